"""Examples of a dataset: problem, images, answer, problem_id, from the files people have.

    examples = load_rows("train.jsonl")  # also .json, .parquet, a folder, a `datasets` folder or hub name
    examples[0]  # {"problem": …, "images": [PIL.Image], "answer": …, "problem_id": …, "extra": {…}}

Images are opened when an example is asked for, within bounds. An example that cannot be used is a `BadExample` that
says which and why: raised, or returned in its place (`bad_examples="return"`), so that a data loader goes on and its
caller counts it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, get_args

import torch

from vigos.data.images import BadImage, ImageLimits, ImageLoader, short
from vigos.data.sources import Head, Records, name_of, open_source
from vigos.method.boxed import fits_in_box
from vigos.system.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image

OnBadExample = Literal["raise", "return"]

# Bounds of an example, checked before anything is parsed. A worked answer has some thousand characters.
MAX_PROBLEM, MAX_ANSWER = 2**18, 2**14  # characters
MAX_IMAGES = 64


class Example(TypedDict):
    """One example of the data. `extra` holds every column that has no field here."""

    problem: str
    images: list[Image]  # RGB
    answer: str
    problem_id: str
    extra: dict[str, Any]
    image_paths: NotRequired[list[str | None]]  # as the data names them; None for images given as bytes


class BadExample(ValueError):
    """An example that cannot be used.

    Attributes:
        example_id: its id, or its number where it has none.
        reason: a slug: "malformed_record", "missing_field", "empty_problem", "empty_answer", "bad_answer",
            "unbalanced_answer", "too_long", "not_text", "image_count", or that of a `BadImage`.
        detail: a sentence for the log.
    """

    def __init__(self, example_id: str, reason: str, detail: str) -> None:
        super().__init__(example_id, reason, detail)  # all three, so that it survives a worker's pickling
        self.example_id, self.reason, self.detail = example_id, reason, detail

    def __str__(self) -> str:
        return printable(
            f"example {self.example_id}: {self.reason}: {self.detail}"
        )  # foreign text in it obeys no terminal


@dataclass(frozen=True)
class _Columns:
    problem: str
    images: str | None  # None: the data has no images
    answer: str
    id: str


@dataclass(frozen=True)
class _Reader:
    """Turn a raw record into an example."""

    columns: _Columns
    images: ImageLoader
    image_placeholder: str | None

    def example_id(self, record: Mapping[str, Any], number: int | str) -> str:
        value = record.get(self.columns.id)
        return str(number if value is None else value)

    def read(self, record: Any, number: int | str) -> Example:
        if not isinstance(record, Mapping):
            raise BadExample(
                str(number), "malformed_record", f"wanted an object with named fields, got {short(record)}"
            )
        example_id, columns = self.example_id(record, number), self.columns
        for name in (columns.problem, columns.answer):
            if name not in record:
                raise BadExample(
                    example_id, "missing_field", f"no field {name!r}; it has {', '.join(map(str, record))}"
                )
        problem = record[columns.problem]
        if not isinstance(problem, str) or not problem.strip():
            raise BadExample(example_id, "empty_problem", f"{columns.problem} must be text, got {short(problem)}")
        _check_text(problem, columns.problem, MAX_PROBLEM, example_id)
        answer = self._answer(record[columns.answer], example_id)
        entries = record.get(columns.images) if columns.images else None
        other = next((name for name in _IMAGE_NAMES if not _is_nothing(record.get(name))), None)
        if columns.images == "images" and "images" not in record and other is not None:
            raise BadExample(example_id, "image_column", f"it has {other!r}; name the column: images_column={other!r}")
        if not isinstance(entries, list | tuple):
            entries = [entries]
        if all(_is_nothing(entry) for entry in entries):
            entries = []
        if len(entries) > MAX_IMAGES:
            raise BadExample(example_id, "image_count", f"{len(entries)} images, more than {MAX_IMAGES}")
        problem = self._without_placeholders(problem, len(entries), example_id)
        try:
            images = [self.images.load(entry) for entry in entries]
        except BadImage as error:
            raise BadExample(example_id, error.reason, error.detail) from error
        used = {columns.problem, columns.images, columns.answer, columns.id}
        extra = {key: value for key, value in record.items() if key not in used}
        paths = [_path_of(entry) for entry in entries]
        return Example(
            problem=problem, images=images, answer=answer, problem_id=example_id, extra=extra, image_paths=paths
        )

    def _answer(self, value: Any, example_id: str) -> str:
        column = self.columns.answer
        if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN: a null in pandas
            raise BadExample(example_id, "empty_answer", f"{column} is {short(value)}")
        if not isinstance(value, str | int | float) or value in (math.inf, -math.inf):
            raise BadExample(example_id, "bad_answer", f"{column} must be text or a number, got {short(value)}")
        answer = str(value).strip()
        _check_text(answer, column, MAX_ANSWER, example_id)
        if not fits_in_box(answer):
            raise BadExample(example_id, "unbalanced_answer", f"the braces of {column} {short(answer)} do not match")
        return answer

    def _without_placeholders(self, problem: str, count: int, example_id: str) -> str:
        mark = self.image_placeholder
        if mark is None or mark not in problem:
            return problem
        if problem.count(mark) > count:
            detail = f"the problem names {problem.count(mark)} images ({mark}), the example has {count}"
            raise BadExample(example_id, "image_count", detail)
        first, *rest = problem.split(mark)  # not by a regular expression: those take time that grows with the square
        parts = [first, *(part.removeprefix("\n").lstrip(" \t") for part in rest)]
        parts = [*(part.removesuffix("\n").rstrip(" \t") for part in parts[:-1]), parts[-1]]
        return " ".join(parts).strip()


def _check_text(text: str, column: str, limit: int, example_id: str) -> None:
    if len(text) > limit:
        raise BadExample(example_id, "too_long", f"{column} has {len(text)} characters, more than {limit}")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadExample(example_id, "not_text", f"{column} {short(text)} holds half a surrogate pair")


def _is_nothing(entry: Any) -> bool:
    """Tell whether an entry says that there is no image: null, NaN (a null in pandas), an empty text or list."""
    if isinstance(entry, float):
        return entry != entry
    return entry is None or entry == [] or (isinstance(entry, str) and not entry.strip())


def _path_of(entry: Any) -> str | None:
    if isinstance(entry, Mapping):
        entry = entry.get("path")
    return str(entry) if isinstance(entry, str | Path) and not str(entry).startswith("data:") else None


# --- Datasets ---------------------------------------------------------------------------------------------------------


class ExampleDataset(torch.utils.data.Dataset[Example | BadExample]):
    """Examples by number. `examples[i]` opens the images of example i and no others."""

    def __init__(self, records: Records, reader: _Reader, bad_examples: OnBadExample) -> None:
        self.records, self.reader, self.bad_examples = records, reader, bad_examples

    @property
    def columns(self) -> list[str]:
        return self.records.columns

    def first(self, count: int) -> ExampleDataset:
        """Return the first `count` examples."""
        return ExampleDataset(Head(self.records, count), self.reader, self.bad_examples)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example | BadExample:
        """Return example `index` (negative: from the end), or with bad_examples="return" the `BadExample` there."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return _read(self.reader, self.records[index % len(self)], index % len(self), self.bad_examples)

    def __iter__(self) -> Iterator[Example | BadExample]:
        return (self[i] for i in range(len(self)))


