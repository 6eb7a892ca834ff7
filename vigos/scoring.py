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
from inspect import signature
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vigos.prefix_tree import PrefixPack, PrefixTree, check_sequence, fed_ids, placeholders
from vigos.sequences import ImageInputs, ScoredSequence
from vigos.supervision import Supervision
from vigos.tree_attention import TreePlan, dummy_mask, installed, text_model
from vigos.vision import VisionCache

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
    inner: nn.Module | None = model
    while inner is not None:
        model = inner
        inner = next((model._modules[name] for name in _WRAPPED if model._modules.get(name) is not None), None)
    return model


def base_model(model: nn.Module) -> Any:
    """The transformers model inside wrappers and PEFT."""
    core: Any = unwrap(model)
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


def logit_settings(config: Any) -> dict[str, Any]:
    """What a model's own forward does to its head's output (Gemma caps it, Cohere and Granite scale it), as arguments
    of `linear_divergence`; from its text config."""
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return {"logit_softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": float(scale)}


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
        backend: the attention of "tree", see `vigos.tree_attention`; "separate" uses the model's own.
        pad_token_id: fills padding, which no result depends on; None takes the model's, or 0.
        vision: where the features of images come from if the vision tower is frozen. "tree" encodes an image once
            anyway within a call; a cache carries that over to later calls, as from the teachers to the student.
        idle: a sequence with an image. Where the vision tower is sharded or trained by several ranks, all of them have
            to run it in the same forwards: one that has no image there is shown this one, and gives no rows for it.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")

    def plan(members: Sequence[ScoredSequence], budget: int) -> list[_Pass]:
        return _plan(model, members, scoring, budget, backend, pad_token_id)

    passes = _level(model, sequences, plan(sequences, token_budget), plan, idle)
    return _run(model, passes, sum(len(s.scored) for s in sequences), vision)


# One forward of the model: how to build its inputs, which of its B * T flat positions are taken, and the output rows
# they become.
@dataclass(frozen=True)
class _Pass:
    build: Callable[[], dict[str, Any]]
    taken: Tensor  # (m,) int64
    rows: Tensor  # (m,) int64
    tokens: int
    images: tuple[ImageInputs, ...] = ()
    packed: bool = False
    members: tuple[int, ...] = ()  # of the sequences of the call


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
    base = base_model(model)
    lm_head(model)
    for sequence in sequences:
        check_sequence(sequence)
        _check_images(base, sequence)
    if scoring == "separate":
        return _separate_passes(base, sequences, token_budget, pad_token_id)
    check_tree(base)
    tree = PrefixTree(sequences, token_budget=token_budget, image_token_id=_image_token_id(base))
    return [_tree_pass(base, sequences, pack, backend) for pack in tree.packs]


def _run(model: nn.Module, passes: Sequence[_Pass], num_rows: int, vision: VisionCache | None) -> Tensor:
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
    passes: list[_Pass],
    plan: Callable[[Sequence[ScoredSequence], int], list[_Pass]],
    idle: ScoredSequence | None,
) -> list[_Pass]:
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
    passes = passes + [_idle_pass(base)] * (int(most) - len(passes))
    trained = replicated and _trains_vision(base)
    if not passes or not (trained or (sharded and hasattr(_inner(base), "get_image_features"))):
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


def _idle_pass(base: Any) -> _Pass:
    """One token that gives no row."""
    nothing = torch.empty(0, dtype=torch.int64)
    return _Pass(lambda: {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=base.device)}, nothing, nothing, 1)


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


