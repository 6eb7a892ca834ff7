"""Properties of the divergence on inputs that hypothesis finds."""

from __future__ import annotations

import math

import torch
from helpers.divergence_cases import KINDS, heads, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vigos
from vigos import reference

INF = float("inf")
fast = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
