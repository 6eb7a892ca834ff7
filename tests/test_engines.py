"""linear_divergence against the oracle in float64, for every engine that runs here, at sizes that suit each.

Where Triton and CUDA have a GPU they run on it, at sizes of their own; elsewhere in an interpreter and an emulation.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.divergence_cases import (
    KINDS,
    Case,
    assert_close,
    assert_same,
    case,
    error,
    of_kind,
    peaked_hidden,
    run,
    split,
)
from helpers.engines import EVERY, PROFILES, set_up

import vigos
from vigos import reference
from vigos.divergence.engines import engine as module_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's: inf - inf
INF = float("inf")
F32, F64 = torch.float32, torch.float64


@pytest.fixture(params=EVERY)
def engine(request, monkeypatch):
    set_up(request.param, monkeypatch, request)
    return request.param


def ours(engine, c, dtype=F32, **options):
    return run(c, engine, dtype, device=PROFILES[engine].device, **options)


def ordinary(engine, **options):
    """A case of the engine's size."""
    profile = PROFILES[engine]
    return case(profile.n, profile.d, **{"v": profile.v, **options})


def check(engine, c):
    """The engine in float32 against the truth and plain PyTorch."""
    assert_close(c, ours(engine, c), run(c, None, F64), run(c, None, F32), textbook=PROFILES[engine].textbook)


@pytest.mark.parametrize(
    ("engine", "shape"), [(e, s) for e in PROFILES for s in PROFILES[e].shapes], indirect=["engine"]
)
def test_shapes(engine, shape):
    n, d, v, *m = shape
    check(engine, case(n, d, v, m=m[0] if m else None))


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
    "everything": {
        "m": 11, "d_t": 17, "bias": True, "temperature": 1.3, "beta": 0.3, "softcap": 8.0, "scale": 0.7,
        "vocab_size": 250, "clip": 0.5,
    },
    "everything, entry clip": {
        "m": 11, "d_t": 17, "bias": True, "temperature": 1.3, "beta": 0.3, "softcap": 8.0, "scale": 0.7,
        "vocab_size": 250, "entry_clip": 0.01,
    },
}  # fmt: skip
# A transform of each side's own.
UNLIKE = {
    "scales": {"scale": 0.7, "teacher": {"scale": 1.2}},
    "one softcap": {"softcap": 9.0, "teacher": {"scale": 0.9}, "bias": True},
    "the other": {"scale": 0.8, "teacher": {"scale": 1.1, "softcap": 12.0}, "bias": True},
    "two softcaps": {
        "scale": 1.3, "softcap": 9.0, "teacher": {"scale": 0.9, "softcap": 30.0}, "temperature": 0.8, "bias": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "name"), [(e, name) for e, profile in PROFILES.items() for name in profile.options or OPTIONS],
    indirect=["engine"],
)  # fmt: skip
def test_options(engine, name):
    check(engine, ordinary(engine, **OPTIONS[name]))


@pytest.mark.parametrize("name", UNLIKE)
def test_heads_that_differ_in_scale_and_softcap(engine, name):
    """With one head and with two."""
    for shared in (True, False):
        size = (24, 32, 501) if PROFILES[engine].n > 20 else (12, 16, 200)
        check(engine, case(*size, near=0.2, shared=shared, **UNLIKE[name]))


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_engine_in_float64(name):
    c = case(**OPTIONS[name])
    exact = dict(run(c, None, F64).items())
    for key, x in run(c, "reference", F64).items():
        assert error(x, exact[key]) < 1e-11, key


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("name", ["softcap", "entry clip", "both biases", "beta"])
def test_every_instruction_set(isa, name):
    c_module = pytest.importorskip("vigos._C")
    c = case(**OPTIONS[name])
    try:
        c_module.select_isa(isa)
    except ValueError:
        pytest.skip(f"this machine does not run {isa}")
    try:
        check("cpu", c)
    finally:
        c_module.select_isa("best")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_operands_keep_float32_logits(engine, dtype):
    """Divergences as if computed in float64 from the rounded operands; gradients off by their own rounding alone."""
    c = ordinary(engine, near=0.05, bias=True)
    got = ours(engine, c, dtype, upstream="loss")
    exact = run(c, None, dtype, upstream="loss", compute=F64)
    rounding = 6e-8 * (c.student @ c.head.T).abs().max() * len(c.student) ** 0.5 / exact.divergence.norm()
    assert error(got.divergence, exact.divergence) < (1e-5 + rounding if PROFILES[engine].textbook else 1e-5)
    assert error(got.dhidden, exact.dhidden) < torch.finfo(dtype).eps
    assert error(got.dhead, exact.dhead) < torch.finfo(dtype).eps


