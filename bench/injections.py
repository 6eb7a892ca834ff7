"""Kill runs, resume them with something changed, damage their files: what is lost, and what the user is told.

python bench/injections.py --kills 50 --changed 10 --damaged 20 --output found.json

A run is `vigos train` of the built-in model with a checkpoint a step, in children of this process, which imports once.
"lost" counts the steps that were logged and had to be trained again, but for the one under way; a run that went on must
end with the metrics (clocks apart) and weights, to the bit, of one that nothing happened to.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vigos.cli import main as vigos
from vigos.train import trainer  # noqa: F401  imported once, and not in every child
from vigos.train.checkpoint import checkpoints, run_id
from vigos.world import load_base, write_world

STEPS = 4
WEIGHTS = ("adapter/adapter_model.safetensors", "merged/model.safetensors")
OPTIONS = {
    "model": "builtin", "max-steps": STEPS, "per-device-train-batch-size": 2, "gradient-accumulation-steps": 1,
    "max-completion-length": 24, "save-strategy": "steps", "save-steps": 1, "report-to": "none", "use-cpu": "true",
    "learning-rate": 1e-3, "lora-dropout": 0.1, "dtype": "float32", "max-prompt-length": 4096, "clip-mode": "none",
}  # fmt: skip


def start(run: Path, data: Path, log: Path, **changed: Any) -> int:
    """Fork a child that runs `vigos train --resume auto`; return its id."""
    options = OPTIONS | {"data": data, "output-dir": run, "resume": "auto"}
    options |= {name.replace("_", "-"): value for name, value in changed.items()}
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code: Any = 1
    try:
        torch.set_num_threads(1)
        vigos(["train", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def wait(child: int) -> int:
    """Return a child's exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return what was logged of each step, clocks and memory left out; damaged lines too."""
    found = []
    for line in (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record:
            found.append({name: value for name, value in record.items() if not name.startswith("perf/")})
    return found


def same(run: Path, whole: Path) -> bool:
    """Tell whether a run ended as the one that nothing happened to."""
    equal = all((run / n).is_file() and (run / n).read_bytes() == (whole / n).read_bytes() for n in WEIGHTS)
    return equal and metrics(run) == metrics(whole)


def step(run: Path) -> int:
    """Return the step of the newest checkpoint; 0: none."""
    found = checkpoints(run, run_id(run)) if run.is_dir() else []
    return int(found[-1].name.split("-")[1]) if found else 0


def kill(folder: Path, data: Path, whole: Path, count: int) -> dict[str, Any]:
    """Kill runs at random moments, `count` times in all; a third of them as the final weights are written."""
    chance = random.Random(0)
    kills, runs, lost, unequal = {"step": 0, "checkpoint": 0, "final save": 0}, 0, 0, 0
    found: dict[str, Any] = {}
    while sum(kills.values()) < count:
        run, code = folder / f"killed-{runs}", 1
        runs += 1
        while code:
            child, before = start(run, data, folder / "killed.log"), step(run)
            moment = chance.choice(("step", "checkpoint", "final save")) if sum(kills.values()) < count else "never"
            marks: dict[str, Callable[[], bool]] = {
                "step": lambda before=before, run=run: len(metrics(run)) > before,
                "checkpoint": lambda run=run: bool(glob.glob(f"{run}/saving/checkpoint-*/*")),
                "final save": lambda run=run: bool(list(run.glob("saving/adapter")) or list(run.glob("saving/merged"))),
                "never": lambda: False,
            }
            over = None
            while over is None and not marks[moment]():
                time.sleep(0.001)
                done, status = os.waitpid(child, os.WNOHANG)
                over = os.waitstatus_to_exitcode(status) if done else None
            if over is None:
                time.sleep(chance.uniform(0, {"step": 0.5, "checkpoint": 0.03, "final save": 0.15}[moment]))
                where = "final save" if list(run.glob("saving/[am]*")) or (run / "adapter").is_dir() else moment
                where = "checkpoint" if list(run.glob("saving/checkpoint-*")) else where
                logged = len(metrics(run))
                os.kill(child, signal.SIGKILL)
                over = wait(child)
                if over == -signal.SIGKILL:
                    kills[where] += 1
                    lost = max(lost, logged - step(run) - 1)
            code = over
        unequal += not same(run, whole)
        shutil.rmtree(run)
        found = {"kills": kills, "runs": runs, "steps lost but the one under way": lost, "ended otherwise": unequal}
        print(found, file=sys.stderr, flush=True)
    return found


def said(log: Path) -> list[str]:
    """Return the warnings and errors of a log, and the lines that tell where a run is."""
    return [line for line in log.read_text().splitlines() if re.match(r"warning|error|the run is", line)]


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("learning rate", {"learning_rate": 1e-4}),
    ("more steps", {"max_steps": STEPS + 1}),
    ("fewer steps than trained", {"max_steps": 1}),
    ("seed", {"seed": 7}),
    ("clip", {"clip_mode": "token"}),
    ("method", {"method": "opsd"}),
    ("batch size", {"per_device_train_batch_size": 1}),
    ("adapter's rank", {"lora_r": 8}),
    ("adapter given up", {"lora": "false"}),
    ("averaged teacher", {"teacher": "ema"}),
]


