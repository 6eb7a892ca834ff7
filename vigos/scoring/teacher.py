"""Hidden states at the scored positions of many sequences, and the frozen teacher that computes them.

`hidden_states` runs a transformers model and returns what its language-model head is applied to, without the head:

    out = model(**batch, output_hidden_states=True).hidden_states[-1]     # after the final norm
    rows = torch.cat([out[b, len(prompt) + scored - 1] for b, (prompt, scored) in enumerate(...)])

The head is switched off rather than bypassed: the model's own `forward` runs, so that mixed precision, adapters and
the hooks of DDP, FSDP and DeepSpeed wrappers work as in an ordinary step.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vigos.divergence.supervision import Supervision
from vigos.method.encode import ScoredSequence
from vigos.models.parts import (
    base_model,
    head_rows,
    inner_model,
    lm_head,
    logit_settings,
    replaced_forward,
    text_model,
    unwrap,
)
from vigos.models.vision_cache import VisionCache
from vigos.scoring.forwards import (
    SCORINGS,
    Pass,
    Scoring,
    check_tree,
    concat_images,
    idle_pass,
    pack_positions,
    plan_passes,
    text_flops,
)
from vigos.scoring.prefix_tree import fed_ids
from vigos.scoring.tree_attention import installed

__all__ = [
    "DEFAULT_TOKEN_BUDGET", "SCORINGS", "Scoring", "ScoringStats", "TeacherBatch", "TeacherScorer", "base_model",
    "check_adapter", "check_tree", "concat_images", "head_rows", "hidden_states", "lm_head", "logit_settings",
    "pack_positions", "replaced_forward", "teacher_mode", "text_flops", "unwrap",
]  # fmt: skip

DEFAULT_TOKEN_BUDGET = 16_384  # tokens of one forward; a longer sequence gets a forward of its own


@dataclass(frozen=True)
class ScoringStats:
    """What the last call cost. `tokens_separate` is what unshared forwards without padding would have fed."""

    tokens: int
    tokens_separate: int
    forwards: int
    seconds: float


def hidden_states(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    *,
    scoring: Scoring = "tree",
    token_budget: int = DEFAULT_TOKEN_BUDGET,
    backend: str = "auto",
    pad_token_id: int | None = None,
    vision: VisionCache | None = None,
    idle: ScoredSequence | None = None,
) -> Tensor:
    """Hidden states (M, D) that predict the scored tokens, in the order of `sequences` and of their `scored`.

    Differentiable when gradients are enabled. D is the width of the language-model head's input; M the sum of the
    lengths of `scored`; the dtype is what the model computes in. With a wrapped model every rank has to call this
    together: ranks that need fewer forwards run idle ones that give no rows.

    Args:
        model: a transformers model with a language-model head, bare, adapted by PEFT, or wrapped (DDP, FSDP, …).
        scoring: "tree" runs every distinct prefix once (see `vigos.PrefixTree`); "separate" runs right-padded batches.
        token_budget: tokens of one forward, padding included. A single longer sequence still gets its forward.
        backend: the attention of "tree", see `vigos.scoring.tree_attention`; "separate" uses the model's own.
        pad_token_id: fills padding, which no result depends on; None takes the model's, or 0.
        vision: where the features of images come from if the vision tower is frozen. "tree" encodes an image once
            anyway within a call; a cache carries that over to later calls, as from the teachers to the student.
        idle: a sequence with an image. Where the vision tower is sharded or trained by several ranks, all of them have
            to run it in the same forwards: one that has no image there is shown this one, and gives no rows for it.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")

    def plan(members: Sequence[ScoredSequence], budget: int) -> list[Pass]:
        return plan_passes(model, members, scoring, budget, backend, pad_token_id)

    passes = _level(model, sequences, plan(sequences, token_budget), plan, idle)
    return _run(model, passes, sum(len(s.scored) for s in sequences), vision)