# --- the promise on precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_precision_promise(engine, dtype, kind, shared):
    """Error of dhidden at mean divergences from 1e-4 to 1: 0.5 % with bf16 operands, 1e-5 in float32."""
    profile = PROFILES[engine]
    for near in profile.near:
        c = case(*((16, 64, 2003) if profile.n > 20 else (3, 24, 300)), near=near, shared=shared)
        c.supervision = of_kind(c.student.shape[0], kind)
        if not shared and dtype == torch.bfloat16:
            c.teacher_head = c.head.clone()  # of two heads that differ by rounding alone the divergence is rounding
        got = ours(engine, c, dtype, upstream="loss", train_head=False)
        exact = run(c, None, dtype, upstream="loss", compute=F64)
        if dtype == torch.bfloat16:
            assert error(got.dhidden, exact.dhidden) <= 5e-3
            continue
        plain = error(run(c, None, dtype, upstream="loss").dhidden, exact.dhidden)
        assert error(got.dhidden, exact.dhidden) <= max(0.0 if shared and profile.difference else 2 * plain, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0, "temperature": 1.3}, {"entry_clip": 1e-3}], ids=str)
def test_digits_next_to_the_teacher(engine, kind, options):
    """float32, one head: (student - teacher) @ head is what is computed, and keeps the digits that logits lose."""
    if not PROFILES[engine].difference or ("entry_clip" in options and engine != "triton"):
        pytest.skip("multiplies both sides, or sums the terms of the definition under an entry clip")
    for near in PROFILES[engine].near:
        c = case(3, 24, 300, near=near, **options)
        c.supervision = of_kind(3, kind)
        if options:
            g = torch.Generator().manual_seed(1)
            c.student_bias, c.teacher_bias = torch.randn(2, 300, generator=g, dtype=F64)
            c.teacher_bias = c.student_bias + near * c.teacher_bias
        got, exact = ours(engine, c, upstream="loss"), run(c, None, F32, upstream="loss", compute=F64)
        off = ((got.dhidden - exact.dhidden).norm(dim=1) / exact.dhidden.norm(dim=1)).max()
        assert off < 1e-5
        # Clipped sums have terms of both signs; theirs are far larger than what is left.
        atol = 2e-6 if "entry_clip" in options else 2e-9
        torch.testing.assert_close(got.divergence, exact.divergence, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_teacher_gives_exactly_nothing(engine, kind):
    c = ordinary(engine)
    c.teacher, c.supervision = c.student, of_kind(len(c.student), kind)
    for teacher_head in (None, c.head.clone()):
        c.teacher_head = teacher_head
        got = ours(engine, c, upstream=torch.ones(len(c.student)))
        assert got.loss == 0
        assert (got.divergence == 0).all()
        assert got.dhidden.abs().max() < 1e-6 * c.head.abs().max()


def test_a_row_does_not_notice_its_neighbours(engine):
    """Bit for bit: other order, other neighbours, other clips among them, NaN next to it, alone."""
    c = case(40, 24, 700, near=0.1) if PROFILES[engine].n > 20 else case(8, 16, 130, near=0.1)
    base, n = c.supervision, len(c.student)

    def results(order, clip=None, spoil=()):
        one = replace(c, student=c.student.clone(), teacher=c.teacher.clone())
        one.student[list(spoil)], one.teacher[list(spoil)] = math.nan, INF
        clips = torch.full((n,), INF) if clip is None else clip
        one.supervision = vigos.Supervision(order, order, base.kind[order], torch.ones(len(order)), clips[order])
        fine = torch.tensor([row not in spoil for row in order.tolist()])
        got = ours(engine, one, upstream=fine & (clips[order] == INF), train_head=False)
        return {
            row: (got.divergence[i].item(), got.dhidden[row])
            for i, row in enumerate(order.tolist()) if row not in spoil and not got.out.clipped[i]
        }  # fmt: skip

    every = torch.arange(n)
    expected = results(every)
    others = {
        "order": results(torch.randperm(n, generator=torch.Generator().manual_seed(1))),
        "clips": results(every, clip=torch.where(every % 3 == 0, 0.0, INF)),
        "NaN": results(every, spoil=(1, n - 3, n - 1)),
        "alone": results(torch.tensor([n - 2, 2])),
    }
    for name, other in others.items():
        assert len(other) >= (2 if name == "alone" else 0.6 * n), name
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
            outcomes.append(run(c, "cpu", F32))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert_same(outcomes[0], other)


# --- which rows count ------------------------------------------------------------------------------------------------


def test_unsupervised_rows_never_reach_the_result(engine):
    c = case(12, 16, 90)
    c.supervision = replace(of_kind(3, vigos.REVERSE_KL), student_row=torch.tensor([1, 11, 4]))
    c.supervision = replace(c.supervision, teacher_row=c.supervision.student_row)
    clean = ours(engine, c)
    c.student[[2, 7]], c.teacher[[0, 9]] = math.nan, INF
    got = ours(engine, c)
    assert_same(got, clean)
    silent = [row for row in range(12) if row not in (1, 4, 11)]
    assert (got.dhidden[silent] == 0).all()
    assert (got.dhidden[[1, 4, 11]] != 0).any(1).all()


def test_weight_zero_adds_exactly_nothing(engine):
    """Also where the row's divergence is infinite or NaN."""
    c = case(4, 8, 50, near=0.3)
    c.student[0] = math.nan
    c.supervision = replace(of_kind(4, vigos.FORWARD_KL), weight=torch.tensor([0.0, 1.0, 0.0, 2.0]))
    got = ours(engine, c, upstream="loss")
    assert got.divergence[0].isnan()
    assert got.loss.item() == pytest.approx((got.divergence[1] + 2 * got.divergence[3]).item(), rel=1e-6)
    assert (got.dhidden[[0, 2]] == 0).all()
    assert torch.isfinite(got.dhead).all()


def test_clipped_rows(engine):
    """A clipped row adds weight * clip, has no gradient from the loss, and still has one from its divergence."""
    c = ordinary(engine, v=200, near=0.3)
    exact, n = run(c, None, F64), len(c.student)
    even = torch.arange(n) % 2 == 0
    c.supervision = replace(c.supervision, clip=torch.where(even, 0.5 * exact.divergence.float(), 1e3))
    got = ours(engine, c, upstream="loss")
    assert torch.equal(got.out.clipped, even)
    assert (got.dhidden[even] == 0).all()
    assert (got.dhidden[~even] != 0).any(1).all()
    assert (ours(engine, c, upstream=torch.ones(n), train_head=False).dhidden != 0).any(1).all()
    check(engine, c)


def test_no_rows(engine):
    """N = 0, and rows of which none is supervised: an exact 0 that backward runs through."""
    none = torch.empty(0, dtype=torch.int64)
    for n in (0, 5):
        c = Case(torch.randn(n, 8), torch.randn(20, 8), torch.randn(n, 8), vigos.Supervision(none, none))
        got = ours(engine, c)
        assert got.loss == 0
        assert got.divergence.shape == (0,)
        assert (got.dhidden == 0).all()
        assert (got.dhead == 0).all()


def test_without_gradients(engine):
    c, device = case(3, 8, 50), PROFILES[engine].device
    with torch.no_grad():
        hidden, head, teacher = (x.to(device, F32) for x in (c.student, c.head, c.teacher))
        out = vigos.linear_divergence(hidden, head, teacher, impl=engine)
    assert out.divergence.shape == (3,)
    assert not out.loss.requires_grad
    assert out.student_logprob is None
    assert out.teacher_logprob is None


def test_statistics(engine):
    c = ordinary(engine, v=300, bias=True, temperature=1.3, softcap=12.0, vocab_size=280)
    labels = torch.randint(280, (len(c.student),), generator=torch.Generator().manual_seed(3))
    labels[:4] = torch.tensor([0, 127, 255, 256])  # the ends of blocks
    rows, out = c.supervision, ours(engine, c, labels=labels).out
    transform, options = split(c.options)
    for side, hidden, row in (("student", c.student, rows.student_row), ("teacher", c.teacher, rows.teacher_row)):
        z = reference.logits(hidden[row], vigos.Head(c.head, c.student_bias, **transform), **options)
        for name, exact in (
            ("lse", z.logsumexp(-1)),
            ("entropy", reference.entropy(z)),
            ("logprob", z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)),
        ):
            got = getattr(out, f"{side}_{name}").double()
            torch.testing.assert_close(got, exact, rtol=3e-6, atol=3e-6, msg=f"{side} {name}")
    assert out.clipped.dtype == torch.bool


