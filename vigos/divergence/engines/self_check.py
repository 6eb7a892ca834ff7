"""A small case through an engine and through the oracle: what `vigos doctor` prints, and what `auto` asks first.

The kernels for GPUs were checked in Triton's interpreter, in a CUDA emulation and by their compilers, and not yet on a
GPU. So `auto` takes one only after it has agreed with float64 on the machine at hand, in the dtype of the call: once a
process and dtype, a second or so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch

from vigos.divergence.engines.precision import ieee_products
from vigos.divergence.engines.problem import LinearProblem, LogitTransform
from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL

# Relative: rounding of float32 operands in products of 64, a teacher 0.02 away; of 16-bit gradients, 2**-9 each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@dataclass(frozen=True)
class Errors:
    """Largest error of a divergence over the largest divergence; norm of the gradient's error over its norm."""

    divergence: float
    gradient: float
    dtype: torch.dtype

    @property
    def ok(self) -> bool:
        """False where either is not a number."""
        return max(self.divergence, self.gradient) < TOLERANCE[self.dtype] and self.gradient == self.gradient


def small_case(dtype: torch.dtype, device: torch.device | str, kinds: tuple[int, ...]) -> LinearProblem:
    """Build 12 pairs of a shared head, V 1000, the teacher next to the student; `kinds` in turn."""
    generator = torch.Generator().manual_seed(0)
    n, d, v = 12, 64, 1000
    weight = torch.randn(v, d, generator=generator) * 0.5
    student = torch.randn(n, d, generator=generator)
    teacher = student + 0.02 * torch.randn(n, d, generator=generator)
    rows = torch.arange(n)
    tensors: dict[str, Any] = {"student_hidden": student, "student_weight": weight, "teacher_hidden": teacher}
    return LinearProblem(
        **{name: x.to(device, dtype) for name, x in tensors.items()},
        student_row=rows.to(device), teacher_row=rows.to(device),
        kind=torch.tensor(kinds, dtype=torch.int8).repeat(n)[:n].to(device), weight=torch.ones(n, device=device),
        clip=torch.full((n,), float("inf"), device=device), labels=None, student_transform=LogitTransform(),
        teacher_transform=LogitTransform(), beta=0.5, entry_clip=None, vocab_size=v, vocab_start=0, group=None,
        teacher_weight=None, student_bias=None, teacher_bias=None, need_dhidden=True, need_dweight=False,
        need_dbias=False,
    )  # fmt: skip


def check(module: ModuleType, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Errors | str:
    """Run `module`, an engine, on the small case in `dtype`; return its errors, or why it cannot run on this device."""
    from vigos.divergence.engines import chunked

    problem = small_case(dtype, device, (FORWARD_KL, REVERSE_KL, JSD))
    reason = module.why_not(problem)
    if reason is not None:
        return reason
    tensors = ("student_hidden", "student_weight", "teacher_hidden")
    with ieee_products():
        got = module.forward(problem)
        exact = chunked.forward(replace(problem, **{name: getattr(problem, name).double() for name in tensors}))
    assert got.drow is not None
    assert exact.drow is not None
    truth = exact.statistics.divergence
    return Errors(
        ((got.statistics.divergence.double() - truth).abs().max() / truth.abs().max()).item(),
        ((got.drow.double() - exact.drow).norm() / exact.drow.norm()).item(),
        dtype,
    )


@cache
def agrees(module: ModuleType, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `auto` may take the engine on this device; a disagreement is said once."""
    try:
        found = check(module, device, dtype)
    except Exception as error:  # compilers and drivers fail in many ways, and another engine runs
        found = f"it failed with {type(error).__name__}: {error}"
    if isinstance(found, Errors) and found.ok:
        return True
    name = module.__name__.rpartition(".")[2]
    warnings.warn(
        f'impl="auto" leaves out the {name!r} engine on {device} in {dtype}: its self-check gave {found}; '
        f"`vigos doctor` repeats it, and impl={name!r} runs it all the same",
        stacklevel=2,
    )
    return False
