"""The Triton and CUDA engines at sizes that only a GPU can run: part of `make gpu-check`.

Sizes are those of real vocabularies where the layout depends on them (clusters, waves), small elsewhere. That results
are right at ordinary sizes is in test_engines.py and test_engines_logits.py, which take the GPU where there is one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.divergence_cases import (
    assert_close,
    assert_same,
    case,
    error,
    logits_no_worse,
    of_kind,
    on_device,
    peaked_logits,
    run,
    run_logits,
)
from helpers.engines import available
from torch import Tensor

import vigos
from vigos.divergence.engines import cuda, engine
from vigos.divergence.engines.problem import LinearProblem, LogitTransform
from vigos.divergence.engines.products import Chunks
from vigos.divergence.engines.self_check import small_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
hopper = pytest.mark.skipif(CAPABILITY != (9, 0), reason="needs compute capability 9.0")
INF = float("inf")


@pytest.fixture(params=["triton", "cuda"])
def impl(request: pytest.FixtureRequest) -> str:
    available(request.param)
    return request.param


def mixed(n: int) -> vigos.Supervision:
    return of_kind(n, torch.arange(n).remainder(3).to(torch.int8))


def hidden_states(n: int, d: int, v: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    student, head = (torch.randn(k, d, generator=generator, device="cuda") for k in (n, v))
    teacher = student + 0.1 * torch.randn(n, d, generator=generator, device="cuda")
    return student.to(dtype), (head * 3 / d**0.5).to(dtype), teacher.to(dtype)


# V: a tail and rows off 16 bytes; a Qwen2.5-VL vocabulary (a cluster of eight); past what a cluster holds in fp32.
@pytest.mark.parametrize("v", [257, 5003, 30_011, 151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits(impl: str, dtype: torch.dtype, v: int) -> None:
    student, teacher = peaked_logits(7, v, dtype, far=0.2)
    logits_no_worse(run_logits(student, teacher, mixed(7), impl, device="cuda"), student, teacher, mixed(7))


def test_small_paths_and_options(impl: str) -> None:
    """Small enough for compute-sanitizer: both paths of the row kernel, softcap, entry clip, padding, in place."""
    for v in (64, 67):
        student, teacher = peaked_logits(6, v, torch.float32, far=0.3)
        for options in ({}, {"entry_clip": 0.01}, {"temperature": 1.3, "softcap": 8.0}, {"vocab_size": v - 3}):
            got = run_logits(student, teacher, mixed(6), impl, device="cuda", **options)
            logits_no_worse(got, student, teacher, mixed(6), **options)
        got = run_logits(student, teacher, mixed(6), impl, device="cuda", inplace=True)
        logits_no_worse(got, student, teacher, mixed(6))


def test_small_and_ragged_linear(impl: str) -> None:
    c = case(131, 72, 1003)
    ours = run(c, impl, torch.float32, device="cuda")
    assert_close(c, ours, run(c, None, torch.float64), run(c, None, torch.float32), textbook=True)


@pytest.mark.parametrize("path", ["two_pass", pytest.param("resident", marks=hopper)])
def test_row_kernel_paths_agree(path: str) -> None:
    """The launcher itself: both paths write what the public call gets, NaN-poisoned outputs included."""
    available("cuda")
    module = cuda._module()
    assert module is not None
    r, v = 5, 32_000
    student, teacher = (x.cuda() for x in peaked_logits(r, v, torch.bfloat16, far=0.2))
    rows = on_device(mixed(r), "cuda")
    names = ("divergence", "student_entropy", "teacher_entropy", "student_lse", "teacher_lse")
    outputs = {name: torch.full((r,), float("nan"), device="cuda") for name in names}
    clipped = torch.empty(r, dtype=torch.bool, device="cuda")
    dlogits = torch.full_like(student, float("nan"))
    params = module.LogitsRowsParams(
        student=student.data_ptr(), teacher=teacher.data_ptr(), dlogits=dlogits.data_ptr(), kind=rows.kind.data_ptr(),
        weight=rows.weight.data_ptr(), clip=rows.clip.data_ptr(), clipped=clipped.data_ptr(), rows=r, vocab=v,
        logical_vocab=v, stride_student=v, stride_teacher=v, stride_dlogits=v,
        **{name: x.data_ptr() for name, x in outputs.items()},
    )  # fmt: skip
    stream = torch.cuda.current_stream().cuda_stream
    module.logits_rows(params, dtype="bfloat16", gradient_dtype="bfloat16", path=path, stream=stream)
    exact = run_logits(student.cpu(), teacher.cpu(), mixed(r), None, upstream=torch.ones(r))
    torch.testing.assert_close(outputs["divergence"].double().cpu(), exact.divergence, rtol=2e-4, atol=1e-6)
    assert error(dlogits.double().cpu(), exact.dhidden) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_at_the_shape_of_a_model(impl: str, dtype: torch.dtype) -> None:
    """More rows than one chunk: gradients of hidden states on some rows against float64, of the head on all."""
    n, d, v = 900, 512, 151_936
    student, head, teacher = hidden_states(n, d, v, dtype, seed=4)
    rows = on_device(mixed(n), "cuda")
    leaf, trained = student.clone().requires_grad_(), head.clone().requires_grad_()
    out = vigos.linear_divergence(leaf, trained, teacher, supervision=rows, impl=impl)
    ours = torch.autograd.grad(out.loss, (leaf, trained))
    some = torch.arange(0, n, 14, device="cuda")  # float64 logits of every row would not fit
    doubled = student[some].double().requires_grad_()
    divergence = vigos.reference.divergence(
        doubled @ head.double().T, teacher[some].double() @ head.double().T, rows.kind[some]
    )
    (wanted,) = torch.autograd.grad(divergence.sum(), doubled)
    exact = 5e-3 if impl == "cuda" and dtype != torch.float32 and CAPABILITY == (9, 0) else 1e-3  # of stored pairs
    torch.testing.assert_close(out.divergence[some].double(), divergence.detach(), rtol=exact, atol=2e-6)
    bound = 2e-5 if dtype == torch.float32 else 6e-3
    assert error(ours[0][some].double(), wanted) < bound
    same = vigos.linear_divergence(leaf, trained, teacher, supervision=rows, impl="reference")
    assert error(ours[1].float(), torch.autograd.grad(same.loss, trained)[0].float()) < 1e-2


@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize(("n", "d", "v"), [(700, 520, 5_003), (5, 8, 3), (512, 2048, 151_936)])
def test_stored_pairs_agree_with_fp32_logits(n: int, d: int, v: int, shared: bool, dtype: torch.dtype) -> None:
    """Our product, the first time each shape is launched and again, against the library's product and fp32 logits."""
    available("cuda")
    student, head, teacher = hidden_states(n, d, v, dtype, seed=6)
    rows = on_device(mixed(n), "cuda")
    problem = replace(
        small_case(dtype, "cuda", (0,)), student_hidden=student, student_weight=head, teacher_hidden=teacher,
        teacher_weight=None if shared else head.roll(1, 0), student_row=rows.student_row, teacher_row=rows.teacher_row,
        kind=rows.kind, weight=rows.weight, clip=rows.clip, vocab_size=v,
    )  # fmt: skip
    assert cuda.stores_pairs(problem)
    fp32 = cuda.forward(problem, Chunks(stored_pairs=False))
    for _ in range(2):
        got = cuda.forward(problem)
        torch.testing.assert_close(got.statistics.divergence, fp32.statistics.divergence, rtol=5e-3, atol=2e-6)
        assert error(got.drow, fp32.drow) < 3e-3


