"""Check that a long run holds what a short one holds: memory, threads, open files, child processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.processes import output_of

SHORT, LONG = 30, 130
PROGRAM = f"""
import gc, json, os, sys
from pathlib import Path
from transformers import TrainerCallback
from helpers.training import PROMPTS, config, processor, rows, tiny_student
from vigos.data.examples import load_rows
from vigos.train.trainer import ViGOSTrainer

folder, held = Path(sys.argv[1]), []

class Measure(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in ({SHORT}, {LONG}):
            gc.collect()
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            tasks = Path("/proc/self/task").iterdir()
            children = [(task / "children").read_text().split() for task in tasks]
            held.append({{
                "threads": int(status["Threads"]), "files": len(os.listdir("/proc/self/fd")),
                "children": sum(map(len, children)), "objects": len(gc.get_objects()),
                "mib": int(status["VmRSS"].split()[0]) / 1024,
            }})

lines = []
for i, row in enumerate(rows(10)):
    row["images"][0].save(folder / f"{{i}}.png")
    lines.append(json.dumps(row | {{"images": [f"{{i}}.png"]}}))
(folder / "train.jsonl").write_text("\\n".join(lines))
args = config(
    folder / "run", max_steps={LONG}, save_strategy="steps", save_steps=20, save_total_limit=2, completion_steps=1,
    max_completion_length=8, grade_rollouts=True, teacher="ema", dataloader_num_workers=0, logging_steps=1,
)
data = load_rows(folder / "train.jsonl", streaming=True)
ViGOSTrainer(tiny_student(), args, processor(), data, prompts=PROMPTS, callbacks=[Measure()]).train()
(folder / "held.json").write_text(json.dumps(held))
"""


@pytest.mark.slow
def test_after_130_steps_as_after_30(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(PROGRAM)
    output_of(tmp_path / "run.py", [str(tmp_path)], tmp_path / "log")
    short, long = json.loads((tmp_path / "held.json").read_text())
    print(short, long)
    for what in ("threads", "files", "children"):
        assert long[what] == short[what], (what, short, long)
    assert long["objects"] < short["objects"] + 100 * (LONG - SHORT), "a log line a step, and little else"
    assert long["mib"] < short["mib"] + 8, (short, long)  # what is made once does not shrink with the steps
