"""The command line itself under SIGTERM and Ctrl-C: a real `vigos train` of the built-in model."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from helpers.processes import start

from vigos.train.checkpoint import last_checkpoint
from vigos.world import write_world


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_command_with_its_code(tmp_path: Path, number: signal.Signals) -> None:
    data, run = write_world(tmp_path / "world", "train", n=8), tmp_path / "run"
    options = {
        "model": "builtin", "data": data, "output-dir": run, "max-steps": 10_000, "per-device-train-batch-size": 2,
        "gradient-accumulation-steps": 1, "max-completion-length": 8, "save-strategy": "no", "report-to": "none",
        "use-cpu": "true", "max-prompt-length": 4096,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    log = tmp_path / "log"
    process = start("vigos", ["train", *flags], log)
    metrics, limit = run / "metrics.jsonl", time.monotonic() + 150
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2) and time.monotonic() < limit:
        assert process.is_alive(), log.read_text()[-2000:]
        time.sleep(0.05)
    assert process.pid
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number, log.read_text()[-2000:]
    assert "go on with the same command and --resume auto" in log.read_text()
    last = json.loads(metrics.read_text().splitlines()[-1])
    found = last_checkpoint(run)
    assert found is not None
    assert found.name == f"checkpoint-{last['step']}", "of the step it was in"
    assert not (run / "adapter").exists(), "a run that was stopped has no final weights"
