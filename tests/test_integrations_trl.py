"""The TRL drop-in against TRL itself, side by side, and against float64 where TRL is wrong."""

from __future__ import annotations

import logging
import weakref
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import peer_statements as statements
from torch import Tensor

from vigos.divergence import api
from vigos.integrations import _patching
from vigos.integrations import trl as drop_in

pytest.importorskip("trl", minversion="1.16")
import trl.trainer.distillation_trainer as distillation
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.gold.gold_trainer import GOLDTrainer
from trl.experimental.sdft import loss_utils as sdft
from trl.experimental.sdpo import loss_utils as sdpo

THEIRS = {
    "chunked": distillation._chunked_divergence_loss,
    "gkd": GKDTrainer.generalized_jsd_loss,
    "gold": GOLDTrainer.generalized_jsd_loss,
    "sdft": sdft.compute_full_logit_self_distillation_loss,
    "sdpo": sdpo.compute_full_logit_self_distillation_loss,
}
BETAS = [0.0, 1.0, 0.5, 0.1]


@pytest.fixture(autouse=True)
def _restored() -> Any:
    yield
    drop_in.unpatch()
    assert distillation._chunked_divergence_loss is THEIRS["chunked"]
    assert GKDTrainer.generalized_jsd_loss is THEIRS["gkd"]


def case(seed: int, b: int, k: int, d: int, v: int, *, d_t: int | None = None, near: float | None = None) -> dict:
    """Hidden states and heads whose rows are peaked (logits of standard deviation 3), in float32, and a mask."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(b, k, d, generator=g)
    w_s = torch.randn(v, d, generator=g) * 3 / d**0.5
    if near is not None:  # self-distillation: one head, a teacher next to the student
        teacher, w_t = student + near * torch.randn(b, k, d, generator=g), w_s
    else:
        d_t = d if d_t is None else d_t
        teacher, w_t = torch.randn(b, k, d_t, generator=g), torch.randn(v, d_t, generator=g) * 3 / d_t**0.5
    mask = (torch.rand(b, k, generator=g) < 0.7).long()
    mask[0, 0] = 1
    return {
        "student": student, "teacher": teacher, "w_s": w_s, "w_t": w_t, "mask": mask,
        "bias_s": torch.randn(v, generator=g), "bias_t": torch.randn(v, generator=g),
    }  # fmt: skip


def run(fn: Any, c: dict, beta: float, *, bias: bool = False, upstream: float = 1.7, **options: Any) -> dict:
    """Loss, entropy, count and every gradient of the student's side."""
    leaves = {name: c[name].detach().clone().requires_grad_() for name in ("student", "w_s", "bias_s")}
    if bias:
        options |= {"student_lm_head_bias": leaves["bias_s"], "teacher_lm_head_bias": c["bias_t"]}
    loss, entropy, n = fn(leaves["student"], c["teacher"], leaves["w_s"], c["w_t"], c["mask"], beta, **options)
    (upstream * loss).backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), "entropy": entropy.detach(), "n": n, **grads}


def exact(
    c: dict, beta: float, *, bias: bool = False, upstream: float = 1.7, divisor: float | None = None, **o: Any
) -> dict:
    """The same in float64, straight from the definition."""
    f = {name: x.double() for name, x in c.items() if x.is_floating_point()}
    leaves = {name: f[name].clone().requires_grad_() for name in ("student", "w_s", "bias_s")}
    o |= {"bias_s": leaves["bias_s"], "bias_t": f["bias_t"]} if bias else {}
    mask = c["mask"].bool()
    loss, entropy = statements.heads(leaves["student"], f["teacher"], leaves["w_s"], f["w_t"], mask, beta, **o)
    loss = loss / (max(int(mask.sum()), 1) if divisor is None else divisor)
    (upstream * loss).backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), "entropy": entropy, "n": mask.sum(), **grads}