def test_non_contiguous_inputs(engine):
    c = case(6, 16, 120, shared=False, bias=True)
    dense, device = ours(engine, c), PROFILES[engine].device

    def lay(x, how):
        x = x.to(device, F32)
        return {
            "every other": lambda: torch.stack([x, x], -1)[..., 0],
            "transposed": lambda: x.T.contiguous().T,
            "half": lambda: torch.cat([x, x], 1)[:, :16],
        }[how]()

    hidden, head = lay(c.student, "every other").requires_grad_(), lay(c.head, "transposed").requires_grad_()
    assert not hidden.is_contiguous()
    assert not head.is_contiguous()
    out = vigos.linear_divergence(
        hidden, vigos.Head(head, c.student_bias.to(device, F32)), lay(c.teacher, "transposed"),
        vigos.Head(lay(c.teacher_head, "half"), lay(c.teacher_bias, "every other")), supervision=c.supervision,
        impl=engine,
    )  # fmt: skip
    torch.testing.assert_close(out.divergence.double().cpu(), dense.divergence, rtol=1e-5, atol=1e-7)
    (1.7 * out.loss + (out.divergence * torch.linspace(0.1, 1, 6).to(device)).sum()).backward()
    assert error(hidden.grad.double().cpu(), dense.dhidden) < 1e-5


