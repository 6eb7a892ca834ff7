"""The losses that benchmarks compare: ours, plain PyTorch's, TRL's and Liger's, behind one call.

Each takes hidden states of student and teacher, their shared head and which rows count; it returns the sum over those
rows of forward KL, reverse KL or JSD(0.5). Peers run as their authors ship them, defaults included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import vigos
from vigos import reference
from vigos.divergence.engines import cuda
from vigos.divergence.engines.products import Chunks
from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL, Supervision

KINDS = {"forward": FORWARD_KL, "reverse": REVERSE_KL, "jsd": JSD}
BETA = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}  # TRL's and Liger's names for the same
Loss = Callable[["Inputs", Tensor, Tensor], Tensor]  # inputs, student leaf (N, D), head (V, D) -> scalar


@dataclass
class Inputs:
    """student, teacher (N, D), head (V, D); live: bool (N,), the rows that count; kind: a key of KINDS."""

    student: Tensor
    teacher: Tensor
    head: Tensor
    live: Tensor
    kind: str = "forward"
    control: Tensor | None = None  # (n, d), the teacher's in another context
    contrast: float = 0.0
    plausibility: float = 0.0


# Noise of the teacher's logits against the student's: KL around 0.02, 2e-4 and, for flat rows, 0.02.
ROWS = {"peaked": 0.2, "near": 0.02, "flat": 0.2}


def inputs(
    rows: str, n: int, d: int, v: int, dtype: torch.dtype, device: str, live: float = 1.0, kind: str = "forward"
) -> Inputs:
    """`rows`: "peaked" and "near" have a few clear winners a row, 1 to 3 nats; "flat" is what random weights give."""
    g = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        head = torch.randn(v, d, generator=g)
        noise = torch.randn(n, d, generator=g) * (1.5 / d**0.5)
        winners = torch.randint(v, (n, 3), generator=g)
        height = torch.tensor([14.0, 13.0, 12.0]) / d
        student = noise if rows == "flat" else noise + (head[winners] * height[:, None]).sum(1)
        teacher = student + torch.randn(n, d, generator=g) * (ROWS[rows] / d**0.5)
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[torch.randperm(n, generator=g)[: round(n * live)]] = True
    return Inputs(student.to(dtype), teacher.to(dtype), head.to(dtype), chosen, kind)


def with_control(x: Inputs, contrast: float, plausibility: float) -> Inputs:
    """Give the teacher a control: itself, blurred by as much as student and teacher differ."""
    g = torch.Generator(x.student.device).manual_seed(1)
    noise = torch.randn(x.teacher.shape, generator=g, device=x.teacher.device)
    control = x.teacher.float() + noise * (x.teacher - x.student).float().abs().mean()
    return replace(x, control=control.to(x.teacher.dtype), contrast=contrast, plausibility=plausibility)


def ours(impl: str, x: Inputs, student: Tensor, head: Tensor) -> Tensor:
    """`vigos.linear_divergence`; rows that do not count are left out by index."""
    at = x.live.nonzero().squeeze(1)
    n = at.shape[0]
    rows = Supervision(
        at, at, torch.full((n,), KINDS[x.kind], dtype=torch.int8, device=at.device),
        torch.ones(n, device=at.device), torch.full((n,), float("inf"), device=at.device),
    )  # fmt: skip
    teacher = x.teacher
    if x.control is not None and (x.contrast or x.plausibility):
        target = {"contrast": x.contrast, "plausibility": x.plausibility}
        rows, teacher = replace(rows, control_row=at + len(teacher), **target), torch.cat([teacher, x.control])
    return vigos.linear_divergence(student, head, teacher, supervision=rows, impl=impl).loss


def fp32_logits(x: Inputs, student: Tensor, head: Tensor) -> Tensor:
    """`ours("cuda")`, with logits in fp32 also where the engine would store pairs."""
    forward = cuda.forward
    cuda.forward = partial(forward, config=Chunks(stored_pairs=False))  # type: ignore[assignment]
    try:
        return ours("cuda", x, student, head)
    finally:
        cuda.forward = forward


def from_logits(z_s: Tensor, z_t: Tensor, kind: str) -> Tensor:
    """What one writes in PyTorch: log-softmax of both in float32 (float64 stays), the sum over the vocabulary."""
    wide = torch.promote_types(z_s.dtype, torch.float32)
    log_q, log_p = z_s.to(wide).log_softmax(-1), z_t.to(wide).log_softmax(-1)
    if kind == "forward":
        return (log_p.exp() * (log_p - log_q)).sum()
    if kind == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum()
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0, dtype=wide))
    return 0.5 * (log_p.exp() * (log_p - log_m)).sum() + 0.5 * (log_q.exp() * (log_q - log_m)).sum()


def naive(x: Inputs, student: Tensor, head: Tensor) -> Tensor:
    """Logits of every row that counts, in the operands' dtype, as a model returns them."""
    with torch.no_grad():
        z_t = x.teacher[x.live] @ head.T
    return from_logits(student[x.live] @ head.T, z_t, x.kind)


