"""Read published benchmarks as examples that `vigos.evaluate` takes: one reader a layout, files as they are published.

    examples = load_benchmark("vilp", "downloads/ViLP")      # a Parquet, JSON or JSONL file, or a folder of them
    vigos eval --benchmark vilp --data downloads/ViLP …      # the same

A multiple-choice question gets its options under it, lettered, and its answer is a letter. Whatever a benchmark scores
by itself (ViLP's triplets, subjects, question types) is kept in `extra`, as are `options`, `accepted` (further right
answers) and `precision`, which the grader reads.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vigos.data.examples import ExampleDataset, ExampleStream, load_rows

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
READ_THE_IMAGE = "Answer the question in the image."
BY_LETTER = "Answer with the letter of the right option."


@dataclass(frozen=True)
class Benchmark:
    """Describe a layout.

    Attributes:
        name: key in BENCHMARKS.
        needs: columns that every record has.
        read: yields the examples of one record, given its number in the files.
        source: where the data is described.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Record, int], Iterator[dict[str, Any]]]
    source: str


def lettered(question: str, options: Sequence[Any]) -> str:
    """Return the question, its options under it as (A), (B), …, and how to answer."""
    lines = [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), *lines, BY_LETTER])


def letter_of(answer: Any, options: Sequence[Any], *, text_first: bool = False) -> str | None:
    """Return the letter of a published answer; None for a null answer.

    Args:
        answer: a letter, `B` or `(B)`, or the text of an option.
        options: in the order of their letters. They may be letters themselves.
        text_first: the layout gives the option's text, which then goes before a letter.

    Raises:
        ValueError: it is neither.
    """
    if answer is None:
        return None
    shown = str(answer).strip()
    bare = shown.strip("().: ").upper()
    by_letter = bare if len(bare) == 1 and bare in ascii_uppercase[: len(options)] else None
    by_text = next((x for x, o in zip(ascii_uppercase, options, strict=False) if str(o).strip() == shown), None)
    found = (by_text or by_letter) if text_first else (by_letter or by_text)
    if found is None:
        raise ValueError(f"answer must be a letter or one of the options {list(options)}, got {answer!r}")
    return found


def _listed(options: Any) -> list[str]:
    """Return options as texts; MMMU writes the list as text, and some of its options are lists."""
    if isinstance(options, str):
        options = ast.literal_eval(options) if options.strip() else []
    options = list(options) if options is not None else []
    if len(options) == 1 and isinstance(options[0], list | tuple):
        options = list(options[0])
    return [", ".join(map(str, o)) if isinstance(o, list | tuple) else str(o) for o in options]


def _is_empty(image: Any) -> bool:
    return image is None or image == "" or (isinstance(image, dict) and not any(image.values()))


def _row(
    record: Record, example_id: Any, problem: str, answer: Any, images: Sequence[Any], *keep: str, **extra: Any
) -> dict[str, Any]:
    """Return an example; if all of `images` are null it holds an image of nothing: it is skipped, not asked blindly."""
    shown = [image for image in images if not _is_empty(image)] or [{}] * bool(images)
    kept = {name: record[name] for name in keep if record.get(name) is not None}
    answer = None if answer is None else str(answer)
    return {"problem": problem, "images": shown, "answer": answer, "problem_id": str(example_id)} | kept | extra


