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
import torch

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


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_cpu_mode(tmp_path: Path) -> None:
    """Every step that a CPU can take, benchmarks included."""
    steps = ["--steps", "tests", "benchmarks", "sanitizer"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", *steps, "--out", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "check.json").read_text())
    found = {step["name"]: step["status"] for step in content["steps"]}
    benches = ("logits_rows", "divergence", "prefix_tree_2m", "train_step_2m")
    assert found == {"tests": "passed", "sanitizer": "skipped"} | {f"bench-{name}": "passed" for name in benches}
    assert "skipped" in content["steps"][0]["detail"]
    assert content["machine"]["packages"]["torch"]
    assert done.stdout.rstrip().splitlines()[-1].strip().startswith("sanitizer"), "the table comes last"

    rows = table(tmp_path / "logits_rows.csv")
    assert {"copy", "eager", "vigos reference"} <= {row["engine"] for row in rows}
    assert all(float(row["error"]) < 0.02 for row in rows if row["engine"] != "copy")
    rows = table(tmp_path / "divergence.csv")
    assert {"floor", "vigos cpu", "vigos reference", "PyTorch"} <= {row["engine"] for row in rows}
    assert all(float(row["error"]) < 1e-3 and float(row["ms"]) > 0 for row in rows if row["engine"] != "floor")
    scored = {row["scheme"]: row for row in table(tmp_path / "prefix_tree_2m.csv")}
    assert float(scored["tree"]["kl_deviation"]) < 1e-4
    assert float(scored["tree"]["flop_ratio"]) > 2
    losses = [float(row["loss"]) for row in table(tmp_path / "train_step_2m.csv")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_check_in_parts(gpu_check: ModuleType, tmp_path: Path) -> None:
    """What an earlier part has found stays, unless its step ran again or the tree is another one."""

    def part(commit: str, **results: str) -> dict[str, str]:
        check = gpu_check.Check(tmp_path, "cpu", time.monotonic() + 60, {"device": "cpu", "commit": commit})
        check.resume()
        for name, status in results.items():
            check.record(gpu_check.Step(name, status))
        steps = json.loads((tmp_path / "check.json").read_text())["steps"]
        found = {step["name"]: step["status"] for step in steps}
        assert len(found) == len(steps), "a step stands there twice"
        return found

    part("a", build="passed", tests="failed")
    assert part("a", tests="passed", sanitizer="passed") == dict.fromkeys(("build", "tests", "sanitizer"), "passed")
    assert part("b", tests="failed") == {"tests": "failed"}
    (tmp_path / "check.json").write_text("{")
    assert part("b", build="passed") == {"build": "passed"}


def test_a_contender_that_fails_leaves_the_others_their_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from measure import checked

    exact, failed = torch.ones(3), list[str]()

    def breaks(error: Exception) -> torch.Tensor:
        raise error

    assert checked("right", lambda: exact * 1.001, exact, 0.01, failed) == pytest.approx(0.001, rel=0.01)
    assert checked("a peer", lambda: exact * 2, exact, None, failed) == pytest.approx(1.0)
    assert checked("not here", lambda: breaks(ImportError("no such module")), exact, 0.01, failed) is None
    assert checked("too large", lambda: breaks(torch.OutOfMemoryError("no room")), exact, 0.01, failed) is None
    assert not failed
    assert checked("wrong", lambda: exact * 1.02, exact, 0.01, failed) is None
    assert checked("nan", lambda: exact * float("nan"), exact, 0.01, failed) is None
    assert checked("broken", lambda: breaks(RuntimeError("no kernel image\nmore")), exact, 0.01, failed) is None
    assert [line.split(":")[0] for line in failed] == ["wrong", "nan", "broken"]
    assert failed[2] == "broken: RuntimeError: no kernel image"
    assert "not here: no such module" in capsys.readouterr().out


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


def test_without_a_gpu_it_says_so(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "--device cpu" in capsys.readouterr().err
