"""Supervision: the pairs of student and teacher rows, and each pair's direction, weight, clip and contrast."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FORWARD_KL, REVERSE_KL, JSD, SKEW_FORWARD, SKEW_REVERSE = range(5)
KINDS = {
    "forward": FORWARD_KL, "reverse": REVERSE_KL, "jsd": JSD, "skew_forward": SKEW_FORWARD, "skew_reverse": SKEW_REVERSE
}  # fmt: skip


def kind_and_beta(beta: float) -> tuple[int, float]:
    """Translate TRL's, Liger's and OPSD's `beta` into (kind, beta) of this library.

    There 0 means forward KL(teacher || student), 1 reverse KL(student || teacher) and anything between JSD(beta); here
    each has a kind, and `beta` is read for JSD alone. Raises ValueError outside [0, 1].
    """
    beta = float(beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 (forward KL) and 1 (reverse KL), got {beta}")
    kind = FORWARD_KL if beta == 0 else REVERSE_KL if beta == 1 else JSD
    return kind, beta if kind == JSD else 0.5


@dataclass(frozen=True)
class Supervision:
    """R pairs: the student's row `student_row[r]` meets the teacher's row `teacher_row[r]`.

    Every field is a tensor (R,) or a scalar that is broadcast. Rows may repeat and come in any order. Hidden states
    (B, T, D) have B * T rows, row b * T + t for token t of sequence b.

    Attributes:
        student_row: int64, index into the student's rows.
        teacher_row: int64, index into the teacher's rows.
        kind: FORWARD_KL ("forward") = KL(teacher || student), REVERSE_KL ("reverse") = KL(student || teacher), JSD
            ("jsd"), or a KL to the mixture m = (1 - beta) student + beta teacher of JSD: SKEW_FORWARD ("skew_forward")
            = KL(teacher || m), SKEW_REVERSE ("skew_reverse") = KL(student || m); one of them, or integers (R,).
        weight: float32, factor of the pair in the loss.
        clip: float32, nats; the pair adds weight * min(divergence, clip) to the loss. inf: no clip.
        shape: leading dimensions that student and teacher must have, checked with the call; None: not checked.
        control_row: int64, index into the teacher's rows of a control c: the same teacher in a context that lacks what
            is to be taught, such as the image. None: no pair has one.
        contrast: float32, alpha, at least 0. The pair's target has the logits z* = z_t + alpha (z_t - z_c).
        plausibility: float32, gamma, in [0, 1]. The target is cut to the teacher's plausible entries, those with
            p_t >= gamma max p_t; the others have probability 0 (not for reverse KL, which would be infinite).
        beta: float, in (0, 1), in place of the call's, for JSD and skew KL. Each value is computed in a call of its
            own; other kinds do not read it. None: the call's.
    """

    student_row: Tensor
    teacher_row: Tensor
    kind: Tensor | int | str = FORWARD_KL
    weight: Tensor | float = 1.0
    clip: Tensor | float = float("inf")
    shape: tuple[int, ...] | None = field(default=None, kw_only=True)
    control_row: Tensor | None = field(default=None, kw_only=True)
    contrast: Tensor | float = field(default=0.0, kw_only=True)
    plausibility: Tensor | float = field(default=0.0, kw_only=True)
    beta: Tensor | float | None = field(default=None, kw_only=True)

    @classmethod
    def aligned(
        cls, n: int, *, kind: Tensor | int | str = FORWARD_KL, weight: Tensor | float = 1.0,
        clip: Tensor | float = float("inf"), device: torch.device | str | None = None,
    ) -> Supervision:  # fmt: skip
        """Pair row i with row i, for i < n."""
        rows = torch.arange(n, device=device)
        return cls(rows, rows, kind, weight, clip)

    @classmethod
    def from_mask(
        cls, mask: Tensor, *, kind: Tensor | int | str = FORWARD_KL, weight: Tensor | float = 1.0,
        clip: Tensor | float = float("inf"),
    ) -> Supervision:  # fmt: skip
        """Pair student and teacher at every position where `mask` is true, in the mask's order.

        Args:
            mask: bool, or integers 0 and 1; any shape, usually (B, T). Student and teacher have this shape before their
                last dimension, or are flattened to mask.numel() rows. Labels are no mask: pass `labels != -100`.
            kind, weight, clip: one value, or a tensor of the mask's shape.

        A (R,) output is spread over the mask by `torch.zeros(mask.shape).masked_scatter(mask, out.divergence)`.
        """
        if not isinstance(mask, Tensor) or mask.dtype.is_floating_point or mask.dtype.is_complex:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a tensor of bool or of integers 0 and 1, got {got}; factors go into weight")
        if mask.dtype != torch.bool:
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise ValueError("mask must hold 0 and 1, got other integers; for labels pass labels != -100")
            mask = mask != 0
        rows = mask.reshape(-1).nonzero().squeeze(1)

        def chosen(name: str, value: Tensor | float | str) -> Tensor | float | str:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            if value.shape != mask.shape:
                raise ValueError(f"{name} must be one value or {tuple(mask.shape)} like mask, got {tuple(value.shape)}")
            return value.reshape(-1)[rows.to(value.device)]

        kind, weight, clip = chosen("kind", kind), chosen("weight", weight), chosen("clip", clip)  # type: ignore[assignment]
        return cls(rows, rows, kind, weight, clip, shape=tuple(mask.shape))
