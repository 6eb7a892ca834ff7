"""impl="cuda" with its kernels emulated on the CPU, against float64: indices, tails, clusters, arithmetic.

What needs a GPU is in test_cuda_gpu.py. Shapes: V under, at and past a vector, a thread's share and a block's share,
with and without a tail; rows that start on 16 bytes and rows that do not.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.divergence_cases import logits_divergence
from helpers.engines import configure, emulate
from torch import Tensor

import vigos
from vigos import FORWARD_KL, JSD, REVERSE_KL, Supervision, reference
from vigos.divergence.engines import cuda

INF = float("inf")
KINDS = [FORWARD_KL, REVERSE_KL, JSD]


@pytest.fixture(autouse=True)
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return emulate(monkeypatch, request)


def peaked(rows: int, v: int, near: float, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student and teacher logits with a few winners a row; the teacher is the student plus noise of size `near`."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, v, generator=generator, dtype=torch.float64) * 2
    for row in range(rows):
        winners = torch.randint(v, (4,), generator=generator)
        student[row, winners] += 8 + 3 * torch.rand(4, generator=generator, dtype=torch.float64)
    teacher = student + near * torch.randn(rows, v, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def exact(student: Tensor, teacher: Tensor, kind: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Divergences and d(sum of them)/d(student) in float64."""
    leaf = student.double().requires_grad_()
    adjust = {k: options.pop(k) for k in ("temperature", "softcap", "scale", "vocab_size") if k in options}
    z = reference.adjust(leaf, **adjust), reference.adjust(teacher.double(), **adjust)
    rows = reference.divergence(*z, kind, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    return rows.detach(), gradient


def run(student: Tensor, teacher: Tensor, kind: Tensor, **options: Any) -> tuple[vigos.DivergenceOutput, Tensor]:
    leaf = student.clone().requires_grad_()
    rows = torch.arange(student.shape[0])
    out = logits_divergence(leaf, teacher, supervision=Supervision(rows, rows, kind), impl="cuda", **options)
    (gradient,) = torch.autograd.grad(out.divergence.sum(), leaf)
    return out, gradient


def off(ours: Tensor, wanted: Tensor) -> float:
    """Largest error over a row, relative to the row's norm; the worst row."""
    assert torch.isfinite(ours).all()
    return ((ours.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


@pytest.mark.parametrize("limit", [232448, 9000], ids=["one block", "cluster"])
@pytest.mark.parametrize("v", [1, 8, 13, 1000, 3072, 5003])
def test_statistics_and_gradient(emulator: ModuleType, v: int, limit: int) -> None:
    emulator.set_device(90, limit)
    student, teacher = peaked(3, v, 0.3, seed=v)
    kind = torch.tensor(KINDS, dtype=torch.int8)
    labels = torch.tensor([0, v // 2, v - 1])
    out, gradient = run(student, teacher, kind, labels=labels, beta=0.3)
    rows, wanted = exact(student, teacher, kind, beta=0.3)
    torch.testing.assert_close(out.divergence.double(), rows, rtol=1e-4, atol=4e-7)
    if v > 1:  # a vocabulary of one has probability 1 and no gradient
        promised = rows > 1e-4  # one token holds nearly all of the other rows; their gradient is noise of size 1e-8
        assert off(gradient[promised], wanted[promised]) < 1e-5
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=2e-8)
    z = student.double(), teacher.double()
    for side, ours_lse, ours_entropy, ours_logprob in (
        (z[0], out.student_lse, out.student_entropy, out.student_logprob),
        (z[1], out.teacher_lse, out.teacher_entropy, out.teacher_logprob),
    ):
        torch.testing.assert_close(ours_lse.double(), side.logsumexp(-1), rtol=3e-7, atol=3e-7)
        torch.testing.assert_close(ours_entropy.double(), reference.entropy(side), rtol=2e-6, atol=2e-6)
        picked = side.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
        torch.testing.assert_close(ours_logprob.double(), picked, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("capability", "limit", "clusters"), [(80, 166912, 1), (90, 232448, 1), (90, 21000, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_paths_agree_with_float64(
    emulator: ModuleType, dtype: torch.dtype, capability: int, limit: int, clusters: int
) -> None:
    """Two passes below sm_90; one block, and eight, above. The gradient's error is that of its own dtype."""
    v = {torch.float32: 6000}.get(dtype, 12000)
    emulator.set_device(capability, limit)
    resident, cluster, _ = emulator.cuda.logits_rows_plan(v, str(dtype)[6:], capability, limit)
    assert (resident, cluster) == (capability >= 90, clusters)
    student, teacher = peaked(3, v, 0.2, seed=1, dtype=dtype)
    kind = torch.tensor(KINDS, dtype=torch.int8)
    out, gradient = run(student, teacher, kind)
    rows, wanted = exact(student, teacher, kind)
    torch.testing.assert_close(out.divergence.double(), rows, rtol=1e-4, atol=1e-6)
    assert off(gradient, wanted) < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("near", [0.014, 0.03, 0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS, ids=["forward", "reverse", "jsd"])
def test_precision_near_the_teacher(kind: int, near: float) -> None:
    """The promise of 1e-5 in float32, from KL 1e-4 up."""
    student, teacher = peaked(2, 4000, near, seed=3)
    kinds = torch.full((2,), kind, dtype=torch.int8)
    _, gradient = run(student, teacher, kinds)
    assert off(gradient, exact(student, teacher, kinds)[1]) < 1e-5


@pytest.mark.parametrize("kind", KINDS, ids=["forward", "reverse", "jsd"])
def test_entry_clip(kind: int) -> None:
    student, teacher = peaked(3, 777, 0.8, seed=5)
    kinds = torch.full((3,), kind, dtype=torch.int8)
    out, gradient = run(student, teacher, kinds, entry_clip=0.01)
    rows, wanted = exact(student, teacher, kinds, entry_clip=0.01)
    assert (rows < exact(student, teacher, kinds)[0] - 1e-3).any(), "the clip must bite"
    torch.testing.assert_close(out.divergence.double(), rows, rtol=1e-4, atol=1e-6)
    assert off(gradient, wanted) < 1e-5


def test_scale_softcap_temperature_and_padding() -> None:
    student, teacher = peaked(3, 1003, 0.3, seed=7)
    kinds = torch.tensor(KINDS, dtype=torch.int8)
    for options in (
        {"temperature": 0.7, "scale": 1.3},
        {"temperature": 1.7, "softcap": 6.0, "scale": 0.8},
        {"vocab_size": 998},
        {"vocab_size": 1},
    ):
        out, gradient = run(student, teacher, kinds, **options)
        rows, wanted = exact(student, teacher, kinds, **options)
        torch.testing.assert_close(out.divergence.double(), rows, rtol=1e-4, atol=1e-6, msg=str(options))
        assert (gradient[:, options.get("vocab_size", 1003) :] == 0).all()
        if options.get("vocab_size") != 1:
            assert off(gradient, wanted) < 2e-5, options


def test_a_teacher_equal_to_its_student_costs_nothing() -> None:
    student, _ = peaked(3, 2001, 0.0, seed=8)
    out, gradient = run(student, student.clone(), torch.tensor(KINDS, dtype=torch.int8))
    assert (out.divergence == 0).all()
    assert gradient.abs().max() < 1e-7


def test_impossible_tokens() -> None:
    """-inf on both sides adds nothing; forward KL where only the student has probability 0 is +inf, with a gradient."""
    student, teacher = peaked(4, 600, 0.3, seed=9)
    student[:, ::7] = teacher[:, ::7] = -INF
    kinds = torch.tensor([FORWARD_KL, REVERSE_KL, JSD, FORWARD_KL], dtype=torch.int8)
    student[3, 1] = -INF
    teacher[2, 2] = student[2, 3] = -INF
    out, gradient = run(student, teacher, kinds)
    rows, wanted = exact(student, teacher, kinds)
    assert out.divergence[3] == INF
    assert rows[3] == INF
    torch.testing.assert_close(out.divergence[:3].double(), rows[:3], rtol=1e-4, atol=1e-6)
    assert torch.isfinite(gradient).all()
    assert (gradient[:, ::7] == 0).all()
    assert off(gradient[:3], wanted[:3]) < 1e-5


def test_extreme_logits() -> None:
    student, teacher = peaked(3, 500, 0.3, seed=10)
    student[:, 3] += 1e4
    teacher[:, 3] += 1e4
    student[:, 5] -= 1e4
    out, gradient = run(student, teacher, torch.tensor(KINDS, dtype=torch.int8))
    assert torch.isfinite(out.divergence).all()
    assert torch.isfinite(gradient).all()
    assert (gradient.sum(-1).abs() < 1e-6).all()


def test_rows_repeat_and_skip() -> None:
    """Rows in any order, some twice, some never; a row that is not supervised may hold NaN and gets a zero gradient."""
    student, teacher = peaked(5, 333, 0.4, seed=11)
    student[2] = float("nan")
    rows = Supervision(
        torch.tensor([4, 0, 4, 1]), torch.tensor([3, 3, 0, 4]), torch.tensor([0, 1, 2, 0], dtype=torch.int8)
    )
    leaf = student.clone().requires_grad_()
    out = vigos.logits_divergence(leaf, teacher, supervision=rows, impl="cuda")
    upstream = torch.tensor([0.5, -2.0, 3.0, 0.0])
    (gradient,) = torch.autograd.grad((out.divergence * upstream).sum(), leaf)
    clean = student.nan_to_num().double().requires_grad_()
    wanted_rows = reference.divergence(clean[rows.student_row], teacher.double()[rows.teacher_row], rows.kind)
    (wanted,) = torch.autograd.grad((wanted_rows * upstream).sum(), clean)
    torch.testing.assert_close(out.divergence.double(), wanted_rows.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)
    assert (gradient[[1, 2, 3]] == 0).all()


@pytest.mark.parametrize("columns", [64, 67], ids=["aligned", "unaligned"])
def test_gradient_in_place_of_strided_logits(columns: int) -> None:
    """A view of wider logits: the gradient goes into the view and leaves what lies beside it alone."""
    wide, teacher = peaked(4, 80, 0.4, seed=12)
    before = wide.clone()
    view = wide[:, 8 : 8 + columns].requires_grad_()
    kinds = torch.tensor([0, 1, 2, 0], dtype=torch.int8)
    rows = torch.arange(4)
    supervision = Supervision(rows, rows.flip(0), kinds)
    beside = teacher.flip(0)[:, 8 : 8 + columns]
    out = vigos.logits_divergence(view, beside, supervision=supervision, inplace=True, impl="cuda")
    (gradient,) = torch.autograd.grad(out.divergence.sum(), view)
    assert gradient.data_ptr() == view.data_ptr()
    kl, wanted = exact(before[:, 8 : 8 + columns], teacher[:, 8 : 8 + columns], kinds)
    assert off(gradient[kl > 1e-4], wanted[kl > 1e-4]) < 1e-5
    assert (kl > 1e-4).sum() >= 3
    assert torch.equal(wide.detach()[:, :8], before[:, :8])
    assert torch.equal(wide.detach()[:, 8 + columns :], before[:, 8 + columns :])


def test_token_clip_and_weight() -> None:
    student, teacher = peaked(4, 500, 0.6, seed=13)
    rows = torch.arange(4)
    each = reference.forward_kl(student.double(), teacher.double())
    clip = torch.tensor([INF, each[1].item() * 0.5, each[2].item() * 2, INF])
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0])
    leaf = student.clone().requires_grad_()
    out = vigos.logits_divergence(leaf, teacher, supervision=Supervision(rows, rows, 0, weight, clip), impl="cuda")
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert out.clipped.tolist() == [False, True, False, False]
    torch.testing.assert_close(out.loss.double(), reference.loss(each, weight, clip), rtol=1e-5, atol=0)
    _, wanted = exact(student, teacher, torch.zeros(4, dtype=torch.int8))
    assert (gradient[[1, 3]] == 0).all()
    assert off(gradient[[0, 2]], (wanted * weight[:, None])[[0, 2]]) < 1e-5


# --- the chunked linear path -----------------------------------------------------------------------------------------


def hidden_states(n: int, m: int, d: int, v: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, head = (torch.randn(k, d, generator=generator) for k in (n, v))
    teacher = student[torch.randint(n, (m,), generator=generator)] + 0.05 * torch.randn(m, d, generator=generator)
    return student.to(dtype), (head * 3 / d**0.5).to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_rows", [16, 64])
def test_linear(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk_rows: int) -> None:
    """Gathered rows in several chunks with a ragged last one, mixed kinds, biases; head and bias gradients."""
    n, m, d, v, r = 9, 7, 24, 515, 21
    configure(monkeypatch, "cuda", cuda.Config(chunk_rows * v * (8 + dtype.itemsize)))
    student, head, teacher = hidden_states(n, m, d, v, dtype, seed=20)
    generator = torch.Generator().manual_seed(21)
    rows = Supervision(
        torch.randint(n, (r,), generator=generator), torch.randint(m, (r,), generator=generator),
        torch.randint(3, (r,), generator=generator).to(torch.int8), torch.rand(r, generator=generator),
        torch.where(torch.rand(r, generator=generator) < 0.3, 0.05, INF),
    )  # fmt: skip
    bias_s, bias_t = (torch.randn(v, generator=generator).to(dtype) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in (student, head, bias_s)]
    out = vigos.linear_divergence(
        leaves[0], vigos.Head(*leaves[1:]), teacher, vigos.Head(leaves[1], bias_t), supervision=rows, temperature=1.2,
        impl="cuda",
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, leaves)
    doubles = [x.double().requires_grad_() for x in (student, head, bias_s)]
    loss, divergence = reference.linear_divergence(
        doubles[0], vigos.Head(*doubles[1:]), teacher.double(), vigos.Head(doubles[1], bias_t.double()),
        supervision=rows, temperature=1.2,
    )  # fmt: skip
    wanted = torch.autograd.grad(loss, doubles)
    assert out.clipped.any()
    assert not out.clipped.all()
    torch.testing.assert_close(out.divergence.double(), divergence.detach(), rtol=1e-4, atol=3e-6)
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    for name, ours, exactly in zip(("hidden", "weight", "bias"), gradients, wanted, strict=True):
        error = (ours.double() - exactly).norm() / exactly.norm()
        assert error < bound, f"{name}: {error:.1e}"


def test_linear_rows_do_not_depend_on_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, v = 40, 16, 300
    configure(monkeypatch, "cuda", cuda.Config(16 * v * 12))
    student, head, teacher = hidden_states(n, n, d, v, torch.float32, seed=22)

    def gradient(at: Tensor) -> Tensor:
        leaf = student.clone().requires_grad_()
        out = vigos.linear_divergence(leaf, head, teacher, supervision=Supervision(at, at), impl="cuda")
        return torch.autograd.grad(out.loss, leaf)[0]

    everything = gradient(torch.arange(n))
    some = torch.tensor([31, 2, 17])
    assert torch.equal(gradient(some)[some], everything[some])


def test_linear_without_rows_or_gradients() -> None:
    student, head, teacher = hidden_states(3, 3, 8, 50, torch.float32, seed=23)
    none = torch.zeros(0, dtype=torch.int64)
    leaf = student.clone().requires_grad_()
    out = vigos.linear_divergence(leaf, head, teacher, supervision=Supervision(none, none), impl="cuda")
    assert out.loss == 0
    assert (torch.autograd.grad(out.loss, leaf)[0] == 0).all()
    with torch.no_grad():
        out = vigos.linear_divergence(student, head, teacher, impl="cuda")
    assert out.divergence.shape == (3,)


# --- plan and refusals -----------------------------------------------------------------------------------------------


def test_plan(emulator: ModuleType) -> None:
    """Qwen2.5-VL's rows on an H100: two blocks a multiprocessor where they fit; past eight blocks, two passes."""
    plan = emulator.cuda.logits_rows_plan
    limit = 232448  # bytes a block may have on sm_90
    resident, cluster, shared = plan(151_936, "bfloat16", 90, limit)
    assert (resident, cluster) == (True, 8)
    assert shared <= limit / 2
    resident, cluster, shared = plan(151_936, "float32", 90, limit)
    assert (resident, cluster) == (True, 8)
    assert limit / 2 < shared <= limit
    assert plan(10_000, "bfloat16", 90, limit)[:2] == (True, 1)
    assert plan(262_144, "float32", 90, limit)[:2] == (False, 1)
    assert plan(32_000, "bfloat16", 80, 166_912)[:2] == (False, 1)
    with pytest.raises(ValueError, match="vocab must be > 0, got 0"):
        plan(0, "float32", 90, limit)


def test_engine_refuses_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    student, head, teacher = hidden_states(3, 3, 8, 50, torch.float64, seed=24)
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16, student_hidden is torch\.float64"):
        vigos.linear_divergence(student, head, teacher, impl="cuda")
    with pytest.raises(ValueError, match="logits of one dtype on both sides"):
        vigos.logits_divergence(student.half(), teacher.float(), impl="cuda")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs, the tensors are on cpu"):
        vigos.logits_divergence(student.float(), teacher.float(), impl="cuda")


@pytest.mark.parametrize(
    ("name", "capability", "runs"),
    [
        ("80-real", (8, 6), True), ("80-real", (9, 0), False), ("80", (10, 0), True), ("86-real", (8, 0), False),
        ("90a-real", (9, 0), True), ("90a", (10, 0), False), ("100-real", (10, 3), True), ("120", (12, 1), True),
    ],
)  # fmt: skip
def test_which_gpu_runs_which_code(name: str, capability: tuple[int, int], runs: bool) -> None:
    assert cuda._runs_on(name, *capability) is runs
