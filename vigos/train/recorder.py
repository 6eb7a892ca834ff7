"""`Recorder`: collect the metrics of every step and the records of its rollouts for the run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vigos.divergence.api import DivergenceOutput
from vigos.divergence.head import Head
from vigos.divergence.supervision import Supervision
from vigos.method.supervise import CONTROL, Rollout, SupervisedBatch
from vigos.train.metrics import PARTS, Metrics, peak_gib, peak_tflops
from vigos.train.ranks import max_over_ranks, sum_over_ranks
from vigos.train.records import TopTokens, completion_records, fault_record
from vigos.train.top_tokens import top_tokens

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from vigos.data.examples import BadExample
    from vigos.train.config import ViGOSConfig
    from vigos.train.profiling import Phases
    from vigos.train.run_folder import RunFolder

logger = logging.getLogger(__name__)

DRIFT = 0.05  # nats a token, in the mean, from which on engine and trainer are said to differ


class Recorder(TrainerCallback):
    """Add up the metrics of a step and keep its records, which are written when the step ends.

    Args:
        folder: where records go.
        phases: whose clocks the metrics of time read.
        tokenizer: of the student, for the texts of tokens.
        accelerator: of the run, for sums over ranks.
        parameters: number of the model's parameters without embeddings, for floating-point operations.
    """

    def __init__(
        self, args: ViGOSConfig, *, folder: RunFolder, phases: Phases, tokenizer: Any, accelerator: Any, parameters: int
    ) -> None:
        self.args, self.folder, self.phases, self.tokenizer = args, folder, phases, tokenizer
        self.accelerator, self.parameters = accelerator, parameters
        self.other_parameters: Mapping[str, int] = {}  # of teachers that are another model, by name
        self.lambdas = args.objective.lambdas
        self.metrics = Metrics(args.objective.terms)
        self._peak_tflops = peak_tflops(accelerator.device)
        self._records: list[dict[str, Any]] = []  # of the step under way
        self._before: list[list[float]] = self.metrics.state()
        self._started, self._warned = 0.0, False

    @property
    def _share(self) -> float:
        """Return one rank's share of what is averaged over ranks."""
        return 1.0 / self.accelerator.num_processes

    # --- A step, in order -----------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Start the step's clock; call it before its rollouts are sampled."""
        self._started = time.perf_counter()
        self.phases.take_lap()

    def skipped(self, bad: BadExample, step: int) -> None:
        """Record an example that was left out after `step` steps."""
        self.metrics.add("examples/skipped", 1.0, 0.0)  # a count for each step
        self.folder.write_skipped(step, bad)

    def sampled(self, step: int, rollouts: Sequence[Rollout], sampling_s: float) -> None:
        """Record the step's rollouts, once its micro-batches are ready to be computed.

        Args:
            step: optimizer steps before this one.
            sampling_s: seconds that sampling took, most of it during the step before with `async_rollout`.
        """
        self.metrics.add_step(self._share)
        self.metrics.add_rollouts(rollouts)
        seconds = time.perf_counter() - self._started - self.phases.lap["sync"]
        if self.args.async_rollout:
            for rollout in rollouts:
                if rollout.version is not None:
                    self.metrics.add("rollout/age", step - rollout.version)
            self.metrics.add("perf/rollout_wait_s", seconds * self._share, self._share)
            seconds = sampling_s
        self.metrics.add("perf/rollout_s", seconds * self._share, 0.0)
        tokens = sum(r.spans.length for r in rollouts)
        self.metrics.add("perf/rollout_tokens_per_s", tokens, seconds * self._share)
        self.metrics.add("perf/tokens_per_s", tokens, 0.0)

    def palr(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Record the sums of a PALR measurement, by group."""
        for name, (answer, image) in sums.items():
            self.metrics.add(f"palr/{name}", answer, answer + image)

    def begin_micro_batches(self) -> None:
        """Remember what is recorded so far, to which `rewind` returns."""
        self._before, self._records = self.metrics.state(), []

    def rewind(self) -> None:
        """Forget the step's micro-batches, which will be computed again."""
        self.metrics.restore(self._before)
        self._records = []
        self.phases.take_lap()

    def writes_completions(self, step: int) -> bool:
        """Tell whether the rollouts of step number `step` are written."""
        every = self.args.completion_steps
        return bool(every) and (step % every == 0 or step == 1)

    def likeliest(
        self, step: int, student: tuple[Tensor, Head], teacher: tuple[Tensor, Head], rows: Supervision
    ) -> TopTokens | None:
        """Return each side's likeliest tokens at every pair, of hidden rows under a head, if `step` writes them."""
        k, temperature = self.args.completion_top_k, self.args.divergence_temperature
        if not k or not self.writes_completions(step):
            return None
        return (
            top_tokens(*student, rows.student_row, k, temperature=temperature),
            top_tokens(*teacher, rows.teacher_row, k, temperature=temperature),
        )

    @torch.no_grad()
    def teacher_knows(self, batch: SupervisedBatch, hidden: Tensor, head: Head, rows: Supervision) -> None:
        """Count how often a privileged teacher's likeliest token where the box begins also begins the reference.

        Args:
            hidden, head: of the teachers. rows: the pairs of `batch`.
        """
        privileged = torch.tensor([teacher.privileged for teacher in self.args.objective.roster])
        begins = torch.tensor([r.spans.answer[0] if r.spans.answer[1] else -1 for r in batch.rollouts])
        at_box = (batch.token == begins[batch.owner]) & privileged[batch.term.long()]
        ids, _ = top_tokens(hidden, head, rows.teacher_row.cpu()[at_box], 1)  # type: ignore[union-attr]
        for owner, token in zip(batch.owner[at_box].tolist(), ids[:, 0].tolist(), strict=True):
            says = self.tokenizer.decode([token]).strip().casefold()
            self.metrics.add("teacher/knows", bool(says) and batch.rollouts[owner].answer.casefold().startswith(says))

    @torch.no_grad()
    def micro_batch(
        self, step: int, batch: SupervisedBatch, out: DivergenceOutput, top: TopTokens | None = None,
        losses: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Record a micro-batch of step number `step` once its divergence is known.

        Args:
            top: the likeliest tokens at each pair, if they are to be written.
            losses: (R,), as in `Metrics.add_terms`.
        """
        self.metrics.add_terms(batch, out, self.lambdas, float(self.accelerator.num_processes), losses)
        if out.student_logprob is not None and self.args.divergence_temperature == 1:
            self.metrics.add_mismatch(batch.sampled_logprob, out.student_logprob)
        student, teacher = _tokens_read(batch)
        for part, tokens in zip(PARTS[1:], (teacher, student, batch.n_pairs, student), strict=True):
            self.metrics.add(f"perf/{part}_tokens_per_s", tokens, 0.0)
        if self.writes_completions(step):
            side = self.args.completion_images
            images = [self.folder.write_images(r.images, side) for r in batch.rollouts]
            records = completion_records(step, batch, out, self.tokenizer, images, top)
            for record, rollout in zip(records, batch.rollouts, strict=True):
                if rollout.views:
                    record["views"] = {k: self.folder.write_images(v, side) for k, v in rollout.views.items()}
            self._records += records

    def operations(self, batch: SupervisedBatch) -> int:
        """Record and return a micro-batch's floating-point operations: about 6 a student token and parameter, 2 a
        teacher token."""
        student, _ = _tokens_read(batch)
        operations = 6 * student * self.parameters
        for s in batch.teacher_sequences:
            size = self.other_parameters.get(s.owner[1].removesuffix(CONTROL), self.parameters)
            operations += 2 * size * (len(s.prompt.ids) + len(s.completion_ids))
        self.metrics.add("perf/tflops", operations / 1e12, 0.0)
        if self._peak_tflops:
            self.metrics.add("perf/mfu", operations / 1e12 / self._peak_tflops, 0.0)
        return operations

    def dropped(self, step: int, reason: str, rollouts: Sequence[Rollout]) -> Path:
        """Record that step number `step` changed no weight; return the file with its rollouts."""
        self.metrics.add("steps/dropped", self._share, 0.0)
        return self.folder.write_fault(step, [fault_record(step, reason, rollout) for rollout in rollouts])

    def logs(self) -> dict[str, float]:
        """Return the metrics since the last call, over all ranks, which call it together."""
        found = self.metrics.collect(
            lambda sums: sum_over_ranks(self.accelerator, sums), lambda top: max_over_ranks(self.accelerator, top)
        )
        if found.get("mismatch/mean", 0.0) > DRIFT and not self._warned:
            self._warned = True
            logger.warning(
                "the engine that samples and the trainer differ by %.3f nats a token (largest %.3f); rounding gives "
                "hundredths. Look for another dtype, chat template or image size on the engine's side, weights "
                "that did not arrive, or (async_rollout) too large a learning rate",
                found["mismatch/mean"], found["mismatch/largest"],
            )  # fmt: skip
        return found | {"perf/peak_gib": peak_gib(self.accelerator.device)}

    # --- The loop's events, checkpoints ---------------------------------------------------------------------------

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the step's rollouts."""
        self.folder.write_completions(state.global_step + 1, self._records)
        self._records = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the step's clock."""
        lap, share = self.phases.take_lap(), self._share
        phases = ("teachers", "student forward", "divergence", "backward")
        for part, phase in zip(PARTS[1:], phases, strict=True):
            self.metrics.add(f"perf/{part}_s", lap[phase] * share, 0.0)
            self.metrics.add(f"perf/{part}_tokens_per_s", 0.0, lap[phase] * share)
        if lap["sync"]:
            self.metrics.add("perf/sync_s", lap["sync"] * share, share)
        seconds = time.perf_counter() - self._started
        self.metrics.add("perf/step_s", seconds * self._share, 0.0)
        self.metrics.add("perf/tokens_per_s", 0.0, seconds * self._share)
        for name in ("perf/tflops", "perf/mfu") if self._peak_tflops else ("perf/tflops",):
            self.metrics.add(name, 0.0, seconds)  # of one device

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Append to `metrics.jsonl`."""
        if logs:
            self.folder.write_metrics(state.global_step, logs)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last log."""
        return {"metrics": self.metrics.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        if state:
            self.metrics.restore(state["metrics"])


def _tokens_read(batch: SupervisedBatch) -> tuple[int, int]:
    """Return the tokens of a micro-batch's sequences, shared prefixes counted each time: student's and teachers'."""
    student, teacher = (
        sum(len(s.prompt.ids) + len(s.completion_ids) for s in sequences)
        for sequences in (batch.student_sequences, batch.teacher_sequences)
    )
    return student, teacher
