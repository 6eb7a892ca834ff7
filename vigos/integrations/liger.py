"""Liger's fused distillation losses by name: same classes, same arguments, our computation.

    from vigos.integrations.liger import LigerFusedLinearJSDLoss   # was: from liger_kernel.chunked_loss import ...

For code that cannot be edited (ms-swift, TRL before 1.16) `patch()` puts these classes into `liger_kernel` and into
every loaded module that imported Liger's by name; run it before the trainer is built.

What differs, on purpose: inputs (B, T, D) are chunked like (B * T, D); heads of different vocabulary sizes are refused
where Liger pads the student's logits with zeros, which gives the padding probability; the cross-entropy term is
computed only if `weight_hard_loss` is passed (Liger's default adds half of it without a word); logits are float32; a
frozen head costs no gradient; a batch without a kept token is 0, not NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.api import linear_divergence
from vigos.divergence.head import Head
from vigos.divergence.supervision import Supervision, kind_and_beta
from vigos.divergence.validation import autocast
from vigos.integrations._logits import check_mask, once
from vigos.integrations._patching import Patch, Target, UnknownPeer, described, say_once, version_of


class _Unasked(float):
    """A default that can be told from the same number passed by the caller."""


_LIGER_HARD = _Unasked(0.5)


def _check_temperature(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    return temperature


def _fused_jsd(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, kept: Tensor | None,
    student_bias: Tensor | None, teacher_bias: Tensor | None, beta: float, temperature: float,
) -> Tensor:  # fmt: skip
    """Return the mean divergence over the kept tokens, 0 without one."""
    kind, beta = kind_and_beta(beta)
    if kept is None:
        kept = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    shared = teacher_weight is student_weight and teacher_bias is student_bias and teacher.dtype == student.dtype
    head = _head(student_weight, student_bias, student)
    return linear_divergence(
        student, head, teacher, None if shared else _head(_detached(teacher_weight), _detached(teacher_bias), teacher),
        supervision=Supervision.from_mask(kept, kind=kind), temperature=float(temperature), beta=beta, reduction="mean",
    ).loss  # fmt: skip


def _detached(x: Any) -> Any:
    """Return the teacher's tensor without the gradient that it asks for and does not get."""
    return None if x is None else x.detach()


