"""logits_divergence against the oracle in float64, for every engine that runs here: layouts, extremes, in place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.divergence_cases import KINDS, error, logits_no_worse, of_kind, peaked_logits, run_logits
from helpers.engines import EVERY, PROFILES, set_up

import vigos
from vigos import reference
from vigos.divergence.engines import ONE_VISIT

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's: inf - inf
INF = float("inf")


@pytest.fixture(params=EVERY)
def engine(request, monkeypatch):
    set_up(request.param, monkeypatch, request)
    return request.param


def ours(engine, *arguments, **options):
    return run_logits(*arguments, engine, device=PROFILES[engine].device, **options)


def mixed(n):
    """Row i against row i, kinds in turn."""
    return of_kind(n, torch.arange(n).remainder(3).to(torch.int8))


@pytest.mark.parametrize(
    ("engine", "v"), [(e, v) for e in PROFILES for v in PROFILES[e].vocabularies], indirect=["engine"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vocabularies(engine, v, dtype):
    """Under, at and past a block; repeated rows add up, rows nobody supervises get exact zeros."""
    student, teacher = peaked_logits(7, v, dtype, far=0.3)
    rows = replace(mixed(9), student_row=torch.tensor([4, 0, 4, 1, 5, 5, 5, 1, 0]), teacher_row=torch.arange(9) % 5)
    logits_no_worse(ours(engine, student, teacher, rows, beta=0.3), student, teacher, rows, beta=0.3)


OPTIONS = {
    "softcap": {"softcap": 7.0, "temperature": 1.2, "vocab_size": 190},
    "scale": {"temperature": 0.7, "scale": 1.3},
    "entry clip": {"entry_clip": 1e-3},
    "one entry": {"vocab_size": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_options(engine, name, inplace):
    """Strided rows too, and labels' and statistics' columns are those of the logical vocabulary."""
    student, teacher = peaked_logits(9, 203, torch.float32, far=0.3)
    rows = replace(mixed(5), student_row=torch.tensor([8, 0, 3, 5, 7]), teacher_row=torch.tensor([0, 0, 6, 1, 2]))
    got = ours(engine, student, teacher, rows, inplace=inplace, **OPTIONS[name])
    logits_no_worse(got, student, teacher, rows, **OPTIONS[name])
    assert (got.dhidden[:, OPTIONS[name].get("vocab_size", 203) :] == 0).all()


@pytest.mark.parametrize("near", [0.02, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("kind", KINDS, ids=["forward", "reverse", "jsd"])
def test_precision_near_the_teacher(engine, kind, near):
    """The promise of 1e-5 in float32 for each row, from KL 1e-4 up."""
    student, teacher = peaked_logits(3, PROFILES[engine].wide, torch.float32, far=near)
    rows = of_kind(3, kind)
    got = ours(engine, student, teacher, rows, upstream="loss")
    exact = run_logits(student, teacher, rows, None, upstream="loss")
    promised = run_logits(student, teacher, of_kind(3, vigos.FORWARD_KL), None).divergence > 1e-4
    assert promised.any()
    off = (got.dhidden - exact.dhidden).norm(dim=1) / exact.dhidden.norm(dim=1)
    # From logits Triton's kernels subtract two log-sums, each rounded.
    assert off[promised].max() < (3e-5 if engine == "triton" else 1e-5)


LAYOUTS = {
    "shifted": lambda x: x[:, :-1],
    "completion": lambda x: x[:, 3:],
    "transposed": lambda x: x.transpose(0, 1),
    "every other": lambda x: x[:, ::2],
    "columns": lambda x: x[..., :37],
    "unaligned columns": lambda x: x[..., 3:],
    "every other column": lambda x: x[..., ::2],
    "strided vocabulary": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "four dimensions": lambda x: x[:, :, None][:, 1:].expand(-1, -1, 1, -1),
    "one sequence": lambda x: x[:1, 1:],
}


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize(
    ("engine", "layout"), [(e, name) for e, profile in PROFILES.items() for name in profile.layouts or LAYOUTS],
    indirect=["engine"],
)  # fmt: skip
def test_any_layout(engine, layout, inplace):
    """Read where they lie; the gradient reaches every row that is supervised, and no other."""
    student, teacher = (x.view(3, 5, 41) for x in peaked_logits(15, 41, torch.float32, far=0.3))
    view = LAYOUTS[layout]
    kept = (torch.arange(view(student)[..., 0].numel()) % 3 != 1).nonzero().squeeze(1)
    rows = replace(of_kind(len(kept), vigos.FORWARD_KL), student_row=kept, teacher_row=kept)
    got = ours(engine, student, teacher, rows, view=view, inplace=inplace)
    exact = run_logits(student, teacher, rows, None, view=view)
    torch.testing.assert_close(got.divergence, exact.divergence, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.dhidden, exact.dhidden, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.dhidden == 0, exact.dhidden == 0)


def test_in_place_writes_there_and_only_once(engine):
    """A view of wider logits: the gradient goes into the view and leaves what lies around it alone."""
    device = PROFILES[engine].device
    for start, columns in ((8, 64), (8, 67)):  # rows on 16 bytes, and off them
        wide = torch.randn(6, 80, device=device)
        before = wide.clone()
        view = (wide[:, start : start + columns]).requires_grad_()
        seen = []
        view.register_hook(lambda grad, seen=seen: seen.append(grad.data_ptr()))
        teacher = torch.randn(6, columns, device=device)
        out = vigos.logits_divergence(view, teacher, inplace=True, impl=engine)
        (gradient,) = torch.autograd.grad(out.loss, view, retain_graph=True)
        assert seen == [view.data_ptr()]
        assert gradient.data_ptr() == view.data_ptr()
        rest = torch.ones(80, dtype=torch.bool, device=device)
        rest[start : start + columns] = False
        assert torch.equal(wide.detach()[:, rest], before[:, rest])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.loss, view)


def test_offsets_beyond_two_to_the_thirty_one():
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


# --- clips, weights, upstream ----------------------------------------------------------------------------------------


def test_token_clip_and_weight(engine):
    student, teacher = peaked_logits(4, 300, torch.float32, far=0.6)
    each = run_logits(student, teacher, of_kind(4, vigos.FORWARD_KL), None).divergence
    clip = torch.tensor([INF, each[1].item() * 0.5, each[2].item() * 2, INF])
    rows = replace(of_kind(4, vigos.FORWARD_KL), weight=torch.tensor([0.5, 1.0, 2.0, 0.0]), clip=clip)
    got = ours(engine, student, teacher, rows, upstream="loss")
    assert got.out.clipped.tolist() == [False, True, False, False]
    assert (got.dhidden[[1, 3]] == 0).all()
    logits_no_worse(ours(engine, student, teacher, rows), student, teacher, rows)


def test_a_row_without_upstream_is_not_read(engine):
    student, teacher = peaked_logits(3, 300, torch.float32, far=0.3)
    student[1] = math.nan
    got = ours(engine, student, teacher, mixed(3), upstream=torch.tensor([1.0, 0.0, 1.0]))
    assert (got.dhidden[1] == 0).all()
    assert got.dhidden.isfinite().all()


UPSTREAMS = {
    "loss": lambda out, g: out.loss,
    "loss of another scale": lambda out, g: 1.7 * out.loss,
    "rows": lambda out, g: (out.divergence * g).sum(),
    "both": lambda out, g: 0.3 * out.loss + (out.divergence * g).sum(),
    "a clipped row": lambda out, g: out.loss + 2 * out.divergence[3],
    "nothing": lambda out, g: 0.0 * out.loss,
}
EIGHT = {"rows": ((8, 65), lambda x: x), "shifted": ((2, 5, 65), lambda x: x[:, :-1])}  # two shapes of eight rows


def weighted(layout, dtype=torch.float32):
    """A leaf, a teacher, and seven of eight rows out of order: every kind, odd weights, one row clipped."""
    shape, view = EIGHT[layout]
    student, teacher = (x.reshape(shape) for x in peaked_logits(math.prod(shape[:-1]), 65, dtype, far=0.3))
    rows = replace(mixed(7), student_row=torch.arange(8).roll(2)[1:], weight=torch.linspace(0.1, 1.3, 7))
    each = run_logits(student, teacher, rows, None, view=view).divergence
    return student, teacher, replace(rows, clip=torch.full((7,), INF).index_fill_(0, torch.tensor(3), each[3] / 2))


def called(engine, student, teacher, rows, layout):
    device, view = PROFILES[engine].device, EIGHT[layout][1]
    leaf, teacher = student.to(device).clone().requires_grad_(), teacher.to(device)
    return leaf, teacher, vigos.logits_divergence(view(leaf), view(teacher), supervision=rows, impl=engine)


@pytest.mark.parametrize("how", UPSTREAMS)
@pytest.mark.parametrize("layout", EIGHT)
def test_any_upstream_again_and_again(engine, layout, how):
    """Compare gradients with float64: of the loss, which forward may have written; of others; each again."""
    student, teacher, rows = weighted(layout)
    leaf, _, out = called(engine, student, teacher, rows, layout)
    g = torch.linspace(-1, 1, 7)
    truth, view = student.double().requires_grad_(), EIGHT[layout][1]
    z_s, z_t = (view(x).flatten(0, -2)[i] for x, i in ((truth, rows.student_row), (teacher.double(), rows.teacher_row)))
    divergence = reference.divergence(z_s, z_t, rows.kind)
    exact = vigos.DivergenceOutput(reference.loss(divergence, rows.weight, rows.clip), divergence, *[g] * 5, None, None)
    (wanted,) = torch.autograd.grad(UPSTREAMS[how](exact, g), truth)
    for _ in range(2):
        total = UPSTREAMS[how](out, g.to(leaf.device))
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
        assert error(gradient.cpu().double(), wanted) < 3e-5
        gradient.fill_(math.nan)


@pytest.mark.parametrize("engine", ONE_VISIT, indirect=True)
@pytest.mark.parametrize("layout", EIGHT)
def test_gradient_of_the_loss_comes_with_it(engine, layout):
    """3 N V of traffic: backward of the loss alone reads no logits, and gives away what forward wrote."""
    student, teacher, rows = weighted(layout)
    expected, _, out = called(engine, student, teacher, rows, layout)
    out.loss.backward()
    device, view, held = PROFILES[engine].device, EIGHT[layout][1], []
    leaf, teacher = view(student.to(device)).detach().requires_grad_(), view(teacher.to(device))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        out = vigos.logits_divergence(leaf, teacher, supervision=rows, impl=engine)
    leaf.data.fill_(math.nan)
    teacher.data.fill_(math.nan)
    (given,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(given, view(expected.grad))
    (written,) = (x for x in held if x.data_ptr() == given.data_ptr())
    assert written.numel() == given.numel()


@pytest.mark.parametrize("engine", ONE_VISIT, indirect=True)
def test_a_half_precision_gradient_is_rounded_once(engine):
    """Under an upstream that is no power of two it is what it is without a gradient from forward."""
    student, teacher, rows = weighted("rows", torch.bfloat16)
    leaf, _, out = called(engine, student, teacher, rows, "rows")
    first, again = (torch.autograd.grad(out.loss / 3, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


# --- extreme logits --------------------------------------------------------------------------------------------------


def test_extreme_logits(engine):
    """Logits of +-1e4 that disagree: huge, finite, and right."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (1e4 * (2 * torch.rand(6, 200, generator=g) - 1) for _ in range(2))
    teacher[3:] = student[3:] + 1e-2 * torch.randn(3, 200, generator=g)
    rows = mixed(6)
    got = ours(engine, student, teacher, rows, upstream=torch.ones(6))
    exact = run_logits(student, teacher, rows, None, upstream=torch.ones(6))
    torch.testing.assert_close(got.divergence, exact.divergence, rtol=1e-4, atol=1e-9)
    largest = exact.dhidden[3:].abs().max().item()
    tiny = 1e-11 if PROFILES[engine].textbook else 1e-5 * largest + 1e-16
    torch.testing.assert_close(got.dhidden[3:], exact.dhidden[3:], rtol=1e-4, atol=tiny)
    # Far apart a gradient is the difference of numbers of the divergence's size, 1e4.
    torch.testing.assert_close(got.dhidden[:3], exact.dhidden[:3], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("how", ["linear", "logits"])
def test_impossible_on_both_sides(engine, how):
    """-inf on both sides, whole blocks too, is as if the entry did not exist, and it has no gradient."""
    g, device = torch.Generator().manual_seed(0), PROFILES[engine].device
    z_s, z_t = torch.randn(5, 300, generator=g) * 4, torch.randn(5, 300, generator=g) * 4
    banned = torch.zeros(300, dtype=torch.bool)
    banned[torch.randperm(150, generator=g)[:30]] = banned[150:] = True
    rows = mixed(5)
    exact = run_logits(z_s[:, ~banned], z_t[:, ~banned], rows, None)
    bias = torch.zeros(300).masked_fill(banned, -INF)
    if how == "linear":  # the head is the identity, so logits are hidden states plus the bias
        leaf = z_s.to(device).requires_grad_()
        head = vigos.Head(torch.eye(300, device=device), bias.to(device))
        out = vigos.linear_divergence(leaf, head, z_t.to(device), supervision=rows, impl=engine)
        out.loss.backward()
        divergence, gradient, entropy = out.divergence.double().cpu(), leaf.grad.cpu(), out.student_entropy
    else:
        got = ours(engine, z_s + bias, z_t + bias, rows)
        divergence, gradient, entropy = got.divergence, got.dhidden, got.out.student_entropy
        assert error(gradient[:, ~banned], exact.dhidden) < 1e-5
    torch.testing.assert_close(divergence, exact.divergence, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(entropy).all()
    assert torch.isfinite(gradient).all()
    assert (gradient[:, banned] == 0).all()
    assert (gradient[:, ~banned] != 0).any()


@pytest.mark.parametrize("student_cannot", [True, False])
def test_impossible_on_one_side(engine, student_cannot):
    """Forward KL is +inf where the student cannot say what the teacher might; reverse KL the other way round."""
    z = torch.randn(4, 70, generator=torch.Generator().manual_seed(0)) * 3
    s, t = z.clone(), z.flip(0).contiguous()
    if not PROFILES[engine].textbook:  # the kernels for GPUs take what underflows for impossible
        t[0, 33] = -2000.0
    (s if student_cannot else t)[:, 33] = -INF
    got = {kind: ours(engine, s, t, of_kind(4, kind), upstream="loss") for kind in KINDS}
    infinite, finite = (KINDS[0], KINDS[1]) if student_cannot else (KINDS[1], KINDS[0])
    assert (got[infinite].divergence == INF).all()
    assert got[infinite].loss == INF
    for kind in (finite, vigos.JSD):
        exact = run_logits(s, t, of_kind(4, kind), None)
        torch.testing.assert_close(got[kind].divergence, exact.divergence, rtol=1e-5, atol=1e-6)
    if student_cannot:  # the gradient of forward KL is p_s - p_t even there
        exact = 1.7 * (s.double().softmax(-1) - t.double().softmax(-1))
        torch.testing.assert_close(got[vigos.FORWARD_KL].dhidden, exact, rtol=1e-4, atol=1e-6)
    # A finite clip makes of it an ordinary clipped row.
    bounded = ours(engine, s, t, replace(of_kind(4, infinite), clip=torch.full((4,), 0.5)), upstream="loss")
    assert bounded.loss.item() == pytest.approx(2.0)
    assert (bounded.dhidden == 0).all()


def test_forward_and_reverse_are_each_other_swapped(engine):
    s, t = torch.randn(5, 400), torch.randn(5, 400)
    forward, reverse = (ours(engine, *x, of_kind(5, kind)) for x, kind in (((s, t), 0), ((t, s), 1)))
    torch.testing.assert_close(forward.divergence, reverse.divergence, rtol=1e-6, atol=1e-6)


def test_error_is_measured():
    """The comparison itself sees an error of a part in a thousand."""
    student, teacher = peaked_logits(4, 100, torch.float32, far=0.3)
    got = run_logits(student, teacher, mixed(4), "reference")
    got.dhidden = got.dhidden * 1.001
    assert error(got.dhidden, run_logits(student, teacher, mixed(4), None).dhidden) > 9e-4
    with pytest.raises(AssertionError, match="dhidden: error"):
        logits_no_worse(got, student, teacher, mixed(4))
