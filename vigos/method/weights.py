"""Weights and shapes of a pair's part of the loss, composed on `out.divergence`, whose rows are differentiable each.

    advantage: [low, high]   w = clip(log p_t(y) - log p_c(y), low, high)     c: the teacher's control; arXiv 2605.21924
    entropy: h               w = min(H(p_t) / h, 1)                           H in nats; as in arXiv 2603.07079
    position: decay          w = decay ** i                                   i: the token's place in its completion
    unlikely: p              w = 1 where p_s(y) < p, else 0                   p_s: the student's
    soft_clip: tau           tau tanh(d / tau) in the place of min(d, clip)   arXiv 2606.01249 clips hard

Weights are constants of the step: no gradient goes through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.output import in_order


@dataclass(frozen=True)
class Pairs:
    """Hold what R pairs are weighed by, (R,) each, detached.

    Attributes:
        divergence: nats, before any clip.
        teacher_logprob, control_logprob: of the token that was written; `control_logprob` is `teacher_logprob` where
            there is no control. Without contrast the teacher's is that of `out`.
        teacher_entropy: of the target, nats.
        student_logprob: of the token that was written, nats.
        token: int64, the token's place in its completion.
    """

    divergence: Tensor
    teacher_logprob: Tensor
    control_logprob: Tensor
    teacher_entropy: Tensor
    token: Tensor
    student_logprob: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Pairs], places: Sequence[Tensor]) -> Pairs:
        """Return parts of a batch's pairs in the order of their places, as in `vigos.divergence.output.joined`."""
        columns = {f.name: in_order([getattr(part, f.name) for part in parts], places) for f in fields(cls)}
        return cls(**columns)  # type: ignore[arg-type]


def advantage(pairs: Pairs, bounds: Sequence[float]) -> Tensor:
    """Return the visual advantage of each pair, clipped to two bounds."""
    return (pairs.teacher_logprob - pairs.control_logprob).clamp(*bounds)


def entropy(pairs: Pairs, full: float) -> Tensor:
    """Return the teacher's entropy as a share of `full` nats, at most 1."""
    return (pairs.teacher_entropy / full).clamp(max=1.0)


def position(pairs: Pairs, decay: float) -> Tensor:
    """Return decay ** i of the completion's token i."""
    return torch.pow(decay, pairs.token.to(pairs.divergence))


def unlikely(pairs: Pairs, below: float) -> Tensor:
    """Return 1 where the student gave the written token a probability below `below`, else 0."""
    return (pairs.student_logprob < math.log(below)).to(pairs.divergence)


WEIGHTS: dict[str, Callable[[Pairs, Any], Tensor]] = {
    "advantage": advantage, "entropy": entropy, "position": position, "unlikely": unlikely,
}  # fmt: skip


def check_weights(weigh: Mapping[str, Any], *, has_control: bool) -> None:
    """Refuse unknown weights and numbers that they do not take."""
    if not isinstance(weigh, Mapping):
        raise ValueError(f"weigh must map names to numbers, got {weigh!r}")
    for name, value in weigh.items():
        if name not in WEIGHTS:
            raise ValueError(f"weigh must be of {', '.join(WEIGHTS)}, got {name!r}")
        if name == "advantage":
            if not (isinstance(value, list | tuple) and len(value) == 2 and 0 <= value[0] < value[1]):
                raise ValueError(f"weigh advantage must be two bounds, 0 <= low < high, got {value!r}")
            if not has_control:
                raise ValueError("weigh advantage needs a control, got none")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"weigh {name} must be a number above 0, got {value!r}")
        elif name == "unlikely" and value > 1:
            raise ValueError(f"weigh unlikely must be at most 1, got {value!r}")
