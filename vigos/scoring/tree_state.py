"""The prefix tree for layers that carry state: short convolutions, Gated DeltaNet and Mamba-2 over a pack.

    x_0 … x_(n-1): the inputs of a token's path from the root            (what a sequence alone would have seen)
    convolution    c_t = sum_k w_k · x_(t-K+1+k) along the path          a branch begins with the last K-1 of its parent
    delta rule     S_t = exp(g_t) · S_(t-1) (I - β_t k_t k_tᵀ) + β_t k_t v_tᵀ;  o_t = S_tᵀ q_t      from its parent's S
    Mamba-2        S_t = exp(A Δ_t) · S_(t-1) + Δ_t B_t x_tᵀ;  y_t = S_tᵀ C_t + D x_t               from its parent's S

A pack is cut into runs wherever a branch leaves. Runs of one level (as many runs above them) go through the model's own
functions together, padded on the right: with g = β = 0 (Δ = 0) a padded token neither decays nor writes the state.
Token-wise projections, gates and norms run on the whole pack, in the model's own forward. Gradients flow through the
states that runs hand on. It costs a call a level, and levels are few: image prefix, question, completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vigos.models.compat import STATE_FUNCTIONS, state_functions
from vigos.scoring.prefix_tree import PrefixPack


@dataclass(frozen=True)
class Run:
    """Tokens [start, stop) of a pack, none of which another branch leaves between.

    Attributes:
        path: (P,) the pack's places of all tokens before it on its path.
        parent: number of the run that the path ends in; None for a root.
        level: number of runs above it.
    """

    start: int
    stop: int
    path: list[int]
    parent: int | None
    level: int


def cut_runs(pack: PrefixPack) -> list[Run]:
    """Cut a pack into runs, in its order: parents come before their branches."""
    segments, branches = [], set()
    keys, q_start, k_start = pack.kv_index.tolist(), 0, 0
    for q_len, k_len in zip(pack.q_len.tolist(), pack.k_len.tolist(), strict=True):
        path = keys[k_start : k_start + k_len - q_len]
        segments.append((q_start, q_start + q_len, path))
        if path:
            branches.add(path[-1] + 1)  # the tokens after it belong to other branches
        q_start, k_start = q_start + q_len, k_start + k_len
    runs: list[Run] = []
    ending: dict[int, int] = {}  # number of the run that ends in a place of the pack
    for start, stop, path in segments:
        cuts = [start, *sorted(place for place in branches if start < place < stop), stop]
        for a, b in pairwise(cuts):
            above = [*path, *range(start, a)]
            parent = ending[above[-1]] if above else None
            ending[b - 1] = len(runs)
            runs.append(Run(a, b, above, parent, 0 if parent is None else runs[parent].level + 1))
    return runs


@dataclass(frozen=True)
class Batch:
    """Runs of one level that go through a function together, as indices into the pack with T for padding.

    Attributes:
        runs: (B,) their numbers.
        places: (B, L) the pack's places of their tokens, padded on the right.
        parents: numbers of the runs they begin from; empty at the roots.
    """

    runs: Sequence[int]
    places: Tensor
    parents: Sequence[int]


class TreeState:
    """Runs of a pack, level by level, for the layers that carry state. Layers share it through their plan."""

    def __init__(self, pack: PrefixPack, device: torch.device | str) -> None:
        self.tokens, self.runs = pack.tokens, cut_runs(pack)
        self.batches = [self._batch(members, device) for members in self._groups()]
        places = torch.cat([batch.places.flatten() for batch in self.batches])
        kept = torch.nonzero(places < self.tokens)[:, 0]
        # Where the pack's tokens stand in the batches' outputs, end to end.
        self.order = torch.empty(self.tokens, dtype=torch.int64, device=device)
        self.order[places[kept]] = kept
        self._tails: dict[int, list[Tensor]] = {}
        self._device = device

    def _groups(self) -> Iterator[list[int]]:
        """Yield runs of one level whose lengths differ by less than two: more would be padding for the most part."""
        for level in range(1 + max(run.level for run in self.runs)):
            members = [i for i, run in enumerate(self.runs) if run.level == level]
            members.sort(key=lambda i: self.runs[i].start - self.runs[i].stop)
            while members:
                least = (self.runs[members[0]].stop - self.runs[members[0]].start) / 2
                group = [i for i in members if self.runs[i].stop - self.runs[i].start >= least]
                members = members[len(group) :]
                yield group

    def _batch(self, members: list[int], device: torch.device | str) -> Batch:
        runs = [self.runs[i] for i in members]
        width = max(run.stop - run.start for run in runs)
        places = torch.full((len(runs), width), self.tokens, dtype=torch.int64)
        for row, run in zip(places, runs, strict=True):
            row[: run.stop - run.start] = torch.arange(run.start, run.stop)
        return Batch(members, places.to(device), [run.parent for run in runs if run.parent is not None])

    def tails(self, length: int) -> list[Tensor]:
        """Return (B, length) for each batch: places of the last tokens before its runs, T where a path is shorter."""
        if length not in self._tails:
            self._tails[length] = []
            for batch in self.batches:
                tail = torch.full((len(batch.runs), length), self.tokens, dtype=torch.int64)
                for row, number in zip(tail, batch.runs, strict=True):
                    last = self.runs[number].path[-length:] if length else []
                    row[length - len(last) :] = torch.tensor(last, dtype=torch.int64)
                self._tails[length].append(tail.to(self._device))
        return self._tails[length]


def tree_conv(
    function: Callable[..., Tensor], alone: bool, x: Tensor, weight: Tensor, *args: Any, tree_plan: Any = None,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Run a causal depthwise convolution over a pack: x (1, C, T), weight (C, K) -> (1, C, T).

    Args:
        alone: the layer mixes tokens by nothing else, and counts as one that took the plan.
    """
    if tree_plan is None:
        return function(x, weight, *args, **kwargs)
    state: TreeState = tree_plan.state
    length = weight.shape[-1] - 1
    padded = torch.cat([x[0], x.new_zeros(x.shape[1], 1)], 1)  # (C, T + 1), zeros where nothing precedes
    out = []
    for batch, tail in zip(state.batches, state.tails(length), strict=True):
        places = torch.cat([tail, batch.places], 1)  # (B, K - 1 + L)
        rows = padded[:, places].transpose(0, 1).contiguous()  # (B, C, K - 1 + L)
        out.append(function(rows, weight, *args, **kwargs)[:, :, length:].transpose(0, 1).flatten(1))
    tree_plan.calls += alone
    return torch.cat(out, 1)[:, state.order][None]


