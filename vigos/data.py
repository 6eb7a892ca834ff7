"""Rows of a dataset: problem, images, answer, problem_id, from the files people have.

    rows = load_rows("train.jsonl")  # also .json, .parquet, a folder, a `datasets` folder or hub name
    rows[0]  # {"problem": …, "images": [PIL.Image], "answer": …, "problem_id": …, "extra": {…}}

Images are opened when a row is asked for, within bounds. A row that cannot be used is a `BadRow` that says which row
and why: raised, or returned in the row's place (`bad_rows="return"`), so that a data loader goes on and its caller
counts it.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import struct
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, get_args

import torch

from vigos.spans import braces_balance

if TYPE_CHECKING:
    from PIL.Image import Image

OnBadRow = Literal["raise", "return"]

# What a photograph or a figure comes in. Formats that run an interpreter (EPS, PDF) or are rare attack surface are not.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "AVIF")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
# Columns that hold images under another name; a dataset with one of them is not a text-only dataset.
_IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "file_name", "file_names", "image_path", "image_paths")


class Row(TypedDict):
    """One row. `extra` holds every column that has no name of its own here."""

    problem: str
    images: list[Image]  # RGB
    answer: str
    problem_id: str
    extra: dict[str, Any]


class BadRow(ValueError):
    """A row that cannot be used.

    Attributes:
        row_id: the row's id, or its number where it has none.
        reason: a slug: "malformed_row", "missing_field", "empty_problem", "empty_answer", "bad_answer",
            "unbalanced_answer", "image_count", "missing_image", "outside_root", "remote_image", "unreadable_image",
            "too_many_pixels", "too_small", "aspect_ratio", "unknown_image".
        detail: a sentence for the log.
    """

    def __init__(self, row_id: str, reason: str, detail: str) -> None:
        super().__init__(row_id, reason, detail)  # all three, so that it survives a worker's pickling
        self.row_id, self.reason, self.detail = row_id, reason, detail

    def __str__(self) -> str:
        return f"row {self.row_id}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be. Sizes are read from the header, before anything is decoded.

    Attributes:
        max_pixels: width x height; larger ones are refused (the processor scales down to far less anyway).
        min_side: in pixels.
        max_aspect: longer side over shorter; Qwen's processors refuse 200 and more.
    """

    max_pixels: int = 2**26
    min_side: int = 8
    max_aspect: float = 199.0


@dataclass(frozen=True)
class _Columns:
    problem: str
    images: str | None
    answer: str
    id: str | None