def head_rows(model: nn.Module, inputs: dict[str, Any], taken: Tensor) -> Tensor:
    """Runs `model(**inputs)` and returns rows of what its language-model head was given. No logits are computed.

    The innermost module's `forward` is redirected for the call, so that a wrapper's own forward, with its hooks, sees
    the returned tensor as the module's output.

    Args:
        taken: (m,) int64, which of the B * T positions are returned, as (m, D).
    """
    core, head = unwrap(model), lm_head(model)
    if isinstance(model, DistributedDataParallel) and not torch.is_grad_enabled():
        model = model.module  # DDP's forward broadcasts buffers, which ranks with other counts would wait for

    def redirected(*args: Any, **kwargs: Any) -> Tensor:
        with replaced_forward(core, original), ExitStack() as stack:
            caught: list[Tensor] = []

            def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
                caught.append(hidden)
                return hidden

            stack.enter_context(replaced_forward(head, keep))
            original(*args, **kwargs)
        if len(caught) != 1:
            raise ValueError(
                f"model must apply its language-model head once a forward, got {len(caught)} times "
                f"in {type(base_model(model)).__name__}"
            )
        return caught[0].flatten(0, 1).index_select(0, taken.to(caught[0].device))

    original = core.forward
    with replaced_forward(core, redirected):
        return model(**inputs)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of the module's own, inside; its hooks and those of wrappers around it run as ever."""
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
    # Longest first: a batch is padded to its first sequence.
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
                images=tuple(s.prompt.images for _, s in members if s.prompt.images is not None),
                packed=False,
                members=tuple(batch),
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
        name = _token_types_name(base)
        if name is not None and any(s.prompt.token_type_ids is not None for _, s in members):
            inputs[name] = torch.stack([_token_types(s, width) for _, s in members])
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


def _token_types_name(base: Any) -> str | None:
    """What the model calls the token types of its prompts with images; None if it wants none."""
    known = set(signature(type(base).forward).parameters) | set(signature(type(_inner(base)).forward).parameters)
    return next((name for name in ("mm_token_type_ids", "token_type_ids") if name in known), None)


def _inner(base: Any) -> Any:
    """The model under the head: for multimodal families the one that holds the vision tower."""
    return getattr(base, base.base_model_prefix, base)


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


# ---- tree: one packed row --------------------------------------------------------------------------------------------

# Families whose image tokens see their whole block, in the layers' masks. Prefixes cover whole images, so they share.
_BLOCKWISE_IMAGES = ("gemma3",)
# Families in which a later token changes what an earlier one sees, or images enter by cross-attention.
_NOT_SHARED = {
    "paligemma": "its prompt attends to itself in both directions",
    "mllama": "its images enter by cross-attention",
    "gemma4": "its image tokens attend to each other",
    "molmo2": "its image tokens attend to each other",
    "git": "its image tokens attend to each other",
}
_SHARED_LAYERS = ("full_attention", "sliding_attention", "attention")


def check_tree(base: Any) -> None:
    """Refuses models in which the state at a token is more than keys and values of the tokens before it."""
    config, text = base.config, base.config.get_text_config()
    name = type(base).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"scoring='tree' needs a decoder-only model, got {name}; use scoring='separate'")
    reason = _NOT_SHARED.get(config.model_type)
    other = sorted(set(getattr(text, "layer_types", None) or ()) - set(_SHARED_LAYERS))
    if reason is None and other:
        reason = f"its layers of type {', '.join(other)} carry state that branches cannot share"
    if reason is None and getattr(base, "_is_stateful", False):
        reason = "it carries recurrent state along the sequence"
    if reason is not None:
        raise ValueError(f"scoring='tree' cannot share prefixes of {name}: {reason}; use scoring='separate'")


def _tree_pass(base: Any, sequences: Sequence[ScoredSequence], pack: PrefixPack, backend: str) -> _Pass:
    def build() -> dict[str, Any]:
        members = [sequences[i] for i in pack.members]
        limit = None
        if base.config.model_type in _BLOCKWISE_IMAGES and pack.images:
            limit = _block_limits(pack, members, _image_token_id(base))
        plan = TreePlan(pack, backend=backend, device=base.device, limit=limit)
        mask: Any = dummy_mask(base.device)
        if limit is not None:  # these families take their masks by layer type
            mask = {kind: mask for kind in _SHARED_LAYERS}
        inputs = {"input_ids": pack.ids[None], "position_ids": pack_positions(base, pack, members)}
        if pack.images:
            inputs |= concat_images(pack.images)
        on_device = {name: tensor.to(base.device) for name, tensor in inputs.items()}
        return on_device | {"attention_mask": mask, "tree_plan": plan, "use_cache": False}

    return _Pass(build, pack.taken, pack.rows, pack.tokens, pack.images, packed=True, members=tuple(pack.members))