class ExampleStream(torch.utils.data.IterableDataset[Example | BadExample]):
    """Examples in order, never all at once. The workers of a `DataLoader` share them.

    Attributes:
        repeat: begin again at the end, as training does: a checkpoint in a later pass then knows its place.
    """

    def __init__(
        self, records: Any, columns: list[str], reader: _Reader, bad_examples: OnBadExample, shards: bool
    ) -> None:
        self.records, self.columns, self.reader, self.bad_examples = records, columns, reader, bad_examples
        self.shards = shards  # the source divides itself among workers
        self.limit: int | None = None
        self.repeat = False

    def first(self, count: int) -> ExampleStream:
        """Return the first `count` examples; of a source that divides itself among workers, those of each worker."""
        stream = copy.copy(self)
        stream.limit = count
        return stream

    def __iter__(self) -> Iterator[Example | BadExample]:
        more = True
        while more:
            more = False
            for example in self._pass():
                more = self.repeat
                yield example

    def _pass(self) -> Iterator[Example | BadExample]:
        worker = torch.utils.data.get_worker_info()
        for number, record in enumerate(islice(self.records, self.limit)):
            name: int | str = number
            if worker is not None:
                if self.shards:
                    name = f"{worker.id}-{number}"  # numbers alone would repeat from worker to worker
                elif number % worker.num_workers != worker.id:
                    continue
            yield _read(self.reader, record, name, self.bad_examples)


def _read(reader: _Reader, record: Any, number: int | str, bad_examples: OnBadExample) -> Example | BadExample:
    try:
        if isinstance(record, ValueError):
            raise BadExample(str(number), "malformed_record", f"not JSON: {record}")
        return reader.read(record, number)
    except BadExample as error:
        if bad_examples == "raise":
            raise
        return error


