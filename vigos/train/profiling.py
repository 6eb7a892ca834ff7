"""`vigos train --profile`: a trace of a few steps, and a table of where their time went.

    profile/trace.json    for chrome://tracing or Perfetto, with a range for each phase
    profile/table.txt     seconds and share of each phase

A phase ends when the device has done its work, so the steps that are profiled overlap less than others; the shares are
what to look at.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

WAIT, WARM_UP, ACTIVE = 1, 1, 2  # steps
NAMES = ("rollouts", "prompts and spans", "teachers", "student forward", "divergence", "backward", "optimizer")


class Phases:
    """Adds up the wall-clock time of phases while it is on; costs nothing while it is off."""

    def __init__(self) -> None:
        self.on = False
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self.at_the_same_time: dict[str, float] = {}

    def beside(self, name: str, seconds: float) -> None:
        """Work of phase `name` that was done on another thread, while other phases went on: counted apart."""
        if self.on:
            self.at_the_same_time[name] = self.at_the_same_time.get(name, 0.0) + seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Inside is phase `name`; what a phase inside it takes is not counted twice."""
        if not self.on:
            yield
            return
        _synchronize()
        inner = sum(self.seconds.values())
        start = time.perf_counter()
        with record_function(f"vigos::{name}"):
            yield
            _synchronize()
        taken = time.perf_counter() - start
        self.seconds[name] += taken - (sum(self.seconds.values()) - inner)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class ProfileCallback(TrainerCallback):
    """Profiles the third and fourth step of a run (rank 0 of it).

    Args:
        phases: the trainer's.
        folder: of the run; the profile goes to `profile/` in it.
        rank: other ranks do nothing.
    """

    def __init__(self, phases: Phases, folder: str | Path, rank: int = 0) -> None:
        self.phases, self.folder, self.rank = phases, Path(folder) / "profile", rank
        self.profiler: Any = None
        self.step, self.started = 0, 0.0
        self.table = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the profiler."""
        if self.rank != 0:
            return
        if args.max_steps > 0 and state.max_steps - state.global_step < WAIT + WARM_UP + ACTIVE:
            raise ValueError(
                f"profile needs at least {WAIT + WARM_UP + ACTIVE} steps, got {state.max_steps - state.global_step}"
            )
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
        )
        self.profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts the steps."""
        if self.profiler is None:
            return
        self.step += 1
        if self.step == WAIT + WARM_UP:
            self.phases.on, self.started = True, time.perf_counter()
        elif self.step == WAIT + WARM_UP + ACTIVE:
            self.phases.on = False
            whole = time.perf_counter() - self.started
            self.table = table(self.phases.seconds, whole, ACTIVE, self.phases.at_the_same_time)
        self.profiler.step()
        if self.table:
            self.profiler.stop()
            self.profiler = None

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        (self.folder / "table.txt").write_text(self.table, encoding="utf-8")
        print(f"\n{self.table}\ntrace: {self.folder / 'trace.json'}")


def table(seconds: dict[str, float], whole: float, steps: int, beside: dict[str, float] | None = None) -> str:
    """Where `whole` seconds of `steps` steps went, a line a phase; what no phase has is "the rest". What was done
    `beside` it, on other threads, stands below."""
    rows = [*seconds.items(), ("the rest", max(whole - sum(seconds.values()), 0.0)), ("a step", whole)]
    rows += [(f"{name}, beside", s) for name, s in (beside or {}).items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {s / steps:9.4f} s  {100 * s / whole:5.1f} %" for name, s in rows]
    return "\n".join([f"Mean of {steps} steps", *lines, ""])
