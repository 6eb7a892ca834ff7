"""impl="cuda_hopper" with its kernels emulated on the CPU, against float64: tiles, stages, phases, fragments, merges.

The emulation takes the layouts of the copy engine's swizzle and of wgmma's fragments from the PTX manual; that the chip
agrees is what test_cuda_gpu.py asks. Sizes: under, at and past a tile of 128 rows, 128 entries, 64 of K.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers.cuda_emulation import build, wide_mm
from torch import Tensor

import vigos
from vigos import FORWARD_KL, JSD, REVERSE_KL, Supervision, reference
from vigos.divergence.engines import cuda, cuda_hopper


@pytest.fixture(scope="module")
def emulator(request: pytest.FixtureRequest) -> ModuleType:
    return build(request.config.cache.mkdir("cuda-emulator"))


@pytest.fixture(autouse=True)
def emulated(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_module", lambda: emulator.cuda)
    monkeypatch.setattr(cuda, "_unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "_mm", wide_mm)
    monkeypatch.setattr(cuda_hopper, "_multiprocessors", lambda device: 4)


def operands(n: int, m: int, d: int, v: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, head = (torch.randn(k, d, generator=generator) for k in (n, v))
    teacher = student[torch.randint(n, (m,), generator=generator)] + 0.1 * torch.randn(m, d, generator=generator)
    return student.bfloat16(), (head * 3 / d**0.5).bfloat16(), teacher.bfloat16()


@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize(("r", "d", "v"), [(5, 8, 3), (128, 64, 128), (131, 72, 301)])
def test_against_float64(r: int, d: int, v: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_hopper, "CHUNK_BYTES", 128 * v * 2)  # two chunks of the gradient at 131 rows
    student, head, teacher = operands(9, 7, d, v, seed=r)
    generator = torch.Generator().manual_seed(1)
    other = None
    if not shared:  # a teacher of another width
        wide = torch.randn(v, d + 64, generator=generator)
        teacher = torch.randn(7, d + 64, generator=generator).bfloat16()
        other = (wide * 2 / d**0.5).bfloat16()
    rows = Supervision(
        torch.randint(9, (r,), generator=generator), torch.randint(7, (r,), generator=generator),
        torch.randint(2, (r,), generator=generator).to(torch.int8), torch.rand(r, generator=generator),
        torch.where(torch.rand(r, generator=generator) < 0.3, 0.02, float("inf")),
    )  # fmt: skip
    labels = torch.randint(v, (r,), generator=generator)
    leaves = [x.clone().requires_grad_() for x in (student, head)]
    out = vigos.linear_divergence(
        leaves[0], leaves[1], teacher, other, supervision=rows, labels=labels, temperature=1.3, logit_scale=0.9,
        impl="cuda_hopper",
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, leaves)
    doubles = [x.double().requires_grad_() for x in (student, head)]
    loss, divergence = reference.linear_divergence(
        doubles[0], doubles[1], teacher.double(), None if other is None else other.double(), supervision=rows,
        temperature=1.3, logit_scale=0.9,
    )  # fmt: skip
    wanted = torch.autograd.grad(loss, doubles)
    torch.testing.assert_close(out.divergence.double(), divergence.detach(), rtol=1e-4, atol=1e-6)
    assert out.clipped.any()
    for name, ours, exactly in zip(("hidden", "weight"), gradients, wanted, strict=True):
        error = (ours.double() - exactly).norm() / exactly.norm()
        assert error < 5e-3, f"{name}: {error:.1e}"
    options = {"temperature": 1.3, "logit_scale": 0.9}
    z_s = reference.logits(student.double()[rows.student_row], head.double(), **options)
    z_t = reference.logits(teacher.double()[rows.teacher_row], (head if other is None else other).double(), **options)
    for z, lse, entropy, logprob in (
        (z_s, out.student_lse, out.student_entropy, out.student_logprob),
        (z_t, out.teacher_lse, out.teacher_entropy, out.teacher_logprob),
    ):
        torch.testing.assert_close(lse.double(), z.logsumexp(-1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy.double(), reference.entropy(z), rtol=1e-5, atol=1e-5)
        picked = z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
        torch.testing.assert_close(logprob.double(), picked, rtol=1e-5, atol=1e-5)


def test_more_parts_of_the_vocabulary_than_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring of stages wraps several times, and the parts are merged: as one part, to rounding."""
    student, head, teacher = operands(4, 4, 200, 900, seed=2)
    results = []
    for multiprocessors in (1, 8):
        monkeypatch.setattr(cuda_hopper, "_multiprocessors", lambda device, m=multiprocessors: m)
        with torch.no_grad():
            results.append(vigos.linear_divergence(student, head, teacher, vocab_size=897, impl="cuda_hopper"))
    one, many = results
    torch.testing.assert_close(one.divergence, many.divergence, rtol=1e-5, atol=1e-7)
    z = (reference.logits(x.double(), head.double(), vocab_size=897) for x in (student, teacher))
    torch.testing.assert_close(many.divergence.double(), reference.forward_kl(*z), rtol=1e-4, atol=1e-6)


