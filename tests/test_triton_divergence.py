"""impl="triton" against float64, on a GPU where there is one, else in Triton's interpreter.

Shapes are small because the interpreter runs each program in Python; they straddle the kernels' blocks all the same:
the tests shrink the slices, so that a row is swept by several programs, and the chunks, so that rows come in several.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.divergence_cases import heads, split
from helpers.engines import configure, small_triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vigos
from vigos import reference
from vigos.divergence.engines import engine
from vigos.divergence.engines.self_check import small_case
from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL, Supervision

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402

from vigos.kernels.numerics import expm1, log1p, tanh_and_slope  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


@pytest.fixture(autouse=True)
def _interpreter_is_noisy():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.*")  # numpy about inf - inf
        yield


@pytest.fixture
def small(monkeypatch):
    configure(monkeypatch, "triton", small_triton())


def assert_no_worse(ours, eager, exact, name, scale=None):
    """At most twice plain PyTorch's root-mean-square error, 4 times its largest (the largest of a few is mostly luck).

    `scale`: the largest value added or subtracted on the way to the answer (default: the answer).
    """
    assert torch.isfinite(ours).all(), f"{name}: non-finite values"
    rounding = torch.finfo(ours.dtype).eps * (exact if scale is None else scale).abs().max().item()
    errors = [(x.double() - exact).abs() for x in (ours, eager)]
    for what, factor, (err, base) in (
        ("rms", 2.0, [x.square().mean().sqrt().item() for x in errors]),
        ("max", 4.0, [x.max().item() for x in errors]),
    ):
        bound = factor * base + rounding
        assert err <= bound, f"{name}: {what} error {err:.2e}, eager {base:.2e}, rounding {rounding:.2e}"


def problem(n, m, r, d, v, dtype=torch.float32, *, seed=0, near=None, shared=True, d_t=None):
    """Hidden states and heads whose logits are peaked: a few clear winners a row. `near`: teacher = student + noise."""
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(v, d, generator=g) * 1.5 / math.sqrt(d)
    hidden = torch.randn(n, d, generator=g) * 2
    hidden += head[torch.randint(v, (n,), generator=g)] * 3
    if near is None:
        teacher = torch.randn(m, d_t or d, generator=g) * 2
    else:
        teacher = hidden[torch.arange(m) % n] * (1 + near * torch.randn(m, d, generator=g))
    head_t = None if shared else torch.randn(v, d_t or d, generator=g) * 3 / math.sqrt(d_t or d)
    rows = Supervision(
        torch.randint(n, (r,), generator=g), torch.randint(m, (r,), generator=g),
        torch.arange(r).remainder(3).to(torch.int8), torch.rand(r, generator=g) + 0.1, torch.full((r,), INF),
    )  # fmt: skip
    to = [None if x is None else x.to(DEVICE, dtype) for x in (hidden, head, teacher, head_t)]
    return (*to, on_device(rows))


def on_device(rows: Supervision) -> Supervision:
    fields = {name: value.to(DEVICE) for name, value in vars(rows).items() if isinstance(value, torch.Tensor)}
    return Supervision(**fields)


def exact(tensors, rows, *, dtype=torch.float64, upstream=None, **options):
    """(loss, divergence, gradients of `tensors` that are given) by the definition, in `dtype`."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    hidden, head, teacher, head_t, bias_s, bias_t = (*leaves, None, None)[:6]
    transform, options = split(options)
    side_s, side_t = heads(head, head_t, bias_s, bias_t, **transform)
    loss, divergence = reference.linear_divergence(hidden, side_s, teacher, side_t, supervision=rows, **options)
    total = loss if upstream is None else loss + (divergence * upstream.to(dtype)).sum()
    wanted = [x for x in (hidden, head, bias_s) if x is not None]
    return loss.detach(), divergence.detach(), torch.autograd.grad(total, wanted)


def ours(tensors, rows, *, train_head=False, upstream=None, **options):
    hidden, head, teacher, head_t, bias_s, bias_t = (*tensors, None, None)[:6]
    leaves = [hidden.detach().clone().requires_grad_(), head.detach().clone().requires_grad_(train_head)]
    if bias_s is not None:
        bias_s = bias_s.detach().clone().requires_grad_(train_head)
        leaves.append(bias_s)
    transform, options = split(options)
    side_s, side_t = heads(leaves[1], head_t, bias_s, bias_t, **transform)
    out = vigos.linear_divergence(leaves[0], side_s, teacher, side_t, supervision=rows, impl="triton", **options)
    total = out.loss if upstream is None else out.loss + (out.divergence * upstream).sum()
    total.backward()
    return out, [x.grad for x in leaves]