@dataclass(frozen=True)
class _Reader:
    """Turns a raw record into a row."""

    columns: _Columns
    root: Path | None
    allow_outside_root: bool
    limits: ImageLimits
    image_placeholder: str | None

    def row_id(self, record: Mapping[str, Any], number: int | str) -> str:
        value = record.get(self.columns.id) if self.columns.id else None
        return str(number if value is None else value)

    def read(self, record: Any, number: int | str) -> Row:
        if not isinstance(record, Mapping):
            raise BadRow(str(number), "malformed_row", f"expected an object with named fields, got {_short(record)}")
        row_id, columns = self.row_id(record, number), self.columns
        for name in (columns.problem, columns.answer):
            if name not in record:
                raise BadRow(row_id, "missing_field", f"no field {name!r}; it has {', '.join(map(str, record))}")
        problem = record[columns.problem]
        if not isinstance(problem, str) or not problem.strip():
            raise BadRow(row_id, "empty_problem", f"{columns.problem} must be text, got {_short(problem)}")
        answer = self._answer(record[columns.answer], row_id)
        entries = record.get(columns.images) if columns.images else None
        if entries is None:
            entries = []
        elif not isinstance(entries, list | tuple):
            entries = [entries]
        problem = self._without_placeholders(problem, len(entries), row_id)
        images = [self._image(entry, row_id) for entry in entries]
        used = {columns.problem, columns.images, columns.answer, columns.id}
        extra = {key: value for key, value in record.items() if key not in used}
        return Row(problem=problem, images=images, answer=answer, problem_id=row_id, extra=extra)

    def _answer(self, value: Any, row_id: str) -> str:
        column = self.columns.answer
        if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN: a null in pandas
            raise BadRow(row_id, "empty_answer", f"{column} is {_short(value)}")
        if not isinstance(value, str | int | float):
            raise BadRow(row_id, "bad_answer", f"{column} must be text or a number, got {_short(value)}")
        answer = str(value).strip()
        if not braces_balance(answer):
            raise BadRow(row_id, "unbalanced_answer", f"the braces of {column} {_short(answer)} do not match")
        return answer

    def _without_placeholders(self, problem: str, count: int, row_id: str) -> str:
        mark = self.image_placeholder
        if mark is None or mark not in problem:
            return problem
        if problem.count(mark) > count:
            detail = f"the problem names {problem.count(mark)} images ({mark}), the row has {count}"
            raise BadRow(row_id, "image_count", detail)
        return re.sub(rf"[ \t]*\n?{re.escape(mark)}\n?[ \t]*", " ", problem).strip()

    def _image(self, entry: Any, row_id: str) -> Image:
        from PIL import Image as PILImage

        if isinstance(entry, PILImage.Image):
            return _to_rgb(_checked(entry, self.limits, row_id, "an image object"), row_id, "an image object")
        if isinstance(entry, Mapping):  # the Image feature of `datasets`, not decoded
            entry = entry["bytes"] if entry.get("bytes") is not None else entry.get("path")
        if isinstance(entry, bytes | bytearray | memoryview):
            return _decode(io.BytesIO(entry), self.limits, row_id, f"{len(entry)} bytes")
        if isinstance(entry, str | Path):
            text = str(entry)
            if text.startswith("data:"):
                return _decode(io.BytesIO(_data_uri(text, row_id)), self.limits, row_id, "a data: image")
            if "://" in text:
                detail = f"{_short(text)} is an address; download the images first, nothing is fetched while training"
                raise BadRow(row_id, "remote_image", detail)
            return _decode(self._path(text, row_id), self.limits, row_id, text)
        raise BadRow(row_id, "unknown_image", f"an image must be a path, bytes or an image, got {_short(entry)}")

    def _path(self, text: str, row_id: str) -> Path:
        if self.root is None and not self.allow_outside_root:
            raise BadRow(row_id, "outside_root", f"image path {text!r} needs data_root: these rows come from no folder")
        try:
            path = (Path(text) if self.root is None else self.root / text).resolve()
            inside = self.root is not None and path.is_relative_to(self.root.resolve())
            if not inside and not self.allow_outside_root:
                detail = f"image path {text!r} leads out of {self.root}; allow_outside_root=True permits that"
                raise BadRow(row_id, "outside_root", detail)
            if not path.is_file():
                raise BadRow(row_id, "missing_image", f"no such file: {path}")
        except OSError as error:  # a name too long, a link to itself, a folder that may not be read
            raise BadRow(row_id, "missing_image", f"{_short(text)}: {error}") from error
        except ValueError as error:
            if isinstance(error, BadRow):
                raise
            raise BadRow(row_id, "missing_image", f"{_short(text)}: {error}") from error  # a null byte
        return path


# --- Images -----------------------------------------------------------------------------------------------------------

# What Pillow's decoders raise on damaged files, besides OSError (truncated) and its own subclasses of it.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


def _decode(source: Path | io.BytesIO, limits: ImageLimits, row_id: str, name: str) -> Image:
    from PIL import Image as PILImage

    PILImage.init()
    try:
        image = PILImage.open(source, formats=[f for f in _FORMATS if f in PILImage.OPEN])
    except PILImage.DecompressionBombError as error:  # Pillow's own limit, which max_pixels cannot lift
        raise BadRow(row_id, "too_many_pixels", f"{name}: {error}") from error
    except _DECODER_ERRORS as error:
        raise BadRow(row_id, "unreadable_image", f"{name}: {error}") from error
    with image:
        return _to_rgb(_checked(image, limits, row_id, name), row_id, name)


