"""Liger's classes and ours, side by side, and against float64 where Liger is wrong."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import peer_statements as statements
from torch import Tensor

from vigos.divergence import api
from vigos.integrations import _patching
from vigos.integrations import liger as drop_in

pytest.importorskip("liger_kernel")
import liger_kernel.chunked_loss as chunked_loss
import liger_kernel.transformers as liger_transformers

THEIRS = (chunked_loss.LigerFusedLinearJSDLoss, liger_transformers.LigerFusedLinearJSD)
BETAS = [0.0, 1.0, 0.5, 0.1]


def case(seed: int, n: int, d: int, v: int, *, d_t: int | None = None, v_t: int | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    d_t, v_t = d if d_t is None else d_t, v if v_t is None else v_t
    labels = torch.randint(v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.3] = -100
    labels[0] = 1
    return {
        "student": torch.randn(n, d, generator=g), "w_s": torch.randn(v, d, generator=g) * 3 / d**0.5,
        "teacher": torch.randn(n, d_t, generator=g), "w_t": torch.randn(v_t, d_t, generator=g) * 3 / d_t**0.5,
        "labels": labels, "bias_s": torch.randn(v, generator=g), "bias_t": torch.randn(v_t, generator=g),
    }  # fmt: skip


def run(
    module: torch.nn.Module, c: dict[str, Tensor], *, bias: bool = False, upstream: float = 1.7
) -> dict[str, Tensor]:
    """Loss and gradients; inputs go in as they lie in `c`."""
    leaves = {name: c[name].detach().clone().requires_grad_() for name in ("student", "w_s", "bias_s")}
    extra = (leaves["bias_s"], c["bias_t"]) if bias else ()
    out = module(leaves["student"], leaves["w_s"], c["teacher"], c["w_t"], c["labels"], *extra)
    loss = out[0] if isinstance(out, tuple) else out
    (upstream * loss).backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), **grads}


def exact(
    c: dict[str, Tensor], beta: float, *, hard: float = 0.0, soft: float = 0.5, temperature: float = 1.0,
    bias: bool = False, upstream: float = 1.7,
) -> dict[str, Tensor]:  # fmt: skip
    """Float64: hard * cross-entropy + soft * JSD, means over the kept labels."""
    f = {name: x.double().flatten(0, -2) if name in ("student", "teacher") else x.double() for name, x in c.items()}
    leaves = {name: f[name].clone().requires_grad_() for name in ("student", "w_s", "bias_s")}
    b_s, b_t = (leaves["bias_s"], f["bias_t"]) if bias else (None, None)
    labels = c["labels"].flatten()
    mask = labels != -100
    total, _ = statements.heads(
        leaves["student"], f["teacher"], leaves["w_s"], f["w_t"], mask, beta, bias_s=b_s, bias_t=b_t,
        temperature=temperature,
    )  # fmt: skip
    logits = torch.nn.functional.linear(leaves["student"], leaves["w_s"], b_s)
    loss = soft * total / mask.sum() + hard * torch.nn.functional.cross_entropy(logits, labels)
    (upstream * loss).backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_equal_to_rounding(ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, z in truth.items():
        assert torch.isfinite(ours[name]).all(), name
        assert ours[name].shape == theirs[name].shape, name
        err, base = ((x[name].double().view_as(z) - z).abs().max().item() for x in (ours, theirs))
        rounding = 64 * torch.finfo(torch.float32).eps * max(z.abs().max().item(), 0.1)
        assert err <= 2 * base + rounding, f"{name}: ours {err:.2e}, Liger {base:.2e}, rounding {rounding:.2e}"


# --- LigerFusedLinearJSDLoss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("shape", "hard", "soft", "temperature"),
    [((1, 8, 17), 0.0, 1.0, 1.0), ((9, 16, 301), 0.0, 0.5, 2.0), ((20, 33, 1000), 0.5, 0.5, 0.7)],
    ids=str,
)
def test_chunked_loss(beta: float, shape: tuple, hard: float, soft: float, temperature: float) -> None:
    options = {"weight_hard_loss": hard, "weight_soft_loss": soft, "beta": beta, "temperature": temperature}
    options |= {"compiled": False, "chunk_size": 8}
    c = case(sum(shape), *shape, d_t=12)
    for bias in (False, True):
        truth = exact(c, beta, hard=hard, soft=soft, temperature=temperature, bias=bias)
        ours, theirs = (run(cls(**options), c, bias=bias) for cls in (drop_in.LigerFusedLinearJSDLoss, THEIRS[0]))
        assert_equal_to_rounding(ours, theirs, truth)


def test_soft_and_hard_losses_are_returned() -> None:
    c = case(1, 7, 16, 101)
    options = {"weight_hard_loss": 0.3, "weight_soft_loss": 0.7, "compiled": False, "return_soft_hard_loss": True}
    arguments = (c["student"], c["w_s"], c["teacher"], c["w_t"], c["labels"])
    ours, theirs = (cls(**options)(*arguments) for cls in (drop_in.LigerFusedLinearJSDLoss, THEIRS[0]))
    assert len(ours) == len(theirs) == 3
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_no_cross_entropy_unless_it_is_asked_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger's default adds half of it: asked for, it is there; left at its default, it is not, and we say so."""
    monkeypatch.setattr(_patching, "_said", set())
    c = case(2, 7, 16, 101)
    with caplog.at_level("WARNING", logger="vigos.integrations"):
        silent = run(drop_in.LigerFusedLinearJSDLoss(compiled=False), c)
    assert "cross-entropy" in caplog.text
    assert_equal_to_rounding(silent, run(THEIRS[0](weight_hard_loss=0.0, compiled=False), c), exact(c, 0.5))
    asked = run(drop_in.LigerFusedLinearJSDLoss(weight_hard_loss=0.5, compiled=False), c)
    assert_equal_to_rounding(asked, run(THEIRS[0](compiled=False), c), exact(c, 0.5, hard=0.5))
    assert (asked["loss"] - silent["loss"]).abs() > 0.5


