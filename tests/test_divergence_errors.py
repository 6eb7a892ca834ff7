"""Users' mistakes: the argument, what was wanted, what came, and what to do about it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import vigos
from vigos.divergence.engines import AUTO, IMPLS, choose, engine

INF = float("inf")
HEAD = partial(vigos.Head, torch.randn(20, 6))


def call(**changes):
    arguments = {
        "student_hidden": torch.randn(4, 6), "head": torch.randn(20, 6), "teacher_hidden": torch.randn(4, 6),
        "impl": "reference", **changes,
    }  # fmt: skip
    return vigos.linear_divergence(**arguments)


def rows(**changes):
    return {
        "supervision": vigos.Supervision(**{"student_row": torch.arange(4), "teacher_row": torch.arange(4), **changes})
    }


MISTAKES = {
    "one dimension": (
        {"student_hidden": torch.randn(6)},
        r"student_hidden must be a float tensor \(\.\.\., D\), got \(6,\)",
    ),
    "other leading dimensions": (
        {"student_hidden": torch.randn(2, 3, 6), "teacher_hidden": torch.randn(3, 2, 6)},
        r"supervision=None .*as many teacher rows as student rows, \(2, 3\), got \(3, 2\)",
    ),
    "integers": (
        {"teacher_hidden": torch.ones(4, 6, dtype=torch.int64)},
        r"teacher_hidden must be a float tensor .*int64",
    ),
    "not a tensor": ({"student_hidden": [[1.0]]}, r"student_hidden must be a float tensor"),
    "head of another width": (
        {"head": torch.randn(20, 5)},
        r"head\.weight must be \(V, 6\) to project student_hidden \(4, 6\), got",
    ),
    "empty head": ({"head": torch.randn(0, 6)}, r"head\.weight must have at least one vocabulary row"),
    "head of another dtype": (
        {"head": torch.randn(20, 6).bfloat16()},
        r"head\.weight must be torch.float32 like student_hidden, got torch.bfloat16",
    ),
    "head elsewhere": (
        {"head": torch.randn(20, 6, device="meta")},
        r"head\.weight must be on cpu like student_hidden, got meta",
    ),
    "teacher elsewhere": ({"teacher_hidden": torch.randn(4, 6, device="meta")}, r"teacher_hidden must be on cpu"),
    "teacher width, shared head": (
        {"teacher_hidden": torch.randn(4, 8)},
        r"teacher_hidden must be \(\.\.\., 6\) for the shared head, got \(4, 8\)",
    ),
    "teacher dtype, shared head": (
        {"teacher_hidden": torch.randn(4, 6).half()},
        r"teacher_hidden must be torch.float32",
    ),
    "teacher head of another width": (
        {"teacher_head": torch.randn(20, 8)},
        r"teacher_head\.weight must be \(V, 6\) to project teacher_hidden",
    ),
    "float64 against float32": (
        {"teacher_hidden": torch.randn(4, 6).double(), "teacher_head": torch.randn(20, 6).double()},
        r"teacher_hidden must be float64 exactly when student_hidden is",
    ),
    "bias shape": (
        {"head": HEAD(bias=torch.randn(19))},
        r"head\.bias must be a float tensor \(20,\) like head\.weight",
    ),
    "bias dtype": (
        {"head": HEAD(bias=torch.randn(20).half())},
        r"head\.bias must be torch.float32 like head\.weight",
    ),
    "teacher bias": (
        {"teacher_head": HEAD(bias=torch.randn(1, 20))},
        r"teacher_head\.bias must be a float tensor \(20,\)",
    ),
    "temperature": ({"temperature": 0.0}, r"temperature must be a positive number, got 0.0"),
    "temperature, a tensor": ({"temperature": torch.tensor(1.0)}, r"temperature must be a positive number, got tensor"),
    "beta": ({"beta": 1.0}, r"beta must be strictly between 0 and 1 .*kinds of their own.*, got 1.0"),
    "entry clip": ({"entry_clip": -0.1}, r"entry_clip must be a positive number or None, got -0.1"),
    "softcap": (
        {"head": vigos.Head(torch.randn(20, 6), softcap=0.0)},
        r"head\.softcap must be a positive number or None, got 0.0",
    ),
    "scale": (
        {"teacher_head": vigos.Head(torch.randn(20, 6), scale=INF)},
        r"teacher_head\.scale must be a positive number, got inf",
    ),
    "no head": ({"head": [1.0]}, r"head must be a vigos.Head or a weight \(V, D\), got list"),
    "impl": ({"impl": "cudnn"}, r"impl must be \"auto\" or one of 'reference', 'cpu'.*got 'cudnn'"),
    "vocabulary size": ({"vocab_size": 21}, r"vocab_size must be at most the heads' 20 vocabulary entries, got 21"),
    "no vocabulary": ({"vocab_size": 0}, r"vocab_size must be a positive integer or None, got 0"),
    "other counts": (
        {"teacher_hidden": torch.randn(5, 6)},
        r"supervision=None .*as many teacher rows as student rows, 4, got 5",
    ),
    "not a supervision": (
        {"supervision": torch.arange(4)},
        r"supervision must be a vigos.Supervision or None, got Tensor",
    ),
    "student row dtype": (
        rows(student_row=torch.arange(4).int()),
        r"supervision.student_row must be an int64 tensor \(R,\)",
    ),
    "teacher row shape": (
        rows(teacher_row=torch.arange(3)),
        r"supervision.teacher_row must be int64 \(4,\) like student_row",
    ),
    "teacher row float": (rows(teacher_row=torch.arange(4.0)), r"supervision.teacher_row must be int64"),
    "kind": (rows(kind=7), r"supervision.kind must be integers \(R,\) or one number, one of 'forward', .* got 7"),
    "kind, a word": (rows(kind="fwd"), r"supervision.kind must be .*'forward', 'reverse', 'jsd', .* got 'fwd'"),
    "kind, wrapping": (
        rows(kind=torch.full((4,), 256)),
        r"supervision.kind must hold vigos.FORWARD_KL, REVERSE_KL or JSD",
    ),
    "reduction": ({"reduction": "batchmean"}, r"reduction must be one of 'sum', 'mean', 'none', got 'batchmean'"),
    "mask of another length": (
        {"supervision": vigos.Supervision.from_mask(torch.ones(3, dtype=torch.bool))},
        r"supervision's mask is \(3,\) and must match the student's leading dimensions, got \(4,\)",
    ),
    "mask of the student alone": (
        {"supervision": vigos.Supervision.from_mask(torch.ones(4) > 0), "teacher_hidden": torch.randn(6, 6)},
        r"supervision's mask is \(4,\) and must match the teacher's leading dimensions, got \(6,\)",
    ),
    "kind, a tensor": (
        rows(kind=torch.full((4,), 5, dtype=torch.int8)),
        r"supervision.kind must hold vigos.FORWARD_KL, REVERSE_KL or JSD",
    ),
    "kind, floats": (rows(kind=torch.zeros(4)), r"supervision.kind must be integers"),
    "weight": (rows(weight="all"), r"supervision.weight must be floats \(R,\) or one number, got 'all'"),
    "weight shape": (
        rows(weight=torch.ones(5)),
        r"supervision.weight must be floats \(4,\) like student_row, got \(5,\)",
    ),
    "negative clip": (rows(clip=-1.0), r"supervision.clip must be at least 0 nats"),
    "NaN clip": (rows(clip=torch.full((4,), float("nan"))), r"supervision.clip must be at least 0 nats"),
    "student row": (
        rows(student_row=torch.tensor([0, 1, 4, 2])),
        r"supervision.student_row must hold rows of the student's 4, got values from 0 to 4",
    ),
    "teacher row": (
        rows(teacher_row=torch.tensor([0, -1, 3, 2])),
        r"supervision.teacher_row must hold .* from -1 to 3",
    ),
    "labels": ({"labels": torch.arange(3)}, r"labels must be an int64 tensor \(4,\), one id for each pair"),
    "label values": (
        {"labels": torch.tensor([0, 1, 2, 20])},
        r"labels must hold ids below the vocabulary size 20, got .*to 20",
    ),
    "label in the padding": (
        {"labels": torch.tensor([0, 1, 2, 19]), "vocab_size": 18},
        r"labels must hold ids below the vocabulary size 18",
    ),
    "ignored labels": ({"labels": torch.tensor([0, 1, 2, -100])}, r"labels must hold ids .*from -100 to 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_linear(name):
    changes, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_padded_vocabularies_say_what_to_slice():
    """Qwen2.5-VL-3B against 7B: one tokenizer, two paddings."""
    heads, hidden = [torch.randn(v, 1) for v in (151_936, 152_064)], torch.randn(4, 1)
    for sides, message in (
        (heads, r"teacher_head must have the 151936 vocabulary rows of head, got 152064.*teacher_head's.*\[:151936\]"),
        (heads[::-1], r"got 151936.* slice head's weight and bias to \[:151936\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(student_hidden=hidden, teacher_hidden=hidden, head=sides[0], teacher_head=sides[1])


def test_logits():
    s, t = torch.randn(3, 10), torch.randn(3, 12)
    with pytest.raises(
        ValueError, match=r"teacher_logits must have the 10 vocabulary columns .*got 12; slice.*\[\.\.\., :10\]"
    ):
        vigos.logits_divergence(s, t)
    with pytest.raises(ValueError, match=r"student_logits must be a float tensor \(\.\.\., V\), got \(3,\)"):
        vigos.logits_divergence(s[:, 0], t)
    with pytest.raises(ValueError, match=r"teacher_logits must be float64 exactly when student_logits are"):
        vigos.logits_divergence(s, t[:, :10].double())
    with pytest.raises(ValueError, match=r"student_logits must have at least one vocabulary column"):
        vigos.logits_divergence(s[:, :0], t[:, :0])
    repeated = vigos.Supervision(torch.tensor([1, 1]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"inplace=True needs every student row to be supervised at most once"):
        vigos.logits_divergence(s.requires_grad_() * 1, t[:, :10], supervision=repeated, inplace=True)


def test_a_named_engine_runs_or_says_why_not():
    with pytest.raises(
        ValueError, match=r"impl='cpu' cannot run this call: it takes float32, bfloat16 and float16, got"
    ):
        call(
            student_hidden=torch.randn(4, 6).double(), teacher_hidden=torch.randn(4, 6).double(),
            head=torch.randn(20, 6).double(), impl="cpu",
        )  # fmt: skip
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"impl='cuda' cannot run this call"):
            call(impl="cuda")


def test_auto_takes_what_runs(monkeypatch):
    """The first engine of the device's order that has nothing against the call."""
    seen = []
    for name in IMPLS:
        module = engine(name)
        monkeypatch.setattr(
            module, "forward", lambda problem, name=name, f=module.forward: seen.append(name) or f(problem)
        )
    call(impl="auto")
    double = {k: x.double() for k, x in (("student_hidden", torch.randn(4, 6)), ("head", torch.randn(20, 6)))}
    call(impl="auto", teacher_hidden=torch.randn(4, 6).double(), **double)
    monkeypatch.setattr(engine("cpu"), "find_extension", lambda: "vigos._C is not built: build it")
    with pytest.warns(UserWarning, match=r"does without the faster 'cpu' engine: vigos._C is not built"):
        call(impl="auto")
    assert seen == ["cpu", "reference", "reference"]
    assert AUTO["cpu"] == ("cpu", "reference")
    with pytest.raises(ValueError, match=r"vigos._C is not built"):
        call(impl="cpu")
    assert callable(choose)


def test_supervision_broadcasts_numbers():
    one = call(supervision=vigos.Supervision(torch.arange(4), torch.arange(4), vigos.JSD, 0.5, 0.1))
    many = vigos.Supervision(
        torch.arange(4), torch.arange(4), torch.full((4,), 2), torch.full((4,), 0.5).double(), torch.tensor(0.1)
    )
    torch.manual_seed(0)
    a = torch.randn(4, 6), torch.randn(20, 6), torch.randn(4, 6)
    assert torch.equal(
        vigos.linear_divergence(*a, supervision=many).loss,
        vigos.linear_divergence(*a, supervision=vigos.Supervision(torch.arange(4), torch.arange(4), 2, 0.5, 0.1)).loss,
    )
    assert one.divergence.shape == (4,)
