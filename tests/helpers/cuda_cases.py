"""Check the CUDA kernels in the emulation; test_cuda_mutations.py asks the same of kernels with a fault."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vigos import reference

from .divergence_cases import KINDS, case, error, of_kind, peaked_logits, run, run_logits

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


def product_is_right(
    emulator: Any, *, shared: bool = True, r: int = 131, d: int = 328, v: int = 301, dtype: str = "bfloat16"
) -> Tensor:
    """Check the product's 16-bit pairs and tops against float64; return all that came out.

    D takes six stages of a ring of three or four, and is no multiple of a stage; two clusters share the tiles.
    """
    d_t, logical = d if shared else d + 64, v - 2 if v > 3 else v
    generator = torch.Generator().manual_seed(r + v)
    student, head = (torch.randn(n, d, generator=generator) for n in (r, v))
    teacher, other = student + 0.1 * torch.randn(r, d, generator=generator), None
    if not shared:
        teacher, other = (torch.randn(n, d_t, generator=generator) for n in (r, v))
        other = (other * 2 / d**0.5).to(getattr(torch, dtype))
    head[logical:] = 100.0  # padding, which is no row's top
    student, head, teacher = (x.to(getattr(torch, dtype)) for x in (student, head * 3 / d**0.5, teacher))
    tiles = -(-v // 128)
    pairs = torch.full((r, tiles * 128 + 4, 2), 7.0, dtype=torch.float16)
    tops = torch.full((r, tiles + 1), 7.0)
    tensors = {
        "student_hidden": student, "teacher_hidden": teacher, "student_weight": head, "pairs": pairs, "tops": tops,
        **({} if other is None else {"teacher_weight": other}),
    }  # fmt: skip
    params = emulator.cuda.PairProductParams(
        **{name: x.data_ptr() for name, x in tensors.items()}, d=d, d_t=d_t, rows=r, vocab=v, logical_vocab=logical,
        stride_student_hidden=d, stride_teacher_hidden=d_t, stride_student_weight=d, stride_teacher_weight=d_t,
        stride_pairs=tiles * 128 + 4, stride_tops=tiles + 1,
    )  # fmt: skip
    emulator.cuda.pair_product(params, dtype=dtype)

    z_s = (student.double() @ head.double().T)[:, :logical]
    z_t = (teacher.double() @ (head if other is None else other).double().T)[:, :logical]
    largest = torch.stack([part.max(1).values for part in z_t.split(128, dim=1)], dim=1)
    torch.testing.assert_close(tops[:, : largest.shape[1]].double(), largest, rtol=2e-6, atol=2e-5)
    below, gap = pairs[:, :logical].double().unbind(-1)
    for name, stored, exact in (
        ("below", below, z_t - largest.repeat_interleave(128, 1)[:, :logical]), ("gap", gap, z_s - z_t),
    ):  # fmt: skip
        torch.testing.assert_close(stored, exact, rtol=2**-11, atol=4e-5, msg=name)
    return torch.cat([pairs[:, :logical].float().flatten(), tops[:, : largest.shape[1]].flatten()])


def pairs_are_right(emulator: Any) -> None:
    """Check the engine on stored pairs, over clusters whose blocks begin inside a tile, a padded tail in the last."""
    emulator.set_device(90, 9000)
    c = case(6, 16, 1003, near=0.2, vocab_size=998)
    got, exact = (
        run(c, impl, torch.bfloat16, upstream="loss", compute=compute, train_head=False)
        for impl, compute in (("cuda", None), (None, torch.float64))
    )  # fmt: skip
    assert error(got.divergence, exact.divergence) < 2e-3, "divergence"
    assert error(got.dhidden, exact.dhidden) < 3e-3, "dhidden"
