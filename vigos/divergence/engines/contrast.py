"""Targets of pairs with a control: z* = z_t + contrast (z_t - z_c), cut to entries with p_t >= plausibility max p_t.

Without a softcap z is linear in the hidden states, so a target that is not cut is the product of one hidden state,
h_t + contrast (h_t - h_c): no product beside the two there are. A cut needs z_t itself, and z_c of the plausible
entries alone. The engines `cpu` and `triton` change a chunk's logits in place before their row kernels see them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vigos.divergence.engines.problem import LinearProblem, LogitTransform, all_reduce

CUT = 128.0  # nats under the row's likeliest entry: exp is 0 in float32


@dataclass(frozen=True)
class Targets:
    """The targets of some pairs of a problem.

    Attributes:
        step: (n, D) contrast (h_t - h_c) in the compute dtype, 0 for pairs whose target is made of logits; None: all 0.
        places: (k,) the pairs whose target is made of logits.
        contrast, plausibility: (k,) of these.
    """

    step: Tensor | None
    places: Tensor
    contrast: Tensor
    plausibility: Tensor


def targets(problem: LinearProblem, pairs: Tensor, *, wide: bool = True) -> Targets | None:
    """Return the targets of `pairs`, indices into the problem's; None where each is its teacher row.

    Args:
        wide: products take hidden states in the compute dtype; else they would round h_t + step, and every target is
            made of logits.
    """
    if problem.control_row is None or problem.contrast is None or problem.plausibility is None:
        return None
    contrast, plausibility = problem.contrast[pairs], problem.plausibility[pairs]
    linear = wide and problem.teacher_transform.softcap is None
    of_logits = plausibility > 0 if linear else (contrast != 0) | (plausibility > 0)
    alpha = torch.where(of_logits, 0.0, contrast)
    step = None
    if bool((alpha != 0).any()):
        hidden, dtype = problem.teacher_hidden, problem.compute_dtype
        separation = hidden[problem.teacher_row[pairs]].to(dtype) - hidden[problem.control_row[pairs]].to(dtype)
        step = torch.where((alpha != 0)[:, None], alpha[:, None].to(dtype) * separation, 0.0)
    places = of_logits.nonzero().squeeze(1)
    return Targets(step, places, contrast[places], plausibility[places])


def adjusted_transform(problem: LinearProblem) -> tuple[LogitTransform, Tensor | None]:
    """Return the teacher's transform and bias as the row kernels are to apply them to logits that `adjust` has left.

    Under a softcap a target has no raw logits, so a chunk holds the teacher's z.
    """
    if problem.control_row is None or problem.teacher_transform.softcap is None:
        return problem.teacher_transform, problem.teacher_bias
    return LogitTransform(), None


def adjust(
    problem: LinearProblem, found: Targets, student: Tensor, teacher: Tensor, separation: Callable[[Tensor], Tensor], *,
    difference: bool,
) -> Tensor:  # fmt: skip
    """Put the targets into a chunk's raw logits, (V, n) views of both sides; return what was cut, bool (V, k).

    Args:
        student: raw_s, or with `difference` raw_s - raw_t.
        separation: from entries (u,), those plausible in any pair of `found.places`, to their raw_t - raw_c, (u, k).
    """
    f, alpha = problem.teacher_transform, found.contrast.to(teacher.dtype)
    bias = None if problem.teacher_bias is None else problem.teacher_bias[: teacher.shape[0], None].to(teacher.dtype)
    everyone = found.places.shape[0] == teacher.shape[1]
    raw = teacher if bias is None else teacher + bias
    capped = f.softcap is not None
    if capped:  # the kernels take z from here on, of every pair
        raw = raw.clone()
        teacher.copy_(f(raw))
    t, s, raw = (x if everyone else x[:, found.places] for x in (teacher, student, raw))
    scale = 1.0 if capped else f.alpha
    z = t if capped else raw
    cut = z < _top(z, problem) + found.plausibility.to(z.dtype).log() / scale
    entries = (~cut).any(1).nonzero().squeeze(1)
    kept, moved = t[entries], alpha != 0
    if bool(moved.any()) and entries.shape[0] > 0:
        step = separation(entries)
        if capped:
            step = kept - f(raw[entries] - step)
        step = torch.where(moved & (kept > -math.inf), step * alpha, 0.0)
        kept += step
        t[entries] = kept
        if difference:
            s.index_add_(0, entries, step, alpha=-1)
    if difference:  # finite, because a kernel that adds a difference to -inf gets NaN
        z = kept if bias is None else kept + bias[entries]
        low = _top(z.masked_fill(cut[entries], -math.inf), problem) - CUT / scale
        low = low.expand_as(t) if bias is None else low - bias
        s.copy_(torch.where(cut, s + t - low, s))
        t.copy_(torch.where(cut, low, t))
    else:
        t.masked_fill_(cut, -math.inf)
    if not everyone:
        teacher[:, found.places], student[:, found.places] = t, s
    return cut


def _top(z: Tensor, problem: LinearProblem) -> Tensor:
    """Return the largest of each column over the ranks that share the vocabulary, (k,)."""
    local = z.amax(0) if z.shape[0] > 0 else z.new_full(z.shape[1:], -math.inf)
    return all_reduce(local, problem.group, "max")


def cut_labels(problem: LinearProblem, cut: Tensor, pairs: Tensor) -> Tensor:
    """Return which pairs' labels were cut from their targets, bool (k,)."""
    assert problem.labels is not None
    local = problem.labels[pairs] - problem.vocab_start
    mine = (local >= 0) & (local < cut.shape[0])
    columns = torch.arange(len(pairs), device=cut.device)[mine]
    found = torch.zeros(len(pairs), device=cut.device)
    found[mine] = cut[local[mine], columns].float()
    return all_reduce(found, problem.group) > 0
