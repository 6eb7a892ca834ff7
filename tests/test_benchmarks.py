"""Each reader on a small file in the layout that its benchmark has when it is published; then a whole evaluation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vigos.cli import main
from vigos.data.benchmarks import BENCHMARKS, load_benchmark


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(buffer, format="PNG")
    return buffer.getvalue()


def embedded(color: str = "red") -> dict[str, Any]:
    """An image as `datasets` writes it into Parquet."""
    return {"bytes": png(color), "path": f"{color}.png"}


MMMU = {
    "id": "val_Art_1", "question": "Who painted <image 1>?", "options": "['Klee', \"O'Keeffe\"]", "answer": "B",
    "question_type": "multiple-choice", "subfield": "Painting", "topic_difficulty": "Easy", "image_1": embedded(),
    "image_2": embedded("blue"), "image_3": None,
}  # fmt: skip
RECORDS: dict[str, list[dict[str, Any]]] = {
    "vilp": [
        {
            "question": "A cat has four legs. How many legs has the cat?",
            **{f"image{k}": embedded(color) for k, color in ((1, "red"), (2, "green"), (3, "blue"))},
            "answer1": "four", "answer2": "five", "answer3": "three",
        }
    ],
    "cv-bench": [
        {
            "idx": 7, "type": "2D", "task": "Count", "image": embedded(), "question": "How many cups?",
            "source": "COCO", "choices": ["1", "3", "2"], "answer": "(C)",
            "prompt": "How many cups? Select from …", "filename": "a.png",
        }
    ],
    "mmmu": [MMMU, MMMU | {"id": "val_Math_2", "options": "[]", "answer": "['5', '5.0']", "question_type": "open"}],
    "mmmu-pro": [{"id": "test_1", "options": "['x', 'y', 'z']", "answer": "A", "image": embedded(), "subject": "Math"}],
    "mathvista": [
        {
            "pid": "12", "question": "Which bar is taller?", "image": "images/12.jpg", "decoded_image": embedded(),
            "choices": ["left", "right"], "answer": "right", "question_type": "multi_choice", "answer_type": "text",
            "precision": None, "unit": None,
        },
        {
            "pid": "13", "question": "How long is it?", "image": "images/13.jpg", "decoded_image": embedded(),
            "choices": None, "answer": "2.5", "question_type": "free_form", "answer_type": "float", "precision": 1.0,
            "unit": "cm",
        },
    ],
    "mathverse": [
        {
            "sample_index": "1", "problem_index": "1", "problem_version": "Text Dominant", "image": embedded(),
            "question": "Find x. Choices:\nA:1\nB:2", "answer": "B", "question_type": "multi-choice",
        },
        {
            "sample_index": "2", "problem_index": "1", "problem_version": "Vision Only", "image": embedded(),
            "question": "", "answer": "B", "question_type": "multi-choice",
        },
    ],
    "realworldqa": [{"image": embedded(), "question": "Left or right? A. left B. right", "answer": "A"}],
    "mm-vet": [
        {
            "question_id": "v1_0", "image": embedded(), "question": "What is x?", "answer": "-1<AND>-5",
            "image_source": "web", "capability": ["ocr", "math"],
        }
    ],
}  # fmt: skip
# problem_id -> (problem, answer, images, a piece of extra)
WANTED: dict[str, dict[str, tuple[str, str, int, dict[str, Any]]]] = {
    "vilp": {
        f"0-{k}": ("A cat has four legs. How many legs has the cat?", answer, 1, {"role": role, "triplet": 0})
        for k, answer, role in ((1, "four", "prior"), (2, "five", "conflict"), (3, "three", "conflict"))
    },
    "cv-bench": {
        "7": (
            "How many cups?\n(A) 1\n(B) 3\n(C) 2\nAnswer with the letter of the right option.", "C", 1,
            {"task": "Count", "type": "2D"},
        )
    },
    "mmmu": {
        "val_Art_1": (
            "Who painted <image 1>?\n(A) Klee\n(B) O'Keeffe\nAnswer with the letter of the right option.", "B", 2,
            {"subfield": "Painting"},
        ),
        "val_Math_2": ("Who painted <image 1>?", "5", 2, {"question_type": "open"}),
    },
    "mmmu-pro": {
        "test_1": (
            "Answer the question in the image.\n(A) x\n(B) y\n(C) z\nAnswer with the letter of the right option.", "A",
            1, {"subject": "Math"},
        )
    },
    "mathvista": {
        "12": (
            "Which bar is taller?\n(A) left\n(B) right\nAnswer with the letter of the right option.", "B", 1,
            {"question_type": "multi_choice"},
        ),
        "13": ("How long is it?", "2.5", 1, {"unit": "cm", "precision": 1.0}),
    },
    "mathverse": {
        "1": ("Find x. Choices:\nA:1\nB:2", "B", 1, {"problem_version": "Text Dominant"}),
        "2": ("Answer the question in the image.", "B", 1, {"problem_version": "Vision Only"}),
    },
    "realworldqa": {"0": ("Left or right? A. left B. right", "A", 1, {})},
    "mm-vet": {"v1_0": ("What is x?", "-1<AND>-5", 1, {"capability": ["ocr", "math"]})},
}  # fmt: skip


def parquet(folder: Path, records: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    file = folder / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file


@pytest.mark.parametrize("name", BENCHMARKS)
def test_parquet_as_published(name: str, tmp_path: Path) -> None:
    """From the file and from its folder: problems, answers, images and what is kept beside them."""
    file = parquet(tmp_path, RECORDS[name])
    for source in (file, tmp_path):
        rows = {row["problem_id"]: row for row in load_benchmark(name, source)}
        assert list(rows) == list(WANTED[name])
        for row_id, (problem, answer, images, extra) in WANTED[name].items():
            row = rows[row_id]
            assert (row["problem"], row["answer"], len(row["images"])) == (problem, answer, images)
            assert {key: row["extra"][key] for key in extra} == extra
    colors = [row["images"][0].getpixel((3, 3)) for row in load_benchmark(name, file)]
    assert colors == ([(255, 0, 0), (0, 128, 0), (0, 0, 255)] if name == "vilp" else [(255, 0, 0)] * len(colors))


def test_json_beside_a_folder_of_images(tmp_path: Path) -> None:
    """MathVista's and MM-Vet's own archives: records by id, images as paths."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "12.jpg").write_bytes(png())
    record = {k: v for k, v in RECORDS["mathvista"][0].items() if k not in ("pid", "decoded_image")}
    (tmp_path / "testmini.json").write_text(json.dumps({"12": record}))
    (row,) = load_benchmark("mathvista", tmp_path)
    assert (row["problem_id"], row["answer"], row["images"][0].size) == ("12", "B", (32, 32))


