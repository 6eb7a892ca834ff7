"""One line a step for whoever watches a run: under a bar on a terminal, by itself in a pipe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from vigos.train.health import clipped_share

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

TEACHERS = {"perception": "description"}  # what a teacher is called in the line, where not by its name


class Watch(TrainerCallback):
    """Show step, loss, valid and right rollouts, divergence by teacher, speed and time left.

    Args:
        console: where to.
        every: steps between two lines in a pipe; the first and the last step always have one.
    """

    def __init__(self, console: Console, every: int = 1) -> None:
        self.console, self.every = console, every
        self.bar: Any = None
        self.task: Any = None
        self.started, self.first_step = 0.0, 0

    @classmethod
    def attach(cls, trainer: Trainer, console: Console, every: int = 1) -> None:
        """Show a trainer's steps in place of transformers' own bar and printed dictionaries."""
        for printer in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printer)
        if trainer.is_world_process_zero():
            trainer.add_callback(cls(console, every))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and the bar on a terminal."""
        self.started, self.first_step = time.perf_counter(), state.global_step
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

            columns = ("steps", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("steps", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line of a step."""
        if not logs or "loss" not in logs:
            return
        step, last = state.global_step, state.max_steps
        if self.bar is not None:
            self.bar.update(self.task, completed=step)
        if step % self.every == 0 or step in (self.first_step + 1, last):
            self.console.print(self.line(step, last, logs), soft_wrap=True, markup=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()

    def line(self, step: int, last: int, logs: dict[str, Any]) -> str:
        """Return the line of a step: what was not measured in it is left out."""
        parts = [f"step {step:{len(str(last))}}/{last}", f"loss {logs['loss']:.4f}"]
        for name, key in (("valid", "rollout/valid"), ("right", "rollout/accuracy")):
            if isinstance(logs.get(key), int | float):
                parts.append(f"{name} {100 * logs[key]:.0f} %")
        terms = [name.removeprefix("kl/") for name in logs if name.startswith("kl/") and logs[name]]
        kl = [f"{TEACHERS.get(term, term)} {logs[f'kl/{term}']:.3f}" for term in terms]
        parts += [f"KL {' '.join(kl)}"] if kl else []
        for words, share in (("clipped", clipped_share(logs)), ("teacher knows", logs.get("teacher/knows"))):
            if isinstance(share, int | float):
                parts.append(f"{words} {100 * share:.0f} %")
        if logs.get("perf/tokens_per_s"):
            parts.append(f"{logs['perf/tokens_per_s']:,.0f} tokens/s")
        done = step - self.first_step
        if done > 0 and step < last:
            parts.append(f"{duration((time.perf_counter() - self.started) / done * (last - step))} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return a duration as people say it: "48 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