def test_three_dimensional_inputs() -> None:
    """ms-swift and TRL pass (B, T, D): flattened here. Liger splits them along B alone, that is hardly ever."""
    c = case(3, 12, 16, 101)
    flat = run(drop_in.LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False), c)
    cubes = c | {"student": c["student"].view(3, 4, 16), "teacher": c["teacher"].view(3, 4, 16)}
    cubes["labels"] = c["labels"].view(3, 4)
    ours = run(drop_in.LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False), cubes)
    theirs = run(THEIRS[0](0.0, 1.0, compiled=False, chunk_size=1), cubes)
    assert ours["dstudent"].shape == (3, 4, 16)
    assert_equal_to_rounding(ours, theirs, exact(cubes, 0.5, soft=1.0))
    torch.testing.assert_close(ours["dstudent"].flatten(0, 1), flat["dstudent"], rtol=0, atol=0)


def test_three_dimensional_inputs_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the engine is two-dimensional, so that its chunks are chunks of tokens."""
    seen = []
    real = api.linear
    monkeypatch.setattr(api, "linear", lambda *a, **k: seen.append(a[0][0].shape) or real(*a, **k))
    c = case(3, 12, 16, 101)
    cubes = c | {"student": c["student"].view(3, 4, 16), "teacher": c["teacher"].view(3, 4, 16)}
    run(drop_in.LigerFusedLinearJSDLoss(0.0), cubes | {"labels": c["labels"].view(3, 4)})
    assert seen == [(12, 16)]


def test_mismatched_vocabularies() -> None:
    """Liger pads the student's logits with zeros: ids that the student cannot produce then take probability from it."""
    c = case(4, 6, 16, 90, v_t=101)
    with pytest.raises(ValueError, match=r"90 vocabulary rows of head, got 101.*\[:90\]"):
        run(drop_in.LigerFusedLinearJSDLoss(0.0, 1.0), c)
    sliced = c | {"w_t": c["w_t"][:90]}
    truth = exact(sliced, 0.5, soft=1.0)
    ours = run(drop_in.LigerFusedLinearJSDLoss(0.0, 1.0), sliced)
    padded = run(THEIRS[0](0.0, 1.0, compiled=False), c)
    assert abs(ours["loss"].item() - truth["loss"].item()) < 1e-5
    assert abs(padded["loss"].item() - truth["loss"].item()) > 1e-2