# One row; rows past a chunk; V neither even nor a multiple of a block, V under a block, D odd.
@pytest.mark.parametrize(
    ("n", "m", "r", "d", "v"), [(1, 1, 1, 8, 7), (5, 4, 9, 24, 389), (3, 6, 17, 33, 256), (18, 18, 5, 16, 130)]
)
def test_every_kind_mixed(small, n, m, r, d, v):
    *tensors, rows = problem(n, m, r, d, v)
    out, (dhidden, _) = ours(tensors, rows)
    loss, divergence, (want, _) = exact(tensors, rows)
    _, eager_divergence, (eager, _) = exact(tensors, rows, dtype=torch.float32)
    lse = torch.logsumexp(tensors[0].double() @ tensors[1].double().T, -1)
    assert_no_worse(out.divergence, eager_divergence, divergence, "divergence", scale=lse)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert_no_worse(dhidden, eager, want, "dhidden")


@pytest.mark.parametrize("kind", [FORWARD_KL, REVERSE_KL, JSD])
@pytest.mark.parametrize("near", [1e-3, 1e-2, 0.1])
def test_teacher_close_to_student(small, kind, near):
    """Where training happens: the gradient is small, and must not be the difference of two rounded numbers."""
    *tensors, rows = problem(6, 6, 6, 24, 389, near=near)
    aligned = torch.arange(6, device=DEVICE)
    rows = replace(rows, student_row=aligned, teacher_row=aligned, kind=torch.full_like(rows.kind, kind))
    out, (dhidden, _) = ours(tensors, rows)
    _, divergence, (want, _) = exact(tensors, rows)
    _, eager_divergence, (eager, _) = exact(tensors, rows, dtype=torch.float32)
    assert_no_worse(dhidden, eager, want, "dhidden")
    lse = torch.logsumexp(tensors[0].double() @ tensors[1].double().T, -1)
    assert_no_worse(out.divergence, eager_divergence, divergence, "divergence", scale=lse)


@pytest.mark.parametrize("kind", [FORWARD_KL, REVERSE_KL, JSD])
@pytest.mark.parametrize("near", [1e-3, *(pytest.param(near, marks=pytest.mark.slow) for near in (1e-2, 0.1))])
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0, "temperature": 1.3}, {"entry_clip": 1e-3}], ids=str)
def test_digits_next_to_the_teacher(small, kind, near, options):
    """float32, one head: (student - teacher) @ head is what is computed, and keeps the digits that logits lose."""
    *tensors, rows = problem(6, 6, 6, 24, 389, near=near)
    aligned = torch.arange(6, device=DEVICE)
    rows = replace(rows, student_row=aligned, teacher_row=aligned, kind=torch.full_like(rows.kind, kind))
    g = torch.Generator().manual_seed(1)
    biases = [torch.randn(389, generator=g).to(DEVICE) for _ in range(2)] if options else []
    if biases:
        biases[1] = biases[0] + near * biases[1]
    out, (dhidden, *_) = ours((*tensors, *biases), rows, **options)
    _, divergence, (want, *_) = exact((*tensors, *biases), rows, **options)
    error = ((dhidden.double() - want).norm(dim=1) / want.norm(dim=1)).max().item()
    assert error < 1e-5, error
    # Clipped sums have terms of both signs; theirs are far larger than what is left.
    atol = 2e-6 if "entry_clip" in options else 2e-9
    torch.testing.assert_close(out.divergence.double(), divergence, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_operands(small, dtype):
    """The error of dhidden is that of rounding the gradient once: at most 0.5 %, in the norm of each row."""
    *tensors, rows = problem(6, 6, 12, 32, 389, dtype, near=0.05)
    _, (dhidden, _) = ours(tensors, rows)
    _, _, (want, _) = exact(tensors, rows)
    used = torch.zeros(6, dtype=torch.bool, device=DEVICE)
    used[rows.student_row] = True
    error = (dhidden.double() - want).norm(dim=1)[used] / want.norm(dim=1)[used]
    assert error.max() <= 5e-3, error
    assert (dhidden[~used] == 0).all()


def test_every_option_and_the_head(small):
    *tensors, rows = problem(6, 5, 6, 24, 200, shared=False, d_t=17)
    g = torch.Generator().manual_seed(1)
    bias_s, bias_t = (torch.randn(200, generator=g).to(DEVICE) for _ in range(2))
    tensors = [*tensors, bias_s, bias_t]
    upstream = torch.randn(6, generator=g).to(DEVICE)
    options = {"temperature": 1.3, "beta": 0.3, "softcap": 8.0, "scale": 0.7, "vocab_size": 190}
    for entry_clip in (None, 0.01):
        options["entry_clip"] = entry_clip
        out, grads = ours(tensors, rows, train_head=True, upstream=upstream, **options)
        _, divergence, want = exact(tensors, rows, upstream=upstream, **options)
        _, eager_divergence, eager = exact(tensors, rows, dtype=torch.float32, upstream=upstream, **options)
        assert_no_worse(out.divergence, eager_divergence, divergence, "divergence", scale=torch.tensor(8.0))
        for name, a, b, c in zip(("dhidden", "dweight", "dbias"), grads, eager, want, strict=True):
            assert_no_worse(a, b, c, name, scale=8.0 / 1.3 * c.abs().max())  # p = exp(z - L), |z| up to 8 / 1.3


def test_statistics_and_labels(small):
    *tensors, rows = problem(6, 5, 6, 24, 333)
    labels = torch.tensor([0, 5, 127, 255, 256, 299], device=DEVICE)
    out = vigos.linear_divergence(*tensors, supervision=rows, labels=labels, vocab_size=300, impl="triton")
    options = {"vocab_size": 300}
    z_s = reference.logits(tensors[0].double(), tensors[1].double(), **options)[rows.student_row]
    z_t = reference.logits(tensors[2].double(), tensors[1].double(), **options)[rows.teacher_row]
    for side, z in (("student", z_s), ("teacher", z_t)):
        scale = z.logsumexp(-1)
        for name, want in (
            ("entropy", reference.entropy(z)),
            ("lse", scale),
            ("logprob", z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)),
        ):
            got = getattr(out, f"{side}_{name}")
            assert (got.double() - want).abs().max() <= 8 * torch.finfo(torch.float32).eps * scale.abs().max(), name


