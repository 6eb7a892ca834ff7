"""The demo in small: every phase runs, what it promises is written, and it says the same twice."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from vigos.report.page import _facts, load_run
from vigos.study import demo


@pytest.mark.slow
def test_demo_writes_what_it_promises_and_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "QUICK", demo.DemoSize(steps=3, examples_a_step=8, triplets=6))
    first, second = (demo.run_demo(tmp_path / name, quick=True, console=Console(quiet=True)) for name in "ab")
    saved = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert saved == json.loads(json.dumps(first))
    for moment in ("before", "after"):
        for name in ("score", "prior", "valid_rate"):
            assert 0 <= saved[moment][name] <= 1
    assert saved["seconds"] > 0
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    metrics = [json.loads(line) for line in (tmp_path / "a" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2, 3]
    assert (tmp_path / "a" / "train" / "merged" / "model.safetensors").is_file()
    assert list(Path(tmp_path / "a" / "train" / "completions").glob("*"))
    told = dict(_facts(load_run(tmp_path / "a")))
    assert (told["model"], told["data"]) == ("builtin", "train.jsonl")
    assert {"duration", "machine", "vigos", "torch", "transformers"} <= told.keys()
