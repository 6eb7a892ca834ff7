"""Attention over a prefix tree, plugged into transformers without touching a model's code.

    mask = (k <= q) & (q < subtree_end[k])                       # (T, T), what every backend computes
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)

`installed(model)` gives the text model's config the name of an attention function of ours for the duration of a call.
The function takes the plan from the keyword `tree_plan`, which transformers hands down to every layer, and calls what
the model was using before when there is none: ordinary calls are bit-identical. The name is also registered for masks;
transformers builds no mask for a name it does not know there, and padding would silently be attended to.

Image blocks that attend to themselves (Gemma 3) widen the mask to the end of the token's own block. That and a sliding
window are in terms of depths on the path from the root, not of places in the pack.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vigos.models.compat import attention_name, checkpoint_functions, set_attention_name, set_checkpoint_function
from vigos.models.parts import text_model
from vigos.scoring.prefix_tree import PrefixPack
from vigos.scoring.tree_state import TreeState, state_installed

BACKENDS = ("auto", "dense", "segments", "varlen", "flash_attn", "triton", "flex", "xformers")
DENSE_LIMIT = 8_192  # tokens; the dense mask takes T * T bytes, and as much again in the dtype of the query
_ROWS = 256  # queries a block of the segments backend masks at once: its memory is _ROWS * keys
_NAME = "vigos_tree_on_"


class TreePlan:
    """Hold what attention asks of a pack, on the model's device. Not a dataclass: FSDP would copy its fields.

    Args:
        pack: the packed sequences.
        backend: one of BACKENDS; a named one runs or raises.
        limit: (T,) int64, for models whose image tokens see their whole block: the last depth each token sees.
    """

    def __init__(
        self,
        pack: PrefixPack,
        *,
        backend: str = "auto",
        device: torch.device | str = "cpu",
        limit: Tensor | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.backend, self.tokens = backend, pack.tokens
        self.calls = 0  # how many attention layers took this plan
        self.q_len, self.k_len = pack.q_len.tolist(), pack.k_len.tolist()
        self.depth = pack.depth.to(device)
        self.subtree_end = pack.subtree_end.to(device)
        self.kv_index = pack.kv_index.to(device)
        self.cu_q, self.cu_k = _cumulative(pack.q_len).to(device), _cumulative(pack.k_len).to(device)
        self.limit = None if limit is None else limit.to(device)
        self._pack = pack
        # The segments backend cuts its blocks on the host.
        self._depth_host, self._limit_host = pack.depth, limit
        self._masks: dict[Any, Any] = {}  # masks are the same in every layer with the same window

    @cached_property
    def state(self) -> TreeState:
        """Return the pack's runs, for layers that carry state."""
        return TreeState(self._pack, self.depth.device)

    def dense_mask(self, window: int | None) -> Tensor:
        """Return (T, T) bool: the row's token sees the column's."""
        if ("dense", window) not in self._masks:
            q = torch.arange(self.tokens, device=self.depth.device)
            visible = (q[None] <= q[:, None]) & (q[:, None] < self.subtree_end[None])
            if self.limit is not None:
                # A block lies in one run of the pack, so distances in the pack are distances on the path.
                ahead = (q[None] > q[:, None]) & (q[None] - q[:, None] <= (self.limit - self.depth)[:, None])
                visible |= ahead
            if window is not None:
                visible &= self.depth[:, None] - self.depth[None] < window
            self._masks["dense", window] = visible
        return self._masks["dense", window]

    def blocks(self, window: int | None) -> list[Block]:
        """Return the segments backend's calls: one for a segment that holds its whole path, else runs of queries."""
        if ("blocks", window) not in self._masks:
            self._masks["blocks", window] = list(self._blocks(window))
        return self._masks["blocks", window]

    def _blocks(self, window: int | None) -> Iterator[Block]:
        q_start, k_start = 0, 0
        for q_len, k_len in zip(self.q_len, self.k_len, strict=True):
            if q_len == k_len and window is None and self._limit_host is None:
                yield Block(q_start, q_start + q_len, k_start, 0, k_len, causal=True)
            else:
                for a in range(q_start, q_start + q_len, _ROWS):
                    b = min(a + _ROWS, q_start + q_len)
                    last = (self._depth_host if self._limit_host is None else self._limit_host)[a:b].max()
                    low = 0 if window is None else max(0, int(self._depth_host[a]) - window + 1)
                    yield Block(a, b, k_start, low, int(last) + 1, causal=False)
            q_start, k_start = q_start + q_len, k_start + k_len

    def block_mask(self, block: Block, window: int | None) -> Tensor:
        """Return (queries, keys) bool of one block. Made anew a layer: kept, all of them would be tokens * path."""
        keys = torch.arange(block.low, block.high, device=self.depth.device)
        depth = self.depth[block.start : block.stop, None]
        mask = keys <= (depth if self.limit is None else self.limit[block.start : block.stop, None])
        return mask if window is None else mask & (depth - keys < window)


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) of the pack against keys [low, high) of a path whose gathered keys begin at `path`."""

    start: int
    stop: int
    path: int
    low: int
    high: int
    causal: bool  # queries and keys are the same tokens: no mask is needed


def _cumulative(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


# ---- backends: query (T, Hq, Dh), key (T, Hkv, Dh), value (T, Hkv, Dv) -> (T, Hq, Dv) -----------------------------


def _dense(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    if plan.tokens > DENSE_LIMIT:
        raise ValueError(
            f"backend='dense' takes packs of at most {DENSE_LIMIT} tokens, got {plan.tokens}; lower token_budget or "
            "use another backend"
        )
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    mask = plan.dense_mask(window)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=_grouped(query, key))
        return out[0].transpose(0, 1)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.mT * (scale / softcap))
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v)[0].transpose(0, 1)


def _segments(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    if softcap is not None:
        raise ValueError("backend='segments' has no softcap, got one from the model; use 'dense', 'triton' or 'flex'")
    k_all, v_all = (x.index_select(0, plan.kv_index).transpose(0, 1)[None] for x in (key, value))
    q_all = query.transpose(0, 1)[None]
    out = []
    for block in plan.blocks(window):
        keys = slice(block.path + block.low, block.path + block.high)
        out.append(
            F.scaled_dot_product_attention(
                q_all[:, :, block.start : block.stop],
                k_all[:, :, keys],
                v_all[:, :, keys],
                attn_mask=None if block.causal else plan.block_mask(block, window),
                is_causal=block.causal,
                scale=scale,
                enable_gqa=_grouped(query, key),
            )
        )
    return torch.cat(out, 2)[0].transpose(0, 1)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    if softcap is not None:
        raise ValueError(
            "backend='varlen' has no softcap, got one from the model; use 'triton', 'flash_attn' or 'flex'"
        )
    from torch.nn.attention.varlen import varlen_attn

    # The signature changed with every release: causal as a flag or as a window, with and without scale and groups.
    accepted = signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "scale" in accepted:
        options["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    if "window_size" in accepted:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is not None:
        raise ValueError(f"backend='varlen' of torch {torch.__version__} has no sliding window, got window {window}")
    else:
        options["is_causal"] = True
    if _grouped(query, key):
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    k, v = (x.index_select(0, plan.kv_index) for x in (key, value))
    out = varlen_attn(
        query.contiguous(), k, v, plan.cu_q, plan.cu_k, max(plan.q_len), max(plan.k_len), **options
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    k, v = (x.index_select(0, plan.kv_index) for x in (key, value))
    return flash_attn_varlen_func(
        query.contiguous(), k, v, plan.cu_q, plan.cu_k, max(plan.q_len), max(plan.k_len), softmax_scale=scale,
        causal=True, window_size=(-1 if window is None else window - 1, 0), softcap=softcap or 0.0,
    )  # fmt: skip


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    if softcap is not None:
        raise ValueError("backend='xformers' has no softcap, got one from the model; use 'triton' or 'flex'")
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    if "xformers" not in plan._masks:
        plan._masks["xformers"] = BlockDiagonalCausalFromBottomRightMask.from_seqlens(plan.q_len, plan.k_len)
    bias = plan._masks["xformers"]
    if window is not None:
        bias = bias.make_local_attention_from_bottomright(window)
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1).index_select(0, plan.kv_index) for x in (key, value))
    return memory_efficient_attention(query[None], k[None], v[None], attn_bias=bias, scale=scale)[0]


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not query.is_cuda and plan.tokens > DENSE_LIMIT:  # uncompiled, it holds every score
        raise ValueError(
            f"backend='flex' on {query.device} takes packs of at most {DENSE_LIMIT} tokens, got {plan.tokens}"
        )
    if ("flex", window) not in plan._masks:
        end, depth = plan.subtree_end, plan.depth

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k <= q) & (q < end[k])
            return seen if window is None else seen & (depth[q] - depth[k] < window)

        plan._masks["flex", window] = create_block_mask(visible, None, None, plan.tokens, plan.tokens, query.device)
    flex: Any = _compiled_flex() if query.is_cuda else flex_attention
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = flex(
        q, k, v, score_mod=None if softcap is None else partial(_softcap, softcap),
        block_mask=plan._masks["flex", window], scale=scale, enable_gqa=_grouped(query, key),
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _softcap(cap: float, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return cap * torch.tanh(score / cap)


def _triton(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    from vigos.kernels.tree_attention import Pack, tree_attention

    if "triton" not in plan._masks:
        plan._masks["triton"] = Pack(plan.subtree_end, plan.depth)
    return tree_attention(query, key, value, plan._masks["triton"], scale=scale, window=window, softcap=softcap)


_RUN: dict[str, Callable[..., Tensor]] = {
    "dense": _dense, "segments": _segments, "varlen": _varlen, "flash_attn": _flash_attn, "triton": _triton,
    "flex": _flex, "xformers": _xformers,
}  # fmt: skip


def _grouped(query: Tensor, key: Tensor) -> bool:
    return query.shape[1] != key.shape[1]


def choose_backend(query: Tensor, plan: TreePlan, softcap: float | None) -> str:
    """Return the backend that "auto" runs for these tensors.

    On a CPU one SDPA call a segment. On a GPU a library's varlen attention where dtype and head width allow it, then
    our kernel.
    """
    if not query.is_cuda:
        return "segments" if softcap is None else "dense"
    if plan.limit is not None:
        return "segments" if softcap is None else "dense"
    half = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    if half and softcap is None and find_spec("torch.nn.attention.varlen") is not None:
        return "varlen"
    if half and find_spec("flash_attn") is not None:
        return "flash_attn"
    return "triton"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Run the tree attention of one layer: query (T, Hq, Dh), key (T, Hkv, Dh), value (T, Hkv, Dv) -> (T, Hq, Dv).

    Args:
        scale: factor of query · key.
        window: how many keys a token sees at most, itself included, counted on its path; None: all.
        softcap: c in c * tanh(score / c); None: none.
    """
    backend = choose_backend(query, plan, softcap) if plan.backend == "auto" else plan.backend
    if plan.limit is not None and backend not in ("dense", "segments"):
        raise ValueError(
            f"backend must be 'auto', 'segments' or 'dense' where image tokens see each other, got {backend!r}"
        )
    return _RUN[backend](query, key, value, plan, scale, window, softcap)