def assert_equal_to_rounding(ours: dict, theirs: dict, truth: dict) -> None:
    """Our error against float64 is at most twice the peer's, plus float32 rounding of the largest value."""
    assert ours.keys() == theirs.keys() == truth.keys()
    assert ours["n"] == theirs["n"] == truth["n"]
    for name in ours.keys() - {"n"}:
        x, y, z = ours[name], theirs[name], truth[name]
        assert x.shape == y.shape, name
        assert x.dtype == y.dtype, name
        assert torch.isfinite(x).all(), name
        err, base = ((w.double() - z).abs().max().item() for w in (x, y))
        rounding = 64 * torch.finfo(torch.float32).eps * max(z.abs().max().item(), 0.1)
        assert err <= 2 * base + rounding, f"{name}: ours {err:.2e}, TRL {base:.2e}, rounding {rounding:.2e}"


# --- _chunked_divergence_loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("shape", "temperature"), [((1, 1, 8, 17), 1.0), ((2, 5, 16, 301), 0.7), ((3, 7, 33, 1000), 2.0)], ids=str
)
def test_chunked_divergence(beta: float, shape: tuple[int, ...], temperature: float) -> None:
    c = case(sum(shape), *shape)
    ours = run(drop_in.chunked_divergence_loss, c, beta, temperature=temperature)
    theirs = run(THEIRS["chunked"], c, beta, temperature=temperature)
    assert_equal_to_rounding(ours, theirs, exact(c, beta, temperature=temperature))


@pytest.mark.parametrize("beta", BETAS)
def test_chunked_divergence_with_bias_scale_softcap_and_other_width(beta: float) -> None:
    c = case(1, 2, 6, 16, 257, d_t=24)
    options = {
        "student_logit_scale": 0.8, "teacher_logit_scale": 0.8, "student_final_logit_softcapping": 5.0,
        "teacher_final_logit_softcapping": 5.0, "temperature": 1.3,
    }  # fmt: skip
    truth = exact(c, beta, bias=True, scale_s=0.8, scale_t=0.8, cap_s=5.0, cap_t=5.0, temperature=1.3)
    ours = run(drop_in.chunked_divergence_loss, c, beta, bias=True, **options)
    assert_equal_to_rounding(ours, run(THEIRS["chunked"], c, beta, bias=True, **options), truth)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("scales", "caps"), [((1.0, 0.25), (None, None)), ((1.0, 1.0), (4.0, None)), ((2.0, 1.0), (None, 30.0))], ids=str
)
def test_heads_that_transform_their_logits_differently(beta: float, scales: tuple, caps: tuple) -> None:
    c = case(2, 3, 5, 16, 257)
    options = {
        "student_logit_scale": scales[0], "teacher_logit_scale": scales[1],
        "student_final_logit_softcapping": caps[0], "teacher_final_logit_softcapping": caps[1],
    }  # fmt: skip
    truth = exact(c, beta, bias=True, scale_s=scales[0], scale_t=scales[1], cap_s=caps[0], cap_t=caps[1])
    ours = run(drop_in.chunked_divergence_loss, c, beta, bias=True, **options)
    assert_equal_to_rounding(ours, run(THEIRS["chunked"], c, beta, bias=True, **options), truth)


@pytest.mark.parametrize("items", [37, torch.tensor(37.0)], ids=str)
def test_num_items_in_batch(items: Any) -> None:
    c = case(3, 2, 5, 16, 301)
    ours = run(drop_in.chunked_divergence_loss, c, 1.0, num_items_in_batch=items)
    theirs = run(THEIRS["chunked"], c, 1.0, num_items_in_batch=items)
    assert_equal_to_rounding(ours, theirs, exact(c, 1.0, divisor=37))


@pytest.mark.parametrize("unlike", [False, True])
def test_a_rank_without_tokens_is_a_zero_with_a_gradient(unlike: bool) -> None:
    c = case(4, 2, 3, 8, 50)
    c["mask"] = torch.zeros_like(c["mask"])
    ours = run(drop_in.chunked_divergence_loss, c, 0.5, bias=True, teacher_logit_scale=0.5 if unlike else 1.0)
    assert ours["loss"] == 0
    assert ours["n"] == 0
    for name in ("dstudent", "dw_s", "dbias_s"):
        assert (ours[name] == 0).all(), name