def _checked(image: Image, limits: ImageLimits, row_id: str, name: str) -> Image:
    width, height = image.size
    if width * height > limits.max_pixels:
        detail = f"{name} has {width} x {height} pixels, more than max_pixels = {limits.max_pixels}"
        raise BadRow(row_id, "too_many_pixels", detail)
    if min(width, height) < limits.min_side:
        raise BadRow(row_id, "too_small", f"{name} has {width} x {height} pixels, min_side is {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        detail = f"{name} has {width} x {height} pixels, sides further apart than max_aspect = {limits.max_aspect}"
        raise BadRow(row_id, "aspect_ratio", detail)
    return image


def _to_rgb(image: Image, row_id: str, name: str) -> Image:
    """Decodes; turns as the camera was held; puts transparent pixels on white, 16-bit grey on 8 bits."""
    from PIL import Image as PILImage
    from PIL import ImageOps

    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = PILImage.new("RGBA", image.size, "white")
            return PILImage.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except _DECODER_ERRORS as error:
        raise BadRow(row_id, "unreadable_image", f"{name}: {error}") from error


def _data_uri(text: str, row_id: str) -> bytes:
    head, comma, payload = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadRow(row_id, "unreadable_image", f"only base64 data: images are read, got {_short(head)}")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise BadRow(row_id, "unreadable_image", f"a data: image: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…" + text[-1]


# --- Sources: where raw records come from -----------------------------------------------------------------------------


class _Records(Protocol):
    """Raw records by number."""

    columns: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class _Lines:
    """A JSONL file read line by line at remembered offsets: its size does not matter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets, position = array("q"), 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    self.offsets.append(position)
                position += len(line)
        self.columns = _columns_of(_json_object(line) for _, line in zip(range(100), _stripped(path), strict=False))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return _json_object(file.readline())


class _Listed:
    """Records that are in memory already."""

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = records
        self.columns = _columns_of(records[:100])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


class _HubTable:
    """A `datasets.Dataset` read as Arrow: its Image features stay bytes or paths, and decoding is bounded here."""

    def __init__(self, table: Any) -> None:
        self.table, self.columns = table.with_format("arrow"), list(table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[index].to_pylist()[0]


def _stripped(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.strip())


def _json_object(line: bytes) -> Any:
    """The parsed line, or its error in its place: one bad line costs one row."""
    try:
        return json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        return error


def _columns_of(records: Any) -> list[str]:
    """Names in order of appearance; the first record need not have them all."""
    return list(dict.fromkeys(name for record in records if isinstance(record, Mapping) for name in record))


# --- Datasets ---------------------------------------------------------------------------------------------------------


class RowDataset(torch.utils.data.Dataset[Row]):
    """Rows by number. `rows[i]` opens the images of row i and no others."""

    def __init__(self, records: _Records, reader: _Reader, bad_rows: OnBadRow) -> None:
        self.records, self.reader, self.bad_rows = records, reader, bad_rows

    @property
    def columns(self) -> list[str]:
        return self.records.columns

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Row:
        """Row `index` (negative: from the end); with bad_rows="return" the `BadRow` itself if it cannot be used."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return _read(self.reader, self.records[index % len(self)], index % len(self), self.bad_rows)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


class RowStream(torch.utils.data.IterableDataset[Row]):
    """Rows in order, never all at once. The workers of a `DataLoader` share the rows between them."""

    def __init__(self, records: Any, columns: list[str], reader: _Reader, bad_rows: OnBadRow, shards: bool) -> None:
        self.records, self.columns, self.reader, self.bad_rows = records, columns, reader, bad_rows
        self.shards = shards  # the source divides itself among workers

    def __iter__(self) -> Iterator[Row]:
        worker = torch.utils.data.get_worker_info()
        for number, record in enumerate(self.records):
            name: int | str = number
            if worker is not None:
                if self.shards:
                    name = f"{worker.id}-{number}"  # numbers alone would repeat from worker to worker
                elif number % worker.num_workers != worker.id:
                    continue
            yield _read(self.reader, record, name, self.bad_rows)


def _read(reader: _Reader, record: Any, number: int | str, bad_rows: OnBadRow) -> Row:
    try:
        if isinstance(record, ValueError):
            raise BadRow(str(number), "malformed_row", f"not JSON: {record}")
        return reader.read(record, number)
    except BadRow as error:
        if bad_rows == "raise":
            raise
        return error  # type: ignore[return-value]


class _LineStream:
    """The lines of a JSONL file from the start, each time it is iterated."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Any]:
        return map(_json_object, _stripped(self.path))


def load_rows(
    source: Any,
    *,
    problem_column: str = "problem",
    images_column: str | None = "images",
    answer_column: str = "answer",
    id_column: str = "problem_id",
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    data_root: str | Path | None = None,
    allow_outside_root: bool = False,
    max_pixels: int = ImageLimits.max_pixels,
    min_side: int = ImageLimits.min_side,
    image_placeholder: str | None = "<image>",
    bad_rows: OnBadRow = "raise",
) -> RowDataset | RowStream:
    """Opens a dataset. Nothing is decoded until a row is asked for.

    Args:
        source: a .jsonl, .json or .parquet file; a folder (saved by `datasets`; with `metadata.jsonl` beside the
            images, also under `<split>/`; with `<split>.jsonl`; or with Parquet files); a hub name for
            `datasets.load_dataset`; a `datasets.Dataset` or `IterableDataset`; or a list of dicts.
        images_column: one image or a list of them a row; missing, null and empty mean a row without images. None: the
            dataset has none. An image is a path, bytes, a base64 `data:` address, `datasets`' Image or a PIL image.
        id_column: where the dataset has no such column, rows are numbered.
        split: for folders and hub names that have several.
        config_name: for hub names that have several configurations.
        streaming: read in order and give a `RowStream` instead of a `RowDataset`.
        data_root: folder that image paths are relative to and must stay in; default: the folder of the source.
        allow_outside_root: permit image paths (and links) that lead out of it.
        max_pixels, min_side: see `ImageLimits`.
        image_placeholder: mark taken out of problems, since images always come first here; None: leave problems alone.
        bad_rows: "raise" a `BadRow` when such a row is asked for, or "return" it in the row's place.
    """
    if bad_rows not in get_args(OnBadRow):
        raise ValueError(f"bad_rows must be one of {', '.join(get_args(OnBadRow))}, got {bad_rows!r}")
    limits = ImageLimits(max_pixels, min_side)
    for name, value in (("max_pixels", max_pixels), ("min_side", min_side)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    records, columns, root, own_shards = _open(source, split, config_name, streaming)
    root = root if data_root is None else Path(data_root)
    if data_root is not None and not Path(data_root).is_dir():
        raise ValueError(f"data_root must be a folder, got {str(data_root)!r}")
    wanted = _match_columns(columns, problem_column, images_column, answer_column, id_column, source)
    reader = _Reader(wanted, root, allow_outside_root, limits, image_placeholder)
    if streaming:
        return RowStream(records, columns, reader, bad_rows, own_shards)
    return RowDataset(records, reader, bad_rows)


def check_usable(rows: RowDataset | RowStream, probe: int = 64) -> Counter[str]:
    """Reads up to `probe` rows (spread over a `RowDataset`, the first ones of a `RowStream`) before hours are spent.

    Returns:
        how many of them are "ok", and how many were refused for which reason.

    Raises:
        ValueError: none of them is usable, or there are none.
    """
    counts: Counter[str] = Counter()
    first: BadRow | None = None
    for row in _probed(rows, probe):
        counts["ok" if not isinstance(row, BadRow) else row.reason] += 1
        first = first or (row if isinstance(row, BadRow) else None)
    if not counts:
        raise ValueError("the dataset has no rows")
    if not counts["ok"]:
        reasons = ", ".join(f"{reason} {n}" for reason, n in counts.most_common() if n)
        raise ValueError(f"none of the {counts.total()} rows read is usable ({reasons}); the first: {first}")
    return counts


def _probed(rows: RowDataset | RowStream, probe: int) -> Iterator[Row | BadRow]:
    if isinstance(rows, RowStream):
        quiet = RowStream(rows.records, rows.columns, rows.reader, "return", rows.shards)
        yield from (row for _, row in zip(range(probe), quiet, strict=False))
    else:
        n = min(probe, len(rows))
        for i in range(n):
            index = i * len(rows) // n
            yield _read(rows.reader, rows.records[index], index, "return")


# --- Finding things ---------------------------------------------------------------------------------------------------


def _match_columns(
    columns: list[str], problem: str, images: str | None, answer: str, row_id: str, source: Any
) -> _Columns:
    if not columns:
        raise ValueError(f"{_name(source)} has no rows with named fields")

    def missing(argument: str, name: str, hint: str = "") -> ValueError:
        near = get_close_matches(name, columns, n=1)
        suggestion = f"; did you mean {argument}={near[0]!r}?" if near else ""
        has = f"{_name(source)} has {', '.join(columns)}"
        return ValueError(f"{argument} {name!r} is not in the data: {has}{suggestion}{hint}")

    if problem not in columns:
        raise missing("problem_column", problem)
    if answer not in columns:
        raise missing("answer_column", answer)
    if images is not None and images not in columns:
        others = [name for name in columns if name.lower() in _IMAGE_NAMES]
        if images != "images":
            raise missing("images_column", images, "; images_column=None if the rows have no images")
        if len(others) > 1 or (others and others[0] not in ("file_name", "file_names")):
            hint = f"; did you mean images_column={others[0]!r}? images_column=None if the rows have no images"
            has = f"{_name(source)} has {', '.join(columns)}"
            raise ValueError(f"images_column 'images' is not in the data: {has}{hint}")
        images = others[0] if others else None  # `datasets` calls the images of a folder file_name; else text only
    found_id: str | None = row_id
    if row_id not in columns:
        if row_id != "problem_id":
            raise missing("id_column", row_id)
        found_id = None
    return _Columns(problem, images, answer, found_id)


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"


def _open(
    source: Any, split: str, config_name: str | None, streaming: bool
) -> tuple[Any, list[str], Path | None, bool]:
    """(records, columns, folder that paths are relative to, whether a stream divides itself among workers)."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return _open_folder(path, split, streaming)
        if path.is_file():
            return _open_file(path, streaming)
        name = str(source)
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+|\w[\w-]*", name) and path.suffix.lower() not in _SUFFIXES:
            return _open_hub(name, split, config_name, streaming)
        raise ValueError(f"source must be a file, a folder or the name of a dataset; there is no {name!r}")
    if isinstance(source, Sequence):
        listed = _Listed(source)
        return listed, listed.columns, None, False
    if type(source).__module__.split(".")[0] == "datasets":
        return _open_table(source, split, None, streaming)
    raise ValueError(
        "source must be a path, the name of a dataset, a datasets.Dataset or a list of dicts, "
        f"got {type(source).__name__}"
    )


def _open_file(path: Path, streaming: bool) -> tuple[Any, list[str], Path | None, bool]:
    kind = path.suffix.lower()
    if kind in _SUFFIXES[:2]:
        if streaming:
            columns = _columns_of(_json_object(line) for _, line in zip(range(100), _stripped(path), strict=False))
            return _LineStream(path), columns, path.parent, False
        lines = _Lines(path)
        return lines, lines.columns, path.parent, False
    if kind == ".json":
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path} is not one JSON document ({error}); one object a line belongs in .jsonl"
            ) from error
        if isinstance(content, dict):  # {"data": [...]}
            lists = [value for value in content.values() if isinstance(value, list)]
            content = lists[0] if len(lists) == 1 else content
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of objects, got {type(content).__name__}")
        listed = _Listed(content)
        return listed, listed.columns, path.parent, False
    if kind == ".parquet":
        return _open_parquet([path], path.parent, streaming)
    raise ValueError(f"source must end in .jsonl, .json or .parquet or be a folder, got {path}")


