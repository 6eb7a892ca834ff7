"""Hidden states at the scored positions of many sequences, and the frozen teacher that computes them.

`hidden_states` runs a transformers model and returns what its language-model head is applied to, without the head:

    out = model(**batch, output_hidden_states=True).hidden_states[-1]     # after the final norm
    rows = torch.cat([out[b, len(prompt) + scored - 1] for b, (prompt, scored) in enumerate(...)])

The head is switched off rather than bypassed: the model's own `forward` runs, so that mixed precision, adapters and
the hooks of DDP, FSDP and DeepSpeed wrappers work as in an ordinary step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vigos.sequences import ImageInputs, ScoredSequence
from vigos.supervision import Supervision

Scoring = Literal["tree", "separate"]
SCORINGS: tuple[Scoring, ...] = ("tree", "separate")
DEFAULT_TOKEN_BUDGET = 16_384  # tokens of one forward; a longer sequence gets a forward of its own

# What wrappers call the module inside them: DDP and DeepSpeed, FSDP, torch.compile, activation checkpointing.
_WRAPPED = ("module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class ScoringStats:
    """What the last call cost. `tokens_separate` is what unshared forwards without padding would have fed."""

    tokens: int
    tokens_separate: int
    forwards: int
    seconds: float


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers or PEFT model inside DDP, FSDP, DeepSpeed and torch.compile wrappers."""
    while inner := next((model._modules[name] for name in _WRAPPED if model._modules.get(name) is not None), None):
        model = inner
    return model


def base_model(model: nn.Module) -> Any:
    """The transformers model inside wrappers and PEFT."""
    core = unwrap(model)
    base = core.get_base_model() if hasattr(core, "get_base_model") else core
    if not hasattr(base, "get_output_embeddings"):
        raise ValueError(f"model must be a transformers model with a language-model head, got {type(base).__name__}")
    return base


def lm_head(model: nn.Module) -> nn.Module:
    """The language-model head inside wrappers and PEFT."""
    base = base_model(model)
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have a language-model head, got {type(base).__name__}, which has none")
    return head