def test_clipped_rows_and_weight_zero_have_exactly_no_gradient(small):
    *tensors, rows = problem(24, 8, 24, 24, 130)
    rows = replace(rows, student_row=torch.arange(24, device=DEVICE))
    _, divergence, _ = exact(tensors, rows)
    clip = torch.where(torch.arange(24, device=DEVICE) % 2 == 0, 0.5 * divergence.float(), 1e3)
    weight = rows.weight.clone()
    weight[5] = 0
    rows = replace(rows, clip=clip, weight=weight)
    out, (dhidden, _) = ours(tensors, rows)
    assert out.clipped.tolist() == [i % 2 == 0 for i in range(24)]
    dead = out.clipped | (weight == 0)
    assert (dhidden[dead] == 0).all()
    assert (dhidden[~dead] != 0).any(dim=1).all()
    loss, _, (want, _) = exact(tensors, rows)
    _, _, (eager, _) = exact(tensors, rows, dtype=torch.float32)
    assert_no_worse(dhidden, eager, want, "dhidden")
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours(small):
    """Bit for bit: the same row alone in the loss, and among rows that are clipped or not."""
    *tensors, rows = problem(24, 8, 24, 24, 130)
    rows = replace(rows, student_row=torch.arange(24, device=DEVICE))
    alone, (one, _) = ours(tensors, rows)
    _, divergence, _ = exact(tensors, rows)
    clip = torch.where(torch.arange(24, device=DEVICE) % 3 != 1, 0.5 * divergence.float(), INF)
    among, (other, _) = ours(tensors, replace(rows, clip=clip))
    assert torch.equal(alone.divergence, among.divergence)
    live = ~among.clipped
    assert live.sum() == 8
    assert torch.equal(one[live], other[live])


def test_identical_models_give_exactly_zero(small):
    *tensors, rows = problem(6, 6, 6, 24, 389)
    tensors[2] = tensors[0].clone()
    rows = replace(rows, teacher_row=rows.student_row)
    out, (dhidden, _) = ours(tensors, rows)
    assert (out.divergence == 0).all()
    assert out.loss == 0
    assert dhidden.abs().max() < 1e-6


def test_no_rows(small):
    *tensors, rows = problem(4, 4, 3, 8, 50)
    none = Supervision(*(getattr(rows, name)[:0] for name in ("student_row", "teacher_row", "kind", "weight", "clip")))
    out, (dhidden, dweight) = ours(tensors, none, train_head=True)
    assert out.loss == 0
    assert out.divergence.shape == (0,)
    assert (dhidden == 0).all()
    assert (dweight == 0).all()


