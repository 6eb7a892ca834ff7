"""The likeliest tokens of student and teacher at supervised positions, for records; a few rows of logits at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from vigos.divergence.reference import logits as head_logits

ROWS_AT_A_TIME = 128  # 128 x 152,000 logits in float32 are 78 MB


@torch.no_grad()
def top_tokens(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The `k` most likely ids at `rows` (R,) of `hidden` (N, D), under the head `weight` (V, D).

    A head that is sharded over the vocabulary (a DTensor) is used in place, by all of its ranks together.

    Returns:
        ids (R, k) int64 and probabilities (R, k) float32 on the CPU, most likely first; k is at most V.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    k = min(k, len(weight))
    group: dist.ProcessGroup | None = None
    if isinstance(weight, DTensor):
        group = weight.device_mesh.get_group()
        weight = weight.to_local()
        bias = bias.to_local() if isinstance(bias, DTensor) else bias
    first = _rows_before(len(weight), group, hidden.device)
    ids, probabilities = torch.empty(len(rows), k, dtype=torch.int64), torch.empty(len(rows), k)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        chosen = rows[start : start + ROWS_AT_A_TIME].to(hidden.device)
        z = head_logits(
            hidden[chosen], weight, bias, temperature=temperature, logit_softcap=logit_softcap, logit_scale=logit_scale
        ).float()
        values, places = z.topk(min(k, z.shape[1]))
        lse, places = z.logsumexp(-1, keepdim=True), places + first
        if group is not None:  # the best of each rank's best
            missing = (0, k - values.shape[1])
            values = _side_by_side(F.pad(values, missing, value=-float("inf")), group)
            places, lse = _side_by_side(F.pad(places, missing), group), _side_by_side(lse, group)
            values, best = values.topk(k)
            places, lse = places.gather(1, best), lse.logsumexp(-1, keepdim=True)
        ids[start : start + len(chosen)] = places.cpu()
        probabilities[start : start + len(chosen)] = (values - lse).exp().cpu()
    return ids, probabilities


def _side_by_side(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(R, ranks * K) from each rank's (R, K)."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _rows_before(rows: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """How many rows of a sharded head the ranks before this one hold."""
    if group is None:
        return 0
    sizes = _side_by_side(torch.tensor([[rows]], device=device), group)
    return int(sizes[0, : group.rank()].sum())
