"""impl="cuda" on a GPU, against float64. `make gpu-check` runs this file; elsewhere it skips.

Sizes are those of real vocabularies where the layout depends on them (clusters, waves), small elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from helpers.divergence_cases import logits_divergence
from torch import Tensor

import vigos
from vigos import FORWARD_KL, JSD, REVERSE_KL, Supervision, reference
from vigos.divergence.engines import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(cuda._module() is None, reason="vigos._C was built without CUDA"),
]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
hopper = pytest.mark.skipif(CAPABILITY != (9, 0), reason="needs compute capability 9.0")
KINDS = [FORWARD_KL, REVERSE_KL, JSD]
INF = float("inf")
BOUND = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 5e-3}


def peaked(rows: int, v: int, near: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with a few winners a row, the teacher `near` the student."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    student = 2 * torch.randn(rows, v, generator=generator, device="cuda")
    winners = torch.randint(v, (rows, 4), generator=generator, device="cuda")
    student.scatter_add_(1, winners, 8 + 3 * torch.rand(rows, 4, generator=generator, device="cuda"))
    teacher = student + near * torch.randn(rows, v, generator=generator, device="cuda")
    return student.to(dtype), teacher.to(dtype)


def kinds_of(rows: int) -> Tensor:
    return torch.tensor(KINDS, device="cuda").repeat(-(-rows // 3))[:rows].to(torch.int8)


def exact(student: Tensor, teacher: Tensor, kind: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    leaf = student.double().requires_grad_()
    rows = reference.divergence(leaf, teacher.double(), kind, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    return rows.detach(), gradient


def off(ours: Tensor, wanted: Tensor) -> float:
    assert torch.isfinite(ours).all()
    return ((ours.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


def rows_of(r: int, kind: Tensor | int) -> Supervision:
    index = torch.arange(r, device="cuda")
    return Supervision(index, index, kind)


# V: a tail and rows off 16 bytes; a Qwen2.5-VL vocabulary (a cluster of eight); past what a cluster holds in fp32.
@pytest.mark.parametrize("v", [257, 5003, 151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits(dtype: torch.dtype, v: int) -> None:
    student, teacher = peaked(7, v, 0.2, dtype)
    kind = kinds_of(7)
    leaf = student.clone().requires_grad_()
    labels = torch.randint(v, (7,), device="cuda")
    out = vigos.logits_divergence(leaf, teacher, supervision=rows_of(7, kind), labels=labels, impl="cuda")
    (gradient,) = torch.autograd.grad(out.divergence.sum(), leaf)
    rows, wanted = exact(student, teacher, kind)
    torch.testing.assert_close(out.divergence.double(), rows, rtol=2e-4, atol=1e-6)
    assert off(gradient, wanted) < BOUND[dtype]
    torch.testing.assert_close(out.student_lse.double(), student.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.teacher_entropy.double(), reference.entropy(teacher.double()), rtol=1e-5, atol=1e-5)
    picked = student.double().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    assert out.student_logprob is not None
    torch.testing.assert_close(out.student_logprob.double(), picked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=["forward", "reverse", "jsd"])
@pytest.mark.parametrize("near", [0.02, 0.1, 1.0])
def test_precision_in_float32(kind: int, near: float) -> None:
    student, teacher = peaked(4, 32_000, near, torch.float32, seed=1)
    kinds = torch.full((4,), kind, dtype=torch.int8, device="cuda")
    leaf = student.clone().requires_grad_()
    out = vigos.logits_divergence(leaf, teacher, supervision=rows_of(4, kinds), impl="cuda")
    (gradient,) = torch.autograd.grad(out.divergence.sum(), leaf)
    rows, wanted = exact(student, teacher, kinds)
    promised = rows > 1e-4
    assert promised.any()
    assert off(gradient[promised], wanted[promised]) < 1e-5


def test_small_paths_and_options() -> None:
    """Small enough for compute-sanitizer: both paths of the row kernel, softcap, entry clip, padding, in place."""
    for v in (64, 67):
        student, teacher = peaked(6, v, 0.3, torch.float32, seed=2)
        kind = kinds_of(6)
        for options in ({}, {"entry_clip": 0.01}, {"temperature": 1.3, "softcap": 8.0}, {"vocab_size": v - 3}):
            leaf = student.clone().requires_grad_()
            out = logits_divergence(leaf, teacher, supervision=rows_of(6, kind), impl="cuda", **options)
            (gradient,) = torch.autograd.grad(out.divergence.sum(), leaf)
            doubled = student.double().requires_grad_()
            adjust = {k: x for k, x in options.items() if k != "entry_clip"}
            z = reference.adjust(doubled, **adjust), reference.adjust(teacher.double(), **adjust)
            rows = reference.divergence(*z, kind, entry_clip=options.get("entry_clip"))
            (wanted,) = torch.autograd.grad(rows.sum(), doubled)
            torch.testing.assert_close(out.divergence.double(), rows.detach(), rtol=2e-4, atol=1e-6)
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)
        leaf = student.clone().requires_grad_()
        out = vigos.logits_divergence(leaf, teacher, supervision=rows_of(6, kind), inplace=True, impl="cuda")
        (gradient,) = torch.autograd.grad(out.divergence.sum(), leaf)
        assert gradient.data_ptr() == leaf.data_ptr()
        torch.testing.assert_close(gradient.double(), exact(student, teacher, kind)[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["two_pass", pytest.param("resident", marks=hopper)])
def test_row_kernel_paths_agree(path: str) -> None:
    """The launcher itself: both paths write what the public call gets, NaN-poisoned outputs included."""
    module = cuda._module()
    assert module is not None
    r, v = 5, 32_000
    student, teacher = peaked(r, v, 0.2, torch.bfloat16, seed=3)
    kind = kinds_of(r)
    names = ("divergence", "student_entropy", "teacher_entropy", "student_lse", "teacher_lse")
    outputs = {name: torch.full((r,), float("nan"), device="cuda") for name in names}
    ones, clip = torch.ones(r, device="cuda"), torch.full((r,), INF, device="cuda")
    clipped = torch.empty(r, dtype=torch.bool, device="cuda")
    dlogits = torch.full_like(student, float("nan"))
    params = module.LogitsRowsParams(
        student=student.data_ptr(), teacher=teacher.data_ptr(), dlogits=dlogits.data_ptr(), kind=kind.data_ptr(),
        weight=ones.data_ptr(), clip=clip.data_ptr(), clipped=clipped.data_ptr(), rows=r, vocab=v, logical_vocab=v,
        stride_student=v, stride_teacher=v, stride_dlogits=v, **{name: x.data_ptr() for name, x in outputs.items()},
    )  # fmt: skip
    stream = torch.cuda.current_stream().cuda_stream
    module.logits_rows(params, dtype="bfloat16", gradient_dtype="bfloat16", path=path, stream=stream)
    rows, wanted = exact(student, teacher, kind)
    torch.testing.assert_close(outputs["divergence"].double(), rows, rtol=2e-4, atol=1e-6)
    assert off(dlogits, wanted) < BOUND[torch.bfloat16]


def hidden_states(n: int, d: int, v: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    student, head = (torch.randn(k, d, generator=generator, device="cuda") for k in (n, v))
    teacher = student + 0.1 * torch.randn(n, d, generator=generator, device="cuda")
    return student.to(dtype), (head * 3 / d**0.5).to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Ragged in every direction; a small tile count; the shape of a model, more rows than one chunk.
@pytest.mark.parametrize(("n", "d", "v"), [(131, 72, 1003), (128, 64, 128), (900, 512, 151_936)])
def test_linear(dtype: torch.dtype, n: int, d: int, v: int) -> None:
    student, head, teacher = hidden_states(n, d, v, dtype, seed=4)
    kind = torch.arange(n, device="cuda").remainder(3).to(torch.int8)
    leaf, trained = student.clone().requires_grad_(), head.clone().requires_grad_()
    out = vigos.linear_divergence(leaf, trained, teacher, supervision=rows_of(n, kind), impl="cuda")
    ours = torch.autograd.grad(out.loss, (leaf, trained))
    some = torch.arange(0, n, max(1, n // 64), device="cuda")  # float64 logits of every row would not fit
    doubled = student[some].double().requires_grad_()
    rows = reference.divergence(doubled @ head.double().T, teacher[some].double() @ head.double().T, kind[some])
    (wanted,) = torch.autograd.grad(rows.sum(), doubled)
    torch.testing.assert_close(out.divergence[some].double(), rows.detach(), rtol=1e-3, atol=2e-6)
    error = (ours[0][some].double() - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 2e-5, torch.bfloat16: 6e-3}[dtype], f"dhidden {error:.1e}"
    same = vigos.linear_divergence(leaf, trained, teacher, supervision=rows_of(n, kind), impl="reference")
    theirs = torch.autograd.grad(same.loss, trained)[0]
    assert (ours[1].float() - theirs.float()).norm() / theirs.float().norm() < 1e-2


def test_bitwise_repeatable_on_another_stream() -> None:
    student, head, teacher = hidden_states(300, 256, 32_000, torch.bfloat16, seed=5)

    def run() -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        out = vigos.linear_divergence(leaf, head, teacher, impl="cuda")
        return out.divergence.detach(), torch.autograd.grad(out.loss, leaf)[0]

    first = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_offsets_beyond_two_to_the_31() -> None:
    """Row 15,000 of 152,064 entries starts past 2**31 elements (4.6 GB of bf16 a side)."""
    v, n = 152_064, 15_000
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    wide = torch.empty(n, v, dtype=torch.bfloat16, device="cuda")
    student, teacher = peaked(2, v, 0.2, torch.bfloat16, seed=6)
    wide[-2:], wide[:2] = student, teacher
    index = torch.tensor([n - 2, n - 1], device="cuda")
    rows = Supervision(index, torch.tensor([0, 1], device="cuda"), kinds_of(2))
    leaf = wide.requires_grad_()
    out = vigos.logits_divergence(leaf, wide.detach()[:2], supervision=rows, impl="cuda")
    (gradient,) = torch.autograd.grad(out.divergence.sum(), leaf)
    expected, wanted = exact(student, teacher, kinds_of(2))
    torch.testing.assert_close(out.divergence.double(), expected, rtol=2e-4, atol=1e-6)
    assert off(gradient[-2:], wanted) < BOUND[torch.bfloat16]
    assert not gradient[: n - 2].any()


def test_row_kernel_in_a_cuda_graph() -> None:
    """The linear path captures and replays: nothing in it waits for the device."""
    from vigos.divergence.engines.cuda import forward
    from vigos.divergence.engines.problem import LinearProblem, LogitTransform

    student, head, teacher = hidden_states(64, 128, 4096, torch.bfloat16, seed=7)
    index = torch.arange(64, device="cuda")
    problem = LinearProblem(
        student_row=index, teacher_row=index, kind=kinds_of(64), weight=torch.ones(64, device="cuda"),
        clip=torch.full((64,), INF, device="cuda"), labels=None, student_transform=LogitTransform(),
        teacher_transform=LogitTransform(), beta=0.5, entry_clip=None, vocab_size=4096, vocab_start=0, group=None,
        student_hidden=student, student_weight=head, teacher_hidden=teacher, teacher_weight=None, student_bias=None,
        teacher_bias=None, need_dhidden=True, need_dweight=False, need_dbias=False,
    )  # fmt: skip
    eager = forward(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(problem)
    graph.replay()
    torch.cuda.synchronize()
    assert captured.drow is not None
    assert eager.drow is not None
    assert torch.equal(captured.statistics.divergence, eager.statistics.divergence)
    assert torch.equal(captured.drow, eager.drow)


def test_compiled() -> None:
    student, head, teacher = hidden_states(64, 128, 4096, torch.bfloat16, seed=8)

    def loss(hidden: Tensor) -> Tensor:
        return vigos.linear_divergence(hidden, head, teacher, impl="cuda").loss

    plain, compiled = (student.clone().requires_grad_() for _ in range(2))
    loss(plain).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    assert torch.equal(plain.grad, compiled.grad)


def test_memory() -> None:
    """At most 700 MiB above inputs and results at a Qwen2.5-VL-3B shape."""
    n, d, v = 4096, 2048, 151_936
    student, head, teacher = hidden_states(n, d, v, torch.bfloat16, seed=9)
    leaf = student.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    vigos.linear_divergence(leaf, head, teacher, impl="cuda").loss.backward()
    torch.cuda.synchronize()
    results = 4 * n * d + 2 * n * d  # drow in fp32 and the gradient
    peak = (torch.cuda.max_memory_allocated() - before - results) / 2**20
    assert peak < 700, f"{peak:.0f} MiB"
