"""Inputs that look like training, and the two ways a result is compared with the truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vigos
from vigos import reference
from vigos.divergence.api import _output
from vigos.divergence.engines.problem import LogitTransform
from vigos.divergence.ops import Call, linear, logits
from vigos.divergence.validation import supervision_tensors

KINDS = (vigos.FORWARD_KL, vigos.REVERSE_KL, vigos.JSD)


@dataclass
class Case:
    """Float64 tensors of one call; `run` converts them."""

    student: Tensor
    head: Tensor
    teacher: Tensor
    supervision: vigos.Supervision
    teacher_head: Tensor | None = None
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def peaked_hidden(n: int, head: Tensor, seed: int, peak: float = 2.0) -> Tensor:
    """(n, D) hidden states whose logits have a clear winner, in every other row with a near tie behind it."""
    g = torch.Generator().manual_seed(seed)
    v, d = head.shape
    winners = torch.randint(v, (n, 2), generator=g)
    second = torch.where(torch.arange(n) % 2 == 1, 0.95, 0.3)[:, None]
    hidden = (head[winners[:, 0]] + second * head[winners[:, 1]]) * peak / d**0.5
    return hidden + 0.05 * torch.randn(n, d, generator=g, dtype=torch.float64)


def case(
    n: int = 24, d: int = 32, v: int = 501, *, m: int | None = None, d_t: int | None = None, seed: int = 0,
    near: float = 0.02, bias: bool = False, shared: bool = True, clip: float = float("inf"), **options: Any,
) -> Case:  # fmt: skip
    """Kinds mixed, weights random, rows of student and teacher paired at random unless m is left out."""
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(v, d, generator=g, dtype=torch.float64)
    student = peaked_hidden(n, head, seed)
    teacher_head = None
    if m is None and d_t is None:
        teacher = student + near * torch.randn(n, d, generator=g, dtype=torch.float64)
        if not shared:
            teacher_head = head + 0.01 * torch.randn(v, d, generator=g, dtype=torch.float64)
        student_row = teacher_row = torch.arange(n)
    else:
        m, d_t = n if m is None else m, d if d_t is None else d_t
        if not shared or d_t != d:
            teacher_head = torch.randn(v, d_t, generator=g, dtype=torch.float64)
        teacher = peaked_hidden(m, head if teacher_head is None else teacher_head, seed + 1)
        r = max(n, m) + 3 if n and m else 0  # repeated and unordered
        student_row = torch.randint(max(n, 1), (r,), generator=g)
        teacher_row = torch.randint(max(m, 1), (r,), generator=g)
    r = student_row.shape[0]
    supervision = vigos.Supervision(
        student_row, teacher_row, torch.tensor(KINDS, dtype=torch.int8).repeat(r // 3 + 1)[:r],
        torch.rand(r, generator=g) + 0.1, torch.full((r,), clip),
    )  # fmt: skip
    biases: list[Tensor | None] = [None, None]
    if bias:
        biases = [torch.randn(v, generator=g, dtype=torch.float64) for _ in range(2)]
        if teacher_head is None:
            biases[1] = None
    return Case(student, head, teacher, supervision, teacher_head, *biases, options=options)


def of_kind(n: int, kind: int) -> vigos.Supervision:
    """Row i against row i, all of one kind, every field a tensor."""
    rows, ones = torch.arange(n), torch.ones(n)
    return vigos.Supervision(rows, rows, torch.full((n,), kind, dtype=torch.int8), ones, torch.full((n,), float("inf")))


@dataclass
class Outcome:
    """Float64 copies of what came out."""

    loss: Tensor
    divergence: Tensor
    dhidden: Tensor
    dhead: Tensor
    dbias: Tensor | None

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, x) for name, x in vars(self).items() if x is not None]


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide options into those of a head and those of the call."""
    return (
        {name: x for name, x in options.items() if name in ("scale", "softcap")},
        {name: x for name, x in options.items() if name not in ("scale", "softcap")},
    )


def heads(
    weight: Tensor, teacher_weight: Tensor | None = None, bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, **both: Any,
) -> tuple[vigos.Head, vigos.Head | None]:  # fmt: skip
    """Return the two heads of a call; without a weight or bias of the teacher's own there is one."""
    head = vigos.Head(weight, bias, **both)
    if teacher_weight is None and teacher_bias is None:
        return head, None
    return head, vigos.Head(weight if teacher_weight is None else teacher_weight, teacher_bias, **both)


def logits_divergence(
    student: Tensor, teacher: Tensor, *, supervision: vigos.Supervision, impl: str, inplace: bool = False,
    labels: Tensor | None = None, **options: Any,
) -> vigos.DivergenceOutput:  # fmt: skip
    """Call `vigos.logits_divergence`, or with a scale or softcap, which it does not take, the operator under it."""
    transform, options = split(options)
    if not transform:
        return vigos.logits_divergence(
            student, teacher, supervision=supervision, impl=impl, inplace=inplace, labels=labels, **options
        )
    side = LogitTransform(**transform, temperature=options.pop("temperature", 1.0))
    rows = supervision_tensors(supervision, student, teacher)
    out = logits(student, teacher, rows, labels, Call(side, side, impl=impl, **options), inplace)
    return _output(out, rows[3], rows[4], labels, "sum")


