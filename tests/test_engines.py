"""linear_divergence and logits_divergence against the oracle in float64, for every engine that runs here.

What takes long in Triton's interpreter or in the emulation of CUDA has smaller cases in the files of those engines.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.divergence_cases import (
    KINDS,
    UNLIKE,
    assert_close,
    case,
    error,
    heads,
    logits_divergence,
    of_kind,
    peaked_hidden,
    run,
    split,
    unlike,
)
from helpers.engines import PROFILES, set_up
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vigos
from vigos import reference

INF = float("inf")
fast = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=PROFILES)
def engine(request, monkeypatch):
    """The name of an engine that runs here; where Triton and CUDA have a GPU, its own files test them."""
    if PROFILES[request.param].device != "cpu":
        pytest.skip("its tensors lie on the CPU; see test_triton_gpu.py and test_cuda_gpu.py")
    set_up(request.param, monkeypatch, request)
    return request.param


@pytest.fixture(params=["reference", "cpu"])
def impl(request, monkeypatch):
    """The name of an engine for CPUs: cases too large for an interpreter, whose files have smaller ones."""
    set_up(request.param, monkeypatch, request)
    return request.param


def ordinary(engine, **options):
    """A case of the engine's size."""
    profile = PROFILES[engine]
    options.setdefault("v", profile.v)
    return case(profile.n, profile.d, **options)


def check(engine, c):
    """The engine in float32 against the truth and plain PyTorch."""
    profile = PROFILES[engine]
    ours = run(c, engine, torch.float32, device=profile.device)
    assert_close(c, ours, run(c, None, torch.float64), run(c, None, torch.float32), textbook=profile.textbook)


# One vocabulary entry; under, at and past a block of 64; past a vocabulary slice of the C++ kernel; odd widths.
@pytest.mark.parametrize(("n", "d", "v"), [(1, 7, 1), (3, 5, 63), (17, 33, 64), (40, 8, 1031), (5, 70, 4501)])
def test_shapes(impl, n, d, v):
    check(impl, case(n, d, v))


