"""Carry a call's options through an operator's schema, and check its supervision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.divergence.engines.problem import LogitTransform
from vigos.divergence.supervision import JSD, REVERSE_KL, SKEW_REVERSE


def check_rows(
    student_row: Tensor, teacher_row: Tensor, kind: Tensor, clip: Tensor, labels: Tensor | None, n: int, m: int, v: int
) -> bool:
    """Check that values are in range, on a GPU in the call's one wait for the device; return whether any is skewed."""
    if student_row.shape[0] == 0:
        return False
    ranges = [
        ("supervision.student_row", student_row, 0, n - 1, f"rows of the student's {n}"),
        ("supervision.teacher_row", teacher_row, 0, m - 1, f"rows of the teacher's {m}"),
        ("supervision.kind", kind, 0, SKEW_REVERSE, "vigos.FORWARD_KL, REVERSE_KL or JSD, or skew ones"),
    ]
    if labels is not None:
        ranges.append(("labels", labels, 0, v - 1, f"ids below the vocabulary size {v}"))
    ends = [end.to(torch.int64) for _, x, *_ in ranges for end in x.aminmax()]
    ends.append((clip >= 0).all().to(torch.int64))  # False for NaN
    together = {end.device for end in ends}
    values = torch.stack(ends).tolist() if len(together) == 1 else [int(end) for end in ends]
    for i, (name, _, low, high, wanted) in enumerate(ranges):
        if values[2 * i] < low or values[2 * i + 1] > high:
            raise ValueError(f"{name} must hold {wanted}, got values from {values[2 * i]} to {values[2 * i + 1]}")
    if not values[-1]:
        raise ValueError("supervision.clip must be at least 0 nats (inf: no clip), got a negative or NaN value")
    return values[5] > JSD


def check_targets(kind: Tensor, target: Sequence[Tensor], m: int) -> None:
    """Check the values of control_row, contrast and plausibility; on a GPU another wait for the device."""
    control_row, contrast, plausibility = target
    if control_row.shape[0] == 0:
        return
    low, high = (int(x) for x in control_row.aminmax())
    if low < 0 or high >= m:
        raise ValueError(
            f"supervision.control_row must hold rows of the teacher's {m}, got values from {low} to {high}"
        )
    for name, x, most, wanted in (
        ("contrast", contrast, math.inf, "finite and at least 0"), ("plausibility", plausibility, 1.0, "in [0, 1]"),
    ):  # fmt: skip
        if not bool(((x >= 0) & (x <= most) & x.isfinite()).all()):  # False for NaN
            raise ValueError(f"supervision.{name} must be {wanted}, got values from {x.min():g} to {x.max():g}")
    if bool(((kind == REVERSE_KL).to(plausibility.device) & (plausibility > 0)).any()):
        raise ValueError(
            "supervision.plausibility must be 0 for pairs of reverse KL, got a positive value: a target that is cut "
            "has probability 0 where the student has not, and the divergence is infinite; take forward KL or JSD"
        )


def _shard(v: int, group_name: str, device: torch.device) -> tuple[dist.ProcessGroup | None, int, int]:
    """Return (group, first id of this rank's shard, size of the full vocabulary)."""
    if not group_name:
        return None, 0, v
    from torch.distributed.distributed_c10d import _resolve_process_group

    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=device)
    sizes[group.rank()] = v
    dist.all_reduce(sizes, group=group)
    return group, int(sizes[: group.rank()].sum()), int(sizes.sum())


def _given(x: float) -> float | None:
    return None if x == math.inf else x


@dataclass(frozen=True)
class Call:
    """Options of a call besides its tensors, and how they travel through an operator's schema.

    Attributes:
        student, teacher: each side's transform from raw logits to z.
        beta: of rows of kind JSD and of skew KL. entry_clip: clip of each vocabulary entry's term, or None.
        vocab_size: logical size of the whole vocabulary; -1: every entry that the heads hold.
        group_name: of the process group that the vocabulary is sharded over, or "".
        impl: "auto" or the name of an engine.
    """

    student: LogitTransform
    teacher: LogitTransform
    beta: float = 0.5
    entry_clip: float | None = None
    vocab_size: int = -1
    group_name: str = ""
    impl: str = "auto"

    def packed(self) -> tuple[list[float], int, str, str]:
        """Return the operators' arguments scalars, vocab_size, group_name, impl; in `scalars` inf stands for None."""
        numbers: list[float | None] = []
        for side in (self.student, self.teacher):
            numbers += [side.scale, side.softcap, side.temperature]
        numbers += [self.beta, self.entry_clip]
        scalars = [math.inf if x is None else float(x) for x in numbers]
        return scalars, self.vocab_size, self.group_name, self.impl

    @classmethod
    def unpacked(cls, scalars: Sequence[float], vocab_size: int, group_name: str, impl: str) -> Call:
        """Return the call that `packed` gave these arguments."""
        scale_s, cap_s, temperature_s, scale_t, cap_t, temperature_t, beta, entry_clip = scalars
        return cls(
            LogitTransform(scale_s, _given(cap_s), temperature_s),
            LogitTransform(scale_t, _given(cap_t), temperature_t),
            beta, _given(entry_clip), vocab_size, group_name, impl,
        )  # fmt: skip


def rows_of(
    call: Call, supervision: Sequence[Tensor], labels: Tensor | None, sizes: tuple[int, int, int],
    device: torch.device, checked: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the fields of `Rows` on the device; `sizes`: student rows, teacher rows, vocabulary here.

    checked: their values were checked before; on a GPU that is a wait for the device.
    """
    n, m, v = sizes
    group, start, total = _shard(v, call.group_name, device)
    if call.vocab_size > total:
        raise ValueError(f"vocab_size must be at most the heads' {total} vocabulary entries, got {call.vocab_size}")
    vocab_size = total if call.vocab_size < 0 else call.vocab_size
    names = ("student_row", "teacher_row", "kind", "weight", "clip", "control_row", "contrast", "plausibility")
    student_row, teacher_row, kind, _, clip, *target = supervision
    if checked:
        skewed = bool((kind > JSD).any())
    else:
        skewed = check_rows(student_row, teacher_row, kind, clip, labels, n, m, vocab_size)
        if target:
            check_targets(kind, target, m)
    if target and not bool((target[1] != 0).any() | (target[2] != 0).any()):
        supervision = supervision[:5]  # every target is its teacher row
    return {
        **{name: x.to(device) for name, x in zip(names, supervision, strict=False)},
        "labels": None if labels is None else labels.to(device), "student_transform": call.student,
        "teacher_transform": call.teacher, "beta": call.beta, "entry_clip": call.entry_clip, "vocab_size": vocab_size,
        "vocab_start": start, "group": group, "skewed": skewed,
    }  # fmt: skip
