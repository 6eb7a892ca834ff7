"""scripts/gpu_check.py in its CPU mode: the script itself, its results, its limits."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts/gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_cpu_mode(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--no-build", "--out", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "check.json").read_text())
    steps = {step["name"]: step for step in content["steps"]}
    assert steps["build"]["status"] == "skipped"
    assert steps["tests"]["status"] == "passed"
    assert "skipped" in steps["tests"]["detail"]
    assert steps["bench-logits_rows"]["status"] == "passed", steps["bench-logits_rows"]["tail"]
    assert content["machine"]["packages"]["torch"]
    with (tmp_path / "logits_rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"copy", "eager", "vigos reference"} <= {row["engine"] for row in rows}
    assert all(float(row["error"]) < 0.02 for row in rows if row["engine"] != "copy")
    assert done.stdout.rstrip().splitlines()[-1].strip().startswith("sanitizer"), "the table comes last"


def test_steps_are_recorded_as_they_end(gpu_check: ModuleType, tmp_path: Path) -> None:
    """A step that fails or hangs is data; one that no longer fits is not started; all are in check.json at once."""
    check = gpu_check.Check(tmp_path, "cpu", time.monotonic() + 60)
    assert check.run("good", [sys.executable, "-c", "print('fine')"], 30)
    assert not check.run("bad", [sys.executable, "-c", "raise SystemExit(3)"], 30)
    assert not check.run("slow", [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 1.5)
    assert not check.run("absent", [str(tmp_path / "nothing")], 5)
    check.deadline = time.monotonic()
    assert not check.run("late", [sys.executable, "-c", "pass"], 30)
    steps = {step["name"]: step for step in json.loads((tmp_path / "check.json").read_text())["steps"]}
    assert {name: step["status"] for name, step in steps.items()} == {
        "good": "passed", "bad": "failed", "slow": "timed out", "absent": "failed", "late": "no time",
    }  # fmt: skip
    assert steps["good"]["tail"] == "fine"
    assert steps["bad"]["detail"] == "exit status 3"
    assert steps["slow"]["tail"] == "begun"
    assert steps["slow"]["seconds"] < 20


def test_without_a_gpu_it_says_so(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "--device cpu" in capsys.readouterr().err
