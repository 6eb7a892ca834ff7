"""What keeps a run alive: checkpoints that are whole, steps that survive faults, an end in order.

`RobustTrainer` stands between `transformers.Trainer` and `vigos.ViGOSTrainer` and knows nothing of the method.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from vigos.errors import TrainingStopped
from vigos.method.supervise import RoutedBatch
from vigos.models.compat import loss_totals, set_loss_totals
from vigos.models.memory import free_memory
from vigos.models.sharding import local_shard
from vigos.scoring.teacher import TeacherScorer
from vigos.train.checkpoint import SAVING, StopSignal, publish, read_state, rotate, saving, write_state
from vigos.train.config import ViGOSConfig
from vigos.train.metrics import Metrics
from vigos.train.profiling import Phases
from vigos.train.run_folder import RunLog
from vigos.train.teacher_weights import TeacherPolicy

logger = logging.getLogger(__name__)


LEAST_TOKEN_BUDGET = 256  # below it a pack holds a single sequence anyway


def gradients_finite(model: nn.Module) -> Tensor:
    """() bool on the model's device: every gradient on this rank is finite, and so is its norm."""
    gradients = [local_shard(p.grad) for p in model.parameters() if p.grad is not None]
    if not gradients:
        return torch.tensor(True)
    norms = torch._foreach_norm([g for g in gradients if g.numel()] or gradients)
    return torch.isfinite(torch.stack([n.float() for n in norms])).all()