OPTIONS = {
    "plain": {},
    "separate heads": {"shared": False},
    "biases": {"bias": True},
    "both biases": {"bias": True, "shared": False},
    "temperature": {"temperature": 1.7},
    "softcap": {"softcap": 9.0, "scale": 0.6, "temperature": 0.8, "bias": True},
    "softcap, separate heads": {"softcap": 9.0, "shared": False, "bias": True},
    "padded vocabulary": {"vocab_size": 250},
    "entry clip": {"entry_clip": 1e-3, "near": 0.2},
    "entry clip, softcap": {"entry_clip": 1e-3, "softcap": 20.0, "near": 0.2},
    "token clip": {"clip": 0.02, "near": 0.2},
    "far teacher": {"near": 3.0},
    "other rows": {"m": 11},
    "other width": {"m": 30, "d_t": 19},
    "beta": {"beta": 0.1, "near": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(impl, name):
    check(impl, ordinary(impl, **OPTIONS[name]))


@pytest.mark.parametrize("name", UNLIKE)
def test_heads_that_differ_in_scale_and_softcap(engine, name):
    """Each side has a transform of its own, with one head and with two, with and without biases."""
    for shared in (True, False):
        c = ordinary(engine, near=0.2, bias=name != "scales", shared=shared)
        ours, exact, eager = (
            unlike(c, who, dtype, UNLIKE[name])
            for who, dtype in ((engine, torch.float32), (None, torch.float64), (None, torch.float32))
        )
        assert_close(c, ours, exact, eager, textbook=PROFILES[engine].textbook)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_engine_in_float64(name):
    c = case(**OPTIONS[name])
    exact = dict(run(c, None, torch.float64).items())
    for key, x in run(c, "reference", torch.float64).items():
        assert error(x, exact[key]) < 1e-11, key


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("name", ["softcap", "entry clip", "both biases", "beta"])
def test_every_instruction_set(isa, name):
    c_module = pytest.importorskip("vigos._C")
    c = case(**OPTIONS[name])
    exact, eager = run(c, None, torch.float64), run(c, None, torch.float32)
    try:
        c_module.select_isa(isa)
    except ValueError:
        pytest.skip(f"this machine does not run {isa}")
    try:
        assert_close(c, run(c, "cpu", torch.float32), exact, eager)
    finally:
        c_module.select_isa("best")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_operands_keep_float32_logits(impl, dtype):
    """Divergences as if computed in float64 from the rounded operands; gradients off by their own rounding alone."""
    profile = PROFILES[impl]
    c = ordinary(impl, near=0.05, bias=True)
    ours = run(c, impl, dtype, row_upstream=False, device=profile.device)
    exact = run(c, None, dtype, row_upstream=False, compute=torch.float64)
    assert error(ours.divergence, exact.divergence) < 1e-5
    assert error(ours.dhidden, exact.dhidden) < torch.finfo(dtype).eps
    assert error(ours.dhead, exact.dhead) < torch.finfo(dtype).eps


# --- the promise on precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision_promise(impl, dtype, kind, shared):
    """Error of dhidden at mean divergences from 1e-4 to 1: 0.5 % with bf16 operands, 1e-5 in float32."""
    profile = PROFILES[impl]
    for near in profile.near:
        c = (
            case(16, 64, 2003, near=near, shared=shared)
            if profile.n > 20
            else case(6, 24, 389, near=near, shared=shared)
        )
        c.supervision = of_kind(c.student.shape[0], kind)
        if not shared and dtype == torch.bfloat16:
            c.teacher_head = c.head.clone()  # of two heads that differ by rounding alone the divergence is rounding
        ours = run(c, impl, dtype, row_upstream=False, device=profile.device)
        exact = run(c, None, dtype, row_upstream=False, compute=torch.float64)
        if dtype == torch.bfloat16:
            assert error(ours.dhidden, exact.dhidden) <= 5e-3
            continue
        eager = run(c, None, dtype, row_upstream=False)
        plain = error(eager.dhidden, exact.dhidden)
        assert error(ours.dhidden, exact.dhidden) <= max(0.0 if shared and profile.difference else 2 * plain, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_teacher_gives_exactly_nothing(impl, kind):
    c = case(20, 33, 777)
    for teacher_head in (None, c.head.float()):
        hidden = c.student.float().requires_grad_()
        rows = vigos.Supervision.aligned(20, kind=kind)
        out = vigos.linear_divergence(
            hidden, c.head.float(), c.student.float(), teacher_head, supervision=rows, impl=impl
        )
        out.divergence.sum().backward()
        assert out.loss == 0
        assert (out.divergence == 0).all()
        assert hidden.grad is not None
        assert hidden.grad.abs().max() < 1e-6 * c.head.abs().max()


def test_a_row_does_not_notice_its_neighbours(impl):
    """Bit for bit: other order, other neighbours, other clips among them, NaN beside it."""
    c = case(40, 24, 700, near=0.1)
    base = c.supervision

    def results(order, clip=None, spoil=()):
        student, teacher = c.student.float().clone(), c.teacher.float().clone()
        for row in spoil:
            student[row], teacher[row] = float("nan"), float("inf")
        student.requires_grad_()
        rows = vigos.Supervision(order, order, base.kind[order], torch.ones(len(order)), INF if clip is None else clip)
        out = vigos.linear_divergence(student, c.head.float(), teacher, supervision=rows, impl=impl)
        keep = [i for i, row in enumerate(order.tolist()) if row not in spoil and not out.clipped[i]]
        (out.divergence[keep]).sum().backward()
        assert student.grad is not None
        return {int(order[i]): (out.divergence[i].item(), student.grad[order[i]].clone()) for i in keep}

    every = torch.arange(40)
    expected = results(every)
    shuffled = results(torch.randperm(40, generator=torch.Generator().manual_seed(1)))
    clipped = results(every, clip=torch.where(every % 3 == 0, 0.0, INF))
    spoiled = results(every, spoil=(1, 18, 39))
    for name, other in (("order", shuffled), ("clips", clipped), ("NaN", spoiled)):
        assert len(other) >= 26, name
        for row, (divergence, gradient) in other.items():
            assert divergence == expected[row][0], (name, row)
            assert torch.equal(gradient, expected[row][1]), (name, row)


def test_threads_do_not_show():
    """Bit for bit, with one thread and with several."""
    c = case(40, 24, 9001)
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            outcomes.append(run(c, "cpu", torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        for (name, x), (_, y) in zip(outcomes[0].items(), other.items(), strict=True):
            assert torch.equal(x, y), name


# --- which rows count ------------------------------------------------------------------------------------------------


def test_unsupervised_rows_never_reach_the_result(impl):
    c = case(12, 16, 90)
    student, teacher = c.student.float().clone(), c.teacher.float().clone()
    student[[2, 7]], teacher[[0, 9]] = float("nan"), float("inf")
    student.requires_grad_()
    rows = vigos.Supervision(torch.tensor([1, 11, 4]), torch.tensor([1, 11, 4]), vigos.REVERSE_KL)
    out = vigos.linear_divergence(student, c.head.float(), teacher, supervision=rows, impl=impl)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert student.grad is not None
    silent = [row for row in range(12) if row not in (1, 4, 11)]
    assert (student.grad[silent] == 0).all()
    assert (student.grad[[1, 4, 11]] != 0).any(1).all()


def test_weight_zero_adds_exactly_nothing(impl):
    """Also where the row's divergence is infinite or NaN."""
    c = case(4, 8, 50, near=0.3)
    student, teacher = c.student.float().clone(), c.teacher.float().clone()
    student[0] = float("nan")
    student.requires_grad_()
    head = c.head.float().requires_grad_()
    weight = torch.tensor([0.0, 1.0, 0.0, 2.0])
    rows = vigos.Supervision(torch.arange(4), torch.arange(4), vigos.FORWARD_KL, weight)
    out = vigos.linear_divergence(student, head, teacher, supervision=rows, impl=impl)
    out.loss.backward()
    assert out.divergence[0].isnan()
    assert out.loss.item() == pytest.approx((out.divergence[1] + 2 * out.divergence[3]).item(), rel=1e-6)
    assert student.grad is not None
    assert head.grad is not None
    assert (student.grad[[0, 2]] == 0).all()
    assert torch.isfinite(head.grad).all()


def test_clipped_rows(impl):
    """A clipped row adds weight * clip, has no gradient from the loss, and still has one from its divergence."""
    c = case(30, 16, 200, near=0.3, clip=0.05)
    exact = run(c, None, torch.float64)
    student = c.student.float().requires_grad_()
    out = vigos.linear_divergence(student, c.head.float(), c.teacher.float(), supervision=c.supervision, impl=impl)
    assert 3 < out.clipped.sum() < 27
    assert torch.equal(out.clipped, exact.divergence > 0.05)
    (of_loss,) = torch.autograd.grad(out.loss, student, retain_graph=True)
    assert (of_loss[out.clipped] == 0).all()
    assert (of_loss[~out.clipped] != 0).any(1).all()
    (of_rows,) = torch.autograd.grad(out.divergence.sum(), student)
    assert (of_rows != 0).any(1).all()


def test_no_rows(impl):
    """N = 0, and rows of which none is supervised: an exact 0 that backward runs through."""
    for n in (0, 5):
        student, head = torch.randn(n, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
        none = torch.empty(0, dtype=torch.int64)
        out = vigos.linear_divergence(
            student, head, torch.randn(n, 8), supervision=vigos.Supervision(none, none), impl=impl
        )
        assert out.loss == 0
        assert out.divergence.shape == (0,)
        out.loss.backward()
        assert student.grad is not None
        assert head.grad is not None
        assert (student.grad == 0).all()
        assert (head.grad == 0).all()


def test_statistics(impl):
    c = case(18, 16, 300, bias=True, temperature=1.3, softcap=12.0, vocab_size=280)
    labels = torch.randint(280, (18,), generator=torch.Generator().manual_seed(3))
    rows = c.supervision
    transform, options = split(c.options)
    out = vigos.linear_divergence(
        c.student.float(), vigos.Head(c.head.float(), c.student_bias.float(), **transform), c.teacher.float(),
        supervision=rows, labels=labels, impl=impl, **options,
    )  # fmt: skip
    for side, hidden, row in (("student", c.student, rows.student_row), ("teacher", c.teacher, rows.teacher_row)):
        z = reference.logits(hidden[row], vigos.Head(c.head, c.student_bias, **transform), **options)
        log_p = z.log_softmax(-1)
        for name, exact in (
            ("lse", z.logsumexp(-1)),
            ("entropy", reference.entropy(z)),
            ("logprob", log_p.gather(1, labels[:, None]).squeeze(1)),
        ):
            got = getattr(out, f"{side}_{name}")
            torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-6, msg=f"{side} {name}")
            assert not got.requires_grad
    assert out.clipped.dtype == torch.bool
    without = vigos.linear_divergence(c.student.float(), c.head.float(), c.teacher.float(), impl=impl)
    assert without.student_logprob is None
    assert without.teacher_logprob is None


def test_non_contiguous_inputs(impl):
    c = case(12, 16, 120, shared=False, bias=True)
    dense = run(c, impl, torch.float32)
    sliced = case(12, 16, 120, shared=False, bias=True)
    sliced.student = torch.stack([c.student, c.student], 2)[:, :, 0]
    sliced.teacher = c.teacher.T.contiguous().T
    sliced.head = c.head.T.contiguous().T
    sliced.teacher_head = torch.cat([c.teacher_head, c.teacher_head], 1)[:, :16]
    hidden, head = sliced.student.float().requires_grad_(), sliced.head.float().requires_grad_()
    assert not hidden.is_contiguous() or not head.is_contiguous()
    teacher_bias = torch.stack([c.teacher_bias.float()] * 2, 1)[:, 0]
    sides = heads(head, sliced.teacher_head.float(), c.student_bias.float(), teacher_bias)
    out = vigos.linear_divergence(
        hidden, sides[0], sliced.teacher.float(), sides[1], supervision=c.supervision, impl=impl
    )
    torch.testing.assert_close(out.divergence.double(), dense.divergence, rtol=1e-5, atol=1e-7)
    (1.7 * out.loss + (out.divergence * torch.linspace(0.1, 1, 12)).sum()).backward()
    assert hidden.grad is not None
    assert error(hidden.grad.double(), dense.dhidden) < 1e-5


# --- extreme logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(impl, kind):
    """Logits of +-1e4 that disagree: huge, finite, and right."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (1e4 * (2 * torch.rand(6, 200, generator=g, dtype=torch.float64) - 1) for _ in range(2))
    teacher[3:] = student[3:] + 1e-2 * torch.randn(3, 200, generator=g, dtype=torch.float64)
    student, teacher = student.float().double(), teacher.float().double()
    leaf, exact_leaf = student.float().requires_grad_(), student.clone().requires_grad_()
    rows = vigos.Supervision.aligned(6, kind=kind)
    out = vigos.logits_divergence(leaf, teacher.float(), supervision=rows, impl=impl)
    exact = reference.divergence(exact_leaf, teacher, torch.full((6,), kind), 0.5)
    torch.testing.assert_close(out.divergence.double(), exact.detach(), rtol=1e-4, atol=1e-9)
    out.loss.backward()
    exact.sum().backward()
    largest = exact_leaf.grad[3:].abs().max().item()
    torch.testing.assert_close(leaf.grad[3:].double(), exact_leaf.grad[3:], rtol=1e-4, atol=1e-5 * largest + 1e-16)
    # Far apart a gradient is the difference of numbers of the divergence's size, 1e4.
    torch.testing.assert_close(leaf.grad[:3].double(), exact_leaf.grad[:3], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["linear", "logits"])
def test_impossible_on_both_sides(impl, kind, how):
    """-inf on both sides is as if the entry did not exist, and it has no gradient."""
    g = torch.Generator().manual_seed(0)
    z_s, z_t = torch.randn(5, 90, generator=g) * 4, torch.randn(5, 90, generator=g) * 4
    banned = torch.randperm(90, generator=g)[:20]
    kept = torch.tensor([i for i in range(90) if i not in banned.tolist()])
    rows = vigos.Supervision.aligned(5, kind=kind)
    exact = reference.divergence(z_s[:, kept].double(), z_t[:, kept].double(), torch.full((5,), kind))
    bias = torch.zeros(90)
    bias[banned] = -INF
    if how == "linear":  # the head is the identity, so logits are hidden states plus the bias
        leaf = z_s.clone().requires_grad_()
        out = vigos.linear_divergence(leaf, vigos.Head(torch.eye(90), bias), z_t, supervision=rows, impl=impl)
    else:
        leaf = (z_s + bias).requires_grad_()
        out = vigos.logits_divergence(leaf, z_t + bias, supervision=rows, impl=impl)
    torch.testing.assert_close(out.divergence.double(), exact, rtol=1e-5, atol=1e-7)
    assert torch.isfinite(out.student_entropy).all()
    out.loss.backward()
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[:, banned] == 0).all()
    assert (leaf.grad[:, kept] != 0).any()


def test_impossible_on_one_side(impl):
    """Forward KL is +inf where the student cannot say what the teacher might; reverse KL the other way round."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4, 70, generator=g) * 3
    for student_cannot in (True, False):
        s, t = z.clone(), z.flip(0).contiguous()
        t[0, 33] = -2000.0  # its probability underflows, and yet it is not impossible
        (s if student_cannot else t)[:, 33] = -INF
        leaf = s.clone().requires_grad_()
        rows = {kind: vigos.Supervision.aligned(4, kind=kind) for kind in KINDS}
        out = {kind: vigos.logits_divergence(leaf, t, supervision=rows[kind], impl=impl) for kind in KINDS}
        infinite, finite = (0, 1) if student_cannot else (1, 0)
        assert (out[KINDS[infinite]].divergence == INF).all()
        assert out[KINDS[infinite]].loss == INF
        for kind in (KINDS[finite], vigos.JSD):
            exact = reference.divergence(s.double(), t.double(), torch.full((4,), kind))
            torch.testing.assert_close(out[kind].divergence.double(), exact, rtol=1e-5, atol=1e-7)
        if student_cannot:  # the gradient of forward KL is p_s - p_t even there
            out[vigos.FORWARD_KL].loss.backward()
            torch.testing.assert_close(leaf.grad, s.softmax(-1) - t.softmax(-1), rtol=1e-4, atol=1e-6)
        # A finite clip makes of it an ordinary clipped row.
        clipped = vigos.Supervision.aligned(4, kind=KINDS[infinite], clip=0.5)
        leaf = s.clone().requires_grad_()
        bounded = vigos.logits_divergence(leaf, t, supervision=clipped, impl=impl)
        bounded.loss.backward()
        assert bounded.loss.item() == pytest.approx(2.0)
        assert (leaf.grad == 0).all()


def test_nan_is_seen(impl):
    """NaN in a row that counts reaches the loss, under a clip and under an entry clip as well."""
    c = case(6, 8, 60)
    student = c.student.float().clone()
    student[2] = float("nan")
    for kind in KINDS:
        for clip, entry_clip in ((INF, None), (0.1, None), (0.1, 1e-3)):
            rows = vigos.Supervision.aligned(6, kind=kind, clip=clip)
            out = vigos.linear_divergence(
                student, c.head.float(), c.teacher.float(), supervision=rows, entry_clip=entry_clip, impl=impl
            )
            assert out.loss.isnan(), (kind, clip, entry_clip)
            assert out.divergence.isnan().tolist() == [False, False, True, False, False, False]


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_logits(impl, dtype, inplace):
    """Repeated rows where they are allowed, unsupervised rows exactly 0, strided rows, a padded vocabulary."""
    g = torch.Generator().manual_seed(0)
    v = 1100
    s = (torch.randn(9, v + 5, generator=g) * 3).to(dtype)[:, :v]
    t = (s.float() + 0.3 * torch.randn(9, v, generator=g)).to(dtype)
    student_row = torch.tensor([8, 0, 3, 5, 7] if inplace else [8, 0, 3, 8, 7, 0, 8])
    r = len(student_row)
    rows = vigos.Supervision(
        student_row, torch.randint(9, (r,), generator=g), torch.tensor((KINDS * 3)[:r], dtype=torch.int8),
        torch.rand(r, generator=g), torch.full((r,), INF),
    )  # fmt: skip
    for options in ({}, {"softcap": 7.0, "temperature": 1.2, "vocab_size": 1000}, {"entry_clip": 1e-3}):
        leaf = s.clone().requires_grad_()
        logits = leaf * 1  # not a leaf: its gradient may overwrite it
        out = logits_divergence(logits, t, supervision=rows, inplace=inplace, impl=impl, **options)
        truth = s.double().requires_grad_()
        clip = options.get("entry_clip")
        adjust = {k: x for k, x in options.items() if k != "entry_clip"}
        exact = reference.divergence(
            reference.adjust(truth[rows.student_row], **adjust),
            reference.adjust(t.double()[rows.teacher_row], **adjust), rows.kind, 0.5, clip,
        )  # fmt: skip
        torch.testing.assert_close(out.divergence.double(), exact.detach(), rtol=1e-5, atol=1e-6)
        upstream = torch.linspace(0.5, 2, r)
        ((out.divergence * upstream).sum() + 3 * out.loss).backward()
        ((exact * upstream).sum() + 3 * (exact * rows.weight).sum()).backward()
        assert leaf.grad.dtype == dtype
        assert error(leaf.grad.double(), truth.grad) < max(2e-5, torch.finfo(dtype).eps)
        silent = [row for row in range(9) if row not in student_row.tolist()]
        assert (leaf.grad[silent] == 0).all()
        if "vocab_size" in options:
            assert (leaf.grad[:, 1000:] == 0).all()


def test_logits_inplace_writes_there_and_only_once(impl):
    s = torch.randn(6, 80)
    logits = (s.clone().requires_grad_() * 1).requires_grad_()
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    out = vigos.logits_divergence(logits, torch.randn(6, 80), inplace=True, impl=impl)
    out.loss.backward(retain_graph=True)
    assert seen == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_logits_with_strided_vocabulary(impl):
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(7, 300, generator=g), torch.randn(7, 300, generator=g)
    results = []
    for strided in (False, True):
        for inplace in (False, True):
            leaf = s.clone().requires_grad_()
            logits = (leaf * 1).T.contiguous().T if strided else leaf * 1
            out = vigos.logits_divergence(logits, t.T.contiguous().T if strided else t, inplace=inplace, impl=impl)
            out.loss.backward()
            results.append((out.loss.item(), leaf.grad))
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-7)


def test_logits_offsets_beyond_two_to_the_thirty_one():
    """Rows that start more than 2**31 elements apart: a view over 2 GiB of address space that is never touched."""
    v, rows = 64, 3
    base = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    s = base.as_strided((rows, v), (2**30 + 2**18, 1))
    t = torch.randn(rows, v)
    s.copy_(t + 0.1)
    s[2, 5] += 1
    leaf = s.detach().requires_grad_()
    out = vigos.logits_divergence(leaf, t.bfloat16(), impl="cpu", inplace=True)
    small = s.clone().requires_grad_()
    expected = vigos.logits_divergence(small, t.bfloat16(), impl="cpu")
    assert torch.equal(out.divergence, expected.divergence)
    out.loss.backward()
    expected.loss.backward()
    assert torch.equal(base.as_strided((rows, v), (2**30 + 2**18, 1)), small.grad)


# --- what must not be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}, {"shared": False}], ids=str)
def test_padding_of_the_head_is_in_no_product(engine, options):
    """Rows of head and bias past the logical vocabulary may hold NaN or inf: results as if they were not there."""
    size = 201
    c = ordinary(engine, near=0.2, bias=True, **options)
    outcomes = []
    for padding in (0.0, math.nan, INF):
        for x in (c.head, c.teacher_head, c.student_bias, c.teacher_bias):
            if x is not None:
                x[size:] = padding
        c.options["vocab_size"] = size
        outcomes.append(run(c, engine, torch.float32))
    clean, *others = outcomes
    for other in others:
        for (name, x), (_, y) in zip(clean.items(), other.items(), strict=True):
            assert torch.equal(x, y), name
    assert (clean.dhead[size:] == 0).all()
    assert (clean.dbias[size:] == 0).all()


def test_switches_for_float32_products_are_ignored_and_put_back(engine):
    """TF32 on a GPU, bfloat16 on a CPU: float32 operands are multiplied in float32 all the same."""
    c = ordinary(engine, near=0.05)
    want = run(c, engine, torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = run(c, engine, torch.float32)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    for (name, x), (_, y) in zip(want.items(), got.items(), strict=True):
        assert torch.equal(x, y), name


def test_tensors_at_odd_addresses(engine):
    """Elements of 4 bytes that start one byte past a multiple of 4, as `torch.frombuffer` gives them."""

    def moved(x):
        raw = bytearray(1) + bytearray(x.contiguous().numpy().tobytes())
        return torch.frombuffer(raw, dtype=x.dtype, offset=1).view(x.shape)

    c = ordinary(engine, near=0.2, bias=True)
    tensors = [x.float() for x in (c.student, c.head, c.student_bias, c.teacher)]
    results = []
    for student, head, bias, teacher in (tensors, [moved(x) for x in tensors]):
        student.requires_grad_()
        out = vigos.linear_divergence(student, vigos.Head(head, bias), teacher, supervision=c.supervision, impl=engine)
        out.loss.backward()
        results.append((out.divergence.detach(), student.grad))
    assert moved(tensors[1]).data_ptr() % 4 == 1
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


# --- bits ------------------------------------------------------------------------------------------------------------


def test_bits_repeat_and_outputs_are_written_in_full(engine, monkeypatch):
    """Twice the same, also where every buffer starts as NaN."""
    c = ordinary(engine, near=0.3, clip=0.05, bias=True)
    first = run(c, engine, torch.float32, row_upstream=False)
    plain = torch.empty

    def poisoned(*size, **options):
        x = plain(*size, **options)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    for (name, x), (_, y) in zip(first.items(), run(c, engine, torch.float32, row_upstream=False).items(), strict=True):
        assert torch.equal(x, y), name
    labels = torch.arange(len(c.supervision.student_row))
    out = vigos.linear_divergence(
        c.student.float(), c.head.float(), c.teacher.float(), supervision=c.supervision, labels=labels, impl=engine
    )
    for name, value in vars(out).items():
        assert not value.isnan().any(), name


# --- properties ------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 200))


@fast
@given(
    shapes=shapes,
    width=st.integers(1, 12),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=19),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.3, 3),
            "softcap": st.floats(2, 30),
            "scale": st.floats(0.3, 2),
            "beta": st.floats(0.05, 0.95),
            "entry_clip": st.floats(1e-4, 0.5),
        },
    ),
    shared=st.booleans(),
    bias=st.booleans(),
    impl=st.sampled_from(["reference", "cpu"]),
)
def test_any_call_agrees_with_the_oracle(shapes, width, kinds, seed, scale, options, shared, bias, impl):
    n, m, d, v = shapes
    g = torch.Generator().manual_seed(seed)

    def tensor(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    d_t = d if shared else width
    r = len(kinds)
    weight = torch.randint(0, 3, (r,), generator=g).float()
    rows = vigos.Supervision(
        torch.randint(n, (r,), generator=g), torch.randint(m, (r,), generator=g), torch.tensor(kinds, dtype=torch.int8),
        weight, torch.where(torch.rand(r, generator=g) < 0.5, 0.3, INF),
    )  # fmt: skip
    student, teacher, head = tensor(n, d) * scale / d**0.5, tensor(m, d_t) * scale / d_t**0.5, tensor(v, d)
    teacher_head = None if shared else tensor(v, d_t)
    biases = [tensor(v) if bias else None, tensor(v) if bias and not shared else None]
    transform, options = split(options)
    arguments = {"supervision": rows, "vocab_size": 1 + seed % v, **options}
    student = student.float().double()
    leaf, truth = student.float().requires_grad_(), student.clone().requires_grad_()
    single = [None if x is None else x.float() for x in (head, teacher_head, *biases)]
    double = [None if x is None else x.double() for x in single]
    ours, exact = heads(*single, **transform), heads(*double, **transform)
    out = vigos.linear_divergence(leaf, ours[0], teacher.float(), ours[1], impl=impl, **arguments)
    loss, divergence = reference.linear_divergence(truth, exact[0], teacher.float().double(), exact[1], **arguments)
    # Rounding of the logits is relative to their size, and a divergence moves with them at most one to one.
    size = scale * d**0.5 * 1e-6 * 20 + 1e-6
    torch.testing.assert_close(out.divergence.double(), divergence.detach(), rtol=1e-4, atol=size)
    if ((divergence.detach() - rows.clip).abs() < 10 * size).any():
        return  # a row that sits on its clip may fall to either side of it
    torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=1e-4, atol=size * r * 2)
    if "entry_clip" in options:
        return  # the same of every entry; the gradients under an entry clip have tests of their own
    out.loss.backward()
    loss.backward()
    bound = size * 20 * max(1.0, head.abs().max().item()) * r
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-3, atol=bound)


