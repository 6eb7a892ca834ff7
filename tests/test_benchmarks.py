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
from vigos.data.examples import BadExample
from vigos.eval.grading import grade, hints


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
RECORDS["vilp-p"] = RECORDS["vilp"]
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
        "val_Math_2": ("Who painted <image 1>?", "5", 2, {"question_type": "open", "accepted": ["5.0"]}),
    },
    "mmmu-pro": {
        "test_1": (
            "Answer the question in the image.\nAnswer with the letter of the right option.", "A", 1,
            {"subject": "Math", "options": ["x", "y", "z"]},
        )
    },
    "mathvista": {
        "12": (
            "Which bar is taller?\n(A) left\n(B) right\nAnswer with the letter of the right option.", "B", 1,
            {"question_type": "multi_choice"},
        ),
        "13": (
            "How long is it? (Unit: cm)\nAnswer with a number with 1 decimal place.", "2.5", 1,
            {"unit": "cm", "precision": 1.0},
        ),
    },
    "mathverse": {
        "1": ("Find x. Choices:\nA:1\nB:2", "B", 1, {"problem_version": "Text Dominant"}),
        "2": ("Answer the question in the image.", "B", 1, {"problem_version": "Vision Only"}),
    },
    "realworldqa": {"0": ("Left or right? A. left B. right", "A", 1, {})},
    "mm-vet": {"v1_0": ("What is x?", "-1<AND>-5", 1, {"capability": ["ocr", "math"]})},
}  # fmt: skip
WANTED["vilp-p"] = {
    key: ("How many legs has the cat?", answer, images, extra | {"variant": "P"})
    for key, (_, answer, images, extra) in WANTED["vilp"].items()
}


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
        for example_id, (problem, answer, images, extra) in WANTED[name].items():
            row = rows[example_id]
            assert (row["problem"], row["answer"], len(row["images"])) == (problem, answer, images)
            assert {key: row["extra"][key] for key in extra} == extra
    colors = [row["images"][0].getpixel((3, 3)) for row in load_benchmark(name, file)]
    assert colors == (
        [(255, 0, 0), (0, 128, 0), (0, 0, 255)] if name.startswith("vilp") else [(255, 0, 0)] * len(colors)
    )


def test_json_beside_a_folder_of_images(tmp_path: Path) -> None:
    """MathVista's and MM-Vet's own archives: records by id, images as paths."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "12.jpg").write_bytes(png())
    record = {k: v for k, v in RECORDS["mathvista"][0].items() if k not in ("pid", "decoded_image")}
    (tmp_path / "testmini.json").write_text(json.dumps({"12": record}))
    (row,) = load_benchmark("mathvista", tmp_path)
    assert (row["problem_id"], row["answer"], row["images"][0].size) == ("12", "B", (32, 32))


def rows_of(name: str, folder: Path, *records: dict[str, Any]) -> list[Any]:
    """The examples of JSONL records; those that cannot be used as `BadExample`."""
    (folder / "red.png").write_bytes(png())
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    found: Any = load_benchmark(name, file)
    found.bad_examples = "return"
    return list(found)


def test_mm_vet_as_its_archive(tmp_path: Path) -> None:
    """mm-vet.json, records by id with `imagename`, beside the folder images/."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "v1_1.png").write_bytes(png())
    record = {"imagename": "v1_1.png", "question": "What is d?", "answer": "1.25 <OR> 5/4", "imagesource": "web",
              "capability": ["ocr", "math"]}  # fmt: skip
    (tmp_path / "mm-vet.json").write_text(json.dumps({"v1_1": record}))
    (row,) = load_benchmark("mm-vet", tmp_path)
    assert (row["problem_id"], row["problem"], row["images"][0].size) == ("v1_1", "What is d?", (32, 32))
    assert row["extra"]["accepted"] == ["1.25", "5/4"]
    asked = hints(row["problem"], row["extra"])
    assert [grade(said, row["answer"], **asked) for said in ("1.25", "\\frac{5}{4}", "1.5")] == [True, True, False]