class RobustTrainer(Trainer):
    """A trainer that can be killed, stopped and fed poison. The attributes without a value are its subclass's."""

    args: ViGOSConfig
    model: Any
    metrics: Metrics
    runlog: RunLog
    phases: Phases
    policy: TeacherPolicy
    scorer: TeacherScorer
    skipped: Counter[str]
    token_budget: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_signal = StopSignal()
        self.dropped_in_a_row = 0
        self._saving = False  # a checkpoint is being written
        self._resumed_from: str | None = None
        self.begin_step([])

    # --- Steps that go wrong --------------------------------------------------------------------------------------

    def begin_step(self, batches: Sequence[RoutedBatch]) -> None:
        """Before the first micro-batch of a step: forgets the last one."""
        self._step_batches = list(batches)
        self._step_computed: list[dict[str, Any]] = []  # micro-batches, the one under way included
        self._step_metrics: list[list[float]] = []  # before its first micro-batch
        self._step_recorded: set[int] = set()
        self._losses_finite = torch.tensor(True, device=self.args.device)

    def first_attempt(self, batch: RoutedBatch) -> bool:
        """Whether this micro-batch has not been recorded yet; asked once for each attempt."""
        if id(batch) in self._step_recorded:
            return False
        self._step_recorded.add(id(batch))
        return True

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch, in smaller packs if memory runs out."""
        step = super().training_step
        if not self._step_computed:
            self._step_metrics = self.metrics.state()
        self._step_computed.append(inputs)
        to_do = [inputs]
        while True:
            try:
                for each in to_do:
                    with self.phases("backward"):  # what the phases inside it leave
                        loss = step(model, each, *args, **kwargs)
                self._losses_finite = self._losses_finite & torch.isfinite(loss).to(self._losses_finite.device)
                return loss
            except torch.OutOfMemoryError as error:
                self._shrink_packs(error)
            # A backward pass that broke off has left gradients of its own: the step starts again.
            free_memory()
            model.zero_grad()
            self.metrics.restore(self._step_metrics)
            to_do = self._step_computed

    def _shrink_packs(self, error: Exception) -> None:
        half = self.token_budget // 2
        if self.accelerator.num_processes > 1:  # the others are in the middle of what this rank cannot finish
            raise TrainingStopped(
                f"out of memory on rank {self.accelerator.process_index} with token_budget={self.token_budget}: go on "
                f"with --resume auto --token-budget {half}"
            ) from error
        if half < LEAST_TOKEN_BUDGET:
            raise TrainingStopped(
                f"out of memory with token_budget={self.token_budget}, where halving it helps no more: use shorter "
                "completions, smaller images, gradient_checkpointing=True or more GPUs (docs/scaling.md)"
            ) from error
        logger.warning(
            "out of memory: going on with token_budget=%d instead of %d; set it so to spare the attempt",
            half, self.token_budget,
        )  # fmt: skip
        self.token_budget = self.scorer.token_budget = half

    def drop_if_not_finite(self) -> None:
        """Before the optimizer: forgets the gradients of a step whose loss or gradient is not finite, on every rank."""
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            return  # DeepSpeed has stepped by now and checks for itself (not in float32), as float16's loss scaler does
        bad_loss, bad_gradient = ~self._losses_finite.cpu(), ~gradients_finite(self.model).cpu()
        ranks_bad = self._over_world(torch.stack([bad_loss, bad_gradient]).double()).cpu()
        if not bool(ranks_bad.any()):
            self.dropped_in_a_row = 0
            return
        for parameter in self.model.parameters():
            parameter.grad = None  # which optimizers pass over: no decay, no momentum
        self.dropped_in_a_row += 1
        self.metrics.add("steps/dropped", 1.0 / self.accelerator.num_processes, 0.0)
        step, what = self.state.global_step + 1, "loss" if ranks_bad[0] else "gradient"
        rollouts = [rollout for batch in self._step_batches for rollout in batch.rollouts]
        path = self.runlog.write_fault(step, f"{what} not finite", rollouts)
        logger.warning("step %d dropped: its %s is not finite; its rollouts are in %s", step, what, path)
        if self.dropped_in_a_row >= self.args.max_dropped_steps:
            raise TrainingStopped(
                f"the loss or gradient was not finite in {self.dropped_in_a_row} steps in a row (max_dropped_steps), "
                f"the last of them step {step}; their rollouts are in {path.parent}. Look at learning_rate, dtype and "
                "these rollouts, and go on from an earlier checkpoint"
            )

    # --- Checkpoints ----------------------------------------------------------------------------------------------

    @property
    def interrupted(self) -> bool:
        """Whether SIGTERM ended the run; its last step is in a checkpoint."""
        return self.stop_signal.received

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return f"{folder}/{SAVING}" if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """transformers' checkpoint and what is ours, whole or not at all."""
        folder, name = str(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with saving(folder, name):
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            written = f"{folder}/{SAVING}/{name}"
            self.policy.save(written, writes=self.args.should_save)
            write_state(written, self.accelerator.process_index, self.own_state())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(folder, name)
                rotate(folder, self.args.save_total_limit)
            self.accelerator.wait_for_everyone()

    def own_state(self) -> dict[str, Any]:
        """This rank's, in a checkpoint: what would differ after a restart."""
        return {
            "metrics": self.metrics.state(),
            "loss": loss_totals(self),
            "skipped": dict(self.skipped),
            "token_budget": self.token_budget,
            "configured_token_budget": self.args.token_budget,
            "dropped_in_a_row": self.dropped_in_a_row,
        }

    def restore_own_state(self) -> None:
        """Once the loop has set up its counters: puts those of the checkpoint in their place."""
        folder, self._resumed_from = self._resumed_from, None
        self.take_own_state(None if folder is None else read_state(folder, self.accelerator.process_index))

    def take_own_state(self, state: dict[str, Any] | None) -> None:
        """Goes on from what `own_state` gave; None: a run that begins, or a checkpoint without this rank's."""
        if state is None:
            return
        self.metrics.restore(state["metrics"])
        set_loss_totals(self, state["loss"])
        self.skipped = Counter(state["skipped"])
        self.dropped_in_a_row = state["dropped_in_a_row"]
        if state["configured_token_budget"] == self.args.token_budget:  # else it was set anew
            self.token_budget = self.scorer.token_budget = state["token_budget"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.bind(self.model_wrapped)  # before what it may take its copies from changes
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.policy.load(resume_from_checkpoint)
        self._resumed_from = resume_from_checkpoint

    def _over_world(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), "sum")

    def _over_ranks(self, count: int) -> int:
        return int(self._over_world(torch.tensor(count)))
