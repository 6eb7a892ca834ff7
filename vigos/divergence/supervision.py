"""Which token is supervised by which teacher row, in which direction, with which clip and weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2


@dataclass(frozen=True)
class Supervision:
    """R supervised rows: the student's row `student_row[r]` meets the teacher's row `teacher_row[r]`.

    Every field is a tensor (R,) or a scalar that is broadcast. Rows may repeat and come in any order.

    Attributes:
        student_row: int64, index into the student's rows.
        teacher_row: int64, index into the teacher's rows.
        kind: int8, FORWARD_KL = KL(teacher || student), REVERSE_KL = KL(student || teacher) or JSD.
        weight: float32, factor of the row in the loss.
        clip: float32, nats; the row adds weight * min(divergence, clip) to the loss. inf: no clip.
    """

    student_row: Tensor
    teacher_row: Tensor
    kind: Tensor | int = FORWARD_KL
    weight: Tensor | float = 1.0
    clip: Tensor | float = float("inf")

    @classmethod
    def aligned(
        cls, n: int, *, kind: int = FORWARD_KL, weight: Tensor | float = 1.0, clip: Tensor | float = float("inf"),
        device: torch.device | str | None = None,
    ) -> Supervision:  # fmt: skip
        """Row i against row i, for i < n."""
        rows = torch.arange(n, device=device)
        return cls(rows, rows, kind, weight, clip)