def load_rows(
    source: Any,
    *,
    problem_column: str = "problem",
    images_column: str | None = "images",
    answer_column: str = "answer",
    id_column: str = "problem_id",
    split: str = "train",
    streaming: bool = False,
    data_root: str | Path | None = None,
    allow_outside_root: bool = False,
    limits: ImageLimits = ImageLimits(),  # noqa: B008 (frozen)
    image_placeholder: str | None = "<image>",
    bad_examples: OnBadExample = "raise",
) -> ExampleDataset | ExampleStream:
    """Open a dataset. Nothing is decoded until an example is asked for.

    Args:
        source: a .jsonl, .json or .parquet file; a folder (saved by `datasets`; with `metadata.jsonl` beside the
            images, also under `<split>/`; with `<split>.jsonl`; or with Parquet files); a hub name for
            `datasets.load_dataset`; a `datasets.Dataset` or `IterableDataset` (for hub names with several
            configurations); or a list of dicts.
        images_column: one image or a list of them an example; missing, null, NaN and empty mean none. None: the dataset
            has none. An image is a path, bytes, a base64 `data:` address, `datasets`' Image or a PIL image.
        id_column: where the dataset has no such column, examples are numbered.
        split: for folders and hub names that have several.
        streaming: read in order and return an `ExampleStream` instead of an `ExampleDataset`.
        data_root: folder that image paths are relative to and must stay in; default: the folder of the source.
        allow_outside_root: permit image paths (and links) that lead out of it.
        limits: of every image: pixels, sides, bytes, seconds.
        image_placeholder: mark taken out of problems, since images always come first here; None: leave problems alone.
        bad_examples: "raise" a `BadExample` when such an example is asked for, or "return" it in its place.

    Raises:
        ValueError: an argument out of range, a source that is not there, or columns that it has not.
    """
    if bad_examples not in get_args(OnBadExample):
        raise ValueError(f"bad_examples must be one of {', '.join(get_args(OnBadExample))}, got {bad_examples!r}")
    opened = open_source(source, split, streaming)
    if data_root is not None and not Path(data_root).is_dir():
        raise ValueError(f"data_root must be a folder, got {str(data_root)!r}")
    images = ImageLoader(
        root=opened.root if data_root is None else Path(data_root),
        allow_outside_root=allow_outside_root,
        limits=limits,
    )
    wanted = _match_columns(opened.columns, problem_column, images_column, answer_column, id_column, source)
    reader = _Reader(wanted, images, image_placeholder)
    if streaming:
        return ExampleStream(opened.records, opened.columns, reader, bad_examples, opened.shards)
    return ExampleDataset(opened.records, reader, bad_examples)


def check_usable(rows: ExampleDataset | ExampleStream, probe: int = 64) -> Counter[str]:
    """Read up to `probe` examples (spread over an `ExampleDataset`, the first of a stream) before hours are spent.

    Returns:
        Counts of "ok" and of each reason for which examples were refused.

    Raises:
        ValueError: none of them is usable, or there are none.
    """
    counts: Counter[str] = Counter()
    first: BadExample | None = None
    for row in _probed(rows, probe):
        counts["ok" if not isinstance(row, BadExample) else row.reason] += 1
        first = first or (row if isinstance(row, BadExample) else None)
    if not counts:
        raise ValueError("the dataset has no examples")
    if not counts["ok"]:
        reasons = ", ".join(f"{reason} {n}" for reason, n in counts.most_common() if n)
        raise ValueError(f"none of the {counts.total()} examples read is usable ({reasons}); the first: {first}")
    return counts


def _probed(rows: ExampleDataset | ExampleStream, probe: int) -> Iterator[Example | BadExample]:
    if isinstance(rows, ExampleStream):
        quiet = copy.copy(rows)
        quiet.bad_examples = "return"
        yield from (row for _, row in zip(range(probe), quiet, strict=False))
    else:
        n = min(probe, len(rows))
        for i in range(n):
            index = i * len(rows) // n
            yield _read(rows.reader, rows.records[index], index, "return")


# --- Columns ----------------------------------------------------------------------------------------------------------

# Columns that hold images under another name; a dataset with one of them is not a text-only dataset.
_IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "file_name", "file_names", "image_path", "image_paths")
_NO_IMAGES = "images_column=None (--images-column none) if the examples have no images"


def _match_columns(
    columns: list[str], problem: str, images: str | None, answer: str, example_id: str, source: Any
) -> _Columns:
    if not columns:
        raise ValueError(f"{name_of(source)} has no records with named fields")

    def missing(argument: str, name: str, hint: str = "") -> ValueError:
        near = get_close_matches(name, columns, n=1)
        suggestion = f"; did you mean {argument}={near[0]!r}?" if near else ""
        has = f"{name_of(source)} has {', '.join(columns)}"
        return ValueError(f"{argument} {name!r} is not in the data: {has}{suggestion}{hint}")

    if problem not in columns:
        raise missing("problem_column", problem)
    if answer not in columns:
        raise missing("answer_column", answer)
    if images is not None and images not in columns:
        others = [name for name in columns if name.lower() in _IMAGE_NAMES]
        if images != "images":
            raise missing("images_column", images, f"; {_NO_IMAGES}")
        if len(others) > 1 or (others and others[0] not in ("file_name", "file_names")):
            hint = f"; did you mean images_column={others[0]!r}? {_NO_IMAGES}"
            has = f"{name_of(source)} has {', '.join(columns)}"
            raise ValueError(f"images_column 'images' is not in the data: {has}{hint}")
        images = others[0] if others else images  # `datasets` calls the images of a folder file_name
    if example_id not in columns and example_id != "problem_id":
        raise missing("id_column", example_id)
    # The default names hold also where the first records, from which `columns` are, have no images and no ids.
    return _Columns(problem, images, answer, example_id)