def float32_logits(x: Inputs, student: Tensor, head: Tensor) -> Tensor:
    """The same from operands widened first: the precision that a careful user has, at twice the memory."""
    with torch.no_grad():
        z_t = x.teacher[x.live].float() @ head.float().T
    return from_logits(student[x.live].float() @ head.float().T, z_t, x.kind)


torch._dynamo.config.recompile_limit = 64  # one compilation a shape; past the limit it would silently run eagerly
_compiled_from_logits = torch.compile(from_logits, dynamic=False)


def compiled(x: Inputs, student: Tensor, head: Tensor) -> Tensor:
    """`naive` with everything behind the products compiled."""
    with torch.no_grad():
        z_t = x.teacher[x.live] @ head.T
    return _compiled_from_logits(student[x.live] @ head.T, z_t, x.kind)


def trl(x: Inputs, student: Tensor, head: Tensor) -> Tensor:
    """DistillationTrainer's chunked divergence."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    teacher_head = head.detach()
    mask = x.live[None].to(student.dtype)
    return _chunked_divergence_loss(student[None], x.teacher[None], head, teacher_head, mask, BETA[x.kind], 1)[0]


def liger(x: Inputs, student: Tensor, head: Tensor) -> Tensor:
    """LigerFusedLinearJSDLoss over 2-D rows, compiled as by default, without the cross-entropy term."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[x.kind])
    labels = torch.where(x.live, 0, -100)
    return module(student, head, x.teacher, head.detach(), labels) * x.live.sum()


def liger_triton(x: Inputs, student: Tensor, head: Tensor) -> Tensor:
    """LigerFusedLinearJSD, its Triton kernels on chunks of logits."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=BETA[x.kind])
    labels = torch.where(x.live, 0, -100)
    return module(student, head, x.teacher, head.detach(), labels) * x.live.sum()


def exact_gradient(x: Inputs, at: Tensor) -> Tensor:
    """Float64 gradient of rows `at`, from the same operands, a few rows at a time."""
    head = x.head.double()
    out = []
    for rows in at.split(max(1, 2**21 // head.shape[0])):
        student = x.student[rows].double().requires_grad_()
        z_t = x.teacher[rows].double() @ head.T
        if x.control is not None:  # which may have entries of -inf
            numbers = (torch.full((len(rows),), value, dtype=torch.float64) for value in (x.contrast, x.plausibility))
            z_t = reference.contrasted(z_t, x.control[rows].double() @ head.T, *(y.to(z_t.device) for y in numbers))
            loss = reference.forward_kl(student @ head.T, z_t).sum()
        else:
            loss = from_logits(student @ head.T, z_t, x.kind)
        out.append(torch.autograd.grad(loss, student)[0])
    return torch.cat(out)


CPU: dict[str, Loss] = {
    "vigos cpu": partial(ours, "cpu"), "vigos reference": partial(ours, "reference"),
    "PyTorch": naive, "torch.compile": compiled, "TRL": trl, "Liger": liger,
}  # fmt: skip
CUDA: dict[str, Loss] = {
    **{f"vigos {impl}": partial(ours, impl) for impl in ("triton", "cuda")},
    "vigos cuda, fp32 logits": fp32_logits, "vigos reference": partial(ours, "reference"),
    "PyTorch": naive, "torch.compile": compiled, "TRL": trl, "Liger": liger, "Liger Triton": liger_triton,
}  # fmt: skip


def contenders(device: str) -> dict[str, Loss]:
    return CUDA if device == "cuda" else CPU
