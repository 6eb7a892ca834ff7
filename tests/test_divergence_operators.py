"""The registered operators: opcheck, gradcheck, torch.compile, autocast, checkpointing, upstream gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vigos
from vigos.divergence import call as call_module
from vigos.divergence.call import Call
from vigos.divergence.engines.problem import LogitTransform
from vigos.divergence.linear_op import linear_backward_op, linear_op
from vigos.divergence.logits_op import logits_op

IMPLS = ["reference", "cpu"]
N, D, V = 8, 6, 41


def inputs(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(V, D, generator=g, dtype=dtype)
    student = torch.randn(N, D, generator=g, dtype=dtype)
    teacher = student + 0.3 * torch.randn(N, D, generator=g, dtype=dtype)
    bias = torch.randn(V, generator=g, dtype=dtype)
    rows = vigos.Supervision(
        torch.arange(N), torch.arange(N).flip(0), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1], dtype=torch.int8),
        torch.rand(N, generator=g) + 0.1, torch.tensor([float("inf")] * 5 + [1e-3, 1e-3, 1e-3]),
    )  # fmt: skip
    return student.requires_grad_(), head.requires_grad_(), bias.requires_grad_(), teacher, rows


def fields(rows):
    return [rows.student_row, rows.teacher_row, rows.kind, rows.weight, rows.clip]


def linear_arguments(impl, dtype=torch.float32, need=(True, True, True), labels=None):
    student, head, bias, teacher, rows = inputs(dtype)
    transform = LogitTransform(0.9, 15.0, 1.2)
    packed = Call(transform, transform, 0.3, impl=impl).packed()
    return student, head, bias, [teacher, None, None], fields(rows), labels, *packed, list(need)


@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, False, False)])
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_linear(impl, need):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear_op, linear_arguments(impl, need=need, labels=torch.arange(N)), test_utils=tests)


@pytest.mark.slow
def test_opcheck_traced():
    torch.library.opcheck(linear_op, linear_arguments("cpu"), test_utils=("test_aot_dispatch_dynamic",))
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    rows = inputs()[4]
    packed = Call(LogitTransform(), LogitTransform(), impl="cpu").packed()
    torch.library.opcheck(logits_op, (student, teacher, fields(rows), None, *packed, False, None, 0))


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_backward(impl):
    arguments = linear_arguments(impl)
    out = linear_op(*arguments)
    saved = [x.detach() for x in (out[1], *out[8:12])]
    student, (teacher, supervision, _), rest = arguments[:3], arguments[3:6], arguments[6:]
    rest = ([x.detach() for x in student], teacher, supervision, *rest)
    for grad_loss, grad_divergence in (
        (torch.tensor(2.0), None),
        (None, torch.rand(N)),
        (torch.tensor(2.0), torch.rand(N)),
    ):
        torch.library.opcheck(
            linear_backward_op, ([grad_loss, grad_divergence], saved, *rest),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_operators_say_that_no_graph_captures_them():
    """They check values on the host; inductor splits its CUDA graphs at operators with this tag."""
    for name in ("linear_divergence", "linear_divergence_backward", "logits_divergence", "logits_divergence_backward_"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.vigos, name).default.tags


def test_values_are_checked_in_forward_alone(monkeypatch):
    """On a GPU the check waits for the device."""
    seen = []
    real = call_module.check_rows
    monkeypatch.setattr(call_module, "check_rows", lambda *rest: seen.append(1) or real(*rest))
    student, head, _, teacher, rows = inputs()
    vigos.linear_divergence(student, head, teacher, supervision=rows, impl="reference").loss.backward()
    logits = torch.randn(N, V, requires_grad=True)
    vigos.logits_divergence(logits, torch.randn(N, V), supervision=rows, impl="reference").loss.backward()
    assert len(seen) == 2


@pytest.mark.parametrize("which", ["linear", "logits"])
def test_gradcheck(which):
    """Loss and divergence with respect to hidden states, head and bias, in float64, clipped rows among them."""
    student, head, bias, teacher, rows = inputs(torch.float64)
    if which == "linear":
        # Held still: the teacher has no gradient.
        teacher_head = vigos.Head(head.detach().clone(), bias.detach().clone(), softcap=15.0)

        def call(student, head, bias):
            out = vigos.linear_divergence(
                student, vigos.Head(head, bias, softcap=15.0), teacher, teacher_head, supervision=rows,
                temperature=1.2, beta=0.3, impl="reference",
            )  # fmt: skip
            return out.loss, out.divergence

        assert torch.autograd.gradcheck(call, (student, head, bias), fast_mode=True)
    else:
        teacher_logits = (teacher @ head.T).detach()

        def call(logits):
            out = vigos.logits_divergence(logits, teacher_logits, supervision=rows, temperature=0.7, impl="reference")
            return out.loss, out.divergence

        assert torch.autograd.gradcheck(call, ((student @ head.T).detach().requires_grad_(),), fast_mode=True)


def scalar(out: vigos.DivergenceOutput, how: str) -> torch.Tensor:
    rows = torch.linspace(-1, 1, N)
    return {
        "loss": 1.7 * out.loss,
        "rows": (out.divergence * rows).sum(),
        "both": out.loss + (out.divergence * rows).sum(),
        "stride 0": out.divergence.sum(),
        "one row": out.divergence[6],  # a clipped one
        "nothing": 0.0 * out.loss,
    }[how]


@pytest.mark.parametrize("how", ["loss", "rows", "both", "stride 0", "one row", "nothing"])
@pytest.mark.parametrize("impl", IMPLS)
def test_upstreams(impl, how):
    """Against autograd through the oracle."""
    student, head, bias, teacher, rows = inputs()
    options = {"supervision": rows, "beta": 0.3}
    out = vigos.linear_divergence(student, vigos.Head(head, bias), teacher, impl=impl, **options)
    ours = torch.autograd.grad(scalar(out, how), (student, head, bias), retain_graph=True)
    again = torch.autograd.grad(scalar(out, how), (student, head, bias))  # backward twice
    truth = [x.detach().double().requires_grad_() for x in (student, head, bias)]
    exact_head = vigos.Head(truth[1], truth[2])
    loss, row_divergence = vigos.reference.linear_divergence(truth[0], exact_head, teacher.double(), **options)
    exact_out = vigos.DivergenceOutput(loss, row_divergence, *[row_divergence] * 5, None, None)
    exact = torch.autograd.grad(scalar(exact_out, how), truth)
    for x, y, z in zip(ours, again, exact, strict=True):
        torch.testing.assert_close(x.double(), z, rtol=1e-4, atol=1e-6)
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_computed_for_inputs_that_need_no_gradient(impl, monkeypatch):
    """Neither under no_grad nor for a frozen head; a trainable head behind frozen hidden states still gets its own."""
    from vigos.divergence.engines import engine

    seen = []
    forward = engine(impl).forward
    monkeypatch.setattr(engine(impl), "forward", lambda problem: seen.append(problem) or forward(problem))
    student, head, _, teacher, rows = inputs()
    with torch.no_grad():
        vigos.linear_divergence(student, head, teacher, supervision=rows, impl=impl)
    vigos.linear_divergence(student, head.detach(), teacher, supervision=rows, impl=impl)
    out = vigos.linear_divergence(student.detach(), head, teacher, supervision=rows, impl=impl)
    needs = [(problem.need_dhidden, problem.need_dweight, problem.need_dbias) for problem in seen]
    assert needs == [(False, False, False), (True, False, False), (False, True, False)]
    out.loss.backward()
    assert head.grad is not None
    assert student.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_in_one_piece(impl):
    """fullgraph, without inductor (which the operator is opaque to), then with other sizes."""
    student, head, _, teacher, rows = inputs()

    def step(student, head):
        out = vigos.linear_divergence(student, head, teacher, supervision=rows, labels=torch.arange(N), impl=impl)
        return out.loss + out.divergence.mean(), out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    total, out = compiled(student, head)
    grads = torch.autograd.grad(total, (student, head))
    plain_total, plain = step(student, head)
    expected = torch.autograd.grad(plain_total, (student, head))
    assert isinstance(out, vigos.DivergenceOutput)
    torch.testing.assert_close(out.student_logprob, plain.student_logprob)
    assert not out.teacher_entropy.requires_grad
    for x, y in zip(grads, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_logits_compile():
    student, teacher = torch.randn(5, 30, requires_grad=True), torch.randn(5, 30)

    def step(logits):
        return vigos.logits_divergence(logits, teacher, impl="cpu").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(student), student)
    (expected,) = torch.autograd.grad(step(student), student)
    torch.testing.assert_close(ours, expected)
    in_place = torch.compile(
        lambda x: vigos.logits_divergence(x, teacher, inplace=True).loss, backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"inplace must be False under torch\.compile"):
        in_place(student)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_operands_as_linear_does(impl):
    student, head, bias, teacher, rows = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vigos.linear_divergence(student, vigos.Head(head, bias), teacher, supervision=rows, impl=impl)
    assert out.loss.dtype == torch.float32
    rounded = [x.detach().bfloat16() for x in (student, head, bias, teacher)]
    expected = vigos.linear_divergence(rounded[0], vigos.Head(*rounded[1:3]), rounded[3], supervision=rows, impl=impl)
    assert torch.equal(out.divergence, expected.divergence)
    out.loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.float32
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_activation_checkpointing(impl):
    student, head, _, teacher, rows = inputs()

    def step(hidden, head):
        return vigos.linear_divergence(torch.tanh(hidden), head, teacher, supervision=rows, impl=impl).loss

    expected = torch.autograd.grad(step(student, head), (student, head))
    for reentrant in (False, True):
        got = torch.autograd.grad if not reentrant else None
        loss = checkpoint(step, student, head, use_reentrant=reentrant)
        if got is None:
            student.grad = head.grad = None
            loss.backward()
            grads = (student.grad, head.grad)
        else:
            grads = got(loss, (student, head))
        for x, y in zip(grads, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_what_comes_back(dtype):
    student, head, _, teacher, rows = inputs()
    hidden, weight = student.detach().to(dtype).requires_grad_(), head.detach().to(dtype).requires_grad_()
    out = vigos.linear_divergence(hidden, weight, teacher.to(dtype), supervision=rows)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.loss.dtype == out.divergence.dtype == out.student_lse.dtype == expected
    out.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