def hidden_states(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    *,
    scoring: Scoring = "tree",
    token_budget: int = DEFAULT_TOKEN_BUDGET,
    backend: str = "auto",
    pad_token_id: int | None = None,
    forwards: int | None = None,
) -> Tensor:
    """Hidden states (M, D) that predict the scored tokens, in the order of `sequences` and of their `scored`.

    Differentiable when gradients are enabled. D is the width of the language-model head's input; M the sum of the
    lengths of `scored`; the dtype is what the model computes in.

    Args:
        model: a transformers model with a language-model head, bare, adapted by PEFT, or wrapped (DDP, FSDP, …).
        scoring: "tree" runs every distinct prefix once (see `vigos.PrefixTree`); "separate" runs right-padded batches.
        token_budget: tokens of one forward, padding included. A single longer sequence still gets its forward.
        backend: the attention of "tree", see `vigos.tree_attention`; "separate" uses the model's own.
        pad_token_id: fills padding, which no result depends on; None takes the model's, or 0.
        forwards: run at least this many forwards, the missing ones over a single token. Sharded models need the same
            number on every rank: pass the maximum of `count_forwards` over the ranks.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    passes = _plan(model, sequences, scoring, token_budget, backend, pad_token_id)
    return _run(model, passes, sum(len(s.scored) for s in sequences), forwards)


def count_forwards(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    *,
    scoring: Scoring = "tree",
    token_budget: int = DEFAULT_TOKEN_BUDGET,
) -> int:
    """How many forwards `hidden_states` will run for these sequences."""
    return len(_plan(model, sequences, scoring, token_budget, "auto", None))


# One forward of the model: how to build its inputs, which of its B * T flat positions are taken, and the output rows
# they become.
@dataclass(frozen=True)
class _Pass:
    build: Callable[[], dict[str, Any]]
    taken: Tensor  # (m,) int64
    rows: Tensor  # (m,) int64
    tokens: int


def _plan(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    scoring: Scoring,
    token_budget: int,
    backend: str,
    pad_token_id: int | None,
) -> list[_Pass]:
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    for sequence in sequences:
        _check(sequence)
    if scoring == "tree":
        raise NotImplementedError("scoring='tree' is not available in this version; use scoring='separate'")
    return _separate_passes(base_model(model), sequences, token_budget, pad_token_id)


def _check(sequence: ScoredSequence) -> None:
    scored, length = sequence.scored, len(sequence.completion_ids)
    if len(scored) == 0:
        return
    if scored.dtype.is_floating_point or scored.dtype == torch.bool:
        raise ValueError(f"scored of {sequence.owner} must be integer indices, got dtype {scored.dtype}")
    if bool((scored[1:] <= scored[:-1]).any()) or int(scored[0]) < 0 or int(scored[-1]) >= length:
        raise ValueError(
            f"scored of {sequence.owner} must increase within [0, {length}), the completion's tokens, "
            f"got {scored.tolist()[:8]} … {int(scored[-1])}"
        )
    if len(sequence.prompt.ids) == 0:
        raise ValueError(f"prompt of {sequence.owner} must hold at least one token, got none")


def fed_ids(sequence: ScoredSequence) -> Tensor:
    """The ids (T,) a model has to read: prompt and completion up to the token before the last scored one."""
    if len(sequence.scored) == 0:
        return sequence.prompt.ids[:0]
    return torch.cat([sequence.prompt.ids, sequence.completion_ids[: int(sequence.scored[-1])].to(sequence.prompt.ids)])


def _run(model: nn.Module, passes: Sequence[_Pass], num_rows: int, forwards: int | None) -> Tensor:
    base = base_model(model)
    parts = []
    for each in passes:
        hidden = head_input(model, each.build())
        parts.append(hidden.flatten(0, 1).index_select(0, each.taken.to(hidden.device)))
    if forwards is not None and forwards < len(passes):
        raise ValueError(f"forwards must be at least {len(passes)}, what these sequences need, got {forwards}")
    idle = None
    for _ in range((forwards or 0) - len(passes)):
        one = head_input(model, {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=base.device)})
        idle = one if idle is None else idle + one
    if parts:
        rows = torch.cat([each.rows for each in passes])
        order = torch.empty_like(rows)
        order[rows] = torch.arange(len(rows))
        out = torch.cat(parts).index_select(0, order.to(parts[0].device))
    else:
        weight = base.get_input_embeddings().weight
        out = torch.zeros(0, base.config.get_text_config().hidden_size, dtype=weight.dtype, device=weight.device)
    assert len(out) == num_rows
    # The idle forwards stay in the graph, so that their backward hooks run on this rank too.
    return out if idle is None else torch.cat([out, idle[0, :0].to(out.dtype)])


def head_input(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Runs `model(**inputs)` and returns what its language-model head was given, (B, T, D). No logits are computed.

    The innermost module's `forward` is redirected for the call, so that a wrapper's own forward, with its hooks, sees
    the returned tensor as the module's output.
    """
    core, head = unwrap(model), lm_head(model)

    def redirected(*args: Any, **kwargs: Any) -> Tensor:
        with _replaced_forward(core, original), ExitStack() as stack:
            caught: list[Tensor] = []

            def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
                caught.append(hidden)
                return hidden

            stack.enter_context(_replaced_forward(head, keep))
            original(*args, **kwargs)
        if len(caught) != 1:
            raise ValueError(
                f"model must apply its language-model head once a forward, got {len(caught)} times "
                f"in {type(base_model(model)).__name__}"
            )
        return caught[0]

    original = core.forward
    with _replaced_forward(core, redirected):
        return model(**inputs)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate's autocast and offload hooks live on the instance
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


# ---- separate: right-padded batches ------------------------------------------------------------------------------


def _separate_passes(
    base: Any, sequences: Sequence[ScoredSequence], token_budget: int, pad_token_id: int | None
) -> list[_Pass]:
    ids = [fed_ids(s) for s in sequences]
    first_row = [0]
    for sequence in sequences:
        first_row.append(first_row[-1] + len(sequence.scored))
    # Longest first: a batch is padded to its first sequence. Python's sort is stable, so equal lengths keep their order.
    order = sorted((i for i in range(len(ids)) if len(ids[i])), key=lambda i: -len(ids[i]))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * len(ids[batches[-1][0]]) <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    passes = []
    for batch in batches:
        width = len(ids[batch[0]])
        taken = [b * width + len(sequences[i].prompt.ids) + sequences[i].scored.cpu() - 1 for b, i in enumerate(batch)]
        rows = [torch.arange(first_row[i], first_row[i + 1]) for i in batch]
        members = [(ids[i], sequences[i]) for i in batch]
        passes.append(
            _Pass(
                build=lambda members=members: _padded_batch(base, members, pad_token_id),  # type: ignore[misc]
                taken=torch.cat(taken),
                rows=torch.cat(rows),
                tokens=len(batch) * width,
            )
        )
    return passes