Step = Callable[[list[Tensor], Tensor | None], tuple[Tensor, Tensor]]


def _over_runs(tree_plan: Any, tensors: Sequence[Tensor], step: Step) -> Tensor:
    """Run `step` level by level over a pack's tensors (1, T, ...): each run from the final state of its parent.

    Args:
        step: from a batch's tensors (B, L, ...), zeros for padding, and its initial states, to output and final states.
    """
    plan: TreeState = tree_plan.state
    padded = [torch.cat([x[0], x.new_zeros(1, *x.shape[2:])]) for x in tensors]
    states: dict[int, Tensor] = {}
    out = []
    for batch in plan.batches:
        begin = torch.stack([states[parent] for parent in batch.parents]) if batch.parents else None
        rows, final = step([x[batch.places] for x in padded], begin)
        states.update(zip(batch.runs, final, strict=True))
        out.append(rows.flatten(0, 1))
    tree_plan.calls += 1
    return torch.cat(out)[plan.order][None]


def tree_delta_rule(
    function: Callable[..., tuple[Tensor, Any]], query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor,
    tree_plan: Any = None, initial_state: Tensor | None = None, output_final_state: bool = False, **kwargs: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Run the gated delta rule over a pack: query, key (1, T, Hk, Dk), value (1, T, Hv, Dv), g, beta (1, T, Hv).

    Returns:
        the output (1, T, Hv, Dv), and no final state.
    """
    if tree_plan is None:
        return function(
            query, key, value, g=g, beta=beta, initial_state=initial_state, output_final_state=output_final_state,
            **kwargs,
        )  # fmt: skip

    def step(tensors: list[Tensor], begin: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, decay, rate = tensors
        return function(q, k, v, g=decay, beta=rate, initial_state=begin, output_final_state=True, **kwargs)

    return _over_runs(tree_plan, (query, key, value, g, beta), step), None


def tree_scan(
    function: Callable[..., Any], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, tree_plan: Any = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Run Mamba-2's scan over a pack: x (1, T, H, P), dt (1, T, H), A (H,), B and C (1, T, G, N) -> (1, T, H, P)."""
    if tree_plan is None:
        return function(x, dt, A, B, C, **kwargs)
    # Steps are made before padding: softplus and the least step would make a padded token decay the state.
    bias, softplus, (least, most) = (kwargs.pop(name) for name in ("dt_bias", "dt_softplus", "dt_limit"))
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = (F.softplus(dt) if softplus else dt).clamp(least, most)
    for name in ("initial_states", "return_final_states"):
        kwargs.pop(name, None)

    def step(tensors: list[Tensor], begin: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs, steps, writes, reads = tensors
        return function(inputs, steps, A, writes, reads, initial_states=begin, return_final_states=True, **kwargs)

    return _over_runs(tree_plan, (x, dt, B, C), step)


def _unfused(function: Callable[..., Any], *args: Any, tree_plan: Any = None, **kwargs: Any) -> Any:
    """Return None over a pack, as transformers' fallback does: the layer then calls convolution and scan apart."""
    return None if tree_plan is not None else function(*args, **kwargs)


@contextmanager
def state_installed(decoder: Any) -> Iterator[None]:
    """Let the state-carrying layers of a decoder take plans, inside; without one they run as ever."""
    with ExitStack() as stack:
        for holder, name in state_functions(decoder):
            original = getattr(holder, name)
            if not isinstance(original, partial):  # a replay inside this context
                alone = not any(hasattr(holder, scan) for scan in STATE_FUNCTIONS[1:3])
                known = (original, alone) if name == "causal_conv1d_fn" else (original,)
                setattr(holder, name, partial(_RUN[name], *known))
                stack.callback(setattr, holder, name, original)
        yield


_RUN: dict[str, Callable[..., Any]] = dict(
    zip(STATE_FUNCTIONS, (tree_conv, tree_delta_rule, tree_scan, _unfused), strict=True)
)
