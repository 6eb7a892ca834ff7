"""Targets with a control, z* = z_t + alpha (z_t - z_c), cut to plausible entries, against the oracle in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.divergence_cases import Case, case, error, heads, logits_divergence, run, split
from helpers.engines import engines_on_cpu

import vigos
from vigos import reference
from vigos.divergence.validation import supervision_tensors

INF = float("inf")
ENGINES = ("reference", "cpu", "triton")


engine = engines_on_cpu(ENGINES)


def contrasted(engine: str, *, alpha: float = 0.7, gamma: float = 0.0, **options) -> Case:
    """A case with controls near their teachers; every third pair has alpha 0, every fourth gamma 0."""
    size = {"n": 10, "d": 16, "v": 260} if engine == "triton" else {}  # one chunk, two slices of the vocabulary
    c = case(**{"near": 0.02} | size | options)
    r = c.supervision.student_row.shape[0]
    contrast = torch.full((r,), alpha).masked_fill(torch.arange(r) % 3 == 2, 0.0)
    cut = torch.full((r,), gamma).masked_fill(torch.arange(r) % 4 == 3, 0.0)
    kind = c.supervision.kind.clone()
    if gamma > 0:
        kind[kind == vigos.REVERSE_KL] = vigos.FORWARD_KL
    g = torch.Generator().manual_seed(5)
    control = c.teacher + 0.05 * torch.randn(c.teacher.shape, generator=g, dtype=torch.float64)
    rows = replace(
        c.supervision, kind=kind, contrast=contrast, plausibility=cut,
        control_row=c.supervision.teacher_row + c.teacher.shape[0],
    )  # fmt: skip
    return replace(c, teacher=torch.cat([c.teacher, control]), supervision=rows)


CASES = {
    "contrast": {},
    "two heads": {"shared": False},
    "biases": {"bias": True},
    "both biases, a cut": {"bias": True, "shared": False, "gamma": 1e-3},
    "softcap": {"softcap": 9.0, "scale": 0.6, "temperature": 0.8, "bias": True},
    "softcap, a cut": {"softcap": 20.0, "gamma": 1e-2},
    "cut": {"gamma": 1e-3},
    "cut alone": {"gamma": 1e-3, "alpha": 0.0},
    "cut, temperature, bias": {"gamma": 1e-2, "temperature": 1.7, "bias": True},
    "padded vocabulary": {"vocab_size": 250, "gamma": 1e-3},
    "entry clip": {"entry_clip": 1e-3, "gamma": 1e-3},
    "large contrast": {"alpha": 40.0, "gamma": 1e-2},
}


@pytest.mark.parametrize("name", CASES)
def test_engines_against_float64(engine, name):
    """The promise of every engine: float32 to 1e-5 of a gradient near the teacher (textbook sums: 3e-5 of a value)."""
    if engine == "triton" and name not in ("contrast", "softcap, a cut", "cut, temperature, bias"):
        pytest.skip("slow in the interpreter; what differs from the other engines is in the cases that run")
    c = contrasted(engine, **CASES[name])
    exact = run(c, None, torch.float64)
    for key, x in run(c, engine, torch.float32).items():
        bound = 1e-5 if key.startswith("d") and key != "divergence" else 3e-5
        if "softcap" in name or "entry" in name or not CASES[name].get("shared", True):
            bound = 1e-4  # logits of each side apart: their own rounding shows
        assert error(x, dict(exact.items())[key]) < bound, (key, error(x, dict(exact.items())[key]))
    if engine == "reference":
        for key, x in run(c, "reference", torch.float64).items():
            assert error(x, dict(exact.items())[key]) < 1e-10, key


@pytest.mark.parametrize("gamma", [0.0, 1e-3])
def test_16_bits(engine, gamma):
    """bfloat16 operands: 0.5 % of the gradient, against float64 of the same operands."""
    c = contrasted(engine, gamma=gamma)
    exact = run(c, None, torch.bfloat16, compute=torch.float64)
    ours = run(c, engine, torch.bfloat16)
    assert error(ours.dhidden, exact.dhidden) < 0.005
    assert error(ours.divergence, exact.divergence) < 0.005


def outputs(c: Case, impl: str, labels: torch.Tensor | None = None) -> tuple[vigos.DivergenceOutput, torch.Tensor]:
    transform, options = split(c.options)
    hidden, head, teacher = (x.float() for x in (c.student, c.head, c.teacher))
    hidden.requires_grad_()
    sides = heads(head, c.teacher_head, **transform)
    out = vigos.linear_divergence(
        hidden, sides[0], teacher, sides[1], supervision=c.supervision, labels=labels, impl=impl, **options
    )
    out.loss.backward()
    return out, hidden.grad


def test_no_contrast_is_no_control_bit_for_bit(engine):
    """Hold also where the control's hidden states are not even numbers, and next to pairs that have a contrast."""
    c = contrasted(engine, alpha=0.0)
    rows = c.supervision
    plain = replace(c, supervision=replace(rows, control_row=None, contrast=0.0, plausibility=0.0))
    nan = c.teacher.clone()
    nan[nan.shape[0] // 2 :] = float("nan")
    some = torch.where(torch.arange(len(rows.contrast)) % 2 == 0, 0.0, 0.5)
    beside = replace(c, supervision=replace(rows, contrast=some))
    (a, da), (b, db), (m, dm) = (outputs(x, engine) for x in (plain, replace(c, teacher=nan), beside))
    for x, y in zip([*vars(a).values(), da], [*vars(b).values(), db], strict=True):
        assert x is y is None or torch.equal(x, y)
    alone = some == 0
    assert torch.equal(a.divergence[alone], m.divergence[alone])
    assert torch.equal(da[alone], dm[alone])
    assert not torch.equal(a.divergence[~alone], m.divergence[~alone])


def test_combined_hidden_states_are_three_products(engine):
    """(1 + alpha) h_t - alpha h_c against the target's logits, and statistics of z* with a label that was cut."""
    c = contrasted(engine, gamma=1e-3)
    for rows in (replace(c.supervision, plausibility=torch.zeros_like(c.supervision.plausibility)), c.supervision):
        z = (c.student.float().double() @ c.head.float().double().T)[rows.student_row]
        z_t, z_c = (
            (c.teacher.float().double() @ c.head.float().double().T)[i] for i in (rows.teacher_row, rows.control_row)
        )
        target = reference.contrasted(z_t, z_c, rows.contrast.double(), rows.plausibility.double())
        labels = torch.where(torch.arange(len(z)) % 2 == 0, z_t.argmax(-1), z_t.argmin(-1))
        out, _ = outputs(replace(c, supervision=rows), engine, labels)
        exact = reference.divergence(z, target, rows.kind)
        assert error(out.divergence.detach().double(), exact) < 3e-5
        assert error(out.teacher_entropy.double(), reference.entropy(target)) < 1e-5
        torch.testing.assert_close(out.teacher_lse.double(), target.logsumexp(-1), rtol=1e-5, atol=1e-5)
        log_p = target.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
        torch.testing.assert_close(out.teacher_logprob.double(), log_p, rtol=1e-4, atol=1e-4)
        assert bool((out.teacher_logprob == -INF).any()) == bool((rows.plausibility > 0).any())


def test_edges_of_the_cut(engine):
    """gamma = 1: the likeliest entry alone, the divergence is -log of the student's probability; ties stay together."""
    head = torch.eye(6).repeat(2, 1)[:11]  # entries i and i + 6 are one
    student, teacher = torch.tensor([[0.5, 1, 2, 0, -1, 0.0]] * 2), torch.tensor([[1.0, 0, 4, 2, 0, 0]] * 2)
    teacher[1] = torch.tensor([0.0, 0, 1, 0, 0, 3])  # entry 5 has no twin
    rows = vigos.Supervision(torch.arange(2), torch.arange(2), plausibility=1.0)
    hidden = student.clone().requires_grad_()
    out = vigos.linear_divergence(hidden, head, teacher, supervision=rows, impl=engine)
    out.loss.backward()
    log_q = (student @ head.T).log_softmax(-1)
    wanted = torch.stack([-(log_q[0, 2] + log_q[0, 8]) / 2 - torch.tensor(2.0).log(), -log_q[1, 5]])
    torch.testing.assert_close(out.divergence.detach(), wanted)
    targets = torch.zeros(2, 11)
    targets[0, [2, 8]], targets[1, 5] = 0.5, 1.0
    torch.testing.assert_close(hidden.grad, (log_q.exp() - targets) @ head, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.teacher_entropy, torch.tensor([2.0, 1.0]).log(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1e-3])
def test_logits(engine, gamma):
    """`logits_divergence` writes the targets out; slices of a padded tensor included."""
    c = contrasted(engine, gamma=gamma, temperature=1.3)
    z, z_t = (torch.nn.functional.pad(x @ c.head.T, (0, 3), value=1e4).float() for x in (c.student, c.teacher))
    rows, v = c.supervision, c.head.shape[0]
    leaf = z.clone().requires_grad_()
    out = logits_divergence(
        leaf, z_t, supervision=rows, impl=engine if engine != "triton" else "reference", vocab_size=v, temperature=1.3
    )
    out.loss.backward()
    exact = z[:, :v].double().requires_grad_()
    target = reference.contrasted(
        z_t[rows.teacher_row, :v].double() / 1.3, z_t[rows.control_row, :v].double() / 1.3, rows.contrast.double(),
        rows.plausibility.double(),
    )  # fmt: skip
    divergence = reference.divergence(exact[rows.student_row] / 1.3, target, rows.kind)
    reference.loss(divergence, rows.weight, rows.clip).backward()
    assert error(out.divergence.detach().double(), divergence.detach()) < 1e-4
    assert error(leaf.grad[:, :v].double(), exact.grad) < 1e-4
    assert not leaf.grad[:, v:].any()


def test_a_contrast_leaves_later_calls_alone():
    z = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    call = {"student_row": torch.arange(3), "teacher_row": torch.arange(3)}
    plain = vigos.logits_divergence(*z, supervision=vigos.Supervision(**call), impl="reference")
    contrast = vigos.Supervision(**call, control_row=torch.tensor([1, 2, 0]), contrast=0.5)
    vigos.logits_divergence(*z, supervision=contrast, impl="reference")
    assert len(supervision_tensors(vigos.Supervision(**call), *z)) == 5
    again = vigos.logits_divergence(*z, supervision=vigos.Supervision(**call), impl="reference")
    assert torch.equal(plain.divergence, again.divergence)


MISTAKES = {
    "contrast without a control": ({"control_row": None}, r"supervision.control_row must be given with contrast"),
    "control of another dtype": ({"control_row": torch.zeros(3)}, r"supervision.control_row must be int64 \(3,\)"),
    "control past the end": (
        {"control_row": torch.tensor([0, 3, 1])},
        r"supervision.control_row must hold rows of the teacher's 3, got values from 0 to 3",
    ),
    "negative contrast": ({"contrast": -0.1}, r"supervision.contrast must be finite and at least 0, got .*-0.1"),
    "no number": ({"contrast": torch.full((3,), INF)}, r"supervision.contrast must be finite"),
    "plausibility": ({"plausibility": 1.5}, r"supervision.plausibility must be in \[0, 1\], got .*1.5"),
    "plausibility shape": ({"plausibility": torch.ones(2)}, r"supervision.plausibility must be floats \(3,\)"),
    "reverse": ({"kind": "reverse", "plausibility": 0.1}, r"plausibility must be 0 for pairs of reverse KL"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    changes, message = MISTAKES[name]
    fields = {"control_row": torch.tensor([2, 1, 0]), "contrast": 0.5, **changes}
    rows = vigos.Supervision(torch.arange(3), torch.arange(3), fields.pop("kind", "forward"), **fields)
    hidden, head = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match=message):
        vigos.linear_divergence(hidden, head, hidden, supervision=rows)
    with pytest.raises(ValueError, match=message):
        vigos.logits_divergence(hidden, hidden, supervision=rows)


def test_an_engine_without_it_says_so():
    rows = vigos.Supervision(torch.arange(3), torch.arange(3), control_row=torch.arange(3), contrast=1.0)
    with pytest.raises(ValueError, match=r"impl='cuda' cannot run this call: it has no kernel for a contrast"):
        vigos.linear_divergence(torch.ones(3, 4), torch.ones(9, 4), torch.ones(3, 4), supervision=rows, impl="cuda")


def test_compiled():
    c = contrasted("reference", gamma=1e-3)
    fields = ("student_row", "teacher_row", "kind", "weight", "clip")
    target = {name: getattr(c.supervision, name) for name in ("control_row", "contrast", "plausibility")}
    positional = [getattr(c.supervision, name) for name in fields]

    def loss(student, head, teacher, kind):
        rows = vigos.Supervision(*positional[:2], kind, *positional[3:], **target)
        return vigos.linear_divergence(student, head, teacher, supervision=rows, impl="reference").loss

    arguments = (c.student.float(), c.head.float(), c.teacher.float(), positional[2])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), loss(*arguments))
