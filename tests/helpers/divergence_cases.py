"""Inputs that look like training, and the two ways a result is compared with the truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vigos
from vigos import reference
from vigos.divergence.api import _output
from vigos.divergence.call import Call
from vigos.divergence.engines.problem import LogitTransform
from vigos.divergence.logits_op import logits
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


def of_kind(n: int, kind: Any) -> vigos.Supervision:
    """Row i against row i, of one kind or of kinds (n,), every field a tensor."""
    kinds = kind if isinstance(kind, Tensor) else torch.full((n,), kind, dtype=torch.int8)
    return vigos.Supervision(torch.arange(n), torch.arange(n), kinds, torch.ones(n), torch.full((n,), float("inf")))


def peaked_logits(n: int, v: int, dtype: torch.dtype, *, far: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(n, V) logits of both sides: a few winners a row, a maximum that moves, the teacher `far` from the student."""
    g = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(n, v, generator=g) + torch.linspace(0, 2, v)
    student.scatter_add_(1, torch.randint(v, (n, 4), generator=g), 8 + 3 * torch.rand(n, 4, generator=g))
    return student.to(dtype), (student + far * torch.randn(n, v, generator=g)).to(dtype)


@dataclass
class Outcome:
    """Float64 copies, on the CPU, of what came out; `out` is everything that the call returned."""

    loss: Tensor
    divergence: Tensor
    dhidden: Tensor  # or that of the logits
    dhead: Tensor | None = None
    dbias: Tensor | None = None
    out: Any = None

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, x) for name, x in vars(self).items() if x is not None and name != "out"]


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    """Bit for bit."""
    for (name, x), (_, y) in zip(ours.items(), theirs.items(), strict=True):
        assert torch.equal(x, y), name


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide options into those of a head and those of the call."""
    return (
        {name: x for name, x in options.items() if name in ("scale", "softcap")},
        {name: x for name, x in options.items() if name not in ("scale", "softcap")},
    )


def heads(
    weight: Tensor, teacher_weight: Tensor | None = None, bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, teacher: dict[str, Any] | None = None, **both: Any,
) -> tuple[vigos.Head, vigos.Head | None]:  # fmt: skip
    """Return the two heads of a call; without anything of the teacher's own there is one."""
    head = vigos.Head(weight, bias, **both)
    if teacher_weight is None and teacher_bias is None:
        return head, None if teacher is None else vigos.Head(weight, bias, **teacher)
    weight = weight if teacher_weight is None else teacher_weight
    return head, vigos.Head(weight, teacher_bias, **(both if teacher is None else teacher))


def finish(
    loss: Tensor, divergence: Tensor, leaves: tuple[Tensor | None, ...], upstream: Any = "both", out: Any = None
) -> Outcome:
    """Differentiate `loss`, or a sum of the divergences with factors (R,), or "both"."""
    total = 1.7 * loss if isinstance(upstream, str) else (divergence * upstream.to(divergence)).sum()
    if isinstance(upstream, str) and upstream == "both":
        total = total + (divergence * torch.linspace(0.1, 1.0, divergence.shape[0]).to(divergence)).sum()
    total.backward()
    grads = [None if x is None or x.grad is None else x.grad.double().cpu() for x in leaves]
    if out is not None:
        out = type(out)(**{name: None if x is None else x.detach().cpu() for name, x in vars(out).items()})
    return Outcome(loss.detach().double().cpu(), divergence.detach().double().cpu(), *grads, out=out)  # type: ignore[arg-type]


