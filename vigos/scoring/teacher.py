"""The teacher: the model without gradients, in evaluation mode, with its adapter off or on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vigos.divergence.supervision import Supervision
from vigos.method.encode import ScoredSequence
from vigos.models.compat import has_own_adapter
from vigos.models.parts import base_model, eval_mode, lm_head, unwrap
from vigos.models.vision_cache import VisionCache
from vigos.scoring.forwards import SCORINGS, Scoring
from vigos.scoring.hidden_states import DEFAULT_TOKEN_BUDGET, distributed, hidden_states


class TeacherBatch(Protocol):
    """Sequences that a step hands to the teacher, and how their rows supervise the student's."""

    @property
    def teacher_sequences(self) -> Sequence[ScoredSequence]: ...

    @property
    def supervision(self) -> Supervision: ...


class TeacherScorer:
    """Score a step's teacher sequences without gradients, in eval mode and with the adapter off.

    Args:
        model: the student itself, whose adapter is switched off for the call, or a separate frozen or EMA model.
        scoring, token_budget, backend: as in `hidden_states`.
        verify: "first" compares the first row's sequences with unshared forwards once, "always" in each call; a
            mismatch warns and switches to scoring="separate". "never" trusts the tree.
        adapter: "off" scores with the weights under the adapter, the frozen teacher; "on" with the adapted ones.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scoring: Scoring = "tree",
        verify: Literal["first", "never", "always"] = "first",
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        backend: str = "auto",
        adapter: Literal["off", "on"] = "off",
    ) -> None:
        if scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
        if verify not in ("first", "never", "always"):
            raise ValueError(f"verify must be 'first', 'never' or 'always', got {verify!r}")
        if adapter not in ("off", "on"):
            raise ValueError(f"adapter must be 'off' or 'on', got {adapter!r}")
        self.model, self.scoring, self.verify = model, scoring, verify
        self.token_budget, self.backend, self.adapter = token_budget, backend, adapter
        self.verified = False  # whether a row has been compared with unshared forwards
        self.deviation = 0.0  # what that comparison gave, relative to the norm of a hidden state
        if adapter == "off":
            check_adapter(model)

    @torch.no_grad()
    def score(
        self, batch: TeacherBatch, *, vision: VisionCache | None = None, dummy: ScoredSequence | None = None
    ) -> tuple[Tensor, Supervision]:
        """Return the teacher's hidden rows (M, D), in the order of the batch's sequences, and the batch's supervision.

        Args:
            vision: as in `hidden_states`; pass the same one to the student's call and its images are encoded once.
            dummy: as in `hidden_states`.
        """
        sequences = list(batch.teacher_sequences)
        with teacher_mode(self.model, adapter=self.adapter):
            hidden = self._hidden(sequences, vision, dummy)
            if self.scoring == "tree" and (self.verify == "always" or (self.verify == "first" and not self.verified)):
                self._compare(sequences, hidden, dummy)
                if self.scoring == "separate":
                    hidden = self._hidden(sequences, vision, dummy)
        return hidden, batch.supervision

    def _hidden(
        self, sequences: Sequence[ScoredSequence], vision: VisionCache | None, dummy: ScoredSequence | None
    ) -> Tensor:
        return hidden_states(
            self.model, sequences, scoring=self.scoring, token_budget=self.token_budget, backend=self.backend,
            vision=vision, dummy=dummy,
        )  # fmt: skip

    def _compare(self, sequences: Sequence[ScoredSequence], hidden: Tensor, dummy: ScoredSequence | None) -> None:
        """Compare the first row's states with its sequences run alone; a mismatch warns and ends sharing.

        The yardstick is what padding does to the same sequences in the model's own forward: rounding in 16 bits moves
        a deep model's states by percents, and no fixed tolerance fits both that and a wrong mask.
        """
        first = next((s.owner[0] for s in sequences if len(s.scored)), None)
        ends = torch.tensor([len(s.scored) for s in sequences], dtype=torch.int64).cumsum(0)
        chosen = [i for i, s in enumerate(sequences) if s.owner[0] == first and len(s.scored)]
        rows = [hidden[int(ends[i]) - len(sequences[i].scored) : int(ends[i])] for i in chosen]
        subset = [sequences[i] for i in chosen]
        alone = hidden_states(self.model, subset, scoring="separate", token_budget=1, dummy=dummy)
        padded = hidden_states(self.model, subset, scoring="separate", token_budget=self.token_budget, dummy=dummy)
        compared = mismatch = False
        if rows:
            self.deviation, usual = _deviation(torch.cat(rows), alone), _deviation(padded, alone)
            allowed = 4 * usual + (1e-4 if hidden.dtype in (torch.float32, torch.float64) else 1e-2)
            compared, mismatch = True, not self.deviation <= allowed  # NaN is a mismatch
        if distributed():  # every rank goes on the same way
            votes = torch.tensor([compared, mismatch], dtype=torch.int32, device=hidden.device)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            compared, mismatch = (bool(v) for v in votes)
        self.verified = self.verified or compared
        if mismatch:
            self.scoring = "separate"
            warnings.warn(
                f"prefix-tree scoring does not reproduce {type(base_model(self.model)).__name__}: hidden states of row "
                f"{first} deviate by {self.deviation:.1e} of their norm; going on with scoring='separate'",
                stacklevel=3,
            )


def _deviation(a: Tensor, b: Tensor) -> float:
    """Return the largest relative distance ||a - b|| / ||b|| of a row."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).max())


@contextmanager
def teacher_mode(model: nn.Module, *, adapter: Literal["off", "on"] = "off") -> Iterator[None]:
    """Put the model into evaluation mode, inside, and with adapter="off" switch its adapter off."""
    with ExitStack() as stack:
        if adapter == "off":
            check_adapter(model)
            stack.enter_context(_adapter_off(model))
        stack.enter_context(eval_mode(model))
        yield


@contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    core: Any = unwrap(model)
    if hasattr(core, "get_base_model"):
        with core.disable_adapter():
            yield
    elif has_own_adapter(core):
        core.disable_adapters()
        try:
            yield
        finally:
            core.enable_adapters()
    else:
        yield


def check_adapter(model: nn.Module) -> None:
    """Refuse adapters whose absence is not the model they were trained from."""
    core = unwrap(model)
    configs = getattr(core, "peft_config", None)
    if not configs:
        return
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(f"adapter {name!r} must not be prompt learning, which no position can be shared under")
        if getattr(config, "modules_to_save", None):
            raise ValueError(
                f"adapter {name!r} must not have modules_to_save, got {list(config.modules_to_save)}: these weights "
                "train in full, so switching the adapter off does not give the frozen teacher back"
            )
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"adapter {name!r} must have bias='none', got {config.bias!r}: trained biases stay when it is off"
            )
    for name, module in core.named_modules():
        if getattr(module, "merged", False) is True:
            raise ValueError(
                f"the adapter must not be merged, got merged weights in {name}: unmerging in place changes the base "
                "weights in low precision; keep the adapter apart"
            )
    if hasattr(lm_head(core), "base_layer"):
        raise ValueError("the adapter must not cover the language-model head: student and teacher share it")