def test_bf16_logits_of_a_near_teacher() -> None:
    """Liger's chunked loss rounds logits to the hidden states' dtype; the gradient towards a near teacher is lost."""
    c = case(5, 24, 64, 3000)
    c["teacher"], c["w_t"] = c["student"] + 0.03 * c["teacher"], c["w_s"]
    c = {name: x.bfloat16() if x.is_floating_point() else x for name, x in c.items()}
    truth = exact(c, 0.0, soft=1.0)
    ours = run(drop_in.LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0), c)
    theirs = run(THEIRS[0](0.0, 1.0, beta=0.0, compiled=False), c)
    errors = [
        ((x["dstudent"].double() - truth["dstudent"]).norm() / truth["dstudent"].norm()).item() for x in (ours, theirs)
    ]
    assert errors[0] < 0.01
    assert errors[1] > 0.1


def test_ids_that_neither_side_can_produce() -> None:
    """A bias of -inf bans an id: Liger's terms are inf - inf."""
    c = case(6, 6, 16, 50)
    c["bias_s"][-3:], c["bias_t"][-3:] = -torch.inf, -torch.inf
    assert not torch.isfinite(run(THEIRS[0](0.0, 1.0, compiled=False), c, bias=True)["loss"])
    ours = run(drop_in.LigerFusedLinearJSDLoss(0.0, 1.0), c, bias=True)
    short = c | {name: c[name][:-3] for name in ("w_s", "w_t", "bias_s", "bias_t")}
    short["labels"] = torch.where(c["labels"] >= 47, 1, c["labels"])
    truth = exact(short, 0.5, soft=1.0, bias=True)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours["dstudent"].double(), truth["dstudent"], rtol=1e-4, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    c = case(7, 6, 16, 50)
    student = c["student"].clone().requires_grad_()
    loss = drop_in.LigerFusedLinearJSDLoss(0.5, 0.5)(student, c["w_s"], c["teacher"], c["w_t"], c["labels"])
    loss.backward()
    assert c["w_s"].grad is None
    torch.testing.assert_close(
        student.grad.double(), exact(c, 0.5, hard=0.5, upstream=1.0)["dstudent"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_no_kept_label_is_a_zero_with_a_gradient(hard: float) -> None:
    c = case(8, 4, 8, 30)
    c["labels"] = torch.full_like(c["labels"], -100)
    out = run(drop_in.LigerFusedLinearJSDLoss(hard), c)
    assert out["loss"] == 0
    assert (out["dstudent"] == 0).all()


def test_bad_arguments_are_refused() -> None:
    c = case(9, 4, 8, 30)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        drop_in.LigerFusedLinearJSDLoss(temperature=0)
    with pytest.raises(ValueError, match=r"beta must be between 0 .* got 2\.0"):
        run(drop_in.LigerFusedLinearJSDLoss(0.0, beta=2), c)
    with pytest.raises(ValueError, match=r"true_labels must be \(4,\), one value for each token, got \(3,\)"):
        run(drop_in.LigerFusedLinearJSDLoss(0.0), c | {"labels": c["labels"][:3]})


# --- LigerFusedLinearJSD ---------------------------------------------------------------------------------------------

_INTERPRETED = """
import sys, torch
from liger_kernel.transformers import LigerFusedLinearJSD
torch.set_num_threads(1)
cases, out = torch.load(sys.argv[1]), []
for c in cases:
    student, w_s = (c[name].clone().requires_grad_() for name in ("student", "w_s"))
    loss = LigerFusedLinearJSD(jsd_beta=c["beta"], temperature=c["temperature"])(
        student, w_s, c["teacher"], c["w_t"], c["labels"]
    )
    (loss * 1.0).backward()
    out.append({"loss": loss.detach(), "dstudent": student.grad, "dw_s": w_s.grad})
torch.save(out, sys.argv[2])
"""


@pytest.mark.slow  # a second process that imports torch and interprets Triton
def test_fused_linear_jsd(tmp_path: Path) -> None:
    """Liger's needs Triton: its kernel runs in the interpreter, in a process of its own."""
    cases: list[dict[str, Any]] = []
    for seed, (beta, labelled) in enumerate([(0.0, True), (1.0, True), (0.1, True), (0.5, False)]):
        c: dict[str, Any] = case(seed, 6, 16, 83, d_t=12)
        c |= {"beta": beta, "temperature": 1.5 if labelled else 1.0, "labels": c["labels"] if labelled else None}
        cases.append(c)
    torch.save(cases, tmp_path / "in.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, tmp_path / "in.pt", tmp_path / "out.pt"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for c, theirs in zip(cases, torch.load(tmp_path / "out.pt"), strict=True):
        ours = run(drop_in.LigerFusedLinearJSD(c["beta"], temperature=c["temperature"]), c, upstream=1.0)
        everything = c | {"labels": torch.zeros(6, dtype=torch.int64) if c["labels"] is None else c["labels"]}
        numbers = {name: x for name, x in everything.items() if isinstance(x, Tensor)}
        truth = exact(numbers, c["beta"], soft=1.0, temperature=c["temperature"], upstream=1.0)
        assert_equal_to_rounding(ours, theirs, truth)


# --- the patch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"), list(zip(THEIRS, (drop_in.LigerFusedLinearJSDLoss, drop_in.LigerFusedLinearJSD), strict=True))
)
def test_same_names_arguments_and_defaults(theirs: type, ours: type) -> None:
    assert ours.__name__ == theirs.__name__
    for method in ("__init__", "forward"):
        a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (theirs, ours))
        assert [(p.name, p.kind, p.default) for p in a.values()] == [(p.name, p.kind, p.default) for p in b.values()]
    assert set(vars(theirs())) <= set(vars(ours()))  # trainers read attributes, such as ignore_index


def test_patch_reaches_every_module_that_imported_the_class() -> None:
    name = "LigerFusedLinearJSDLoss"
    swift = type(sys)("a_trainer_of_ms_swift")
    swift.LigerFusedLinearJSDLoss = THEIRS[0]
    sys.modules[swift.__name__] = swift
    try:
        with drop_in.patched() as names:
            assert len(names) == 2
            for module in (swift, chunked_loss, chunked_loss.jsd_loss):
                assert getattr(module, name) is drop_in.LigerFusedLinearJSDLoss
            assert liger_transformers.LigerFusedLinearJSD is drop_in.LigerFusedLinearJSD
            with drop_in.patched():
                assert drop_in.patch() == names
            assert chunked_loss.LigerFusedLinearJSDLoss is drop_in.LigerFusedLinearJSDLoss
        for module in (swift, chunked_loss, chunked_loss.jsd_loss):
            assert getattr(module, name) is THEIRS[0]
        assert liger_transformers.LigerFusedLinearJSD is THEIRS[1]
    finally:
        del sys.modules[swift.__name__]


def test_an_unknown_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class LigerFusedLinearJSDLoss(torch.nn.Module):
        def __init__(self, beta: float = 0.5) -> None: ...

    monkeypatch.setattr(chunked_loss.jsd_loss, "LigerFusedLinearJSDLoss", LigerFusedLinearJSDLoss)
    with pytest.raises(
        _patching.UnknownPeer, match=r"liger-kernel 0\..*\(self, beta=0.5\); vigos knows .*weight_hard_loss"
    ):
        drop_in.patch()
    assert liger_transformers.LigerFusedLinearJSD is THEIRS[1]
    assert [ok for _, ok, _ in drop_in.fit()] == [False, True]


def test_fit() -> None:
    assert [ok for _, ok, _ in drop_in.fit()] == [True, True]