def _padded_batch(
    base: Any, members: Sequence[tuple[Tensor, ScoredSequence]], pad_token_id: int | None
) -> dict[str, Any]:
    width = max(len(ids) for ids, _ in members)
    pad = pad_token_id if pad_token_id is not None else _pad_token_id(base)
    inputs = {
        "input_ids": torch.stack([F.pad(ids.cpu(), (0, width - len(ids)), value=pad) for ids, _ in members]),
        "attention_mask": torch.stack([(torch.arange(width) < len(ids)).long() for ids, _ in members]),
    }
    images = [s.prompt.images for _, s in members if s.prompt.images is not None]
    if images:
        inputs |= concat_images(images)
        if takes(base, "mm_token_type_ids") and any(s.prompt.token_type_ids is not None for _, s in members):
            inputs["mm_token_type_ids"] = torch.stack([_token_types(s, width) for _, s in members])
    return {name: tensor.to(base.device) for name, tensor in inputs.items()}


def _token_types(sequence: ScoredSequence, width: int) -> Tensor:
    """mm_token_type_ids (width,): the prompt's, then 0 for the completion and the padding."""
    types = sequence.prompt.token_type_ids
    if types is None:
        return torch.zeros(width, dtype=torch.int64)
    return F.pad(types.cpu().long(), (0, max(width - len(types), 0)))[:width]


def _pad_token_id(base: Any) -> int:
    pad = getattr(base.config.get_text_config(), "pad_token_id", None)
    return pad if pad is not None and pad >= 0 else 0


def takes(base: Any, name: str) -> bool:
    """Whether the model's forward, or the forward of the multimodal model under its head, names this argument."""
    inner = getattr(base, "base_model", base)
    return any(name in signature(type(module).forward).parameters for module in (base, inner))


def concat_images(images: Sequence[ImageInputs]) -> dict[str, Tensor]:
    """The images of several prompts as one processor call would have returned them.

    Every family stacks along the first axis (patches, tiles, images or prompts). Where the second axis counts tiles or
    images and differs, it is filled with zeros, the filling that these families' own processors use and models skip.
    """
    names = list(images[0].tensors)
    for each in images:
        if list(each.tensors) != names:
            raise ValueError(f"images of one batch must carry the same tensors {names}, got {list(each.tensors)}")
    joined = {}
    for name in names:
        tensors = [each.tensors[name] for each in images]
        if tensors[0].ndim >= 4:
            second = max(t.shape[1] for t in tensors)
            if len({t.shape[2:] for t in tensors}) > 1:
                raise ValueError(
                    f"{name} of one batch must agree beyond the second axis, got {[tuple(t.shape) for t in tensors]}; "
                    "let the image processor resize them to one size"
                )
            tensors = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, second - t.shape[1])) for t in tensors]
        joined[name] = torch.cat(tensors)
    return joined


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
        if adapter == "off":
            check_adapter(model)

    @torch.no_grad()
    def score(self, batch: TeacherBatch) -> tuple[Tensor, Supervision]:
        """The teacher's hidden rows (M, D), in the order of `batch.teacher_sequences`, and the batch's supervision."""
        start = time.perf_counter()
        sequences = list(batch.teacher_sequences)
        with teacher_mode(self.model, adapter=self.adapter):
            passes = _plan(self.model, sequences, self.scoring, self.token_budget, self.backend, None)
            hidden = _run(self.model, passes, sum(len(s.scored) for s in sequences), None)
        self.stats = ScoringStats(
            tokens=sum(each.tokens for each in passes),
            tokens_separate=sum(len(fed_ids(s)) for s in sequences),
            forwards=len(passes),
            seconds=time.perf_counter() - start,
        )
        return hidden, batch.supervision


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
    core = unwrap(model)
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
    head_path = next((name for name, module in core.named_modules() if module is lm_head(core)), "")
    if hasattr(lm_head(core), "base_layer"):
        raise ValueError(
            f"the adapter must not cover the language-model head {head_path!r}: student and teacher share it"
        )
