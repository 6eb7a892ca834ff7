"""`StepGuard`: a step that survives lost memory, and one that changes nothing if its numbers are not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vigos.errors import TrainingStopped
from vigos.method.supervise import SupervisedBatch
from vigos.models.compat import norms
from vigos.models.memory import free_memory
from vigos.models.sharding import local_shard
from vigos.train.ranks import sum_over_ranks

if TYPE_CHECKING:
    from vigos.scoring.teacher import TeacherScorer
    from vigos.train.config import ViGOSConfig
    from vigos.train.recorder import Recorder

logger = logging.getLogger(__name__)


LEAST_TOKEN_BUDGET = 256  # below it a pack holds a single sequence anyway


class StepGuard:
    """Repeat a step in smaller packs when memory runs out, and drop one whose loss or gradient is not finite.

    Args:
        scorer: of the teachers; its `token_budget`, which the student shares, is what is halved.
        recorder: rewound before a step is repeated, and told of steps that are dropped.
        accelerator: of the run, for collectives.

    Attributes:
        dropped_in_a_row: steps dropped since the last one that was not.
    """

    def __init__(self, args: ViGOSConfig, *, scorer: TeacherScorer, recorder: Recorder, accelerator: Any) -> None:
        self.args, self.scorer, self.recorder, self.accelerator = args, scorer, recorder, accelerator
        self.dropped_in_a_row = 0
        self.begin_step([])

    def begin_step(self, batches: Sequence[SupervisedBatch]) -> None:
        """Forget the last step; call it before the first micro-batch of `batches`."""
        self._batches = list(batches)
        self._computed: list[dict[str, Any]] = []  # micro-batches, the one under way included
        self._losses_finite = torch.tensor(True, device=self.accelerator.device)

    def run(self, compute: Callable[[dict[str, Any]], Tensor], model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return `compute(inputs)`, the loss of a micro-batch after its backward pass.

        When memory runs out the step's gradients are thrown away and all its micro-batches so far are computed again
        with half the token budget. Raises TrainingStopped where that cannot help.
        """
        self._computed.append(inputs)
        remaining = [inputs]
        while True:
            try:
                for each in remaining:
                    loss = compute(each)
                self._losses_finite = self._losses_finite & torch.isfinite(loss).to(self._losses_finite.device)
                return loss
            except torch.OutOfMemoryError as error:
                self._shrink_packs(error)
            # A backward pass that broke off has left gradients of its own: the step starts again.
            free_memory()
            model.zero_grad()
            self.recorder.rewind()
            remaining = self._computed

    def _shrink_packs(self, error: Exception) -> None:
        budget = self.scorer.token_budget
        half = budget // 2
        if self.accelerator.num_processes > 1:  # the others are in the middle of what this rank cannot finish
            raise TrainingStopped(
                f"out of memory on rank {self.accelerator.process_index} with token_budget={budget}: go on "
                f"with --resume auto --token-budget {half}"
            ) from error
        if half < LEAST_TOKEN_BUDGET:
            raise TrainingStopped(
                f"out of memory with token_budget={budget}, where halving it helps no more: use shorter "
                "completions, smaller images, gradient_checkpointing=True or more GPUs (docs/scaling.md)"
            ) from error
        logger.warning(
            "out of memory: going on with token_budget=%d instead of %d; set it so to spare the attempt", half, budget
        )
        self.scorer.token_budget = half

    def drop_if_not_finite(self, model: nn.Module, step: int) -> None:
        """Forget the gradients of step number `step` on every rank if a loss or gradient is not finite on any.

        Call it before the optimizer. Raises TrainingStopped after `max_dropped_steps` such steps in a row.
        """
        bad_loss, bad_gradient = ~self._losses_finite.cpu(), ~gradients_finite(model).cpu()
        ranks_bad = sum_over_ranks(self.accelerator, torch.stack([bad_loss, bad_gradient]).double()).cpu()
        if not bool(ranks_bad.any()):
            self.dropped_in_a_row = 0
            return
        for parameter in model.parameters():
            parameter.grad = None  # which optimizers pass over: no decay, no momentum
        self.dropped_in_a_row += 1
        what = "loss" if ranks_bad[0] else "gradient"
        rollouts = [rollout for batch in self._batches for rollout in batch.rollouts]
        path = self.recorder.dropped(step, f"{what} not finite", rollouts)
        logger.warning("step %d dropped: its %s is not finite; its rollouts are in %s", step, what, path)
        if self.dropped_in_a_row >= self.args.max_dropped_steps:
            raise TrainingStopped(
                f"the loss or gradient was not finite in {self.dropped_in_a_row} steps in a row (max_dropped_steps), "
                f"the last of them step {step}; their rollouts are in {path.parent}. Look at learning_rate, dtype and "
                "these rollouts, and go on from an earlier checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the token budget that memory has sufficed for, and the steps dropped in a row."""
        return {
            "token_budget": self.scorer.token_budget,
            "configured_token_budget": self.args.token_budget,
            "dropped_in_a_row": self.dropped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; a token budget that was configured anew since then stays."""
        self.dropped_in_a_row = state.get("dropped_in_a_row", 0)
        if state.get("configured_token_budget") == self.args.token_budget:
            self.scorer.token_budget = state["token_budget"]


def gradients_finite(model: nn.Module) -> Tensor:
    """Tell whether every gradient on this rank, and its norm, is finite: () bool on the model's device."""
    gradients = [local_shard(p.grad) for p in model.parameters() if p.grad is not None]
    if not gradients:
        return torch.tensor(True)
    sizes = [n.float() for n in norms([g for g in gradients if g.numel()] or gradients)]
    return torch.isfinite(torch.stack(sizes)).all()