def run(
    c: Case, impl: str | None, dtype: torch.dtype, *, upstream: Any = "both", compute: Any = None,
    device: str = "cpu", labels: Tensor | None = None, train_head: bool = True,
) -> Outcome:  # fmt: skip
    """One call and its backward: impl None is the oracle. `compute`: its dtype, after rounding inputs to `dtype`."""

    def leaf(x: Tensor | None, train: bool = True) -> Tensor | None:
        return None if x is None else x.to(device, dtype).to(compute or dtype).clone().requires_grad_(train)

    hidden, head, bias = leaf(c.student), leaf(c.head, train_head), leaf(c.student_bias, train_head)
    teacher, *single = (leaf(x, False) for x in (c.teacher, c.teacher_head, c.teacher_bias))
    transform, options = split(c.options)
    sides = heads(head, single[0], bias, single[1], options.pop("teacher", None), **transform)
    options["supervision"] = on_device(c.supervision, device)
    if impl is None:
        return finish(
            *reference.linear_divergence(hidden, sides[0], teacher, sides[1], **options), (hidden, head, bias), upstream
        )
    if labels is not None:
        options["labels"] = labels.to(device)
    out = vigos.linear_divergence(hidden, sides[0], teacher, sides[1], impl=impl, **options)
    return finish(out.loss, out.divergence, (hidden, head, bias), upstream, out)


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


def run_logits(
    student: Tensor, teacher: Tensor, rows: vigos.Supervision, impl: str | None, *, view: Any = None,
    inplace: bool = False, upstream: Any = "both", device: str = "cpu", **options: Any,
) -> Outcome:  # fmt: skip
    """The same of logits in their dtype; impl None: the oracle in float64. `view` lays both sides out."""
    dtype = torch.float64 if impl is None else student.dtype
    leaf, rows = student.to(device, dtype).clone().requires_grad_(), on_device(rows, device)
    # Not the leaf itself: its gradient may overwrite it.
    s, t = (
        x if view is None else view(x) for x in (leaf * 1, teacher.to(device, torch.float64 if impl is None else None))
    )
    if impl is None:
        adjust = {k: options.pop(k) for k in ("temperature", "softcap", "scale", "vocab_size") if k in options}
        z_s, z_t = (reference.adjust(x.flatten(0, -2), **adjust) for x in (s, t))
        divergence = reference.divergence(z_s[rows.student_row], z_t[rows.teacher_row], rows.kind, **options)
        return finish(reference.loss(divergence, rows.weight, rows.clip), divergence, (leaf,), upstream)
    out = logits_divergence(s, t, supervision=rows, impl=impl, inplace=inplace, **options)
    return finish(out.loss, out.divergence, (leaf,), upstream, out)


def on_device(rows: vigos.Supervision, device: str) -> vigos.Supervision:
    return vigos.Supervision(**{k: x.to(device) if isinstance(x, Tensor) else x for k, x in vars(rows).items()})


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


def logits_no_worse(ours: Outcome, student: Tensor, teacher: Tensor, rows: vigos.Supervision, **options: Any) -> None:
    """The rule of `assert_close` for logits: the divergences may be off by the rounding of the largest logit, and the
    gradient by that of its own dtype (twice: Triton's interpreter truncates bfloat16, where a GPU rounds).
    """
    exact = run_logits(student, teacher, rows, None, **options)
    eager = run_logits(student.float(), teacher.float(), rows, "reference", **options)
    largest, few = student.abs().max().item(), 4 * 6e-8
    own = 0.0 if student.dtype == torch.float32 else 2 * torch.finfo(student.dtype).eps
    for name, x in ours.items():
        truth, plain = getattr(exact, name), getattr(eager, name)
        assert torch.isfinite(x).all(), f"{name}: not finite"
        mine, size = (x - truth).norm().item(), truth.norm().item()
        bound = 2 * (plain - truth).norm().item() + few * max(size, largest) + (own * size if name == "dhidden" else 0)
        bound = max(bound, 1e-5 * size)  # the promise
        assert mine <= bound, f"{name}: error {mine:.1e}, plain {(plain - truth).norm():.1e}, bound {bound:.1e}"
    silent = torch.ones(len(student), dtype=torch.bool).index_fill(0, rows.student_row, False)
    assert (ours.dhidden.view(len(student), -1)[silent] == 0).all()