# --- what must not be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}, {"shared": False}], ids=str)
def test_padding_of_the_head_is_in_no_product(engine, options):
    """Rows of head and bias past the logical vocabulary may hold NaN or inf: results as if they were not there."""
    size = 201
    c = ordinary(engine, near=0.2, bias=True, vocab_size=size, **options)
    outcomes = []
    for padding in (0.0, math.nan, INF):
        for x in (c.head, c.teacher_head, c.student_bias, c.teacher_bias):
            if x is not None:
                x[size:] = padding
        outcomes.append(ours(engine, c))
    clean, *others = outcomes
    for other in others:
        assert_same(clean, other)
    assert (clean.dhead[size:] == 0).all()
    assert (clean.dbias[size:] == 0).all()


def test_nan_is_seen(engine):
    """NaN in a row that counts reaches the loss, under a clip and under an entry clip as well."""
    c = case(6, 8, 60)
    c.student[2] = math.nan
    c.supervision = replace(c.supervision, student_row=torch.tensor([2, 2, 2, 0, 1, 3]))  # every kind, twice
    for clip, c.options in ((INF, {}), (0.1, {}), (0.1, {"entry_clip": 1e-3})):
        c.supervision.clip.fill_(clip)
        got = ours(engine, c)
        assert got.loss.isnan(), (clip, c.options)
        assert got.divergence.isnan().tolist() == [True] * 3 + [False] * 3


def test_switches_for_float32_products_are_ignored_and_put_back(engine):
    """TF32 on a GPU, bfloat16 on a CPU: float32 operands are multiplied in float32 all the same."""
    c = ordinary(engine, near=0.05)
    want = ours(engine, c)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = ours(engine, c)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(want, got)


def test_tensors_at_odd_addresses(engine):
    """Elements of 4 bytes that start one byte past a multiple of 4, as `torch.frombuffer` gives them."""
    if PROFILES[engine].device != "cpu":
        pytest.skip("a GPU's memory is not made of such")

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


def test_bits_repeat_and_outputs_are_written_in_full(engine, monkeypatch):
    """Twice the same, also where every buffer starts as NaN."""
    c = ordinary(engine, near=0.3, clip=0.05, bias=True)
    first = ours(engine, c, upstream="loss")
    plain = torch.empty

    def poisoned(*size, **options):
        x = plain(*size, **options)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    second = ours(engine, c, upstream="loss", labels=torch.arange(len(c.supervision.student_row)))
    assert_same(first, second)
    for name, value in vars(second.out).items():
        assert not value.isnan().any(), name


def test_peaked_cases_are_peaked():
    """The inputs of this file have the entropies of a language model, not those of noise."""
    head = torch.randn(501, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    entropy = reference.entropy(peaked_hidden(24, head, 0) @ head.T)
    assert 0.05 < entropy.mean() < 3


# --- auto ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_auto_takes_an_engine_after_it_agreed_with_float64(monkeypatch, request, recwarn):
    """A kernel that the machine at hand computes wrongly is left out, with one warning; its own name still runs it."""
    from vigos.divergence import engines
    from vigos.divergence.engines.self_check import agrees

    set_up("triton", monkeypatch, request)
    device = PROFILES["triton"].device
    monkeypatch.setitem(engines.AUTO, device, ("triton", "reference"))
    module, seen = module_of("triton"), []
    right = module.forward

    def wrong(problem):
        result = right(problem)
        seen.append("triton")
        result.drow *= 1.01
        return result

    def call(impl):
        hidden, head, teacher = (torch.randn(n, 8, device=device) for n in (3, 40, 3))
        return vigos.linear_divergence(hidden.requires_grad_(), head, teacher, impl=impl)

    def warned():
        return [str(w.message) for w in recwarn.list if w.category is UserWarning]

    agrees.cache_clear()
    try:
        call("auto")
        assert not warned()
        agrees.cache_clear()
        monkeypatch.setattr(module, "forward", wrong)
        call("auto")
        call("auto")
        (message,) = warned()
        assert "leaves out the 'triton' engine" in message
        assert "gradient=0.0" in message
        assert seen == ["triton"]  # by the check alone
        call("triton")
        assert seen == ["triton"] * 2
    finally:
        agrees.cache_clear()
