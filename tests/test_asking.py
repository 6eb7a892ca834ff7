"""A trained model is asked as it was trained: prompts and format are saved with its weights and read back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from vigos.cli import main
from vigos.launch import asking_of
from vigos.method.asking import FILE, Asking
from vigos.method.prompts import Prompts
from vigos.world import checkpoint_path, world_prompts, write_world

OTHER = Asking(Prompts(student="Look.\n{problem} {format}", system=""), "strict", "released")


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return int(stop.value.code or 0)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    OTHER.save(tmp_path)
    assert Asking.load(tmp_path) == OTHER
    assert Asking.load(tmp_path / "none") is None
    assert Asking.load(None) is None
    (tmp_path / FILE).write_text("prompts: {student: 'x', teacher: 'y'}\n")
    with pytest.raises(ValueError, match=f"{tmp_path / FILE} must hold the prompts that the model was trained with"):
        Asking.load(tmp_path)
    (tmp_path / FILE).write_text("[1, 2\n")
    with pytest.raises(ValueError, match=r"must hold the prompts .* line 2: "):
        Asking.load(tmp_path)
    (tmp_path / FILE).write_text("prompts: &a {student: x}\nvalidity: *a\n")
    for load in (Asking.load, lambda folder: Prompts.from_file(folder / FILE)):
        with pytest.raises(ValueError, match=r"line 2: an alias"):
            load(tmp_path)


def test_an_adapter_goes_before_its_model_and_a_file_before_both(tmp_path: Path) -> None:
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
    model, adapter = str(tmp_path / "model"), str(tmp_path / "adapter")
    assert asking_of(model) == Asking()
    assert asking_of("builtin").prompts == asking_of(str(checkpoint_path())).prompts == world_prompts()
    OTHER.save(model)
    assert asking_of(model) == asking_of(model, adapter=adapter) == OTHER
    trained = replace(OTHER, prompts=Prompts(student="{problem}"))
    trained.save(adapter)
    assert asking_of(model, adapter=adapter) == trained
    (tmp_path / "own.yaml").write_text("student: 'My {problem}'\n")
    asked = asking_of(model, str(tmp_path / "own.yaml"), adapter=adapter)
    assert asked == replace(OTHER, prompts=Prompts(student="My {problem}"))


@pytest.mark.slow
def test_an_evaluation_asks_as_the_model_was_trained_and_skips_what_is_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The built-in model in a folder of another name answers under its own prompts alone."""
    data = write_world(tmp_path / "world", "test", n=10)
    lines = data.read_text().splitlines()
    lines.insert(4, json.dumps(json.loads(lines[0]) | {"problem_id": "long", "problem": "word " * 30_000}))
    data.write_text("\n".join(lines) + "\n")
    for name in ("asked", "unasked"):
        shutil.copytree(checkpoint_path(), tmp_path / name)
    Asking(world_prompts()).save(tmp_path / "asked")
    options = ["--data", str(data), "--temperature", "1", "--max-new-tokens", "96", "--dtype", "float32"]
    found = {}
    for name in ("asked", "unasked", "builtin"):
        model = name if name == "builtin" else str(tmp_path / name)
        assert run("eval", "--model", model, *options, "--output-dir", str(tmp_path / f"eval-{name}")) == 0
        found[name] = json.loads((tmp_path / f"eval-{name}" / "summary.json").read_text())
    assert found["asked"] == found["builtin"]
    assert found["asked"]["valid_rate"] > 0.8 > found["unasked"]["valid_rate"], "other words, other answers"
    assert (found["asked"]["examples"], found["asked"]["skipped_reasons"]) == (30, {"prompt_too_long": 1})
    assert " % (" in capsys.readouterr().out

    record = json.loads((tmp_path / "eval-asked" / "records.jsonl").read_text().splitlines()[1])
    first = json.loads(lines[0])
    assert (record["problem"], record["images"]) == (first["problem"], first["images"])

    folders = [str(tmp_path / "eval-unasked"), str(tmp_path / "eval-asked")]
    assert run("compare", *folders) == 1
    assert "they were asked with other prompts. --force shows them" in capsys.readouterr().err
    assert run("compare", *folders, "--force") == 0
    printed = capsys.readouterr()
    assert "warning: the two evaluations do not measure the same thing" in printed.err
    assert "accuracy" in printed.out


def test_compare_says_what_is_not_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def records(name: str, ids: range, correct: int, prediction: str | None = "x", answer: str = "1") -> str:
        settings = {"format": 1, "k": 1, "n": 1, "prompts": "p", "sampling": {}}
        sample = {"text": "", "prediction": prediction, "valid": True, "reason": "", "finished": True, "tokens": 1}
        lines = [{"settings": settings}]
        for i in ids:
            row = {"key": str(i), "problem_id": str(i), "answer": answer, "extra": {}}
            lines.append(row | {"samples": [sample | {"correct": i < correct}]})
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)

    a, b = records("a", range(100), 50), records("b", range(10, 100), 90, None)
    assert run("compare", a, b) == 0
    printed = capsys.readouterr().out
    assert "left out: 10 examples that only a has" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line.split()}
    assert "40 / 0" in rows["accuracy"]
    assert "0 / 90" in rows["unparseable"], "more unparseable answers are worse"
    assert run("compare", a, records("c", range(90, 300), 0)) == 1
    assert "only 10 of 100 examples are in both" in capsys.readouterr().err
    assert run("compare", a, records("d", range(100), 0, answer="2")) == 1
    assert "100 of the 100 examples of the same id have another reference answer" in capsys.readouterr().err
    path = tmp_path / "a" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], "{damaged\n", *lines[6:]]))
    assert run("compare", a, b) == 0
    assert "left out: 1 damaged lines of a" in capsys.readouterr().out
