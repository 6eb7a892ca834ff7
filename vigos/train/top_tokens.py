"""Find the likeliest tokens of student and teacher at supervised positions, a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.head import Head
from vigos.divergence.output import in_order
from vigos.divergence.reference import logits as head_logits

ROWS_AT_A_TIME = 128  # 128 x 152,000 logits in float32 are 78 MB


@torch.no_grad()
def top_tokens(hidden: Tensor, head: Head, rows: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the `k` most likely ids at `rows` (R,) of `hidden` (N, D), under a head (V, D).

    Returns:
        ids (R, k) int64 and probabilities (R, k) float32 on the CPU, most likely first; k is at most V.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    k = min(k, len(head.weight))
    ids, probabilities = torch.empty(len(rows), k, dtype=torch.int64), torch.empty(len(rows), k)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        chosen = rows[start : start + ROWS_AT_A_TIME].to(hidden.device)
        z = head_logits(hidden[chosen], head, temperature=temperature).float()
        values, ids[start : start + len(chosen)] = z.topk(k)
        probabilities[start : start + len(chosen)] = (values - z.logsumexp(-1, keepdim=True)).exp()
    return ids, probabilities


def joined_top(parts: Sequence[Any], places: Sequence[Tensor]) -> Any:
    """Return the likeliest tokens of parts of a batch's pairs, of both sides, in the order of their places."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    return tuple(tuple(in_order([p[side][i] for p in parts], places) for i in (0, 1)) for side in (0, 1))