def test_nan_in_an_unsupervised_row_stays_there(small):
    *tensors, rows = problem(6, 5, 6, 24, 200)
    rows = replace(rows, student_row=rows.student_row % 5)
    clean, (want, _) = ours(tensors, rows)
    tensors[0][5] = math.nan
    out, (dhidden, _) = ours(tensors, rows)
    assert torch.equal(out.divergence, clean.divergence)
    assert torch.equal(dhidden, want)


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that any operation inside returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.slow
def test_never_holds_every_logit(small):
    """Nothing of N x V elements: at most a chunk of 16 rows, where the naive loss is seen to hold all."""
    n, d, v = 64, 8, 600
    case = small_case(torch.float32, DEVICE, (FORWARD_KL,))
    hidden, head = torch.randn(n, d, device=DEVICE), torch.randn(v, d, device=DEVICE)
    rows = torch.arange(n, device=DEVICE)
    case = replace(
        case, student_hidden=hidden, student_weight=head, teacher_hidden=hidden + 0.1, student_row=rows,
        teacher_row=rows, kind=torch.zeros(n, dtype=torch.int8, device=DEVICE), weight=torch.ones(n, device=DEVICE),
        clip=torch.full((n,), INF, device=DEVICE), vocab_size=v,
    )  # fmt: skip
    with torch.no_grad(), Largest() as ours_:
        engine("triton").forward(case)
    with torch.no_grad(), Largest() as naive:
        reference.forward_kl(hidden @ head.T, hidden @ head.T)
    assert naive.bytes >= 4 * n * v
    assert ours_.bytes <= 4 * n * v / 2, f"{ours_.bytes / 4:.0f} elements in one tensor, N x V is {n * v}"


def test_float64_and_a_missing_interpreter_are_refused(monkeypatch):
    *tensors, rows = problem(2, 2, 2, 8, 16)
    with pytest.raises(ValueError, match="float64"):
        vigos.linear_divergence(*(None if x is None else x.double() for x in tensors), supervision=rows, impl="triton")
    if DEVICE == "cpu":
        monkeypatch.setattr("vigos.kernels.numerics.INTERPRETED", False)
        with pytest.raises(ValueError, match="need a CUDA device"):
            vigos.linear_divergence(*tensors, supervision=rows, impl="triton")


# --- a head sharded over the vocabulary ------------------------------------------------------------------------------


def _rank(rank, folder):
    """One of two processes that hold 130 and 70 of 200 entries."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    hidden, head, teacher, _, rows = problem(6, 5, 6, 24, 200)
    labels = torch.tensor([0, 129, 130, 150, 189, 7])
    mine = slice(0, 130) if rank == 0 else slice(130, 200)
    leaf = hidden.clone().requires_grad_()
    out = vigos.linear_divergence(
        leaf, vigos.Head(head[mine].clone(), process_group=dist.group.WORLD), teacher, supervision=rows, labels=labels,
        vocab_size=190, entry_clip=0.05, impl="triton",
    )  # fmt: skip
    out.loss.backward()
    results = (out.divergence.detach(), out.student_entropy, out.teacher_logprob, leaf.grad)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="two processes share no GPU here")
def test_sharded_head(tmp_path):
    """Two processes with unequal shards give what one with the whole head gives, and the same bits as each other."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    hidden, head, teacher, _, rows = problem(6, 5, 6, 24, 200)
    labels = torch.tensor([0, 129, 130, 150, 189, 7])
    leaf = hidden.clone().requires_grad_()
    out = vigos.linear_divergence(
        leaf, head, teacher, supervision=rows, labels=labels, vocab_size=190, entry_clip=0.05, impl="reference"
    )
    out.loss.backward()
    whole = (out.divergence.detach(), out.student_entropy, out.teacher_logprob, leaf.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


# --- logits ----------------------------------------------------------------------------------------------------------


def peaked(n, v, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, v, generator=g)
    z[torch.arange(n), torch.randint(v, (n,), generator=g)] += 9
    z[torch.arange(n), torch.randint(v, (n,), generator=g)] += 8.99
    z += torch.linspace(0, 2, v)  # the maximum moves from block to block
    return z.to(DEVICE, dtype)


def logits_exact(student, teacher, rows, dtype=torch.float64, upstream=None, **options):
    s = student.detach().to(dtype).requires_grad_()
    adjust = {k: options[k] for k in ("temperature", "softcap", "scale", "vocab_size") if k in options}
    z_s = reference.adjust(s, **adjust)[rows.student_row]
    z_t = reference.adjust(teacher.to(dtype), **adjust)[rows.teacher_row]
    divergence = reference.divergence(z_s, z_t, rows.kind, options.get("beta", 0.5), options.get("entry_clip"))
    loss = reference.loss(divergence, rows.weight, rows.clip)
    total = loss if upstream is None else (divergence * upstream.to(dtype)).sum()
    (grad,) = torch.autograd.grad(total, s)
    return divergence.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [1, 127, 128, 401])
