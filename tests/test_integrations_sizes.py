"""Two sides that do not fit each other are refused in every drop-in, by both sizes, before memory is cut anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import peer_statements as statements
from torch import Tensor

from vigos.integrations import liger, opsd, released, trl, verl

V, D = 8, 6


def labels(like: Tensor) -> Tensor:
    return torch.zeros(like.shape[:-1], dtype=torch.int64)


LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "trl gkd": lambda s, t: trl.generalized_jsd_loss(s, t),
    "trl gkd, labels": lambda s, t: trl.generalized_jsd_loss(s, t, labels(s), num_items_in_batch=3),
    "trl sdft": lambda s, t: trl.full_logit_self_distillation_loss(s, t, distillation_alpha=0.5).sum(),
    "opsd": lambda s, t: opsd.generalized_jsd_loss(s, t, beta=0.0),
    "opsd, labels": lambda s, t: opsd.generalized_jsd_loss(s, t, labels(s)),
    "opsd, top k": lambda s, t: opsd.generalized_jsd_loss(s, t, top_k=3),
    "released": lambda s, t: released.masked_kl_loss(t, s, torch.ones(s.shape[:-1])),
    "released, tokens": lambda s, t: released.kl_tokens(t, s).sum(),
}


@pytest.mark.parametrize("shape", [(1, 3, 16), (1, 6, 8), (2, 3, 8), (1, 2, 12), (3, 8)], ids=str)
@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_other_sizes(name: str, shape: tuple[int, ...]) -> None:
    """A vocabulary of 16 for 8 has twice the memory: cut as 8, it gave a number."""
    student = torch.randn(1, 3, V, requires_grad=True)
    sizes = r"\(1, 3, 8\).*" + str(shape).replace("(", r"\(").replace(")", r"\)")
    other = str(shape).replace("(", r"\(").replace(")", r"\)") + r".*\(1, 3, 8\)"
    with pytest.raises(ValueError, match=f"{sizes}|{other}"):
        LOGITS[name](student, torch.randn(shape))


@pytest.mark.parametrize("length", [2, 4, 6])
def test_masks_and_labels_of_another_length(length: int) -> None:
    s, t = torch.randn(1, 3, V, requires_grad=True), torch.randn(1, 3, V)
    mask = torch.zeros(1, length, dtype=torch.int64)
    for call in (
        lambda: trl.generalized_jsd_loss(s, t, mask),
        lambda: opsd.generalized_jsd_loss(s, t, mask),
        lambda: released.masked_kl_loss(t, s, mask),
        lambda: released.masked_kl_loss(t, s, torch.ones(1, 3), post_clip_mask=mask),
    ):
        with pytest.raises(ValueError, match=rf"must be \(1, 3\), one value for each token, got \(1, {length}\)"):
            call()


def chunked(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, mask: Tensor) -> Any:
    pytest.importorskip("trl", minversion="1.16")
    return trl.chunked_divergence_loss(student, teacher, head, teacher_head, mask, 0.5)


HIDDEN: dict[str, Callable[..., Any]] = {
    "trl": chunked,
    "liger chunked": lambda s, w, t, w_t, mask: liger.LigerFusedLinearJSDLoss(0.0)(
        s, w, t, w_t, mask - 100 * (1 - mask)
    ),
    "liger chunked, cross-entropy": lambda s, w, t, w_t, mask: liger.LigerFusedLinearJSDLoss(0.5)(
        s, w, t, w_t, mask - 100 * (1 - mask)
    ),
    "liger fused": lambda s, w, t, w_t, mask: liger.LigerFusedLinearJSD()(s, w, t, w_t, mask - 100 * (1 - mask)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_states_of_other_sizes(name: str) -> None:
    student, head, mask = torch.randn(2, 3, D, requires_grad=True), torch.randn(V, D), torch.ones(2, 3).long()
    fits = {"s": student, "w": head, "t": torch.randn(2, 3, D), "w_t": torch.randn(V, D), "mask": mask}
    HIDDEN[name](*fits.values())
    for change, message in (
        ({"t": torch.randn(2, 4, D)}, r"\(2, 3\).*teacher.*\(2, 4\)"),
        ({"t": torch.randn(3, 2, D)}, r"\(2, 3\).*teacher.*\(3, 2\)"),
        ({"mask": mask[:, :2]}, r"\(2, 2\).*\(2, 3\)|\(2, 3\).*\(2, 2\)"),
        ({"mask": torch.ones(2, 4).long()}, r"\(2, 4\).*\(2, 3\)|\(2, 3\).*\(2, 4\)"),
        ({"w_t": torch.randn(2 * V, D)}, r"8 vocabulary rows of head, got 16"),
        ({"w_t": torch.randn(V, 2 * D)}, r"\(V, 6\) to project teacher_hidden.*got \(8, 12\)"),
        ({"t": torch.randn(2, 3, 2 * D)}, r"\(V, 12\) to project teacher_hidden.*got \(8, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            HIDDEN[name](*(fits | change).values())


def test_top_k_ids_of_other_sizes() -> None:
    student = torch.randn(1, 3, V, requires_grad=True)
    values, ids = torch.randn(1, 4, V).log_softmax(-1).topk(2)
    with pytest.raises(ValueError, match=r"\(\*\(1, 3\), k\) like student_logits, got \(1, 4, 2\)"):
        verl.topk_forward_kl(student, values, ids)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOGITS, "verl"])
def test_compiled_at_a_second_sequence_length(name: str) -> None:
    """Lengths are dynamic from the second on; what backward keeps must outlive it nowhere."""

    def top_k(student: Tensor, teacher: Tensor) -> Tensor:
        values, ids = teacher.log_softmax(-1).topk(3)
        return verl.topk_forward_kl(student, values, ids)["distillation_losses"].sum()

    loss = top_k if name == "verl" else LOGITS[name]
    torch._dynamo.reset()
    compiled = torch.compile(loss)
    for length in (5, 7, 11):
        leaves = [torch.randn(2, length, V, generator=torch.Generator().manual_seed(length)) for _ in range(2)]
        teacher = torch.randn(2, length, V)
        values = [run(x.requires_grad_(), teacher) for run, x in zip((compiled, loss), leaves, strict=True)]
        for value in values:
            value.backward()
        torch.testing.assert_close(*values)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


# --- second derivatives ----------------------------------------------------------------------------------------------


def penalise(loss: Tensor, student: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    (gradient.pow(2).sum() + student.sum()).backward()


@pytest.mark.parametrize("name", [*LOGITS, *HIDDEN, "verl", "cross-entropy"])
def test_second_derivatives_raise(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    if name == "cross-entropy":
        student, head = torch.randn(6, D, generator=g).requires_grad_(), torch.randn(V, D, generator=g)
        loss = liger._cross_entropy(student, head, None, torch.arange(6), -100, 4)
    elif name in HIDDEN:
        student = torch.randn(2, 3, D, generator=g).requires_grad_()
        rest = torch.randn(V, D, generator=g), torch.randn(2, 3, D, generator=g), torch.randn(V, D, generator=g)
        loss = HIDDEN[name](student, *rest, torch.ones(2, 3).long())
        loss = loss[0] if isinstance(loss, tuple) else loss
    else:
        student, teacher = torch.randn(2, 3, V, generator=g).requires_grad_(), torch.randn(2, 3, V, generator=g)
        if name == "verl":
            values, ids = teacher.log_softmax(-1).topk(3)
            loss = verl.topk_forward_kl(student, values, ids)["distillation_losses"].sum()
        else:
            loss = LOGITS[name](student, teacher)
    with pytest.raises(RuntimeError, match="differentiable once"):
        penalise(loss, student)


# --- Liger's cross-entropy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_the_cross_entropy_of_ligers_replacement_keeps_float32_logits(autocast: bool) -> None:
    """With the same bf16 operands: the value to float32, the gradients to one rounding of the logits' gradient."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 64, generator=g), torch.randn(3000, 64, generator=g) / 3
    bias, ids = torch.randn(3000, generator=g).bfloat16(), torch.randint(3000, (40,), generator=g)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    results = []
    for dtype in (torch.float32 if autocast else torch.bfloat16, torch.float64):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, head, bias)]
        if dtype == torch.float64:
            loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T + leaves[2], ids)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = liger.LigerFusedLinearJSDLoss(1.0, 0.0, chunk_size=16)(
                    leaves[0], leaves[1], leaves[0].detach(), leaves[1], ids, leaves[2], leaves[2]
                )
        loss.backward()
        results.append((loss.item(), *(x.grad.double() for x in leaves)))
    (ours, *gradients), (exact, *wanted) = results
    assert ours == pytest.approx(exact, rel=1e-6)
    for x, y in zip(gradients, wanted, strict=True):
        assert ((x - y).norm() / y.norm()).item() < 5e-3