@pytest.mark.parametrize("unlike", [False, True])
def test_autocast(unlike: bool) -> None:
    """Float32 weights under a bf16 autocast: operands are rounded, logits are not."""
    c = case(5, 2, 8, 64, 500, near=0.05)
    options = {"teacher_logit_scale": 1.5} if unlike else {}
    rounded = {name: x.bfloat16() if x.is_floating_point() else x for name, x in c.items()}
    truth = exact(rounded, 1.0, scale_t=1.5 if unlike else 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(drop_in.chunked_divergence_loss, c, 1.0, **options)
        theirs = run(THEIRS["chunked"], c, 1.0, **options)
    for name in ("loss", "entropy", "dstudent", "dw_s"):
        assert ours[name].dtype == theirs[name].dtype, name
        errors = [((x[name].double() - truth[name]).norm() / truth[name].norm()).item() for x in (ours, theirs)]
        # TRL keeps the head's gradient in float32; ours is rounded to the autocast dtype, as F.linear's is.
        assert errors[0] <= 2 * errors[1] + (2**-8 if name == "dw_s" else 1e-6), f"{name}: {errors}"


def test_a_head_of_another_dtype_is_cast_like_trl_casts_it() -> None:
    c = case(6, 2, 4, 16, 101)
    c |= {"student": c["student"].bfloat16(), "teacher": c["teacher"].bfloat16()}
    ours, theirs = (run(fn, c, 0.0) for fn in (drop_in.chunked_divergence_loss, THEIRS["chunked"]))
    truth = exact({name: x.bfloat16() if x.is_floating_point() else x for name, x in c.items()}, 0.0)
    for name in ("loss", "entropy", "dstudent", "dw_s"):
        assert ours[name].dtype == theirs[name].dtype, name
        errors = [((x[name].double() - truth[name]).norm() / truth[name].norm()).item() for x in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + (2**-8 if name == "dw_s" else 1e-6), f"{name}: {errors}"


def test_one_head_for_both_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-distillation passes one parameter twice."""
    c = case(7, 2, 4, 16, 101, near=0.1)
    seen = []
    real = api.linear
    monkeypatch.setattr(api, "linear", lambda *a, **k: seen.append(a[1][1]) or real(*a, **k))
    head = c["w_s"].clone().requires_grad_()
    loss, *_ = drop_in.chunked_divergence_loss(c["student"], c["teacher"], head, head, c["mask"], 0.0)
    theirs, *_ = THEIRS["chunked"](c["student"], c["teacher"], head, head, c["mask"], 0.0)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    assert seen == [None]


def test_fsdp2_heads(tmp_path: Any) -> None:
    """A DTensor head is the storage of a head for other tokens on other ranks: gathered, not vocabulary-parallel."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        c = case(8, 2, 4, 16, 101)
        plain = run(drop_in.chunked_divergence_loss, c, 0.5, bias=True)
        head, bias = (
            distribute_tensor(c[name], mesh, [Shard(0)]).detach().requires_grad_() for name in ("w_s", "bias_s")
        )
        student = c["student"].clone().requires_grad_()
        loss, entropy, n = drop_in.chunked_divergence_loss(
            student, c["teacher"], head, distribute_tensor(c["w_t"], mesh, [Shard(0)]), c["mask"], 0.5,
            student_lm_head_bias=bias, teacher_lm_head_bias=distribute_tensor(c["bias_t"], mesh, [Shard(0)]),
        )  # fmt: skip
        (1.7 * loss).backward()
        assert isinstance(head.grad, DTensor)
        torch.testing.assert_close(loss.detach(), plain["loss"])
        torch.testing.assert_close(entropy, plain["entropy"])
        torch.testing.assert_close(student.grad, plain["dstudent"])
        torch.testing.assert_close(head.grad.full_tensor(), plain["dw_s"])
        torch.testing.assert_close(bias.grad.full_tensor(), plain["dbias_s"])
        assert n == plain["n"]
    finally:
        dist.destroy_process_group()


def test_zero3_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed ZeRO-3 keeps parameters empty outside its gathering context, also while backward runs."""
    c = case(9, 2, 4, 16, 101)
    plain = run(drop_in.chunked_divergence_loss, c, 1.0, bias=True)
    names = ("w_s", "w_t", "bias_s", "bias_t")
    whole = {name: c[name].clone() for name in names}
    parameters = {name: torch.nn.Parameter(c[name].clone()) for name in names}
    by_id = {id(p): name for name, p in parameters.items()}
    gathered: list[str] = []

    @contextmanager
    def gather(*params: Tensor) -> Any:
        for p in params:
            gathered.append(by_id[id(p)])
            p.data = whole[by_id[id(p)]]
        yield
        for p in params:
            p.data = torch.empty(0)

    monkeypatch.setattr("trl.trainer.utils.maybe_gather_lm_head_ctx", gather)
    student = c["student"].clone().requires_grad_()
    for p in parameters.values():
        p.data = torch.empty(0)
    loss, *_ = drop_in.chunked_divergence_loss(
        student, c["teacher"], parameters["w_s"], parameters["w_t"], c["mask"], 1.0,
        student_lm_head_bias=parameters["bias_s"], teacher_lm_head_bias=parameters["bias_t"],
    )  # fmt: skip
    assert parameters["w_s"].numel() == 0
    dstudent, dw_s, dbias_s = torch.autograd.grad(1.7 * loss, (student, parameters["w_s"], parameters["bias_s"]))
    assert sorted(gathered) == sorted(names)
    torch.testing.assert_close(dstudent, plain["dstudent"])
    torch.testing.assert_close(dw_s, plain["dw_s"])
    torch.testing.assert_close(dbias_s, plain["dbias_s"])


def test_mismatched_vocabularies_are_refused() -> None:
    c = case(10, 1, 3, 8, 40)
    with pytest.raises(ValueError, match=r"40 vocabulary rows.*got 38"):
        drop_in.chunked_divergence_loss(c["student"], c["teacher"], c["w_s"], c["w_t"][:38], c["mask"], 0.5)


def test_beta_outside_its_range_is_refused() -> None:
    c = case(10, 1, 3, 8, 40)
    with pytest.raises(ValueError, match=r"beta must be between 0 .* and 1 .*, got 1.5"):
        drop_in.chunked_divergence_loss(c["student"], c["teacher"], c["w_s"], c["w_t"], c["mask"], 1.5)


# --- losses of logits ------------------------------------------------------------------------------------------------


def logits_case(seed: int, b: int, t: int, v: int, dtype: torch.dtype, near: float = 1.0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(b, t, v, generator=g) * 3
    teacher = student + near * torch.randn(b, t, v, generator=g)
    labels = torch.where(torch.rand(b, t, generator=g) < 0.3, -100, 1)
    labels[0, 0] = 1
    return student.to(dtype), teacher.to(dtype), labels


def of_logits(fn: Any, student: Tensor, teacher: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient, through a causal shift that no view can flatten."""
    whole = torch.nn.functional.pad(student, (0, 0, 0, 1)).requires_grad_()
    out = fn(whole[:, :-1], torch.nn.functional.pad(teacher, (0, 0, 0, 1))[:, :-1], *args, **kwargs)
    (out * torch.linspace(0.5, 2.0, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), whole.grad[:, :-1]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "items"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("trainer", ["gkd", "gold"])
def test_generalized_jsd_loss(beta: float, reduction: str, labelled: bool, trainer: str) -> None:
    student, teacher, labels = logits_case(11, 3, 5, 203, torch.float32)
    options: dict[str, Any] = {"labels": labels if labelled else None, "beta": beta, "temperature": 1.4}
    options |= {"num_items_in_batch": torch.tensor(19)} if reduction == "items" else {"reduction": reduction}
    theirs = of_logits(THEIRS[trainer], student, teacher, **options)
    with drop_in.patched([trainer]):
        ours = of_logits(
            (GKDTrainer if trainer == "gkd" else GOLDTrainer).generalized_jsd_loss, student, teacher, **options
        )
    truth = of_logits(THEIRS[trainer], student.double(), teacher.double(), **options)
    for x, y, z in zip(ours, theirs, truth, strict=True):
        err, base = ((w.double() - z).abs().max().item() for w in (x, y))
        assert err <= 2 * base + 64 * torch.finfo(torch.float32).eps * z.abs().max().item(), (err, base)


@pytest.mark.parametrize("alpha", BETAS)
@pytest.mark.parametrize("module", ["sdft", "sdpo"])
def test_full_logit_self_distillation(alpha: float, module: str) -> None:
    student, teacher, _ = logits_case(12, 2, 4, 150, torch.float32)
    theirs = of_logits(THEIRS[module], student, teacher, distillation_alpha=alpha)
    with drop_in.patched([module]):
        import trl.experimental.sdft.sdft_trainer as sdft_trainer
        import trl.experimental.sdpo.sdpo_trainer as sdpo_trainer

        trainer = sdft_trainer if module == "sdft" else sdpo_trainer
        fn = trainer.compute_full_logit_self_distillation_loss  # the name that the trainer calls
        assert fn is drop_in.full_logit_self_distillation_loss
        ours = of_logits(fn, student, teacher, distillation_alpha=alpha)
    assert trainer.compute_full_logit_self_distillation_loss is THEIRS[module]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("trainer", "options"), [("gkd", {"reduction": "none"}), ("gold", {"logits_are_probs": True})])
def test_what_cannot_be_fused_is_left_to_trl(trainer: str, options: dict) -> None:
    """Every entry's term, and GOLD's unnormalised probabilities of the ids that two tokenizers share."""
    student, teacher, _ = logits_case(13, 2, 3, 40, torch.float32)
    if trainer == "gold":
        student, teacher = student.softmax(-1)[..., :30], teacher.softmax(-1)[..., :30]
    theirs = THEIRS[trainer](student, teacher, **options)
    with drop_in.patched():
        ours = (GKDTrainer if trainer == "gkd" else GOLDTrainer).generalized_jsd_loss(student, teacher, **options)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("trainer", ["gkd", "gold"])
def test_no_kept_token_is_zero(trainer: str) -> None:
    student, teacher, labels = logits_case(14, 2, 3, 40, torch.float32)
    with drop_in.patched([trainer]):
        fn = (GKDTrainer if trainer == "gkd" else GOLDTrainer).generalized_jsd_loss
        value, grad = of_logits(fn, student, teacher, labels=torch.full_like(labels, -100))
    assert value == 0
    assert (grad == 0).all()


def test_backward_lets_go_of_the_logits() -> None:
    """A training loop that keeps its loss until the next step must not keep the step's logits with it."""
    student, teacher, labels = logits_case(17, 3, 4, 50, torch.float32)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1.0
    alive = weakref.ref(logits.untyped_storage())
    loss = drop_in.generalized_jsd_loss(logits[:, :-1], teacher[:, :-1], labels[:, 1:])
    del logits
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    assert alive() is not None
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * first)
    assert alive() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# --- where TRL is wrong ----------------------------------------------------------------------------------------------


def test_bf16_logits_of_a_near_teacher() -> None:
    """GKD takes log-softmax in the logits' dtype: with bf16 logits a near teacher's gradient drowns in rounding."""
    student, teacher, labels = logits_case(15, 2, 6, 4000, torch.bfloat16, near=0.05)
    ours = of_logits(drop_in.generalized_jsd_loss, student, teacher, labels, beta=0.0)
    theirs = of_logits(THEIRS["gkd"], student, teacher, labels, beta=0.0)
    truth = of_logits(THEIRS["gkd"], student.double(), teacher.double(), labels, beta=0.0)
    errors = [((x[1].double() - truth[1]).norm() / truth[1].norm()).item() for x in (ours, theirs)]
    assert errors[0] < 0.005  # bf16 rounding of the gradient itself
    assert errors[1] > 0.05
    assert abs(ours[0].item() - truth[0].item()) < 1e-5 * truth[0].item()
    assert abs(theirs[0].item() - truth[0].item()) > 1e-2 * truth[0].item()


@pytest.mark.parametrize("beta", BETAS)
def test_ids_that_neither_side_can_produce(beta: float) -> None:
    """Log-probabilities of -inf on both sides: TRL's terms are inf - inf there; they are nothing."""
    student, teacher, labels = logits_case(16, 2, 3, 60, torch.float32)
    student[..., -5:], teacher[..., -5:] = -torch.inf, -torch.inf
    assert not torch.isfinite(THEIRS["gkd"](student, teacher, labels, beta=beta))
    value, grad = of_logits(drop_in.generalized_jsd_loss, student, teacher, labels, beta=beta)
    truth, exact_grad = of_logits(
        THEIRS["gkd"], student[..., :-5].double(), teacher[..., :-5].double(), labels, beta=beta
    )
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad[..., :-5].double(), exact_grad, rtol=1e-4, atol=1e-7)
    assert (grad[..., -5:] == 0).all()