def _head(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Head:
    """Return the head in the dtype of its hidden states; an autocast casts both."""
    if torch.is_autocast_enabled(hidden.device.type):
        return Head(weight, bias)
    return Head(weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


class _Product(torch.autograd.Function):
    """Multiply (N, D) by (V, D) transposed: float32 before any rounding, whatever the operands are."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        grad = grad.to(rows.dtype)  # rounded once
        drows = once(_product(grad, weight).to(rows.dtype), rows) if ctx.needs_input_grad[0] else None
        return drows, once(_product(grad.T, rows).to(weight.dtype), weight) if ctx.needs_input_grad[1] else None


def _product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype in (torch.float32, torch.float64):
            return a @ b
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore: int, width: int) -> Any:
    """Sum -log p(label) over labels that are not `ignore`, `width` tokens at a time, recomputed in backward."""
    kept = (labels != ignore).nonzero().squeeze(1)
    hidden, weight, bias = (autocast(x, hidden.device) for x in (hidden, weight, bias))
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)

    def logits_and_loss(rows: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = _Product.apply(rows, weight)
        logits = logits if bias is None else logits + bias
        return torch.nn.functional.cross_entropy(logits, ids, reduction="sum")

    total = (hidden[:0].sum() + weight[:0].sum()).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    for rows in kept.split(max(1, width)):
        total = total + torch.utils.checkpoint.checkpoint(
            logits_and_loss, hidden[rows], labels[rows], weight, bias, use_reentrant=False
        )
    return total


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`: JSD, and cross-entropy if it is asked for, per kept token.

    loss = weight_hard_loss * CE + weight_soft_loss * JSD(beta), each a mean over the labels that are not
    `ignore_index`; beta 0 is forward, 1 reverse KL; the temperature applies to the divergence alone.

    Args:
        weight_hard_loss: without it there is no cross-entropy term, where Liger takes 0.5: half of the answer would be
            a term that the caller never named. Pass 0.5 for Liger's default.
        weight_soft_loss, beta, ignore_index, temperature: as in Liger.
        compiled: accepted and not needed. chunk_size: tokens per chunk of the cross-entropy; the divergence sizes its
            own chunks.
        return_soft_hard_loss: forward returns (loss, soft, hard); hard is computed then, whatever its weight.
    """

    def __init__(
        self, weight_hard_loss: float = _LIGER_HARD, weight_soft_loss: float = 0.5, beta: float = 0.5,
        ignore_index: int = -100, temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(weight_hard_loss, _Unasked):
            say_once(
                "vigos' LigerFusedLinearJSDLoss leaves out the cross-entropy term, which Liger adds with weight 0.5 by "
                "default; pass weight_hard_loss to have it"
            )
            weight_hard_loss = 0.0
        self.weight_hard_loss = float(weight_hard_loss)
        self.weight_soft_loss = float(weight_soft_loss)
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = _check_temperature(temperature)
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
        true_labels: Tensor, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Compute the loss of hidden states (tokens, D) or (B, T, D), heads (V, D), labels (tokens,) or (B, T)."""
        check_mask(true_labels, student_input, "true_labels")
        kept = true_labels != self.ignore_index
        soft = _fused_jsd(
            student_input, student_weight, teacher_input, teacher_weight, kept, student_bias, teacher_bias, self.beta,
            self.temperature,
        )  # fmt: skip
        if self.weight_hard_loss == 0 and not self.return_soft_hard_loss:
            return self.weight_soft_loss * soft
        hidden, labels = student_input.flatten(0, -2), true_labels.flatten()
        hard = _cross_entropy(hidden, student_weight, student_bias, labels, self.ignore_index, self.chunk_size)
        hard = hard / kept.sum().clamp(min=1)
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


class LigerFusedLinearJSD(torch.nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearJSD`: JSD(beta) per kept token; every device, no Triton needed.

    Args:
        jsd_beta, ignore_index, temperature: as in Liger.
        accum_dtype: accepted; the head's gradient is always summed in float32 (float64 for float64).
    """

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.jsd_beta = jsd_beta
        self.temperature = _check_temperature(temperature)
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Compute the loss of hidden states (..., D), heads (V, D) and labels (...); labels None: every token."""
        if shift_labels is not None:
            check_mask(shift_labels, student_input, "shift_labels")
        kept = None if shift_labels is None else shift_labels != self.ignore_index
        return _fused_jsd(
            student_input, student_weight, teacher_input, teacher_weight, kept, None, None, self.jsd_beta,
            self.temperature,
        )  # fmt: skip


# --- the patch -------------------------------------------------------------------------------------------------------

_CLASSES = (  # where Liger defines it, ours
    ("liger_kernel.chunked_loss.jsd_loss", LigerFusedLinearJSDLoss),
    ("liger_kernel.transformers.fused_linear_jsd", LigerFusedLinearJSD),
)


def _checked(module: str, ours: type) -> type:
    """Return Liger's class, if its constructor and its forward take what ours do."""
    theirs = getattr(importlib.import_module(module), ours.__name__, None)
    if theirs is None:
        raise UnknownPeer(f"{module} has no {ours.__name__}")
    for method in ("__init__", "forward"):
        found, known = described(getattr(theirs, method)), described(getattr(ours, method))
        if found != known:
            raise UnknownPeer(f"{module}.{ours.__name__}.{method} has the signature {found}; vigos knows {known}")
    return theirs


def _target(module: str, ours: type) -> Target:
    def make(_: Any) -> Callable[..., Any]:
        return ours

    return Target(module, ours.__name__, (described(ours),), make, "")


_patch = Patch("liger-kernel")


def patch() -> tuple[str, ...]:
    """Put our classes where Liger's are; the names of what was replaced. Undone by `unpatch`; twice is once."""
    if _patch.active:
        return _patch.replaced
    found = version_of("liger-kernel")
    if found is None:
        raise UnknownPeer("liger-kernel is not installed; import the classes from vigos.integrations.liger instead")
    try:
        for module, ours in _CLASSES:
            _checked(module, ours)
    except UnknownPeer as error:
        raise UnknownPeer(f"liger-kernel {found}: {error}") from None
    _patch.peer = f"liger-kernel {found}"
    return _patch.apply([_target(module, ours) for module, ours in _CLASSES])


def unpatch() -> None:
    """Put Liger's own classes back."""
    _patch.undo()


@contextmanager
def patched() -> Iterator[tuple[str, ...]]:
    """Patch inside the block. A patch that was in place before it stays in place after it."""
    outer = _patch.active
    try:
        yield patch()
    finally:
        if not outer:
            unpatch()


def fit() -> list[tuple[str, bool | None, str]]:
    """Return (name, whether it fits, why) of each class; None: Liger is not installed."""
    found = version_of("liger-kernel")
    if found is None:
        return [("liger-kernel", None, "not installed; the classes of vigos.integrations.liger work without it")]
    if _patch.active:
        return [("liger-kernel", True, f"liger-kernel {found}: in place, {', '.join(_patch.replaced)}")]
    lines: list[tuple[str, bool | None, str]] = []
    for module, ours in _CLASSES:
        try:
            _checked(module, ours)
        except (UnknownPeer, ImportError) as error:
            lines.append((f"liger {ours.__name__}", False, f"liger-kernel {found}: {error}"))
        else:
            lines.append((f"liger {ours.__name__}", True, f"liger-kernel {found}: same arguments and defaults"))
    return lines
