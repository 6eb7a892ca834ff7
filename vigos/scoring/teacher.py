"""The teacher: the model without gradients, in evaluation mode, with its adapter off or on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vigos.divergence.supervision import Supervision
from vigos.method.encode import EncodedPrompt, ScoredSequence
from vigos.models.compat import has_own_adapter
from vigos.models.parts import eval_mode, lm_head, unwrap
from vigos.models.routers import LoadBalance
from vigos.models.vision_cache import VisionCache
from vigos.scoring.check import TreeCheck, Verify
from vigos.scoring.forwards import SCORINGS, Scoring
from vigos.scoring.hidden_states import DEFAULT_TOKEN_BUDGET


class TeacherBatch(Protocol):
    """Sequences that a step hands to the teacher, and how their rows supervise the student's."""

    @property
    def teacher_sequences(self) -> Sequence[ScoredSequence]: ...

    @property
    def supervision(self) -> Supervision: ...


class TeacherScorer:
    """Score a step's teacher sequences without gradients, in eval mode and with the adapter off.

    `check` decides for student and teacher alike if they are scored by the tree.

    Args:
        model: the student itself, whose adapter is switched off for the call, or a separate frozen or EMA model.
        scoring, token_budget, backend: as in `hidden_states`.
        verify: "first" compares one example's states with separate forwards once, "always" in each call; a mismatch
            warns and switches to scoring="separate". "never" trusts the tree.
        adapter: "off" scores with the weights under the adapter, the frozen teacher; "on" with the adapted ones.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scoring: Scoring = "tree",
        verify: Verify = "first",
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        backend: str = "auto",
        adapter: Literal["off", "on"] = "off",
    ) -> None:
        if scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
        if adapter not in ("off", "on"):
            raise ValueError(f"adapter must be 'off' or 'on', got {adapter!r}")
        self.model, self.check, self._scoring = model, TreeCheck(verify), scoring
        self.token_budget, self.backend, self.adapter = token_budget, backend, adapter
        if adapter == "off":
            check_adapter(model)

    @property
    def scoring(self) -> Scoring:
        """Return how the next call scores: as asked, or "separate" after a mismatch of either side."""
        return self.check.scoring(self._scoring)

    @torch.no_grad()
    def score(
        self, batch: TeacherBatch, *, vision: VisionCache | None = None, dummy: ScoredSequence | None = None
    ) -> tuple[Tensor, Supervision]:
        """Return the teacher's hidden rows (M, D), in the order of the batch's sequences, and the batch's supervision.

        Args:
            vision: as in `hidden_states`; pass the same one to the student's call and its images are encoded once.
            dummy: as in `hidden_states`.
        """
        with teacher_mode(self.model, adapter=self.adapter):
            hidden = self.check.hidden_states(
                self.model, list(batch.teacher_sequences), "teacher", scoring=self._scoring,
                token_budget=self.token_budget, backend=self.backend, vision=vision, dummy=dummy,
            )  # fmt: skip
        return hidden, batch.supervision

    def score_student(
        self, model: nn.Module, sequences: Sequence[ScoredSequence], *, scoring: Scoring,
        vision: VisionCache | None = None, dummy: ScoredSequence | None = None, balance: LoadBalance | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the student's hidden rows (N, D) with their graph, in the order of its sequences.

        Without sequences one token still goes through the model: wrappers wait for every rank's forward.
        """
        hidden = self.check.hidden_states(
            model, sequences or [_ONE_TOKEN], "student", scoring=scoring, token_budget=self.token_budget,
            vision=vision, dummy=dummy, balance=balance,
        )  # fmt: skip
        return hidden if sequences else hidden[:0]


_ONE = torch.zeros(1, dtype=torch.int64)
_ONE_TOKEN = ScoredSequence(EncodedPrompt(_ONE, None, None), _ONE, _ONE)  # one token after one token


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
        start = str(getattr(config, "init_lora_weights", True)).lower()
        if start.startswith(("pissa", "olora", "corda", "loftq")):
            raise ValueError(
                f"adapter {name!r} must not be initialised by {start!r}, which changes the weights under it: with the "
                "adapter off the frozen teacher would not be the initial model"
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