def _run(model: nn.Module, passes: Sequence[Pass], num_rows: int, vision: VisionCache | None) -> Tensor:
    base = base_model(model)
    shown = [image.key for each in passes if each.packed for image in each.images]
    if vision is None and len(set(shown)) < len(shown) and VisionCache.obstacle(base) is None:
        vision = VisionCache(max_images=len(shown))  # prompts that share an image but no prefix
    parts = []
    for each in passes:
        inputs = each.build()
        plan = inputs.get("tree_plan")
        with ExitStack() as stack:
            if plan is not None:
                stack.enter_context(installed(base))
            if vision is not None and each.images:
                stack.enter_context(vision.serving(base, each.images))
            parts.append(head_rows(model, inputs, each.taken))
        if plan is not None:
            layers = base.config.get_text_config().num_hidden_layers
            if plan.calls != layers:
                raise ValueError(
                    f"scoring='tree' needs {layers} attention layers that go through AttentionInterface, got "
                    f"{plan.calls} of {type(base).__name__}; use scoring='separate'"
                )
    if parts:
        rows = torch.cat([each.rows for each in passes])
        order = torch.empty_like(rows)
        order[rows] = torch.arange(len(rows))
        # Idle forwards give no rows but stay in the graph, so that their backward hooks run on this rank too.
        out = torch.cat(parts).index_select(0, order.to(parts[0].device))
    else:
        weight = base.get_input_embeddings().weight
        out = torch.zeros(0, base.config.get_text_config().hidden_size, dtype=weight.dtype, device=weight.device)
    assert len(out) == num_rows
    return out


