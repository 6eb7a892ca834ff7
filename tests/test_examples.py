"""The example scripts run from end to end, a few steps each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_trl_world(tmp_path: Path) -> None:
    pytest.importorskip("trl", minversion="1.16")
    out = run("trl_world.py", "--steps", "2", "--rows", "40", "--evaluate", "0", "--out", str(tmp_path))
    assert "trl.trainer.distillation_trainer._chunked_divergence_loss" in out  # the fused loss is what trained
    loss = float(re.search(r"'train_loss': '?([\d.e-]+)", out).group(1))
    assert 0 < loss < 10


def test_text_opsd(tmp_path: Path) -> None:
    out = run("text_opsd.py", "--warm-up", "12", "--steps", "10", "--out", str(tmp_path))
    assert re.search(r"before: \d+% of 100 answers right", out)
    assert re.search(r"after: \d+% of 100 answers right", out)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(step.get("kl/reference", 0.0) for step in steps) > 0  # the teacher read what the student did not