@fast
@given(seed=st.integers(0, 999), beta=st.floats(0.01, 0.99), far=st.floats(1e-4, 10.0))
def test_jsd_lies_where_it_must(seed, beta, far):
    """0 <= JSD <= the entropy of a coin with chance beta; swapping sides and beta for 1 - beta changes nothing."""
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(4, 50, generator=g) * 3
    t = s + far * torch.randn(4, 50, generator=g)
    rows = vigos.Supervision.aligned(4, kind=vigos.JSD)
    one = vigos.logits_divergence(s, t, supervision=rows, beta=beta, impl="cpu").divergence
    other = vigos.logits_divergence(t, s, supervision=rows, beta=1 - beta, impl="cpu").divergence
    coin = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (one >= 0).all()
    assert (one <= coin + 1e-6).all()
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_forward_and_reverse_are_each_other_swapped():
    s, t = torch.randn(5, 400), torch.randn(5, 400)
    forward = vigos.logits_divergence(s, t, supervision=vigos.Supervision.aligned(5), impl="cpu")
    reverse = vigos.logits_divergence(t, s, supervision=vigos.Supervision.aligned(5, kind=vigos.REVERSE_KL), impl="cpu")
    torch.testing.assert_close(forward.divergence, reverse.divergence, rtol=1e-6, atol=1e-7)


def test_peaked_cases_are_peaked():
    """The inputs of this file have the entropies of a language model, not those of noise."""
    head = torch.randn(501, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entropy = reference.entropy(peaked_hidden(24, head, 0) @ head.T)
    assert 0.05 < entropy.mean() < 3
