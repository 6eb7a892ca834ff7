"""Drop-ins for codebases that are no packages, against straight-line float64 statements of what they compute."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import peer_statements as statements
from torch import Tensor

from vigos import integrations
from vigos.integrations import opsd, released, verl
from vigos.integrations._patching import UnknownPeer

EPS = torch.finfo(torch.float32).eps


def peaked(seed: int, *shape: int, near: Tensor | None = None, by: float = 1.0) -> Tensor:
    """Logits (..., V) with a few clear winners; or a neighbour of such."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise * 3 if near is None else near + by * noise


def assert_close_to(exact: Tensor, ours: Tensor, name: str, factor: float = 64) -> None:
    error, scale = (ours.double() - exact).abs().max().item(), max(exact.abs().max().item(), 0.05)
    assert error <= factor * EPS * scale, f"{name}: {error:.2e} of {scale:.2e}"


def both(fn: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor], student: Tensor) -> None:
    """Value and gradient in the student's logits."""
    results = []
    for compute, dtype in ((fn, student.dtype), (truth, torch.float64)):
        leaf = student.to(dtype).clone().requires_grad_()
        value = compute(leaf)
        (1.3 * value).backward()
        results.append((value.detach(), leaf.grad))
    for name, ours, exact in zip(("loss", "gradient"), *results, strict=True):
        assert_close_to(exact, ours, name)


# --- OPSD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("token_clip", [None, 0.01])
def test_opsd(beta: float, top_k: int | None, token_clip: float | None) -> None:
    student = peaked(0, 2, 6, 301)
    teacher = peaked(1, 2, 6, 301, near=student)
    labels = torch.tensor([[1, 2, -100, 3, -100, 4], [-100, -100, 5, 6, 7, 8]])
    both(
        lambda s: opsd.generalized_jsd_loss(
            s, teacher, labels, beta, 1.2, "batchmean", False, top_k, token_clip
        ),
        lambda s: statements.opsd(s, teacher.double(), labels, beta, 1.2, top_k, token_clip),
        student,
    )  # fmt: skip
    if token_clip is not None:  # the clip is felt, and it is one of entries: the token's sum is not bounded by it
        free = opsd.generalized_jsd_loss(student, teacher, labels, beta, 1.2, top_k=top_k)
        clipped = opsd.generalized_jsd_loss(student, teacher, labels, beta, 1.2, top_k=top_k, token_clip=token_clip)
        assert clipped < 0.9 * free


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("mean", 8 * 301), ("batchmean", 8)])
def test_opsd_reductions(reduction: str, divisor: int) -> None:
    student = peaked(0, 2, 6, 301)
    teacher = peaked(1, 2, 6, 301, near=student)
    labels = torch.tensor([[1, 2, -100, 3, -100, 4], [-100, -100, 5, 6, 7, 8]])
    exact = statements.opsd(student.double(), teacher.double(), labels, 0.5, 1.0, None, None) * 8 / divisor
    assert_close_to(
        exact * divisor, opsd.generalized_jsd_loss(student, teacher, labels, reduction=reduction) * divisor, reduction
    )
    whole = opsd.generalized_jsd_loss(student, teacher, reduction=reduction)
    every = statements.opsd(student.double(), teacher.double(), torch.zeros(2, 6), 0.5, 1.0, None, None) * 12
    assert_close_to(every, whole * {"sum": 1, "mean": 12 * 301, "batchmean": 2}[reduction], reduction)


def opsd_trainer(clip: bool) -> type:
    """A class whose loss has OPSD's signature, of the release with the clip or of the one before."""

    def generalized_jsd_loss(
        student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean",
        logits_are_probs=False, top_k=None, token_clip=None,
    ) -> str:  # fmt: skip
        return "theirs"

    def older(
        student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean",
        logits_are_probs=False, top_k=None,
    ) -> str:  # fmt: skip
        return "theirs"

    return type("OPSDTrainer", (), {"generalized_jsd_loss": staticmethod(generalized_jsd_loss if clip else older)})


@pytest.mark.parametrize("clip", [True, False])
def test_opsd_patch(clip: bool) -> None:
    trainer = opsd_trainer(clip)
    theirs = trainer.generalized_jsd_loss
    student, teacher = peaked(0, 1, 3, 40), peaked(1, 1, 3, 40)
    with opsd.patched(trainer):
        assert opsd.patch(trainer) == opsd.patch(trainer)
        loss = trainer().generalized_jsd_loss(student_logits=student, teacher_logits=teacher, beta=0.0, top_k=5)
        exact = statements.opsd(student.double(), teacher.double(), torch.zeros(1, 3), 0.0, 1.0, 5, None) * 3
        assert_close_to(exact, loss, "loss")
        assert trainer.generalized_jsd_loss(student, teacher, reduction="none") == "theirs"
        assert trainer.generalized_jsd_loss(student, teacher, logits_are_probs=True) == "theirs"
    assert trainer.generalized_jsd_loss is theirs