# --- the patch -------------------------------------------------------------------------------------------------------


def test_patch_is_reversible_and_idempotent() -> None:
    names = drop_in.patch()
    assert len(names) == 5
    assert distillation._chunked_divergence_loss is drop_in.chunked_divergence_loss
    assert sdft.compute_full_logit_self_distillation_loss is drop_in.full_logit_self_distillation_loss
    assert isinstance(vars(GKDTrainer)["generalized_jsd_loss"], staticmethod)  # callable on an instance as before
    once = GKDTrainer.generalized_jsd_loss
    assert drop_in.patch() == names
    assert GKDTrainer.generalized_jsd_loss is once
    drop_in.unpatch()
    drop_in.unpatch()
    for value, name in ((GKDTrainer.generalized_jsd_loss, "gkd"), (GOLDTrainer.generalized_jsd_loss, "gold")):
        assert value is THEIRS[name]
    assert sdpo.compute_full_logit_self_distillation_loss is THEIRS["sdpo"]


def test_patched_blocks_nest() -> None:
    with drop_in.patched():
        with drop_in.patched():
            pass
        assert distillation._chunked_divergence_loss is drop_in.chunked_divergence_loss
    assert distillation._chunked_divergence_loss is THEIRS["chunked"]
    with pytest.raises(KeyError), drop_in.patched():
        raise KeyError
    assert distillation._chunked_divergence_loss is THEIRS["chunked"]