# --- adapters on the head --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{"target_modules": ["lm_head"]}, {"target_modules": ["body"], "modules_to_save": ["lm_head"]}]
)
def test_the_mixin_refuses_an_adapter_on_the_head(how: dict[str, Any]) -> None:
    """Its weight alone is not what the model multiplies by, and the adapter would get no gradient."""
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head = torch.nn.Linear(D, D), torch.nn.Linear(D, V)
            self.config = type("Config", (), {"to_dict": lambda self: {}, "model_type": "tiny"})()

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.lm_head

    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, **how))
    with pytest.raises(ValueError, match=r"must be a torch.nn.Linear, got peft\..*released.patch, which keeps logits"):
        released._check_head(model.get_base_model().get_output_embeddings(), model.get_base_model())
    released._check_head(Model().lm_head, Model())


def test_statements_agree_on_what_fits() -> None:
    """The sizes that are not refused give the definition's value."""
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(1, 3, V, generator=g), torch.randn(1, 3, V, generator=g)
    exact = statements.opsd(s.double(), t.double(), torch.zeros(1, 3), 0.5, 1.0, None, None)
    for name in ("opsd, labels", "trl gkd, labels"):
        torch.testing.assert_close(LOGITS[name](s, t).double(), exact, rtol=1e-5, atol=1e-6)