def test_logits(small, dtype, v):
    """Repeated rows add up; rows nobody supervises get exact zeros."""
    student, teacher = peaked(7, v, 0, dtype), peaked(5, v, 1, dtype)
    *_, rows = problem(6, 5, 12, 4, 8)
    s = student.clone().requires_grad_()
    out = vigos.logits_divergence(s, teacher, supervision=rows, impl="triton")
    out.loss.backward()
    divergence, want = logits_exact(student, teacher, rows)
    eager_divergence, eager = logits_exact(student, teacher, rows, torch.float32)
    assert_no_worse(out.divergence, eager_divergence, divergence, "divergence", scale=torch.tensor(12.0))
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter truncates where a GPU rounds
        assert (s.grad.double() - want).abs().max() <= 2**-7 * want.abs().max()
    else:
        assert_no_worse(s.grad, eager.to(dtype), want, "dlogits")
    assert (s.grad[6] == 0).all()


def test_logits_of_minus_infinity(small):
    """Impossible on both sides: nothing. Impossible for the student alone: forward KL is +inf, its gradient finite."""
    student, teacher = peaked(6, 300, 0), peaked(6, 300, 1)
    student[:, 7] = teacher[:, 7] = -INF
    student[:, 200:] = teacher[:, 200:] = -INF  # whole blocks
    student[3, 11] = -INF
    teacher[4, 12] = -INF
    aligned = torch.arange(6, device=DEVICE)
    for kind in (FORWARD_KL, REVERSE_KL, JSD):
        full = (torch.full((6,), kind, dtype=torch.int8), torch.ones(6), torch.full((6,), INF))
        rows = Supervision(aligned, aligned, *(x.to(DEVICE) for x in full))
        s = student.clone().requires_grad_()
        out = vigos.logits_divergence(s, teacher, supervision=rows, impl="triton")
        out.divergence.backward(torch.ones(6, device=DEVICE))
        want, grad = logits_exact(student, teacher, rows, upstream=torch.ones(6, device=DEVICE))
        infinite = {FORWARD_KL: [3], REVERSE_KL: [4], JSD: []}[kind]
        assert out.divergence.isinf().nonzero().squeeze(1).tolist() == infinite
        assert want.isinf().nonzero().squeeze(1).tolist() == infinite
        fine = ~want.isinf()
        assert (out.divergence[fine].double() - want[fine]).abs().max() < 1e-5
        assert (s.grad[fine].double() - grad[fine]).abs().max() < 1e-6
        if kind == FORWARD_KL:
            p = torch.softmax(student[3].double(), 0) - torch.softmax(teacher[3].double(), 0)
            assert (s.grad[3].double() - p).abs().max() < 1e-6