def test_mmmu_pro_options_that_are_letters_or_lists(tmp_path: Path) -> None:
    image = {"image_1": "red.png", "question": "Which?"}
    letters, nested, listed, broken = rows_of(
        "mmmu-pro", tmp_path,
        image | {"id": "1", "options": "['C', 'A', 'B']", "answer": "A"},
        image | {"id": "2", "options": "[['1, 2', '3, 4', '5, 6']]", "answer": "C"},
        image | {"id": "3", "options": "[['1', '2'], ['3', '4']]", "answer": "B"},
        image | {"id": "4", "options": "['x'", "answer": "A"},
    )  # fmt: skip
    assert (letters["answer"], letters["extra"]["options"]) == ("A", ["C", "A", "B"])
    assert (nested["answer"], nested["extra"]["options"]) == ("C", ["1, 2", "3, 4", "5, 6"])
    assert (listed["answer"], listed["extra"]["options"]) == ("B", ["1, 2", "3, 4"])
    assert isinstance(broken, BadExample)  # one record does not refuse the file


def test_mmmu_takes_every_accepted_answer(tmp_path: Path) -> None:
    (row,) = rows_of("mmmu", tmp_path, {"id": "1", "question": "How much?", "options": "[]", "answer": "['$6', 'six']",
                                        "image_1": "red.png"})  # fmt: skip
    asked = hints(row["problem"], row["extra"])
    assert [grade(said, row["answer"], **asked) for said in ("6", "six", "7")] == [True, True, False]


def test_mathvista_answers_by_text_and_to_a_precision(tmp_path: Path) -> None:
    record = {"pid": "1", "question": "Which?", "image": "red.png", "choices": ["B", "A"], "answer": "A",
              "question_type": "multi_choice", "answer_type": "text", "precision": None, "unit": None}  # fmt: skip
    free = record | {"choices": None, "question_type": "free_form"}
    choice, number, integer, several = rows_of(
        "mathvista", tmp_path, record,
        free | {"pid": "2", "answer": "0.21", "answer_type": "float", "precision": 2.0},
        free | {"pid": "3", "answer": "7", "answer_type": "integer"},
        free | {"pid": "4", "answer": "[2007, 2008]", "answer_type": "list"},
    )  # fmt: skip
    assert choice["answer"] == "B"  # the option "A" is the second
    assert number["problem"].endswith("Answer with a number with 2 decimal places.")
    assert integer["problem"].endswith("Answer with an integer.")
    assert several["problem"].endswith("Answer with a list, such as [1, 2, 3].")
    asked = hints(number["problem"], number["extra"])
    assert [grade(said, number["answer"], **asked) for said in ("0.2134", "0.22", "0.2")] == [True, False, False]


def test_mathverse_text_only_has_no_image(tmp_path: Path) -> None:
    record = {"sample_index": "1", "question": "Find x.", "answer": "4", "question_type": "free-form"}
    text, blind = rows_of(
        "mathverse", tmp_path,
        record | {"problem_version": "Text Only", "image": ""},
        record | {"problem_version": "Vision Only", "image": ""},
    )  # fmt: skip
    assert (text["images"], text["answer"]) == ([], "4")
    assert isinstance(blind, BadExample)  # its image is missing: not asked without one


def test_nulls_are_skipped_and_unicode_line_ends_are_text(tmp_path: Path) -> None:
    record = {"image": "red.png", "question": "Left or\u2028right?", "answer": "left"}
    good, no_answer, no_image = rows_of(
        "realworldqa", tmp_path, record, record | {"answer": None}, record | {"image": None}
    )
    assert good["problem"] == "Left or\u2028right?"
    assert isinstance(no_answer, BadExample)
    assert isinstance(no_image, BadExample)
    file = tmp_path / "raw.jsonl"  # as other programs write it: not escaped
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(load_benchmark("realworldqa", file)) == 1


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
    assert (summary["examples"], summary["score_examples"], summary["prior_examples"]) == (6, 4, 2)
    again = [*command, "--output-dir", str(tmp_path / "b"), "--baseline", str(tmp_path / "out" / "records.jsonl")]
    with pytest.raises(SystemExit) as stop:
        main(again)
    assert not stop.value.code
    assert "baseline" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*again, "--temperature", "1", "--output-dir", str(tmp_path / "c")])
    assert stop.value.code == 1
    assert "they were asked with other sampling" in capsys.readouterr().err