@pytest.mark.parametrize("near", [0.01, 0.03, 0.2])
def test_16_bit_gradients_are_rounded_once(impl: str, near: float) -> None:
    """Error of each row's dhidden against float64 with the same operands: at most 0.5 %, all kinds."""
    c = case(300, 512, 20_011, near=near)
    got = run(c, impl, torch.bfloat16, upstream="loss", device="cuda", train_head=False)
    exact = run(c, None, torch.bfloat16, upstream="loss", compute=torch.float64, device="cuda", train_head=False)
    assert ((got.dhidden - exact.dhidden).norm(dim=1) / exact.dhidden.norm(dim=1)).max() <= 5e-3


def test_clipped_rows_change_nobody_else(impl: str) -> None:
    c = case(900, 256, 5_003, near=0.1)
    alone = run(c, impl, torch.bfloat16, upstream="loss", device="cuda", train_head=False)
    c.supervision.clip.copy_(torch.where(torch.rand(900) < 0.5, 0.5 * alone.divergence, INF))
    among = run(c, impl, torch.bfloat16, upstream="loss", device="cuda", train_head=False)
    dead = among.out.clipped
    assert torch.equal(alone.divergence, among.divergence)
    assert (among.dhidden[dead] == 0).all()
    assert torch.equal(alone.dhidden[~dead], among.dhidden[~dead])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["triton", "cuda", "reference"])