def test_opsd_of_an_unknown_signature_is_refused() -> None:
    trainer = type("OPSDTrainer", (), {"generalized_jsd_loss": staticmethod(lambda logits, eps=1e-8: None)})
    with pytest.raises(UnknownPeer, match=r"signature \(logits, eps=1e-08\); vigos knows .*token_clip=None"):
        opsd.patch(trainer)


# --- the released ViGOS code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True], ids=["teacher is the source", "student is the source"])
@pytest.mark.parametrize(("token_clip", "post"), [(None, None), (0.3, 0.05), (None, 0.05), (0.0, 0.0), (0.2, None)])
def test_released_masked_kl_loss(reverse: bool, token_clip: float | None, post: float | None) -> None:
    student = peaked(2, 2, 7, 203)
    teacher = peaked(3, 2, 7, 203, near=student, by=0.6)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(4)) < 0.7
    last = torch.zeros_like(mask)
    last[0, mask[0].nonzero()[-1]] = last[1, mask[1].nonzero()[-1]] = True
    options = (mask, 0.9, token_clip, last, post)

    def of(fn: Callable[..., Tensor], other: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda s: fn(s, other, *options) if reverse else fn(other, s, *options)

    both(of(released.masked_kl_loss, teacher), of(statements.released, teacher.double()), student)


def test_released_kl_tokens() -> None:
    student = peaked(2, 2, 3, 203)
    teacher = peaked(3, 2, 3, 203, near=student, by=0.3)
    exact = statements.kl(teacher.double().log_softmax(-1), student.double().log_softmax(-1)).sum(-1)
    clip = 1.05 * exact.median().item()
    student.requires_grad_()
    tokens = released.kl_tokens(teacher, student, token_clip=clip)
    assert_close_to(exact.clamp(max=clip), tokens.detach(), "tokens")
    tokens.sum().backward()
    silent = (student.grad == 0).all(-1)
    assert torch.equal(silent, exact > clip)  # a clipped token has no gradient
    assert 0 < silent.sum() < 6
    assert_close_to(exact, released.kl_tokens(teacher, student.detach()), "without a gradient")


def test_released_empty_mask_and_refusals() -> None:
    student, teacher = peaked(2, 1, 3, 20).requires_grad_(), peaked(3, 1, 3, 20)
    loss = released.masked_kl_loss(teacher, student, torch.zeros(1, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()
    mask = torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"target_logits must match source_logits \(1, 3, 20\), got \(1, 3, 19\)"):
        released.masked_kl_loss(teacher, student[..., :19], mask)
    with pytest.raises(ValueError, match=r"token_mask must be \(1, 3\), one value for each token, got \(1, 2\)"):
        released.masked_kl_loss(teacher, student, mask[:, :2])
    with pytest.raises(ValueError, match="both require a gradient"):
        released.masked_kl_loss(teacher.requires_grad_(), student, mask)


class Model(torch.nn.Module):
    """A model in the shape of transformers': hidden states of the last `logits_to_keep` tokens, then the head."""

    scale = 1.0

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.body = torch.nn.Embedding(60, 12)
        self.lm_head = torch.nn.Linear(12, 60, bias=bias)
        self.config = types.SimpleNamespace()
        self.widths: list[int] = []

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0) -> Any:
        hidden = torch.cumsum(self.body(input_ids), 1)[:, -logits_to_keep:]
        logits = self.lm_head(hidden) * self.scale
        self.widths.append(logits.shape[-1])
        return types.SimpleNamespace(logits=logits)


def released_module() -> types.ModuleType:
    """Our own miniature of the released trainer's shape: its module calls `masked_kl_loss` by its own name."""
    module = types.ModuleType("released_trainer_in_miniature")
    module.masked_kl_loss = _masked_kl_loss

    class ViGOSTrainer:
        def _unwrap_train_model(self, model: Any) -> Any:
            return model

        def _build_vigos_rollout_batch(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            with torch.no_grad():  # a rollout samples, so it needs logits
                return {"next": model(inputs["prompt"], 1).logits.argmax(-1)}

        def _batched_teacher_completion_logits(self, model: Any, jobs: dict[str, Tensor]) -> dict[str, Tensor]:
            with torch.no_grad():
                return {name: model(ids, 7).logits[:, :-1] for name, ids in jobs.items()}

        def compute_loss(
            self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            assert self._build_vigos_rollout_batch(model, inputs)["next"].max() < 60
            teachers = self._batched_teacher_completion_logits(model, inputs["jobs"])
            logits = model(inputs["student"], 7).logits[:, :-1]
            positions = inputs["positions"][..., None].expand(-1, -1, logits.shape[-1])
            loss_of = module.masked_kl_loss
            loss = (
                0.1 * loss_of(teachers["perception"], logits, inputs["description"], 1.1, 0.5, inputs["last"], 2**-4)
                + 0.5 * loss_of(teachers["reasoning"], logits.gather(1, positions), inputs["reasoning"], 1.1)
                + 2.0 * loss_of(logits, teachers["ref"], inputs["fallback"], 1.1, 0.25)
            )
            return (loss, {"logits": logits}) if return_outputs else loss

    ViGOSTrainer.__module__ = module.__name__
    module.ViGOSTrainer = ViGOSTrainer
    return module


def _masked_kl_loss(
    source_logits: Tensor, target_logits: Tensor, token_mask: Tensor, temperature: float = 1.0,
    token_clip: float | None = None, post_clip_mask: Tensor | None = None, post_token_clip: float | None = None,
) -> Tensor:  # fmt: skip
    return statements.released(
        source_logits, target_logits, token_mask, temperature, token_clip, post_clip_mask, post_token_clip
    )


@pytest.fixture
def theirs() -> Iterator[types.ModuleType]:
    module = released_module()
    sys.modules[module.__name__] = module
    yield module
    released.unpatch(module)
    del sys.modules[module.__name__]


def rollout() -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)

    def ids(n: int) -> Tensor:
        return torch.randint(60, (3, n), generator=g)

    description = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6]).bool()
    last = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6]).bool()
    reasoning = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0] * 6]).bool()
    positions = torch.tensor([[3, 4, 5, 0, 0, 0], [2, 3, 4, 5, 0, 0], [0] * 6])
    fallback = torch.tensor([[0] * 6, [0] * 6, [1, 1, 1, 1, 0, 0]]).bool()
    return {
        "prompt": ids(4), "student": ids(9), "jobs": {"perception": ids(8), "reasoning": ids(11), "ref": ids(10)},
        "description": description, "last": last, "reasoning": reasoning, "positions": positions, "fallback": fallback,
    }  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_released_mixin(theirs: types.ModuleType, bias: bool, frozen_head: bool) -> None:
    """The same loss and gradients as with logits, in float64; and no logits but those of the rollout.

    The clips are powers of two: a row's clip travels in float32.
    """

    class Fused(released.FusedLossMixin, theirs.ViGOSTrainer): ...

    results = []
    for trainer in (theirs.ViGOSTrainer(), Fused()):
        torch.manual_seed(6)
        model = Model(bias).double()
        model.lm_head.requires_grad_(not frozen_head)
        loss = trainer.compute_loss(model, rollout())
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()], model.widths))
    assert results[0][0] > 0.05
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-12, atol=0)
    for ours, exact in zip(results[1][1], results[0][1], strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            assert exact.abs().max() > 0
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-13)
    assert results[0][2] == [60] * 5
    assert results[1][2] == [12, 60, 12, 12, 12, 12]  # the first is one token, to see what the model does to logits
    assert theirs.masked_kl_loss is _masked_kl_loss


