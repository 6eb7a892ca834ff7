"""Clocks of the phases of a step, and `vigos train --profile`: a trace of a few steps and a table of their phases.

    profile/trace.json    for chrome://tracing or Perfetto, with a range for each phase
    profile/table.txt     seconds and share of each phase

A phase ends when the device has done its work, so the steps that are profiled overlap less than others; the shares are
what to look at.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers import TrainerCallback

from vigos.system.files import replace_file

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

WAIT, WARM_UP, ACTIVE = 1, 1, 2  # steps
NAMES = ("rollouts", "prompts and spans", "teachers", "student forward", "divergence", "backward", "optimizer", "sync")


class Phases:
    """Add up the wall-clock time of phases.

    Attributes:
        on: True while a profile is taken: a phase then ends when the device has done its work, and is in the trace.
        seconds: of each phase while `on`, nested phases not counted twice.
        overlap: seconds of phases that were run on other threads meanwhile.
        lap: seconds of each phase since the last `take_lap`, profile or not. On a GPU, without a profile, those
            until the work was queued, or until the phase itself waited for it.
    """

    def __init__(self) -> None:
        self.on = False
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self.overlap: dict[str, float] = {}
        self.lap = dict.fromkeys(NAMES, 0.0)
        self._nested = 0.0  # seconds of phases that ended in the one under way

    def overlapped(self, name: str, seconds: float) -> None:
        """Count work of phase `name` that was done on another thread while other phases ran."""
        if self.on:
            self.overlap[name] = self.overlap.get(name, 0.0) + seconds

    def take_lap(self) -> dict[str, float]:
        """Return `lap` and begin another."""
        lap, self.lap = self.lap, dict.fromkeys(NAMES, 0.0)
        return lap

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside as phase `name`, but for the phases nested in it."""
        before, self._nested = self._nested, 0.0
        self._synchronize()
        with record_function(f"vigos::{name}") if self.on else nullcontext():
            start = time.perf_counter()
            try:
                yield
            finally:
                self._synchronize()
                taken = time.perf_counter() - start
                alone, self._nested = taken - self._nested, before + taken
                self.lap[name] += alone
                if self.on:
                    self.seconds[name] += alone

    def _synchronize(self) -> None:
        if self.on and torch.cuda.is_available():
            torch.cuda.synchronize()


class ProfileCallback(TrainerCallback):
    """Profile the third and fourth step of a run, on rank 0.

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
        """Start the profiler; of a resumed run with too few steps left none is taken."""
        left = state.max_steps - state.global_step
        if self.rank != 0 or (state.global_step and left < WAIT + WARM_UP + ACTIVE):
            return
        if args.max_steps > 0 and left < WAIT + WARM_UP + ACTIVE:
            raise ValueError(f"profile needs at least {WAIT + WARM_UP + ACTIVE} steps, got {left}")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
        )
        self.profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the steps."""
        if self.profiler is None:
            return
        self.step += 1
        if self.step == WAIT + WARM_UP:
            self.phases.on, self.started = True, time.perf_counter()
        elif self.step == WAIT + WARM_UP + ACTIVE:
            self.phases.on = False
            total = time.perf_counter() - self.started
            self.table = table(self.phases.seconds, total, ACTIVE, self.phases.overlap)
        self.profiler.step()
        if self.table:
            self.profiler.stop()
            self.profiler = None

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        replace_file(self.folder / "table.txt", self.table)
        print(f"\n{self.table}\ntrace: {self.folder / 'trace.json'}")


def table(seconds: dict[str, float], total: float, steps: int, overlap: dict[str, float] | None = None) -> str:
    """Format where the `total` seconds of `steps` steps went, a line a phase; time in no phase is "the rest".

    Args:
        overlap: seconds of work on other threads, which stands below.
    """
    rows = [item for item in seconds.items() if item != ("sync", 0.0)]  # there is nobody to send weights to
    rows += [("the rest", max(total - sum(seconds.values()), 0.0)), ("a step", total)]
    rows += [(f"{name}, overlapping", s) for name, s in (overlap or {}).items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {s / steps:9.4f} s  {100 * s / total:5.1f} %" for name, s in rows]
    return "\n".join([f"Mean of {steps} steps", *lines, ""])
