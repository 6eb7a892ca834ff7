"""Pairs with a beta of their own: one call for each value, put together.

An engine takes one beta a call. Pairs of a skew KL get calls of their own, so that the others keep a faster engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.output import DivergenceOutput, joined, reduced
from vigos.divergence.supervision import JSD, KINDS, Supervision
from vigos.divergence.validation import check_labels


def by_beta(
    divergence: Callable[..., DivergenceOutput], sides: Sequence[Any], supervision: Supervision, labels: Tensor | None,
    reduction: str, options: dict[str, Any],
) -> DivergenceOutput:  # fmt: skip
    """Return `divergence(*sides, ...)` of pairs whose `supervision.beta` is given.

    Raises:
        ValueError: betas that are no floats in (0, 1), or torch.compile, which cannot count them.
    """
    if torch.compiler.is_compiling():
        raise ValueError("supervision.beta must be None under torch.compile: call once for each beta")
    rows = supervision.student_row
    r, beta = len(rows), supervision.beta
    beta = beta if isinstance(beta, Tensor) else torch.tensor(beta, dtype=torch.float64)
    if beta.shape not in ((r,), ()) or not beta.is_floating_point() or not bool(((beta > 0) & (beta < 1)).all()):
        raise ValueError(f"supervision.beta must be floats ({r},) in (0, 1), or one, got {supervision.beta!r}")
    labels = check_labels(labels, supervision, rows, sides[0].device)
    beta, kind = beta.detach().double().cpu().expand(r), supervision.kind
    kind = torch.as_tensor(KINDS.get(kind, -1) if isinstance(kind, str) else kind).cpu().expand(r)
    groups = torch.where(kind > JSD, beta + 2, torch.where(kind == JSD, beta, 0.0))
    outputs, places = [], []
    columns: dict[str, Any] = {f.name: getattr(supervision, f.name) for f in fields(supervision)} | {"beta": None}
    for group in groups.unique() if r else groups.new_zeros(1):
        index = (groups == group).nonzero().squeeze(1)
        numbers = {} if group == 0 else {"beta": float(beta[index[0]])}
        pairs = Supervision(**{k: x[index.to(x.device)] if _is_column(x) else x for k, x in columns.items()})
        ids = None if labels is None else labels[index.to(labels.device)]
        outputs.append(divergence(*sides, supervision=pairs, labels=ids, **numbers, **options))
        places.append(index)
    out = joined(outputs, places)
    both = (supervision.weight, supervision.clip)
    weight, clip = (torch.as_tensor(x).to(out.divergence.device).expand(r) for x in both)
    return replace(out, loss=reduced(out.loss, out.divergence, weight, clip, reduction))


def _is_column(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0