def _vilp(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read one question and three images with an answer each; the first agrees with the prior."""
    yield from _vilp_triplet(record, n, str(record["question"]), "F")


def _vilp_p(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read ViLP-P: the question alone, without the sentence before it that states the prior."""
    question = str(record["question"])
    yield from _vilp_triplet(record, n, question.partition(". ")[2].strip() or question, "P")


def _vilp_triplet(record: Record, n: int, question: str, variant: str) -> Iterator[dict[str, Any]]:
    for k in (1, 2, 3):
        yield _row(
            record, f"{record.get('id', n)}-{k}", question, record[f"answer{k}"], [record[f"image{k}"]],
            triplet=n, role="prior" if k == 1 else "conflict", variant=variant,
        )  # fmt: skip


def _cv_bench(record: Record, n: int) -> Iterator[dict[str, Any]]:
    options = _listed(record["choices"])
    yield _row(
        record, record.get("idx", n), lettered(record["question"], options), letter_of(record["answer"], options),
        [record["image"]], "type", "task", "source", options=options,
    )  # fmt: skip


def _mmmu(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read MMMU and MMMU-Pro. Open questions may accept several answers; in MMMU-Pro vision the image asks."""
    options, question = _listed(record["options"]), record.get("question")
    images = [record["image"]] if "image" in record else [record.get(f"image_{k}") for k in range(1, 8)]
    keep = ("subfield", "subject", "topic_difficulty", "question_type")
    if options:
        problem = lettered(str(question), options) if question else f"{READ_THE_IMAGE}\n{BY_LETTER}"
        answer = letter_of(record["answer"], options)
        yield _row(record, record["id"], problem, answer, images, *keep, options=options)
        return
    answer = record["answer"]
    answers = _listed(answer) if isinstance(answer, list) or str(answer).startswith("[") else [answer]
    extra = {"accepted": answers[1:]} if len(answers) > 1 else {}
    yield _row(record, record["id"], str(question or READ_THE_IMAGE), answers[0], images, *keep, **extra)


def _math_vista(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read a question whose answer is an option's text, a number with a precision, a list or text."""
    options, precision, unit = _listed(record.get("choices")), record.get("precision"), record.get("unit")
    image = record["decoded_image"] if record.get("decoded_image") is not None else record["image"]
    keep = ("question_type", "answer_type", "precision", "unit")
    problem = str(record["question"]) + (f" (Unit: {unit})" if unit else "")
    if options:
        answer = letter_of(record["answer"], options, text_first=True)
        yield _row(record, record["pid"], lettered(problem, options), answer, [image], *keep, options=options)
        return
    places = int(precision) if precision is not None else 1
    how = {
        "integer": "Answer with an integer.",
        "float": f"Answer with a number with {places} decimal place{'s' * (places != 1)}.",
        "list": "Answer with a list, such as [1, 2, 3].",
    }.get(str(record.get("answer_type")))
    problem = problem if how is None else f"{problem}\n{how}"
    yield _row(record, record["pid"], problem, record["answer"], [image], *keep)


def _math_verse(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read a question with its options in it. The version "Text Only" has no image."""
    problem = str(record["question"] or "").strip() or READ_THE_IMAGE
    text_only = str(record.get("problem_version", "")).casefold().replace("_", " ") == "text only"
    images = [] if text_only and _is_empty(record["image"]) else [record["image"]]
    yield _row(record, record["sample_index"], problem, record["answer"], images, "problem_version", "question_type")


def _real_world_qa(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read a question with its options and how to answer in it."""
    yield _row(record, record.get("id", n), str(record["question"]), record["answer"], [record["image"]])


def _mm_vet(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read free-form answers, of which <OR> separates alternatives; <AND> is meant for a judge, and text here.

    The archive names images by `imagename` in the folder images/; Parquet files hold them in `image`.
    """
    image = record["image"] if "image" in record else f"images/{record['imagename']}"
    answer, extra = record["answer"], {}
    if answer is not None and "<OR>" in str(answer) and "<AND>" not in str(answer):
        extra["accepted"] = [part.strip() for part in str(answer).split("<OR>")]
    yield _row(record, record["question_id"], str(record["question"]), answer, [image], "capability", **extra)


_VILP_COLUMNS = ("question", *(f"{kind}{k}" for k in (1, 2, 3) for kind in ("image", "answer")))
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("vilp", _VILP_COLUMNS, _vilp, "ViLP: Probing Visual Language Priors in VLMs"),
        Benchmark("vilp-p", _VILP_COLUMNS, _vilp_p, "ViLP: Probing Visual Language Priors in VLMs"),
        Benchmark("cv-bench", ("image", "question", "choices", "answer"), _cv_bench, "Cambrian-1, CV-Bench"),
        Benchmark("mmmu", ("id", "question", "options", "answer", "image_1"), _mmmu, "MMMU"),
        Benchmark("mmmu-pro", ("id", "options", "answer"), _mmmu, "MMMU-Pro, standard and vision"),
        Benchmark("mathvista", ("pid", "question", "image", "answer"), _math_vista, "MathVista"),
        Benchmark("mathverse", ("sample_index", "question", "image", "answer"), _math_verse, "MathVerse"),
        Benchmark("realworldqa", ("image", "question", "answer"), _real_world_qa, "RealWorldQA"),
        Benchmark("mm-vet", ("question_id", "question", "answer"), _mm_vet, "MM-Vet"),
    )
}


def load_benchmark(name: str, path: str | Path, *, allow_outside_root: bool = False) -> ExampleDataset | ExampleStream:
    """Open a published benchmark as examples.

    Args:
        name: a key of BENCHMARKS.
        path: a .parquet, .json (a list, or records by id) or .jsonl file, or a folder whose files of one of these
            kinds are read in the order of their names. Image paths are relative to the folder.
        allow_outside_root: as in `load_rows`, whose bounds hold here too.

    A record that cannot be read, or lacks its answer or its image, is a `BadExample`.

    Raises:
        ValueError: an unknown benchmark, a path without data, a column of the layout that the file lacks, or no record
            that can be read.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    benchmark, path = BENCHMARKS[name], Path(path)
    records = list(_records(path))
    if not records:
        raise ValueError(f"data must hold records of {name}, got none in {path}")
    if missing := [column for column in benchmark.needs if column not in records[0]]:
        raise ValueError(
            f"data of {name} ({benchmark.source}) must have the columns {', '.join(benchmark.needs)}; {path} lacks "
            f"{', '.join(missing)}, it has {', '.join(map(str, records[0]))}"
        )
    rows, failure = [], ""
    for n, record in enumerate(records):
        try:
            rows += list(benchmark.read(record, n))
        except (ValueError, KeyError, SyntaxError) as error:
            failure = f"record {n} of {path} is not one of {name}: {error}"
            logger.warning("%s", failure)
            rows.append({"problem": "?", "images": [], "answer": None, "problem_id": f"record {n}"})
    if failure and not any(row["answer"] is not None for row in rows):
        raise ValueError(failure)
    return load_rows(
        rows, data_root=path if path.is_dir() else path.parent, image_placeholder=None,
        allow_outside_root=allow_outside_root,
    )  # fmt: skip


def _records(path: Path) -> Iterator[Record]:
    if not path.exists():
        raise ValueError(f"data must be a file or a folder, got {str(path)!r}, which is not there")
    files = [path]
    if path.is_dir():
        kinds = ([*path.rglob(f"*.{kind}")] for kind in ("parquet", "jsonl", "json"))
        files = sorted(next((found for found in kinds if found), []))
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(file).to_pylist()
        elif file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:  # unlike str.splitlines, these end at line feeds alone
                yield from (json.loads(line) for line in lines if line.strip())
        elif file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict):  # records by id, as MathVista and MM-Vet publish them
                content = [{"pid": key, "question_id": key} | record for key, record in content.items()]
            yield from content
        else:
            raise ValueError(f"data must be .parquet, .json or .jsonl, got {file.name}")