def _open_folder(path: Path, split: str, streaming: bool) -> tuple[Any, list[str], Path | None, bool]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        return _open_table(load_from_disk(str(path)), split, path, streaming)
    for name in (f"{split}/metadata.jsonl", "metadata.jsonl", f"{split}.jsonl", f"{split}.json"):
        if (path / name).is_file():
            return _open_file(path / name, streaming)
    for folder, pattern in ((path, f"{split}*.parquet"), (path / "data", f"{split}*.parquet"), (path, "*.parquet")):
        files = sorted(folder.glob(pattern))
        if files:
            return _open_parquet(files, path, streaming)
    raise ValueError(
        f"{path} holds no dataset: wanted metadata.jsonl, {split}.jsonl, Parquet files or a folder that `datasets` "
        f"saved, found {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}"
    )


def _open_parquet(files: list[Path], root: Path, streaming: bool) -> tuple[Any, list[str], Path | None, bool]:
    from datasets import load_dataset

    table = load_dataset("parquet", data_files=[str(f) for f in files], split="train", streaming=streaming)
    return _open_table(table, "train", root, streaming)


def _open_hub(
    name: str, split: str, config_name: str | None, streaming: bool
) -> tuple[Any, list[str], Path | None, bool]:
    from datasets import load_dataset

    try:
        table = load_dataset(name, config_name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no file or folder {name!r}, and as a dataset on the hub: {error}") from error
    return _open_table(table, split, None, streaming)


def _open_table(table: Any, split: str, root: Path | None, streaming: bool) -> tuple[Any, list[str], Path | None, bool]:
    from datasets import Dataset

    if isinstance(table, dict):  # DatasetDict
        if split not in table:
            raise ValueError(f"split must be one of {', '.join(table)}, got {split!r}")
        table = table[split]
    if isinstance(table, Dataset):
        records = _HubTable(table)
        return records, records.columns, root, False
    if not streaming:
        raise ValueError("source is a stream of `datasets`: pass streaming=True")
    table = table.decode(False)
    columns = table.column_names or _columns_of(record for _, record in zip(range(1), table, strict=False))
    return table, columns, root, True
