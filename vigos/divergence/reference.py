"""The definition of every divergence in a few lines of PyTorch: any dtype, any device, differentiable by autograd.

The tests' oracle (in float64) and the answer to "what exactly does vigos compute?". It holds every logit; the engine
`impl="reference"` computes the same in chunks. Logits z are softcap(scale * (hidden @ weight.T + bias)) / temperature.
A logit of -inf on both sides adds nothing. Where one distribution has probability 0 and the other, which weights the
logarithm, does not, a KL is +inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vigos.divergence.head import Head
from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL, SKEW_FORWARD, SKEW_REVERSE, Supervision

INF = float("inf")


def logits(hidden: Tensor, head: Head | Tensor, *, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """Return the (..., V) logits of `hidden` (..., D) under a head, or its weight (V, D), ready for softmax."""
    head = head if isinstance(head, Head) else Head(head)
    raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
    return adjust(raw, scale=head.scale, softcap=head.softcap, temperature=temperature, vocab_size=vocab_size)


def adjust(
    raw: Tensor, *, scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Scale, then softcap * tanh(z / softcap), then divide by the temperature; ids >= vocab_size get -inf."""
    z = raw * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    if vocab_size is not None and vocab_size < z.shape[-1]:
        z = z.masked_fill(torch.arange(z.shape[-1], device=z.device) >= vocab_size, -INF)
    return z


def _gap(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log a - log b, and 0 where a has no probability (so that 0 * inf does not arise, forward or backward)."""
    possible = log_a > -INF
    return torch.where(possible, log_a, 0) - torch.where(possible, log_b, 0)


def _sum(terms: Tensor, entry_clip: float | None) -> Tensor:
    return (terms if entry_clip is None else terms.clamp(max=entry_clip)).sum(-1)


def contrasted(teacher_logits: Tensor, control_logits: Tensor, contrast: Tensor, plausibility: Tensor) -> Tensor:
    """Return the logits z* = z_t + contrast (z_t - z_c) of a target, -inf where p_t < plausibility max p_t.

    Logits are (N, V), contrast and plausibility (N,). A row of contrast 0 does not read its control.
    """
    step = contrast[:, None] * (teacher_logits - control_logits)
    target = teacher_logits + torch.where((contrast == 0)[:, None] | (teacher_logits == -INF), 0.0, step)
    least = teacher_logits.amax(-1) + plausibility.log()
    return target.masked_fill(teacher_logits < least[:, None], -INF)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, entry_clip: float | None = None) -> Tensor:
    """Return KL(teacher || student) of each row, in nats: (N, V), (N, V) -> (N,)."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    gap, p = _gap(log_p, log_q), log_p.exp()
    p = torch.where(gap == INF, p.clamp_min(torch.finfo(p.dtype).tiny), p)  # possible, however improbable: not 0 * inf
    return _sum(p * gap, entry_clip)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, entry_clip: float | None = None) -> Tensor:
    """Return KL(student || teacher) of each row, in nats: (N, V), (N, V) -> (N,)."""
    return forward_kl(teacher_logits, student_logits, entry_clip)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, entry_clip: float | None = None) -> Tensor:
    """Return beta * KL(teacher || m) + (1 - beta) * KL(student || m), in nats: (N, V), (N, V) -> (N,).

    m = (1 - beta) * student + beta * teacher.
    """
    log_q, log_p, log_m = _mixture(student_logits, teacher_logits, beta)
    return _sum(beta * log_p.exp() * _gap(log_p, log_m) + (1 - beta) * log_q.exp() * _gap(log_q, log_m), entry_clip)


def _mixture(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    neither = (log_q == -INF) & (log_p == -INF)
    log_m = torch.logaddexp(
        log_q.masked_fill(neither, 0.0) + math.log(1 - beta), log_p.masked_fill(neither, 0.0) + math.log(beta)
    )
    return log_q, log_p, log_m


def skew_kl(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, entry_clip: float | None = None, *, forward: bool
) -> Tensor:
    """Return KL(teacher || m) of each row if `forward`, else KL(student || m), with the m of `jsd`: (N, V) -> (N,)."""
    log_q, log_p, log_m = _mixture(student_logits, teacher_logits, beta)
    log_w = log_p if forward else log_q
    return _sum(log_w.exp() * _gap(log_w, log_m), entry_clip)


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, kind: Tensor, beta: float = 0.5, entry_clip: float | None = None
) -> Tensor:
    """Return the divergence that `kind` (R,) names, row by row: (R, V), (R, V) -> (R,) nats."""
    out = student_logits.new_zeros(kind.shape)
    for value, compute in (
        (FORWARD_KL, lambda s, t: forward_kl(s, t, entry_clip)),
        (REVERSE_KL, lambda s, t: reverse_kl(s, t, entry_clip)),
        (JSD, lambda s, t: jsd(s, t, beta, entry_clip)),
        (SKEW_FORWARD, lambda s, t: skew_kl(s, t, beta, entry_clip, forward=True)),
        (SKEW_REVERSE, lambda s, t: skew_kl(s, t, beta, entry_clip, forward=False)),
    ):
        rows = (kind == value).nonzero().squeeze(-1)
        out = out.index_put((rows,), compute(student_logits[rows], teacher_logits[rows]))
    return out


def loss(row_divergence: Tensor, weight: Tensor, clip: Tensor) -> Tensor:
    """Sum weight * min(divergence, clip); a row of weight 0 adds exactly 0, a clipped row has no gradient."""
    clipped = row_divergence > clip
    value = torch.where(clipped, clip.to(row_divergence.dtype), row_divergence)
    return (torch.where(weight != 0, value, 0) * weight.to(value.dtype)).sum()


def entropy(z: Tensor) -> Tensor:
    """Return the entropy of softmax(z) in nats: (N, V) -> (N,)."""
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * torch.where(log_p > -INF, log_p, 0)).sum(-1)


def linear_divergence(
    student_hidden: Tensor, head: Head | Tensor, teacher_hidden: Tensor, teacher_head: Head | Tensor | None = None, *,
    supervision: Supervision, temperature: float = 1.0, beta: float = 0.5, entry_clip: float | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (loss, divergence (R,)) with every logit in memory: what `vigos.linear_divergence` must agree with.

    Hidden states are (N, D) and (M, D_t); every field of `supervision` is a tensor (R,). The teacher is detached.
    """

    def logits_of(hidden: Tensor, side: Head | Tensor | None, rows: Tensor) -> Tensor:
        side = head if side is None else side
        return logits(hidden[rows], side, temperature=temperature, vocab_size=vocab_size)

    z_s = logits_of(student_hidden, None, supervision.student_row)
    z_t = logits_of(teacher_hidden, teacher_head, supervision.teacher_row)
    if supervision.control_row is not None:
        assert isinstance(supervision.contrast, Tensor)
        assert isinstance(supervision.plausibility, Tensor)
        z_c = logits_of(teacher_hidden, teacher_head, supervision.control_row)
        z_t = contrasted(z_t, z_c, supervision.contrast.to(z_t.dtype), supervision.plausibility.to(z_t.dtype))
    assert isinstance(supervision.kind, Tensor)
    assert isinstance(supervision.weight, Tensor)
    assert isinstance(supervision.clip, Tensor)
    rows = divergence(z_s, z_t.detach(), supervision.kind, beta, entry_clip)
    return loss(rows, supervision.weight, supervision.clip), rows