def change(folder: Path, data: Path, part: Path, count: int) -> list[dict[str, Any]]:
    """Resume a run after two of its steps with something changed."""
    found = []
    for what, options in CHANGES[:count]:
        run, log = shutil.copytree(part, folder / "changed"), folder / f"changed-{what}.log"
        code = wait(start(run, data, log, **options))
        kept = metrics(run)[:2] == metrics(part)[:2]
        found.append({"changed": what, "exit code": code, "history kept": kept, "said": said(log)})
        shutil.rmtree(run)
    return found


FILES = (
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "vigos_manifest.json",
)  # fmt: skip


def flipped(content: bytes) -> bytes:
    """Flip a bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "flipped": flipped,
    "empty": lambda content: b"",
}


def damage(folder: Path, data: Path, part: Path, whole: Path, count: int) -> list[dict[str, Any]]:
    """Damage a file of a run's newest checkpoint (or its records), and resume it."""
    places = [(f"checkpoint-2/{name}", how) for how in DAMAGES for name in FILES]
    places = [*places, ("metrics.jsonl", "flipped"), ("config.yaml", "empty")]
    found = []
    for name, how in places[:count]:
        run, log = shutil.copytree(part, folder / "damaged"), folder / f"damaged-{name.replace('/', '-')}-{how}.log"
        (run / name).write_bytes(DAMAGES[how]((run / name).read_bytes()))
        code = wait(start(run, data, log))
        weights = all((run / n).is_file() and (run / n).read_bytes() == (whole / n).read_bytes() for n in WEIGHTS)
        found.append({"file": name, "how": how, "exit code": code, "same weights": weights, "said": said(log)})
        shutil.rmtree(run)
    return found


def main() -> None:
    """Inject, and print or write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 50), ("changed", len(CHANGES)), ("damaged", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_base()  # the parent imports for all
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, whole, part = write_world(folder / "world", "train", 12), folder / "whole", folder / "part"
        started = time.monotonic()
        if code := wait(start(whole, data, folder / "whole.log")):
            sys.exit(f"the run that nothing happens to ended with {code}: {(folder / 'whole.log').read_text()[-2000:]}")
        shutil.copytree(whole, part)  # as a kill after the second step leaves it
        for left in ("adapter", "merged", "checkpoint-3", "checkpoint-4"):
            shutil.rmtree(part / left)
        found: dict[str, Any] = {}
        phases: dict[str, Callable[[], Any]] = {
            "damaged": lambda: damage(folder, data, part, whole, options.damaged),
            "changed": lambda: change(folder, data, part, options.changed),
            "killed": lambda: kill(folder, data, whole, options.kills),
            "seconds": lambda: round(time.monotonic() - started),
        }
        for name, phase in phases.items():
            found[name] = phase()
            if options.output:  # what is found so far
                options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