def run(
    c: Case, impl: str | None, dtype: torch.dtype, *, row_upstream: bool = True, compute: Any = None,
    device: str = "cpu",
) -> Outcome:  # fmt: skip
    """One call and its backward: impl None is the oracle. `compute`: its dtype, after rounding inputs to `dtype`."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device, dtype).to(compute or dtype).clone().requires_grad_()

    hidden, head, bias = leaf(c.student), leaf(c.head), leaf(c.student_bias)
    teacher, teacher_head, teacher_bias = (
        None if x is None else x.to(device, dtype).to(compute or dtype)
        for x in (c.teacher, c.teacher_head, c.teacher_bias)
    )
    transform, options = split(c.options)
    sides = heads(head, teacher_head, bias, teacher_bias, **transform)
    options["supervision"] = c.supervision
    if impl is None:
        loss, divergence = reference.linear_divergence(hidden, sides[0], teacher, sides[1], **options)
    else:
        out = vigos.linear_divergence(hidden, sides[0], teacher, sides[1], impl=impl, **options)
        loss, divergence = out.loss, out.divergence
    total = 1.7 * loss
    if row_upstream:
        total = total + (divergence * torch.linspace(0.1, 1.0, divergence.shape[0]).to(divergence)).sum()
    total.backward()
    grads = [None if x is None or x.grad is None else x.grad.double().cpu() for x in (hidden, head, bias)]
    return Outcome(loss.detach().double().cpu(), divergence.detach().double().cpu(), *grads)  # type: ignore[arg-type]


UNLIKE = {
    "scales": (LogitTransform(0.7), LogitTransform(1.2)),
    "one softcap": (LogitTransform(1.0, 9.0), LogitTransform(0.9)),
    "the other": (LogitTransform(0.8), LogitTransform(1.1, 12.0)),
    "two softcaps": (LogitTransform(1.3, 9.0, 1.4), LogitTransform(0.9, 30.0, 0.8)),
}


def unlike(c: Case, impl: str | None, dtype: torch.dtype, sides: tuple[LogitTransform, LogitTransform]) -> Outcome:
    """Run `c` with a transform of each side's own; impl None: the oracle."""
    hidden, head = (x.to(dtype).clone().requires_grad_() for x in (c.student, c.head))
    bias = None if c.student_bias is None else c.student_bias.to(dtype).clone().requires_grad_()
    teacher, teacher_head, teacher_bias = (
        None if x is None else x.to(dtype) for x in (c.teacher, c.teacher_head, c.teacher_bias)
    )
    rows = c.supervision
    if impl is None:
        head_t, bias_t = (head, bias) if teacher_head is None else (teacher_head, teacher_bias)
        raw_s = torch.nn.functional.linear(hidden, head, bias)[rows.student_row]
        raw_t = torch.nn.functional.linear(teacher, head_t, bias_t)[rows.teacher_row].detach()
        divergence = reference.divergence(sides[0](raw_s), sides[1](raw_t), rows.kind, **c.options)
        loss = reference.loss(divergence, rows.weight, rows.clip)
    else:
        call = Call(*sides, impl=impl, **c.options)
        fields = supervision_tensors(rows, hidden, teacher)
        loss, divergence, *_ = linear((hidden, head, bias), (teacher, teacher_head, teacher_bias), fields, None, call)
    loss.backward()
    grads = [None if x is None else x.grad.double() for x in (hidden, head, bias)]
    return Outcome(loss.detach().double(), divergence.detach().double(), *grads)  # type: ignore[arg-type]


def error(x: Tensor, exact: Tensor) -> float:
    """Norm of the difference, relative to the norm of the truth (or to 1e-6, where the truth is 0)."""
    return ((x - exact).norm() / exact.norm().clamp_min(1e-6)).item()


def assert_close(c: Case, ours: Outcome, exact: Outcome, eager: Outcome, *, textbook: bool = False) -> None:
    """Each result within twice what plain PyTorch loses in float32, or within a few roundings of the truth.

    textbook: the engine sums the terms of the definition, as every engine does under an entry clip. They are
    differences of logits, and their sum may be off by the rounding of the largest one.
    """
    eps = 6e-8
    theirs, truths = dict(eager.items()), dict(exact.items())
    largest = (c.student @ c.head.T).abs().max().item()
    for name, x in ours.items():
        assert torch.isfinite(x).all(), f"{name}: not finite"
        mine, plain = error(x, truths[name]), error(theirs[name], truths[name])
        bound = 2 * plain + 4 * eps
        if (textbook or "entry_clip" in c.options) and name in ("loss", "divergence"):
            bound += eps * largest * max(1, x.numel()) ** 0.5 / truths["divergence"].norm().item()
        assert mine <= bound, f"{name}: error {mine:.1e}, plain PyTorch {plain:.1e}, bound {bound:.1e}"