def test_tensors_on_another_device_than_the_current_one(name: str) -> None:
    available(name)
    c = case(50, 64, 1_003, near=0.1)
    here, there = (run(c, name, torch.bfloat16, device=device) for device in ("cuda:0", "cuda:1"))
    torch.testing.assert_close(there.divergence, here.divergence, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(there.dhidden, here.dhidden, rtol=2e-2, atol=1e-4)
    assert torch.cuda.current_device() == 0


def test_bits_repeat_on_another_stream(impl: str) -> None:
    c = case(500, 256, 20_011, near=0.1)
    first = run(c, impl, torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = run(c, impl, torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    assert_same(first, second)


def test_offsets_beyond_two_to_the_31(impl: str) -> None:
    """Row 15,000 of 152,064 entries starts past 2**31 elements (4.6 GB of bf16 a side); the last two are supervised."""
    v, n = 152_064, 15_000
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    student, teacher = peaked_logits(2, v, torch.bfloat16, far=0.2)
    wide, wide_teacher = (torch.zeros(n, v, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    wide[-2:], wide_teacher[-2:] = student.cuda(), teacher.cuda()
    index = torch.tensor([n - 2, n - 1], device="cuda")
    leaf, rows = wide.requires_grad_(), on_device(mixed(2), "cuda")
    out = vigos.logits_divergence(leaf, wide_teacher, supervision=vigos.Supervision(index, index, rows.kind), impl=impl)
    (gradient,) = torch.autograd.grad(out.divergence.sum(), leaf)
    exact = run_logits(student, teacher, mixed(2), None, upstream=torch.ones(2))
    torch.testing.assert_close(out.divergence.double().cpu(), exact.divergence, rtol=2e-4, atol=1e-6)
    assert error(gradient[-2:].double().cpu(), exact.dhidden) < 5e-3
    assert not gradient[: n - 2].any()


def test_cuda_graph(impl: str) -> None:
    """The engine's own work captures and replays: nothing in it waits for the device."""
    student, head, teacher = hidden_states(100, 128, 5_003, torch.bfloat16, seed=7)
    rows = on_device(mixed(100), "cuda")
    problem = LinearProblem(
        student_row=rows.student_row, teacher_row=rows.teacher_row, kind=rows.kind, weight=rows.weight,
        clip=torch.full_like(rows.clip, 0.05), labels=None, student_transform=LogitTransform(),
        teacher_transform=LogitTransform(), beta=0.5, entry_clip=None, vocab_size=5_003, vocab_start=0, group=None,
        student_hidden=student, student_weight=head, teacher_hidden=teacher, teacher_weight=None, student_bias=None,
        teacher_bias=None, need_dhidden=True, need_dweight=False, need_dbias=False,
    )  # fmt: skip
    forward = engine(impl).forward
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        eager = forward(problem)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = forward(problem)
    student.mul_(1.01)
    graph.replay()
    fresh = forward(problem)
    assert not torch.equal(fresh.statistics.divergence, eager.statistics.divergence)
    assert torch.equal(captured.statistics.divergence, fresh.statistics.divergence)
    torch.testing.assert_close(captured.drow, fresh.drow, rtol=1e-2, atol=1e-5)


def test_compiled(impl: str) -> None:
    student, head, teacher = hidden_states(64, 128, 4096, torch.bfloat16, seed=8)

    def loss(hidden: Tensor) -> Tensor:
        return vigos.linear_divergence(hidden, head, teacher, impl=impl).loss

    plain, compiled = (student.clone().requires_grad_() for _ in range(2))
    loss(plain).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    assert torch.equal(plain.grad, compiled.grad)


def test_memory_is_a_chunk(impl: str) -> None:
    """At most 700 MiB above inputs and results at a Qwen2.5-VL-3B shape; all logits would be 2.3 GiB a side."""
    n, d, v = 4096, 2048, 151_936
    student, head, teacher = hidden_states(n, d, v, torch.bfloat16, seed=9)
    leaf = student.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    vigos.linear_divergence(leaf, head, teacher, impl=impl).loss.backward()
    torch.cuda.synchronize()
    results = 4 * n * d + 2 * n * d  # drow in fp32 and the gradient
    peak = (torch.cuda.max_memory_allocated() - before - results) / 2**20
    assert peak < 700, f"{peak:.0f} MiB"