def _level(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    passes: list[Pass],
    plan: Callable[[Sequence[ScoredSequence], int], list[Pass]],
    idle: ScoredSequence | None,
) -> list[Pass]:
    """As many forwards as the rank with the most, with the vision tower in the same ones, where they are collectives.

    Added forwards give no rows.
    """
    replicated = _reduces_gradients(model) and torch.is_grad_enabled()  # else without the wrapper
    sharded = _sharded(model)
    if not _distributed() or not (replicated or sharded):
        return passes
    base = base_model(model)
    most = torch.tensor(len(passes), device=base.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    passes = passes + [idle_pass(base)] * (int(most) - len(passes))
    trained = replicated and _trains_vision(base)
    if not passes or not (trained or (sharded and hasattr(inner_model(base), "get_image_features"))):
        return passes
    # Units of a sharded tower are gathered by its forward; wrappers wait for the gradients of a trained one.
    shows = torch.tensor([trained or bool(each.images) for each in passes], dtype=torch.int32, device=base.device)
    dist.all_reduce(shows, op=dist.ReduceOp.MAX)
    first_row = torch.tensor([0, *(len(s.scored) for s in sequences)]).cumsum(0).tolist()
    for k, needed in enumerate(shows.tolist()):
        if needed and not passes[k].images:
            shown = idle or next((s for s in sequences if s.prompt.images is not None), None)
            if shown is None:
                raise ValueError(
                    "idle must be a sequence with an image: other ranks run the vision tower, and this one has no image"
                )
            members = passes[k].members
            (joined,) = plan([*(sequences[i] for i in members), shown], sys.maxsize)
            rows = torch.tensor([r for i in members for r in range(first_row[i], first_row[i + 1])], dtype=torch.int64)
            own = joined.rows < len(rows)
            passes[k] = replace(joined, taken=joined.taken[own], rows=rows[joined.rows[own]], members=members)
    return passes


def _reduces_gradients(model: nn.Module) -> bool:
    """DDP or DeepSpeed: every rank has to have the same gradients, in the same buckets."""
    return isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine"


def _trains_vision(base: Any) -> bool:
    """Whether anything beside the language model and its head is trained."""
    language = {id(p) for module in (text_model(base), base.get_output_embeddings()) for p in module.parameters()}
    return any(p.requires_grad and id(p) not in language for p in base.parameters())


def _sharded(model: nn.Module) -> bool:
    """FSDP of either kind, or ZeRO-3: a forward gathers weights from every rank."""
    return any(type(m).__name__.startswith("FSDP") or isinstance(m, FSDPModule) for m in model.modules()) or any(
        hasattr(p, "ds_id") for p in model.parameters()
    )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# ---- the teacher ---------------------------------------------------------------------------------------------------


class TeacherBatch(Protocol):
    """What a step hands to the teacher: sequences, and how their rows supervise the student's."""

    @property
    def teacher_sequences(self) -> Sequence[ScoredSequence]: ...

    @property
    def supervision(self) -> Supervision: ...


class TeacherScorer:
    """Scores a step's teacher sequences without gradients, in eval mode and with the adapter off.

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
        self.stats = ScoringStats(0, 0, 0, 0.0)
        self.verified = False  # whether a row has been compared with unshared forwards
        self.deviation = 0.0  # what that comparison gave, relative to the norm of a hidden state
        if adapter == "off":
            check_adapter(model)

    @torch.no_grad()
    def score(
        self, batch: TeacherBatch, *, vision: VisionCache | None = None, idle: ScoredSequence | None = None
    ) -> tuple[Tensor, Supervision]:
        """The teacher's hidden rows (M, D), in the order of `batch.teacher_sequences`, and the batch's supervision.

        Args:
            vision: as in `hidden_states`; pass the same one to the student's call and its images are encoded once.
            idle: as in `hidden_states`.
        """
        start = time.perf_counter()
        sequences = list(batch.teacher_sequences)
        with teacher_mode(self.model, adapter=self.adapter):
            hidden, passes = self._hidden(sequences, vision, idle)
            if self.scoring == "tree" and (self.verify == "always" or (self.verify == "first" and not self.verified)):
                self._compare(sequences, hidden, idle)
                if self.scoring == "separate":
                    hidden, passes = self._hidden(sequences, vision, idle)
        self.stats = ScoringStats(
            tokens=sum(each.tokens for each in passes),
            tokens_separate=sum(len(fed_ids(s)) for s in sequences),
            forwards=len(passes),
            seconds=time.perf_counter() - start,
        )
        return hidden, batch.supervision

    def _hidden(
        self, sequences: Sequence[ScoredSequence], vision: VisionCache | None, idle: ScoredSequence | None
    ) -> tuple[Tensor, list[Pass]]:
        def plan(members: Sequence[ScoredSequence], budget: int) -> list[Pass]:
            return plan_passes(self.model, members, self.scoring, budget, self.backend, None)

        passes = _level(self.model, sequences, plan(sequences, self.token_budget), plan, idle)
        return _run(self.model, passes, sum(len(s.scored) for s in sequences), vision), passes

    def _compare(self, sequences: Sequence[ScoredSequence], hidden: Tensor, idle: ScoredSequence | None) -> None:
        """Compares the first row's states with its sequences run alone; a mismatch warns and ends sharing.

        The yardstick is what padding does to the same sequences in the model's own forward: rounding in 16 bits moves
        a deep model's states by percents, and no fixed tolerance fits both that and a wrong mask.
        """
        first = next((s.owner[0] for s in sequences if len(s.scored)), None)
        ends = torch.tensor([len(s.scored) for s in sequences], dtype=torch.int64).cumsum(0)
        chosen = [i for i, s in enumerate(sequences) if s.owner[0] == first and len(s.scored)]
        rows = [hidden[int(ends[i]) - len(sequences[i].scored) : int(ends[i])] for i in chosen]
        subset = [sequences[i] for i in chosen]
        alone = hidden_states(self.model, subset, scoring="separate", token_budget=1, idle=idle)
        padded = hidden_states(self.model, subset, scoring="separate", token_budget=self.token_budget, idle=idle)
        compared = mismatch = False
        if rows:
            self.deviation, usual = _deviation(torch.cat(rows), alone), _deviation(padded, alone)
            allowed = 4 * usual + (1e-4 if hidden.dtype in (torch.float32, torch.float64) else 1e-2)
            compared, mismatch = True, not self.deviation <= allowed  # NaN is a mismatch
        if _distributed():  # every rank goes on the same way
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
    """The largest relative distance ||a - b|| / ||b|| of a row."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).max())


@contextmanager
def teacher_mode(model: nn.Module, *, adapter: Literal["off", "on"] = "off") -> Iterator[None]:
    """Eval mode and, if asked, the adapter off; every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        if adapter == "off":
            check_adapter(model)
            stack.enter_context(_adapter_off(model))
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    core: Any = unwrap(model)
    if hasattr(core, "get_base_model"):
        with core.disable_adapter():
            yield
    elif getattr(core, "_hf_peft_config_loaded", False):
        core.disable_adapters()
        try:
            yield
        finally:
            core.enable_adapters()
    else:
        yield


def check_adapter(model: nn.Module) -> None:
    """Refuses adapters whose absence is not the model they were trained from."""
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
