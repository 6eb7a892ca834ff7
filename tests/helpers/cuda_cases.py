"""Check the CUDA kernels in the emulation; test_cuda_mutations.py asks the same of kernels with a fault."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vigos import reference

from .divergence_cases import KINDS, error, of_kind, peaked_logits, run_logits

# Capability, shared memory, vocabulary. Blocks with room for two rows; a cluster of four; two blocks, each with three
# parts of a row and room for one of the next; two passes, as below sm_90.
LAYOUTS = {
    "one block": (90, 232448, 1003), "cluster": (90, 12000, 1003), "parts": (90, 145000, 13003),
    "two passes": (80, 232448, 1003),
}  # fmt: skip


def rows_are_right(emulator: Any, layout: str = "cluster") -> Tensor:
    """Check statistics and gradient of each kind of row, on 16-byte addresses and off them; return all that came out.

    The rows have gaps behind them, and their number of entries is odd.
    """
    capability, limit, v = LAYOUTS[layout]
    emulator.set_device(capability, limit)
    stride, rows = v + 5, of_kind(3, torch.tensor(KINDS, dtype=torch.int8))
    student, teacher = peaked_logits(3, v, torch.float32, far=0.2)
    exact = run_logits(student, teacher, rows, None, upstream=torch.ones(3))
    labels = torch.tensor([0, v // 2, v - 1])
    found = []
    for shift in (0, 1):
        s, t, dlogits = (torch.full((3, stride), 7.0)[:, shift : shift + v] for _ in range(3))
        s.copy_(student)
        t.copy_(teacher)
        names = ("divergence", "student_entropy", "teacher_entropy", "student_lse", "teacher_lse", "student_logprob")
        out = {name: torch.empty(3) for name in (*names, "teacher_logprob")}
        clipped = torch.zeros(3, dtype=torch.bool)
        pointers = {"student": s, "teacher": t, "dlogits": dlogits, "labels": labels, "clipped": clipped, **out}
        pointers |= {name: getattr(rows, name) for name in ("kind", "weight", "clip")}
        params = emulator.cuda.LogitsRowsParams(
            **{name: x.data_ptr() for name, x in pointers.items()}, rows=3, vocab=v, logical_vocab=v,
            stride_student=stride, stride_teacher=stride, stride_dlogits=stride,
        )  # fmt: skip
        emulator.cuda.logits_rows(params, dtype="float32", gradient_dtype="float32", path="auto")
        torch.testing.assert_close(out["divergence"].double(), exact.divergence, rtol=2e-5, atol=1e-7)
        assert error(dlogits.double(), exact.dhidden) < 2e-5, "dlogits"
        for side, z in (("student", student.double()), ("teacher", teacher.double())):
            picked = z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
            for name, truth in (("lse", z.logsumexp(-1)), ("entropy", reference.entropy(z)), ("logprob", picked)):
                torch.testing.assert_close(out[f"{side}_{name}"].double(), truth, rtol=2e-6, atol=2e-6)
        found += [*out.values(), dlogits.flatten()]
    return torch.cat(found)


def projections_are_right(
    emulator: Any, *, shared: bool = True, r: int = 131, d: int = 328, v: int = 301, splits: int = 2
) -> Tensor:
    """Check the wgmma kernels against float64, forward and reverse rows mixed; return all that came out.

    D takes six stages of a ring of three or four, and is no multiple of a stage.
    """
    d_t, alpha, logical = d if shared else d + 64, 0.7, v - 2 if v > 3 else v
    generator = torch.Generator().manual_seed(r + v)
    student, head = (torch.randn(n, d, generator=generator) for n in (r, v))
    teacher, other = student + 0.1 * torch.randn(r, d, generator=generator), None
    if not shared:
        teacher, other = (torch.randn(n, d_t, generator=generator) for n in (r, v))
        other = (other * 2 / d**0.5).bfloat16()
    student, head, teacher = student.bfloat16(), (head * 3 / d**0.5).bfloat16(), teacher.bfloat16()
    kind = torch.randint(2, (r,), generator=generator).to(torch.int8)
    live = (torch.rand(r, generator=generator) < 0.8).float()
    labels = torch.randint(logical, (r,), generator=generator)
    names = "divergence", "student_entropy", "teacher_entropy", "student_lse", "teacher_lse", "student_logprob"
    out = {name: torch.empty(r) for name in (*names, "teacher_logprob")}
    stride = v + v % 2 + 2
    dlogits = torch.zeros(r, stride, dtype=torch.bfloat16)
    other_tensors = {
        "student_hidden": student, "teacher_hidden": teacher, "student_weight": head, "kind": kind, "live": live,
        "labels": labels, "dlogits": dlogits, "clip": torch.full((r,), 1e9), "clipped": torch.zeros(r).bool(),
        "label_logits": torch.zeros(2, r), "partial": torch.zeros(9, splits, r),
        "state": torch.zeros(r, emulator.cuda.row_state), **({} if other is None else {"teacher_weight": other}),
    }  # fmt: skip
    sizes = {
        "d": d, "d_t": d_t, "rows": r, "vocab": v, "logical_vocab": logical, "splits": splits, "stride_dlogits": stride,
        "stride_student_hidden": d, "stride_teacher_hidden": d_t, "stride_student_weight": d,
        "stride_teacher_weight": d_t,
    }  # fmt: skip
    emulator.linear_hopper({name: x.data_ptr() for name, x in (out | other_tensors).items()} | sizes, alpha)

    raw = (student.double() @ head.double().T).requires_grad_()
    z_s = alpha * raw[:, :logical]
    z_t = alpha * (teacher.double() @ (head if other is None else other).double().T)[:, :logical]
    divergence = reference.divergence(z_s, z_t, kind)
    (gradient,) = torch.autograd.grad((divergence * live).sum(), raw)
    torch.testing.assert_close(out["divergence"].double(), divergence.detach(), rtol=1e-4, atol=1e-6)
    assert error(dlogits[:, :v].double(), gradient) < 5e-3, "dlogits"
    assert (dlogits[:, logical:] == 0).all(), "padding"
    for side, z in (("student", z_s.detach()), ("teacher", z_t)):
        picked = z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
        for name, exact in (("lse", z.logsumexp(-1)), ("entropy", reference.entropy(z)), ("logprob", picked)):
            torch.testing.assert_close(out[f"{side}_{name}"].double(), exact, rtol=1e-5, atol=1e-5)
    return torch.cat([*out.values(), dlogits[:, :v].float().flatten()])