def test_extreme_logits(small):
    student, teacher = peaked(3, 300, 0) * 1e3, peaked(3, 300, 1) * 1e3  # about +-1e4
    aligned = torch.arange(3, device=DEVICE)
    kind = torch.tensor([0, 1, 2], dtype=torch.int8, device=DEVICE)
    rows = Supervision(aligned, aligned, kind, torch.ones(3, device=DEVICE), torch.full((3,), INF, device=DEVICE))
    s = student.clone().requires_grad_()
    out = vigos.logits_divergence(s, teacher, supervision=rows, impl="triton")
    out.loss.backward()
    divergence, grad = logits_exact(student, teacher, rows)
    torch.testing.assert_close(out.divergence.double(), divergence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s.grad.double(), grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset"])
def test_logits_in_any_layout(small, layout):
    student, teacher = peaked(6, 300, 0), peaked(6, 300, 1)
    if layout == "transposed":
        student, teacher = student.T.contiguous().T, teacher.T.contiguous().T
    elif layout == "every_other":
        student, teacher = (x.repeat_interleave(2, 1)[:, ::2] for x in (student, teacher))
    else:
        student, teacher = (torch.cat([x[:, :3], x], 1)[:, 3:] for x in (student, teacher))
    *_, rows = problem(6, 6, 9, 4, 8)
    s = student.detach().requires_grad_()
    out = vigos.logits_divergence(s, teacher, supervision=rows, impl="triton")
    out.loss.backward()
    divergence, want = logits_exact(student, teacher, rows)
    assert (out.divergence.double() - divergence).abs().max() < 1e-5
    assert (s.grad.double() - want).abs().max() < 1e-6


def test_gradient_in_place_of_the_logits(small):
    student, teacher = peaked(6, 300, 0), peaked(6, 300, 1)
    *_, rows = problem(6, 6, 5, 4, 8)
    rows = replace(rows, student_row=torch.tensor([4, 0, 2, 1, 5], device=DEVICE))
    _, want = logits_exact(student, teacher, rows)
    s = student.clone().requires_grad_()
    out = vigos.logits_divergence(s * 1, teacher, supervision=rows, impl="triton", inplace=True)
    out.loss.backward()
    assert (s.grad.double() - want).abs().max() < 1e-6


def test_a_row_without_upstream_is_not_read(small):
    student, teacher = peaked(3, 300, 0), peaked(3, 300, 1)
    student[1] = math.nan
    *_, rows = problem(3, 3, 3, 4, 8)
    aligned = torch.arange(3, device=DEVICE)
    rows = replace(rows, student_row=aligned, teacher_row=aligned)
    s = student.clone().requires_grad_()
    out = vigos.logits_divergence(s, teacher, supervision=rows, impl="triton")
    out.divergence.backward(torch.tensor([1.0, 0.0, 1.0], device=DEVICE))
    assert (s.grad[1] == 0).all()
    assert s.grad.isfinite().all()


# --- entries ---------------------------------------------------------------------------------------------------------


@triton.jit
def _probe(x_ptr, out_ptr, n: tl.constexpr):
    offs = tl.arange(0, n)
    x = tl.load(x_ptr + offs)
    tanh, slope = tanh_and_slope(x)
    tl.store(out_ptr + offs, expm1(x))
    tl.store(out_ptr + n + offs, log1p(expm1(-tl.abs(x)) * 0.7))
    tl.store(out_ptr + 2 * n + offs, tanh)
    tl.store(out_ptr + 3 * n + offs, slope)


def test_elementary_functions():
    """expm1, log1p and tanh to 2 eps over their whole range, where exp and log themselves are."""
    magnitudes = torch.logspace(-30, 1.3, 1024)
    x = torch.cat([-magnitudes, magnitudes]).to(DEVICE)
    out = torch.full((4, 2048), math.nan, device=DEVICE)
    _probe[(1,)](x, out, 2048)
    y = x.double()
    wanted = (
        torch.expm1(y), torch.log1p(torch.expm1(-y.abs()) * 0.7), torch.tanh(y),
        4 * torch.exp(-2 * y.abs()) / (1 + torch.exp(-2 * y.abs())) ** 2,
    )  # fmt: skip
    for got, want in zip(out, wanted, strict=True):
        relative = (got.double() - want).abs() / want.abs()
        assert relative.max() <= 40 * torch.finfo(torch.float32).eps if DEVICE == "cuda" else 2.4e-7


def test_auto_takes_an_engine_after_it_agreed_with_float64(monkeypatch):
    """A kernel that the machine at hand computes wrongly is left out, with one warning; its own name still runs it."""
    from vigos.divergence import engines
    from vigos.divergence.engines.self_check import agrees

    monkeypatch.setitem(engines.AUTO, DEVICE, ("triton", "reference"))
    module, seen = engine("triton"), []
    right = module.forward

    def wrong(problem):
        result = right(problem)
        seen.append("triton")
        result.drow *= 1.01
        return result

    def call(impl):
        hidden, head, teacher = (torch.randn(n, 8, device=DEVICE) for n in (3, 40, 3))
        return vigos.linear_divergence(hidden.requires_grad_(), head, teacher, impl=impl)

    agrees.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            call("auto")
        agrees.cache_clear()
        monkeypatch.setattr(module, "forward", wrong)
        with pytest.warns(UserWarning, match=r"leaves out the 'triton' engine.*gradient=0.0"):
            call("auto")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            call("auto")
        assert seen == ["triton"]  # by the check alone
        call("triton")
        assert seen == ["triton"] * 2
    finally:
        agrees.cache_clear()
