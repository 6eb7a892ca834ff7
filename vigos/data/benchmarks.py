"""Published benchmarks as rows that `vigos.evaluate` takes: one reader a layout, files as their authors publish them.

    rows = load_benchmark("vilp", "downloads/ViLP")      # a Parquet, JSON or JSONL file, or a folder of them
    vigos eval --benchmark vilp --data downloads/ViLP …  # the same

A multiple-choice question gets its options under it, lettered, and its answer is a letter. What a benchmark scores
apart (ViLP's triplets, subjects, question types) is kept beside the row, in `extra`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vigos.data.examples import ExampleDataset, ExampleStream, load_rows

Record = Mapping[str, Any]
READ_THE_IMAGE = "Answer the question in the image."


@dataclass(frozen=True)
class Benchmark:
    """A layout.

    Attributes:
        needs: columns that every record has.
        read: the rows of one record, which is the n-th of its files.
        source: where the data is described.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Record, int], Iterator[dict[str, Any]]]
    source: str


def lettered(question: str, options: Sequence[Any]) -> str:
    """Return the question, its options under it as (A), (B), …, and how to answer."""
    lines = [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), *lines, "Answer with the letter of the right option."])


def letter_of(answer: Any, options: Sequence[Any]) -> str:
    """Return the letter of an answer that is given as a letter, as "(B)", or as the option itself."""
    text = str(answer).strip()
    bare = text.strip("().: ").upper()
    if len(bare) == 1 and bare in ascii_uppercase[: len(options)] and text not in map(str, options):
        return bare
    for letter, option in zip(ascii_uppercase, options, strict=False):
        if str(option).strip() == text:
            return letter
    raise ValueError(f"answer must be a letter or one of the options {list(options)}, got {answer!r}")


def _listed(options: Any) -> list[Any]:
    """Return options as a list; MMMU writes the list as text."""
    if isinstance(options, str):
        options = ast.literal_eval(options) if options.strip() else []
    return list(options) if options is not None else []


def _row(
    record: Record, row_id: Any, problem: str, answer: Any, images: Sequence[Any], *keep: str, **extra: Any
) -> dict:
    kept = {name: record[name] for name in keep if record.get(name) is not None}
    shown = [image for image in images if image is not None]
    return {"problem": problem, "images": shown, "answer": str(answer), "problem_id": str(row_id)} | kept | extra


def _vilp(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read one question and three images with an answer each; the first agrees with the prior."""
    for k in (1, 2, 3):
        yield _row(
            record, f"{record.get('id', n)}-{k}", str(record["question"]), record[f"answer{k}"], [record[f"image{k}"]],
            triplet=n, role="prior" if k == 1 else "conflict",
        )  # fmt: skip


def _cv_bench(record: Record, n: int) -> Iterator[dict[str, Any]]:
    options = _listed(record["choices"])
    yield _row(
        record, record.get("idx", n), lettered(record["question"], options), letter_of(record["answer"], options),
        [record["image"]], "type", "task", "source",
    )  # fmt: skip


def _mmmu(record: Record, n: int) -> Iterator[dict[str, Any]]:
    options, question = _listed(record["options"]), str(record.get("question") or READ_THE_IMAGE)
    images = [record["image"]] if "image" in record else [record.get(f"image_{k}") for k in range(1, 8)]
    keep = ("subfield", "subject", "topic_difficulty", "question_type")
    if not options:
        yield _row(record, record["id"], question, _first(record["answer"]), images, *keep)
        return
    yield _row(record, record["id"], lettered(question, options), letter_of(record["answer"], options), images, *keep)


def _first(answer: Any) -> str:
    """Return an open answer; several accepted ones are written as a list, and the first is the one asked for."""
    text = str(answer)
    return str(_listed(text)[0]) if text.startswith("[") else text


def _math_vista(record: Record, n: int) -> Iterator[dict[str, Any]]:
    options = _listed(record.get("choices"))
    image = record["decoded_image"] if record.get("decoded_image") is not None else record["image"]
    keep = ("question_type", "answer_type", "precision", "unit")
    problem, answer = str(record["question"]), record["answer"]
    if options:
        problem, answer = lettered(problem, options), letter_of(answer, options)
    yield _row(record, record["pid"], problem, answer, [image], *keep)


def _math_verse(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read an example whose question already holds its options, if any."""
    problem = str(record["question"] or "").strip() or READ_THE_IMAGE
    yield _row(
        record, record["sample_index"], problem, record["answer"], [record["image"]], "problem_version", "question_type"
    )


def _real_world_qa(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read an example whose question already holds its options and how to answer."""
    yield _row(record, record.get("id", n), str(record["question"]), record["answer"], [record["image"]])


def _mm_vet(record: Record, n: int) -> Iterator[dict[str, Any]]:
    """Read a free-form answer with <AND> and <OR>, meant for a judge; matched as text here."""
    images = [record["image"]]
    yield _row(record, record["question_id"], str(record["question"]), record["answer"], images, "capability")


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "vilp", ("question", *(f"{kind}{k}" for k in (1, 2, 3) for kind in ("image", "answer"))), _vilp,
            "ViLP: Probing Visual Language Priors in VLMs",
        ),
        Benchmark("cv-bench", ("image", "question", "choices", "answer"), _cv_bench, "Cambrian-1, CV-Bench"),
        Benchmark("mmmu", ("id", "question", "options", "answer", "image_1"), _mmmu, "MMMU"),
        Benchmark("mmmu-pro", ("id", "options", "answer"), _mmmu, "MMMU-Pro, standard and vision"),
        Benchmark("mathvista", ("pid", "question", "image", "answer"), _math_vista, "MathVista"),
        Benchmark("mathverse", ("sample_index", "question", "image", "answer"), _math_verse, "MathVerse"),
        Benchmark("realworldqa", ("image", "question", "answer"), _real_world_qa, "RealWorldQA"),
        Benchmark("mm-vet", ("question_id", "image", "question", "answer"), _mm_vet, "MM-Vet"),
    )
}  # fmt: skip


def load_benchmark(name: str, path: str | Path, *, allow_outside_root: bool = False) -> ExampleDataset | ExampleStream:
    """Open a published benchmark as examples.

    Args:
        name: a key of BENCHMARKS.
        path: a .parquet, .json (a list, or records by id) or .jsonl file, or a folder whose files of one of these
            kinds are read in the order of their names. Image paths are relative to the folder.
        allow_outside_root: as in `load_rows`, whose bounds hold here too.

    Raises:
        ValueError: an unknown benchmark, a path without data, or a column of the layout that the file lacks.
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
    rows = []
    for n, record in enumerate(records):
        try:
            rows += list(benchmark.read(record, n))
        except (ValueError, KeyError, SyntaxError) as error:
            raise ValueError(f"record {n} of {path} is not one of {name}: {error}") from error
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
            yield from (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        elif file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict):  # records by id, as MathVista and MM-Vet publish them
                content = [{"pid": key, "question_id": key} | record for key, record in content.items()]
            yield from content
        else:
            raise ValueError(f"data must be .parquet, .json or .jsonl, got {file.name}")
