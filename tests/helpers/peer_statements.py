"""What other codebases' distillation losses compute, stated line by line in the dtype of their inputs.

Written from their documented behaviour, for those that are no packages (OPSD, the released ViGOS code, verl's top-k
loss) and as the float64 truth for those that are. Every logit is held and autograd differentiates; `bench/dropins.py`
times the same lines as "before".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Terms of KL(a || b) from log-probabilities, entry by entry; nothing where a has no probability."""
    possible = a > -math.inf
    return torch.where(possible, a.exp() * (torch.where(possible, a, 0.0) - torch.where(possible, b, 0.0)), 0.0)


def jsd_terms(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Entry by entry, from log-probabilities: forward KL at beta 0, reverse KL at 1, else the generalized JSD."""
    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = ((1 - beta) * student.exp() + beta * teacher.exp()).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def opsd(
    student: Tensor, teacher: Tensor, labels: Tensor, beta: float, temperature: float, top_k: int | None,
    token_clip: float | None,
) -> Tensor:  # fmt: skip
    """OPSD: temperature, teacher's top-k renormalised, divergence, clip of each entry, mean over kept tokens."""
    student, teacher = student / temperature, teacher / temperature
    if top_k:
        ids = teacher.topk(top_k, -1).indices
        student, teacher = student.gather(-1, ids), teacher.gather(-1, ids)
    terms = jsd_terms(student.log_softmax(-1), teacher.log_softmax(-1), beta)
    if token_clip is not None:
        terms = terms.clamp(max=token_clip)
    return terms[labels != -100].sum() / (labels != -100).sum()


def released(
    source: Tensor, target: Tensor, mask: Tensor, temperature: float, token_clip: float | None,
    post_clip_mask: Tensor | None, post_token_clip: float | None,
) -> Tensor:  # fmt: skip
    """The released ViGOS code: KL(source || target) of each active token, clipped after its sum, mean over them."""
    tokens = kl((source / temperature).log_softmax(-1), (target / temperature).log_softmax(-1)).sum(-1)[mask]
    if token_clip:
        tokens = tokens.clamp(max=token_clip)
    if post_clip_mask is not None and post_token_clip:
        tokens = torch.where(post_clip_mask[mask], tokens.clamp(max=post_token_clip), tokens)
    return tokens.sum() / mask.sum()


def verl(logits: Tensor, log_probs: Tensor, ids: Tensor, floor: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """verl: KL over the teacher's top-k ids with both log-probabilities bounded below; the two masses before that."""
    log_q = logits.log_softmax(-1).gather(-1, ids)
    masses = log_q.exp().sum(-1), log_probs.exp().sum(-1)
    if floor is not None:
        log_q, log_probs = log_q.clamp(min=floor), log_probs.clamp(min=floor)
    return (log_probs.exp() * (log_probs - log_q)).sum(-1), *masses


def heads(
    student: Tensor, teacher: Tensor, w_s: Tensor, w_t: Tensor, mask: Tensor, beta: float, *,
    bias_s: Tensor | None = None, bias_t: Tensor | None = None, scale_s: float = 1.0, scale_t: float = 1.0,
    cap_s: float | None = None, cap_t: float | None = None, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """TRL's chunked divergence, unchunked: (sum of divergences, sum of the student's entropies) over the mask."""

    def log_probs(hidden: Tensor, w: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
        z = torch.nn.functional.linear(hidden[mask], w, bias) * scale
        z = z if cap is None else cap * torch.tanh(z / cap)
        return (z / temperature).log_softmax(-1)

    log_q, log_p = log_probs(student, w_s, bias_s, scale_s, cap_s), log_probs(teacher, w_t, bias_t, scale_t, cap_t)
    return jsd_terms(log_q, log_p.detach(), beta).sum(), -(log_q.exp() * log_q).sum().detach()