# ---- transformers --------------------------------------------------------------------------------------------------


def _attention_forward(
    previous: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    tree_plan: TreePlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the plan if there is one: query (1, Hq, T, Dh), key and value (1, Hkv, T, Dh) -> (1, T, Hq, Dh)."""
    if tree_plan is None:
        return _previous_function(previous, module)(module, query, key, value, attention_mask, *args, **kwargs)
    if query.shape[0] != 1 or query.shape[2] != tree_plan.tokens or key.shape[2] != tree_plan.tokens:
        raise ValueError(
            f"the prefix tree needs self-attention over its {tree_plan.tokens} tokens, got query {tuple(query.shape)} "
            f"and key {tuple(key.shape)} in {type(module).__name__}; use scoring='separate' for this model"
        )
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"the prefix tree has no {name}, got it from {type(module).__name__}; use scoring='separate'"
            )
    if kwargs.get("dropout"):
        raise ValueError(f"attention dropout must be 0 in a prefix tree, got {kwargs['dropout']}")
    scale = kwargs.get("scaling")
    out = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        tree_plan,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
    )
    tree_plan.calls += 1
    return out[None].contiguous(), None


def _previous_function(previous: str, module: nn.Module) -> Callable[..., Any]:
    from transformers import AttentionInterface

    if previous == "eager":  # every modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[previous]


def registered_name(previous: str) -> str:
    """Register the attention that runs a plan if there is one and `previous` otherwise; return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = _NAME + previous
    if name not in AttentionInterface():
        AttentionMaskInterface.register(name, AttentionMaskInterface()[previous])
        AttentionInterface.register(name, partial(_attention_forward, previous))
    return name


@contextmanager
def installed(base: Any) -> Iterator[None]:
    """Let the text model of a transformers model take plans; restore it afterwards.

    Layers under gradient checkpointing run again during backward, when this context is gone: their checkpoint function
    is wrapped so that the replay runs in the same state.
    """
    decoder = text_model(base)
    configs: dict[int, Any] = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}
    before = [(config, attention_name(config)) for config in configs.values()]
    checkpointed = checkpoint_functions(decoder)
    try:
        for config, previous in before:
            if not previous.startswith(_NAME):  # a replay inside this context
                set_attention_name(config, registered_name(previous))
        for module, function in checkpointed.items():
            set_checkpoint_function(module, partial(_checkpoint_installed, base, function))
        with state_installed(decoder):
            yield
    finally:
        for config, previous in before:
            set_attention_name(config, previous)
        for module, function in checkpointed.items():
            set_checkpoint_function(module, function)


def _checkpoint_installed(base: Any, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(partial(_call_installed, base, function), *args)


def _call_installed(base: Any, function: Callable[..., Any], *args: Any) -> Any:
    with installed(base):
        return function(*args)


def dummy_mask(device: torch.device | str) -> Tensor:
    """Return a mask that keeps transformers from building one. It fits no scores: a layer that uses it fails."""
    return torch.zeros(1, 1, 0, 0, dtype=torch.bool, device=device)
