"""scripts/gpu_check.py in its CPU mode: the script itself, its results, its limits."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

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


def new_check(gpu_check: ModuleType, out: Path, machine: dict[str, str] | None = None) -> Any:
    return gpu_check.Check(out, Path(tempfile.mkdtemp(dir=out.parent)), "cpu", time.monotonic() + 60, machine or {})


def rehearse(out: Path, *steps: str) -> dict[str, Any]:
    """Run the script on a CPU; return check.json and, beside it, the rows of each CSV in the archive."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--first", "--steps", *steps, "--out", str(out)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"check.json", "summary.txt", "check.tar.gz"}
    content: dict[str, Any] = json.loads((out / "check.json").read_text())
    assert [step["name"] for step in content["steps"]] == list(steps)
    assert {step["status"] for step in content["steps"]} <= {"passed", "skipped"}
    assert done.stdout.rstrip().splitlines()[-1].strip().startswith(steps[-1]), "the table comes last"
    with tarfile.open(out / "check.tar.gz") as archive:
        for member in archive.getmembers():
            if member.name.endswith(".csv"):
                file = archive.extractfile(member)
                assert file is not None
                content[member.name] = list(csv.DictReader(io.TextIOWrapper(file)))
    return content


@pytest.mark.slow
def test_first_run_on_a_cpu(tmp_path: Path) -> None:
    """The first figures, row kernels, tests and a model: what a GPU's first minutes would bring home, in small."""
    content = rehearse(tmp_path, "first", "rows", "tests", "tree", "sweeps", "memcheck")
    steps = {step["name"]: step for step in content["steps"]}
    assert "skipped" in steps["tests"]["detail"]
    assert content["machine"]["packages"]["torch"]
    first = content["first"]
    assert first["ceilings"]["copy"] > 0
    assert max(first["precision"].values()) < 1e-4
    target = [row for row in first["target"] if row["engine"] == "vigos cpu"]
    assert [row["v"] for row in target] == [1000, 1001, 1600]
    assert all(row["error"] < 1e-3 and row["of_floor"] > 0 for row in target)
    assert first["profile"][0]["share"] > first["profile"][-1]["share"] > 0
    assert first["chunks"].keys() == {"16", "32"}
    assert "x floor" in (tmp_path / "summary.txt").read_text()
    rows = content["rows.csv"]
    assert {"copy", "eager", "vigos reference"} <= {row["engine"] for row in rows}
    assert all(float(row["error"]) < 0.02 for row in rows if row["engine"] != "copy")
    scored = {row["scheme"]: row for row in content["tree.csv"]}
    assert float(scored["tree"]["kl_deviation"]) < 1e-4
    assert float(scored["tree"]["flop_ratio"]) > 2


def test_a_check_in_parts(gpu_check: ModuleType, tmp_path: Path) -> None:
    """What an earlier part has found stays, unless its step ran again or the tree is another one."""

    def part(commit: str, **results: str) -> dict[str, str]:
        check = new_check(gpu_check, tmp_path, {"device": "cpu", "commit": commit})
        check.resume()
        for name, status in results.items():
            (check.work / f"{name}.log").touch()
            check.record(gpu_check.Step(name, status))
        steps = json.loads((tmp_path / "check.json").read_text())["steps"]
        found = {step["name"]: step["status"] for step in steps}
        assert len(found) == len(steps), "a step stands there twice"
        return found

    def kept() -> list[str]:
        with tarfile.open(tmp_path / "check.tar.gz") as archive:
            return sorted(archive.getnames())

    part("a", build="passed", tests="failed")
    assert part("a", tests="passed", memcheck="passed") == dict.fromkeys(("build", "tests", "memcheck"), "passed")
    assert kept() == ["build.log", "memcheck.log", "tests.log"]
    assert part("b", tests="failed") == {"tests": "failed"}
    assert kept() == ["tests.log"]
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
    check = new_check(gpu_check, tmp_path)
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
