"""A process that trains in children, which it kills, fills the disk of, or stops: `restart_cases.py FOLDER`.

The parent imports and forks, so that a child costs a second and not ten. What happened is left in `FOLDER/found.json`.
"""

from __future__ import annotations

import glob
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from helpers.training import PROMPTS, config, processor, rows, tiny_student
from vigos.train.checkpoint import EXIT_CODE, CheckpointError, checkpoints, last_checkpoint
from vigos.train.trainer import ViGOSTrainer

KILLS = 20
STEPS = 60
END = 2  # steps of the runs that are cut off in their final save
ROWS = 24


class At(TrainerCallback):
    """Calls something after a step."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def build(folder: Path, *callbacks: TrainerCallback, **options: Any) -> ViGOSTrainer:
    """A trainer whose every random stream matters: dropout, order of rows, sampling; logs lie between checkpoints."""
    defaults = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 3,
        "clip_mode": "none", "max_completion_length": 8, "lora_dropout": 0.1, "lr_scheduler_type": "linear",
        "teacher": "ema", "ema_decay": 0.5, "lora_r": 1, "lora_target_modules": ["q_proj"],
    }  # fmt: skip
    args = config(folder, **(defaults | options))
    return ViGOSTrainer(
        tiny_student(), args, processor(), rows(ROWS), prompts=PROMPTS, callbacks=list(callbacks)
    )  # fmt: skip


def resume(engine: ViGOSTrainer) -> None:
    """What `vigos train --resume auto` does, its exit code included."""
    found = last_checkpoint(str(engine.args.output_dir))
    engine.train(resume_from_checkpoint=None if found is None else str(found))
    if engine.interrupted:
        raise SystemExit(EXIT_CODE)


def child(work: Callable[[], None], log: Path) -> int:
    """Forks; the child does `work` and leaves with 0, with the code of its SystemExit, or 1. Returns its id."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    code = 1
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        # torch makes its thread pool anew after a fork, at its first use; the loader's threads would do so at once.
        torch.set_num_threads(1)
        work()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def wait(number: int) -> int:
    """A child's exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def until(seconds: float, happened: Callable[[], bool]) -> None:
    """Waits for it, and not longer than that."""
    limit = time.monotonic() + seconds
    while not happened() and time.monotonic() < limit:
        time.sleep(0.001)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def kill_at_random(folder: Path) -> dict[str, Any]:
    """Kills a run `KILLS` times, each time going on from its last checkpoint, then lets it end."""
    chance = random.Random(0)
    kills, restarts_from = 0, []
    saving = 0  # kills that left a half-written checkpoint behind
    run, log = folder / "killed", folder / "killed.log"
    while kills < KILLS:
        before = last_checkpoint(run) if run.is_dir() else None
        number = child(lambda: resume(build(run)), log)
        if chance.random() < 0.6:  # in the middle of writing a checkpoint
            until(20, lambda: bool(glob.glob(f"{run}/saving/checkpoint-*/*")))
            time.sleep(chance.uniform(0, 0.02))
        else:  # at any time before it has gone on by two steps: on a fast machine too the run must outlast the kills
            step = 0 if before is None else step_of(before)
            until(chance.uniform(0.1, 1.0), lambda step=step: (run / f"checkpoint-{step + 2}").is_dir())
        os.kill(number, signal.SIGKILL)
        code = wait(number)
        if code != -signal.SIGKILL:
            raise RuntimeError(f"the run ended by itself ({code}) after {kills} kills; see {log}")
        kills += 1
        saving += bool(list(run.glob("saving/checkpoint-*")))
        after = last_checkpoint(run) if run.is_dir() else None
        assert before is None or after is not None, "a checkpoint was lost"
        restarts_from.append(0 if after is None else step_of(after))
    ended = wait(child(lambda: resume(build(run)), log))
    return {"kills": kills, "while_saving": saving, "restarts_from": restarts_from, "exit_code": ended}


def stopped(folder: Path) -> dict[str, Any]:
    """SIGTERM in the middle of a step, then the rest of the run."""
    run, log = folder / "stopped", folder / "stopped.log"
    here = At(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    first = wait(child(lambda: resume(build(run, here, save_steps=100)), log))
    found = [path.name for path in checkpoints(run)]
    second = wait(child(lambda: resume(build(run, save_steps=100)), log))
    return {"exit_codes": [first, second], "checkpoints": found}


def full_disk(folder: Path) -> dict[str, Any]:
    """No file may grow past a few kilobytes from the third step on."""
    run, log = folder / "full", folder / "full.log"

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

    def work() -> None:
        try:
            build(run, At(3, fill), lora_r=16).train()
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (folder / "full.txt").write_text(str(error))
            raise SystemExit(7) from error

    code = wait(child(work, log))
    left = sorted(path.name for path in run.iterdir() if "checkpoint" in path.name or path.name == "saving")
    again = wait(child(lambda: resume(build(run, lora_r=16, max_steps=5)), log))
    return {"exit_code": code, "message": (folder / "full.txt").read_text(), "left": left, "again": again}


class AtEnd(TrainerCallback):
    """Calls something before the final weights are written."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act()


def cut_off_at_the_end(folder: Path, how: str) -> dict[str, Any]:
    """The final save is cut off: no file may grow, the process is killed, told to stop before it, or in it; then the
    rest of the run."""
    run, log = folder / f"end-{how}", folder / f"end-{how}.log"
    options = {"max_steps": END, "save_strategy": "no", "save_merged": True}
    acts: dict[str, Callable[[], Any]] = {
        "disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY)),
        "late": lambda: os.kill(os.getpid(), signal.SIGTERM),
    }

    def work() -> None:
        try:
            resume(build(run, AtEnd(acts.get(how, lambda: None)), **options))
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (folder / f"end-{how}.txt").write_text(str(error))
            raise SystemExit(7) from error

    number = child(work, log)
    if how in ("kill", "sigterm"):
        until(60, lambda: (run / "saving" / "merged").is_dir())
        os.kill(number, signal.SIGKILL if how == "kill" else signal.SIGTERM)
    first = wait(number)
    left = sorted(path.name for path in run.iterdir() if path.is_dir() and path.name not in ("saving", "merged"))
    left = [] if (run / "merged").is_dir() else left
    message = folder / f"end-{how}.txt"
    second = wait(child(lambda: resume(build(run, **options)), log)) if first else 0
    return {"exit_codes": [first, second], "left": left, "message": message.read_text() if message.is_file() else ""}


def main(folder: Path) -> None:
    """All of them, and the run that nothing happened to."""
    torch.set_num_threads(1)
    processor()
    whole = wait(child(lambda: resume(build(folder / "whole", save_steps=7)), folder / "whole.log"))
    found = {"whole": whole, "killed": kill_at_random(folder), "stopped": stopped(folder), "full": full_disk(folder)}
    found["end"] = {how: cut_off_at_the_end(folder, how) for how in ("disk", "kill", "late", "sigterm")}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