def test_released_mixin_outputs_and_clean_up(theirs: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused(released.FusedLossMixin, theirs.ViGOSTrainer): ...

    model = Model()
    _, outputs = Fused().compute_loss(model, rollout(), return_outputs=True)
    assert outputs["hidden_states"].shape == (3, 6, 12)
    monkeypatch.setattr(theirs.ViGOSTrainer, "_batched_teacher_completion_logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Fused().compute_loss(model, rollout())
    assert "forward" not in vars(model.lm_head)
    assert model(torch.zeros(1, 2, dtype=torch.int64)).logits.shape[-1] == 60
    assert released._head.get() is None


def test_released_mixin_refuses_what_it_cannot_do(theirs: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused(released.FusedLossMixin, theirs.ViGOSTrainer): ...

    class Alone(released.FusedLossMixin): ...

    model = Model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0"):
        Fused().compute_loss(model, rollout())
    monkeypatch.setattr(Model, "scale", 0.5)  # a name that nobody has heard of
    with pytest.raises(ValueError, match="must apply nothing to its logits after the head, got Model, whose forward"):
        Fused().compute_loss(Model(), rollout())
    sharded = Model()
    sharded.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"Linear with weight \(0,\); ZeRO-3"):
        Fused().compute_loss(sharded, rollout())
    with pytest.raises(UnknownPeer, match="must stand before"):
        Alone().compute_loss(Model(), rollout())
    del theirs.ViGOSTrainer._batched_teacher_completion_logits
    with pytest.raises(UnknownPeer, match="has no _batched_teacher_completion_logits"):
        Fused().compute_loss(Model(), rollout())


def test_released_patch(theirs: types.ModuleType) -> None:
    assert released.patch(theirs) == released.patch(theirs) == (f"{theirs.__name__}.masked_kl_loss",)
    assert theirs.masked_kl_loss is released.masked_kl_loss
    released.unpatch(theirs)
    assert theirs.masked_kl_loss is _masked_kl_loss
    with released.patched(theirs):
        assert theirs.masked_kl_loss is released.masked_kl_loss
    assert theirs.masked_kl_loss is _masked_kl_loss
    theirs.masked_kl_loss = lambda p, q: None
    with pytest.raises(UnknownPeer, match=r"signature \(p, q\); vigos knows \(source_logits"):
        released.patch(theirs)
    del theirs.masked_kl_loss
    with pytest.raises(UnknownPeer, match="neither masked_kl_loss nor kl_tokens"):
        released.patch(theirs)
    with pytest.raises(ValueError, match="got none"):
        released.patch()


# --- verl ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [None, -3.0, -10.0])
@pytest.mark.parametrize("chunk", [2**25, 4 * 203])
def test_verl_topk(floor: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verl._CHUNK_ELEMENTS, "cpu", chunk)
    student = peaked(7, 2, 5, 203)
    log_probs, ids = peaked(8, 2, 5, 203, near=student).log_softmax(-1).topk(9, -1)
    out = verl.topk_forward_kl(student, log_probs, ids, log_prob_min_clamp=floor)
    losses, student_mass, teacher_mass = statements.verl(student.double(), log_probs.double(), ids, floor)
    assert_close_to(losses, out["distillation_losses"], "losses")
    assert_close_to(student_mass, out["student_mass"], "student_mass")
    assert_close_to(teacher_mass, out["teacher_mass"], "teacher_mass")
    weights = torch.linspace(0.5, 2.0, 10).view(2, 5)  # verl reduces per-token losses in its own ways
    both(
        lambda s: (
            weights * verl.topk_forward_kl(s, log_probs, ids, log_prob_min_clamp=floor)["distillation_losses"]
        ).sum(),
        lambda s: (weights * statements.verl(s, log_probs.double(), ids, floor)[0]).sum(),
        student,
    )
    own = student.topk(9, -1).indices
    shared = (ids[..., :, None] == own[..., None, :]).any(-1)
    assert torch.equal(out["overlap_count"], shared.sum(-1))
    assert not out["student_mass"].requires_grad


def test_verl_bf16_logits() -> None:
    """verl takes log-softmax in the logits' dtype; a near teacher's loss is then rounding."""
    student = peaked(7, 1, 8, 4000).bfloat16()
    log_probs, ids = peaked(8, 1, 8, 4000, near=student.float(), by=0.02).log_softmax(-1).topk(50, -1)
    exact, *_ = statements.verl(student.double(), log_probs.double(), ids, None)
    before, *_ = statements.verl(student, log_probs, ids, None)
    ours = verl.topk_forward_kl(student, log_probs, ids)["distillation_losses"]
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).abs().max() < 2e-6  # float32 rounding of log-probabilities around -10
    assert (before.double() - exact).abs().max() > 1e-3


def test_verl_refuses_ids_that_do_not_fit() -> None:
    student, ids = peaked(7, 1, 3, 20), torch.zeros(1, 3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"int64 \(1, 3, 2\).*got \(1, 3, 2\) torch.int32"):
        verl.topk_forward_kl(student, torch.zeros(1, 3, 2), ids.int())
    with pytest.raises(ValueError, match="like student_logits"):
        verl.topk_forward_kl(student[:, :2], torch.zeros(1, 3, 2), ids)


@dataclass
class Settings:
    names: list[str] = field(default_factory=list)
    use_topk: bool = False
    use_estimator: bool = False


@pytest.fixture
def fake_verl(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Modules with the names and the registry of verl's, written by us: verl itself is not installable here."""
    losses, fsdp, ulysses = (
        types.ModuleType(name)
        for name in ("verl.trainer.distillation.losses", "verl.trainer.distillation.fsdp.losses", "verl.utils.ulysses")
    )
    losses.DISTILLATION_LOSS_REGISTRY = {"forward_kl_topk": lambda **_: "unpacked"}
    losses.DISTILLATION_SETTINGS_REGISTRY = {}
    losses.DistillationLossSettings = Settings
    losses.get_distillation_loss_fn = losses.DISTILLATION_LOSS_REGISTRY.__getitem__

    def register(settings: Settings) -> Callable[[Any], Any]:
        def decorator(fn: Any) -> Any:
            for name in settings.names:
                assert name not in losses.DISTILLATION_LOSS_REGISTRY
                losses.DISTILLATION_LOSS_REGISTRY[name] = fn
                losses.DISTILLATION_SETTINGS_REGISTRY[name] = settings
            return fn

        return decorator

    losses.register_distillation_loss = register

    def compute_forward_kl_topk(student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format) -> str:
        return "theirs"

    fsdp.compute_forward_kl_topk = compute_forward_kl_topk
    ulysses.get_ulysses_sequence_parallel_world_size = lambda: 1
    ulysses.slice_input_tensor = None
    for name in ("verl", "verl.trainer", "verl.trainer.distillation", "verl.trainer.distillation.fsdp", "verl.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (losses, fsdp, ulysses):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return losses


def test_verl_registration(fake_verl: types.ModuleType) -> None:
    fsdp = sys.modules["verl.trainer.distillation.fsdp.losses"]
    theirs = fsdp.compute_forward_kl_topk
    with verl.patched():
        assert verl.register() == verl.register()
        assert fake_verl.DISTILLATION_LOSS_REGISTRY[verl.LOSS]() == "unpacked"
        assert fake_verl.DISTILLATION_SETTINGS_REGISTRY[verl.LOSS].use_topk
        student = peaked(7, 1, 6, 40)
        nested = [torch.nested.nested_tensor(list(x[0].split([2, 4])), layout=torch.jagged)
                  for x in peaked(8, 1, 6, 40).log_softmax(-1).topk(5, -1)]  # fmt: skip
        config = types.SimpleNamespace(
            distillation_loss=types.SimpleNamespace(loss_mode=verl.LOSS, log_prob_min_clamp=-10.0)
        )
        out = fsdp.compute_forward_kl_topk(student, *nested, config, "thd")
        log_probs, ids = (x.values()[None] for x in nested)
        exact, *_ = statements.verl(student.double(), log_probs.double(), ids, -10.0)
        assert_close_to(exact, out["distillation_losses"], "losses")
        assert {tuple(x.shape) for x in out.values()} == {(1, 6)}
        config.distillation_loss.loss_mode = "forward_kl_topk"
        assert fsdp.compute_forward_kl_topk(student, *nested, config, "thd") == "theirs"
    assert fsdp.compute_forward_kl_topk is theirs
    assert list(fake_verl.DISTILLATION_LOSS_REGISTRY) == ["forward_kl_topk"]


def test_verl_of_an_unknown_signature_is_refused(fake_verl: types.ModuleType) -> None:
    sys.modules["verl.trainer.distillation.fsdp.losses"].compute_forward_kl_topk = lambda student_logits, data: None
    with pytest.raises(UnknownPeer, match=r"signature \(student_logits, data\); vigos knows .*data_format"):
        verl.register()
    assert list(fake_verl.DISTILLATION_LOSS_REGISTRY) == ["forward_kl_topk"]


# --- the package -----------------------------------------------------------------------------------------------------


def test_importing_costs_no_peer() -> None:
    """Nor does importing one drop-in import its peer."""
    code = (
        "import sys, vigos.integrations as i; [getattr(i, name) for name in i.PEERS]; "
        "print({m.split('.')[0] for m in sys.modules} & {'trl', 'liger_kernel', 'transformers', 'verl'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_fit_names_every_peer() -> None:
    lines = integrations.fit()
    names = " ".join(name for name, _, _ in lines)
    for peer in ("trl", "liger", "opsd", "released ViGOS", "verl"):
        assert peer in names
    assert all(ok in (True, False, None) and detail for _, ok, detail in lines)


def test_unknown_integration() -> None:
    with pytest.raises(AttributeError, match="no attribute 'swift'"):
        _ = integrations.swift