def test_one_trainer_only() -> None:
    drop_in.patch(["gkd"])
    assert GKDTrainer.generalized_jsd_loss is not THEIRS["gkd"]
    assert GOLDTrainer.generalized_jsd_loss is THEIRS["gold"]


def test_an_unknown_trainer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainers must be among .* got 'sft'"):
        drop_in.patch(["sft"])


def test_an_unknown_signature_is_refused_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(student_hidden_states: Tensor, chunk_size: int = 7) -> None: ...

    monkeypatch.setattr(distillation, "_chunked_divergence_loss", other)
    with pytest.raises(_patching.UnknownPeer) as error:
        drop_in.patch()
    for part in (
        "trl 1.",
        "_chunked_divergence_loss",
        "(student_hidden_states, chunk_size=7)",
        "num_items_in_batch=None",
    ):
        assert part in str(error.value)
    assert GKDTrainer.generalized_jsd_loss is THEIRS["gkd"]
    assert distillation._chunked_divergence_loss is other
    assert [ok for name, ok, _ in drop_in.fit() if name == "trl distillation"] == [False]
    monkeypatch.undo()


def test_a_function_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sdft, "compute_full_logit_self_distillation_loss")
    with pytest.raises(_patching.UnknownPeer, match="does not exist"):
        drop_in.patch(["sdft"])


def test_somebody_elses_replacement_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    def theirs() -> None: ...

    drop_in.patch(["distillation"])
    distillation._chunked_divergence_loss = theirs
    try:
        drop_in.unpatch()
        assert distillation._chunked_divergence_loss is theirs
    finally:
        distillation._chunked_divergence_loss = THEIRS["chunked"]


def test_it_says_once_what_it_replaced(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patching, "_said", set())
    with caplog.at_level(logging.WARNING, logger="vigos.integrations"):
        for _ in range(3):
            with drop_in.patched(["distillation"]):
                pass
    said = [record.getMessage() for record in caplog.records if record.name == "vigos.integrations"]
    assert len(said) == 1
    assert "trl.trainer.distillation_trainer._chunked_divergence_loss" in said[0]


def test_fit() -> None:
    assert [(name, ok) for name, ok, _ in drop_in.fit()] == [(f"trl {name}", True) for name in drop_in.TRAINERS]
    with drop_in.patched():
        assert [ok for _, ok, _ in drop_in.fit()] == [True]