CUPS = {"image": "a.png", "question": "How many?", "choices": ["1", "3"], "answer": "(Q)"}


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("vlip", [], r"benchmark must be one of vilp, .*got 'vlip'"),
        ("vilp", [], r"must hold records of vilp, got none"),
        ("vilp", [{"question": "?", "image1": 1}], r"lacks answer1, image2, answer2, image3, answer3, it has question"),
        ("cv-bench", [CUPS], r"record 0 of .* is not one of cv-bench: answer must be a letter or one of"),
    ],
)
def test_another_layout_is_named(name: str, records: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records))
    with pytest.raises(ValueError, match=message):
        load_benchmark(name, file)


def test_eval_of_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, with the built-in model: ViLP's triplets come out as Score and Prior."""
    parquet(tmp_path, RECORDS["vilp"] * 2)
    command = ["eval", "--model", "builtin", "--benchmark", "vilp", "--data", str(tmp_path), "--max-new-tokens", "24"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--output-dir", str(tmp_path / "out")])
    assert not stop.value.code
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rows"], summary["score_rows"], summary["prior_rows"]) == (6, 4, 2)
    again = [*command, "--output-dir", str(tmp_path / "b"), "--baseline", str(tmp_path / "out" / "records.jsonl")]
    with pytest.raises(SystemExit) as stop:
        main(again)
    assert not stop.value.code
    assert "baseline" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*again, "--temperature", "1", "--output-dir", str(tmp_path / "c")])
    assert stop.value.code == 1
    assert "baseline must be asked the same way: sampling" in capsys.readouterr().err