def pack_positions(base: Any, pack: PrefixPack, members: Sequence[ScoredSequence]) -> Tensor:
    """The position ids of a pack: (3, 1, T) for models with three position axes, (1, T) for the others.

    Three axes come from the model's own rule, applied to every whole sequence; text goes on after the largest position
    of what precedes it.
    """
    inner = _inner(base)
    if not hasattr(inner, "get_rope_index"):
        return pack.depth[None]
    if not pack.images:
        return pack.depth.expand(3, 1, -1)
    ids = [fed_ids(s) for s in members]
    width = max(len(x) for x in ids)
    rule = {
        "input_ids": torch.stack([F.pad(x, (0, width - len(x))) for x in ids]),
        "attention_mask": torch.stack([(torch.arange(width) < len(x)).long() for x in ids]),
        "mm_token_type_ids": torch.stack([_token_types(s, width) for s in members]),
    } | concat_images([s.prompt.images for s in members if s.prompt.images is not None])
    known = signature(inner.get_rope_index).parameters
    positions = inner.get_rope_index(**{k: v.cpu() for k, v in rule.items() if k in known})[0]  # (3, B, width)
    return positions[:, pack.sequence, pack.depth][:, None]


def _block_limits(pack: PrefixPack, members: Sequence[ScoredSequence], image_token_id: int | None) -> Tensor:
    """The last depth each token of the pack sees, (T,): the end of its image, or itself."""
    limits = torch.empty_like(pack.depth)
    for j, sequence in enumerate(members):
        own = pack.sequence == j
        marks = placeholders(sequence, image_token_id)
        limit = torch.arange(int(pack.depth[own].max()) + 1 if bool(own.any()) else 0)
        ends = torch.nonzero(marks & ~F.pad(marks, (0, 1))[1:])[:, 0]
        inside = torch.nonzero(marks[: len(limit)])[:, 0]
        limit[inside] = ends[torch.searchsorted(ends, inside)]
        limits[own] = limit[pack.depth[own]]
    return limits


def _image_token_id(base: Any) -> int | None:
    config = base.config
    found = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    return found if isinstance(found, int) else None


def _check_images(base: Any, sequence: ScoredSequence) -> None:
    prompt = sequence.prompt
    if prompt.images is None:
        return
    if _token_types_name(base) is not None and prompt.token_type_ids is None:
        # Without them Qwen2.5-VL silently places every image token on one axis, and Gemma 3 masks images causally.
        raise ValueError(
            f"token_type_ids of the prompt of {sequence.owner} must be the processor's mm_token_type_ids for "
            f"{type(base).__name__}, got None; ask the processor for them with return_mm_token_type_ids=True"
        )
    if prompt.token_type_ids is not None and prompt.token_type_ids.shape != prompt.ids.shape:
        raise ValueError(
            f"token_type_ids of the prompt of {sequence.owner} must match its ids {tuple(prompt.ids.shape)}, got "
            f"{tuple(prompt.token_type_ids.shape)}"
        )


def text_flops(base: Any, pack: PrefixPack, *, backend: str = "segments") -> int:
    """Floating-point operations of the text model's matrix products in one forward of a pack, a multiply-add as two.

    Attention counts the scores the backend computes. Adapters and the vision tower are not included.
    """
    text, plan = base.config.get_text_config(), TreePlan(pack, backend=backend)
    weights = sum(
        m.in_features * m.out_features
        for name, m in text_model(base).named_modules()
        if isinstance(m, nn.Linear) and "lora_" not in name
    )
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    windows = [text.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    return 2 * pack.tokens * weights + sum(4 * heads * width * plan.pairs(backend, window) for window in windows)


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
    ) -> tuple[Tensor, list[_Pass]]:
        def plan(members: Sequence[ScoredSequence], budget: int) -> list[_Pass]:
            return _plan(self.model, members, self.scoring, budget, self.backend, None)

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