def test_plan(emulator: ModuleType) -> None:
    """No part of the vocabulary is empty, and 8,192 rows fill 132 multiprocessors with 128 blocks."""
    plan = emulator.cuda.linear_hopper_plan
    assert plan(8192, 151_936, 132) == (64, 2)
    for rows in (1, 130, 1000, 8192):
        for v in (1, 129, 1000, 151_936):
            row_tiles, splits = plan(rows, v, 132)
            tiles = -(-v // 128)
            each = -(-tiles // splits)
            assert row_tiles == -(-rows // 128)
            assert each * (splits - 1) < tiles


def test_refusals(emulator: ModuleType) -> None:
    student, head, teacher = operands(3, 3, 16, 40, seed=4)
    index = torch.arange(3)
    for change, message in (
        ({"supervision": Supervision(index, index, torch.full((3,), JSD, dtype=torch.int8))}, "JSD needs a second"),
        ({"entry_clip": 0.1}, "entry_clip needs a second visit"),
        ({"logit_softcap": 30.0}, "has no softcap"),
        ({"student_bias": torch.zeros(40, dtype=torch.bfloat16)}, "adds no bias"),
    ):
        with pytest.raises(ValueError, match=message):
            vigos.linear_divergence(student, head, teacher, impl="cuda_hopper", **change)
    with pytest.raises(ValueError, match=r"bfloat16 operands, student_hidden is torch\.float32"):
        vigos.linear_divergence(student.float(), head.float(), teacher.float(), impl="cuda_hopper")
    with pytest.raises(ValueError, match="student_hidden has 12 columns"):
        vigos.linear_divergence(student[:, :12], head[:, :12], teacher[:, :12], impl="cuda_hopper")
    with pytest.raises(ValueError, match="no kernel for logits"):
        vigos.logits_divergence(student, teacher, impl="cuda_hopper")


def test_launchers_refuse_bad_arguments(emulator: ModuleType) -> None:
    good = {
        "student_hidden": 1024, "teacher_hidden": 1024, "student_weight": 1024, "strides": (64, 64, 64, 64), "d": 64,
        "d_t": 64, "rows": 2, "vocab": 300, "logical_vocab": 300, "alpha": 1.0, "kind": 16, "splits": 3, "state": 16,
    }  # fmt: skip
    statistics = {
        name: 16 for name in (
            "partial", "clip", "divergence", "clipped", "student_entropy", "teacher_entropy", "student_lse",
            "teacher_lse",
        )
    }  # fmt: skip
    for change, message in (
        ({"vocab": 0}, r"vocab must be in \[1"),
        ({"splits": 4}, "splits must be few enough"),
        ({"student_hidden": 1032}, "student_hidden must be aligned to 16 bytes, got address 1032"),
        ({"d": 60, "d_t": 60}, "student_hidden must be of a width that is a multiple of 8"),
        ({"strides": (63, 64, 64, 64)}, "student_hidden must be of a row stride"),
        ({"d_t": 72}, "d_t must be d where the head is shared, got 72"),
        ({"partial": 0}, "partial must be a device pointer"),
        ({"labels": 16}, "label_logits must be a device pointer"),
    ):
        with pytest.raises(ValueError, match=message):
            emulator.cuda.linear_statistics(**good | statistics | change)
    with pytest.raises(ValueError, match="stride_dlogits must be even"):
        emulator.cuda.linear_gradient(**good, live=16, dlogits=16, stride_dlogits=301)


@pytest.mark.parametrize("kind", [FORWARD_KL, REVERSE_KL], ids=["forward", "reverse"])
def test_identical_models_cost_nothing(kind: int) -> None:
    student, head, _ = operands(4, 4, 64, 200, seed=5)
    leaf = student.clone().requires_grad_()
    rows = torch.arange(4)
    out = vigos.linear_divergence(
        leaf, head, student.clone(), supervision=Supervision(rows, rows, kind), impl="cuda_hopper"
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert (out.divergence == 0).all()
    assert (gradient == 0).all()
