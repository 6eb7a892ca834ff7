"""TRL >= 1.16 on the fused loss: `patch()`, `unpatch()`, `with patched(): ...`.

| TRL's function | used by | replaced by |
|---|---|---|
| `_chunked_divergence_loss` | `DistillationTrainer` and its subclasses | `chunked_divergence_loss` |
| `GKDTrainer.generalized_jsd_loss`, `GOLDTrainer.generalized_jsd_loss` | GKD, GOLD | `generalized_jsd_loss` |
| `compute_full_logit_self_distillation_loss` | SDFT, SDPO | `full_logit_self_distillation_loss` |

Same inputs, same outputs. Where TRL computes in the logits' own dtype (GKD, GOLD, SDFT, SDPO) these compute, and
return, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.api import linear_divergence
from vigos.divergence.head import Head
from vigos.divergence.supervision import Supervision, kind_and_beta
from vigos.integrations._logits import generalized_jsd, token_divergence
from vigos.integrations._patching import Patch, Target, UnknownPeer, check_signature, say_once, version_of
from vigos.system.extras import install

TRAINERS = ("distillation", "gkd", "gold", "sdft", "sdpo")
_CHUNKED = (
    "(student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, completion_mask, "
    "beta, num_items_in_batch=None, student_lm_head_bias=None, teacher_lm_head_bias=None, student_logit_scale=1.0, "
    "teacher_logit_scale=1.0, student_final_logit_softcapping=None, teacher_final_logit_softcapping=None, "
    "temperature=1.0)",
)
_JSD = "student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction='batchmean'"
_GKD = (f"({_JSD}, num_items_in_batch=None)",)
_GOLD = (f"({_JSD}, logits_are_probs=False, num_items_in_batch=None)",)
_FULL = ("(student_logits, teacher_logits, *, distillation_alpha)",)


# --- from hidden states ----------------------------------------------------------------------------------------------


def _gathered(*parameters: Tensor | None) -> Any:
    """Enter TRL's context in which DeepSpeed ZeRO-3 partitions are gathered, each parameter once."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    distinct: list[Any] = list({id(p): p for p in parameters if p is not None}.values())
    return maybe_gather_lm_head_ctx(*distinct)


def _gathered_head(weight: Any, bias: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a head that FSDP2 shards (a DTensor), gathered; any head in the dtype of its hidden states.

    FSDP2's shards are the ranks' storage of one head for different tokens, not a vocabulary split over the same tokens,
    so it must not reach `linear_divergence` as a DTensor.
    """
    weight, bias = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (weight, bias))
    if torch.is_autocast_enabled(hidden.device.type):
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute TRL's `_chunked_divergence_loss`: (loss, sum of the student's entropies in nats, tokens counted).

    Args:
        student_hidden_states: (B, K, H), differentiable. teacher_hidden_states: (B, K, H_t).
        student_lm_head_weight: (V, H), differentiable. teacher_lm_head_weight: (V, H_t).
        completion_mask: (B, K), 0: token left out.
        beta: 0 forward KL, 1 reverse KL, between them JSD(beta).
        num_items_in_batch: the loss is the sum over tokens divided by it; None: by the tokens counted (at least 1).
        The rest: each side's bias (V,), scale and softcap, and the temperature of both.
    """
    kind, beta = kind_and_beta(beta)
    student, teacher = student_hidden_states, teacher_hidden_states
    shared = (
        teacher_lm_head_weight is student_lm_head_weight
        and teacher_lm_head_bias is student_lm_head_bias
        and teacher.dtype == student.dtype
    )
    with _gathered(student_lm_head_weight, student_lm_head_bias, teacher_lm_head_weight, teacher_lm_head_bias):
        w_s, b_s = _gathered_head(student_lm_head_weight, student_lm_head_bias, student)
        w_t, b_t = w_s, b_s
        if not shared:
            w_t, b_t = _gathered_head(teacher_lm_head_weight, teacher_lm_head_bias, teacher)
            w_t, b_t = w_t.detach(), None if b_t is None else b_t.detach()  # they ask for a gradient and get none
        out = linear_divergence(
            student, Head(w_s, b_s, float(student_logit_scale), student_final_logit_softcapping),
            teacher, Head(w_t, b_t, float(teacher_logit_scale), teacher_final_logit_softcapping),
            supervision=Supervision.from_mask(completion_mask != 0, kind=kind), temperature=float(temperature),
            beta=beta,
        )  # fmt: skip
    loss, entropy = out.loss, out.student_entropy.sum()
    kept = (completion_mask != 0).sum()
    divisor = kept.clamp(min=1) if num_items_in_batch is None else _divisor(num_items_in_batch, loss)
    return loss / divisor, entropy, kept


# --- from logits -----------------------------------------------------------------------------------------------------


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Compute GKD's and GOLD's `generalized_jsd_loss` of logits (B, T, V) for reductions to a scalar, in nats.

    `num_items_in_batch` divides the sum over tokens; else "batchmean" divides it by the kept tokens (without labels by
    B), "mean" by tokens times V, "sum" by nothing.
    """
    if num_items_in_batch is not None:
        reduction = "sum"
    loss = generalized_jsd(
        student_logits, teacher_logits, labels=labels, beta=beta, temperature=temperature, reduction=reduction
    )
    return loss if num_items_in_batch is None else loss / _divisor(num_items_in_batch, loss)


def _divisor(items: Tensor | int, loss: Tensor) -> Tensor | int:
    return items.to(loss.device) if isinstance(items, Tensor) else items


def full_logit_self_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float
) -> Tensor:
    """Compute SDFT's and SDPO's loss per token, in nats: (B, T, V) twice -> (B, T)."""
    kind, beta = kind_and_beta(distillation_alpha)
    return token_divergence(student_logits, teacher_logits, kind=kind, beta=beta)


def _fusable(reduction: str, logits_are_probs: bool = False) -> bool:
    """Tell if a fused loss can do it.

    reduction="none" asks for every vocabulary entry's term; probabilities of a subset of the ids are no softmax.
    """
    return reduction in ("batchmean", "mean", "sum") and not logits_are_probs


def _gkd(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(
        student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, beta: float = 0.5,
        temperature: float = 1.0, reduction: str = "batchmean", num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:  # fmt: skip
        run = generalized_jsd_loss if num_items_in_batch is not None or _fusable(reduction) else original
        reduction = "sum" if num_items_in_batch is not None else reduction
        return run(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)

    return loss


def _gold(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(
        student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, beta: float = 0.5,
        temperature: float = 1.0, reduction: str = "batchmean", logits_are_probs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:  # fmt: skip
        reduction = "sum" if num_items_in_batch is not None else reduction
        if not _fusable(reduction, logits_are_probs):
            return original(
                student_logits, teacher_logits, labels, beta, temperature, reduction, logits_are_probs,
                num_items_in_batch,
            )  # fmt: skip
        return generalized_jsd_loss(
            student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
        )

    return loss


# --- the patch -------------------------------------------------------------------------------------------------------


def _targets(trainer: str) -> list[Target]:
    if trainer == "distillation":
        owner = "trl.trainer.distillation_trainer"
        return [Target(owner, "_chunked_divergence_loss", _CHUNKED, lambda _: chunked_divergence_loss, "trl")]
    if trainer == "gkd":
        return [Target("trl.experimental.gkd.gkd_trainer:GKDTrainer", "generalized_jsd_loss", _GKD, _gkd)]
    if trainer == "gold":
        return [Target("trl.experimental.gold.gold_trainer:GOLDTrainer", "generalized_jsd_loss", _GOLD, _gold)]
    owner = f"trl.experimental.{trainer}.loss_utils"
    name = "compute_full_logit_self_distillation_loss"
    return [Target(owner, name, _FULL, lambda _: full_logit_self_distillation_loss, "trl")]


def _chosen(trainers: Sequence[str] | None) -> list[Target]:
    unknown = [name for name in trainers or () if name not in TRAINERS]
    if unknown:
        raise ValueError(f"trainers must be among {', '.join(TRAINERS)}, got {', '.join(map(repr, unknown))}")
    found = version_of("trl")
    if found is None:
        raise UnknownPeer(f"trl is not installed; {install('trl')}")
    targets = []
    for name in TRAINERS if trainers is None else trainers:
        for target in _targets(name):
            try:
                target.original()
            except ModuleNotFoundError as error:
                # One of TRL's experimental trainers wants a package of its own: only an error if it was asked for.
                if trainers is not None:
                    raise
                say_once(f"vigos left trl's {name} alone: {error}")
                continue
            except UnknownPeer as error:
                raise UnknownPeer(f"trl {found}: {error}") from None
            targets.append(target)
            # A trainer that holds the function by name must be loaded to be changed.
            if name in ("sdft", "sdpo"):
                __import__(f"trl.experimental.{name}.{name}_trainer")
    return targets


_patch = Patch("trl")


def patch(trainers: Sequence[str] | None = None) -> tuple[str, ...]:
    """Put the fused loss into TRL; the names of what was replaced. Undone by `unpatch`. A second call changes nothing.

    Args:
        trainers: some of "distillation", "gkd", "gold", "sdft", "sdpo". None: all.

    Raises UnknownPeer, and changes nothing, if one of the functions does not have the signature it has in TRL 1.16.
    """
    if _patch.active:
        return _patch.replaced
    targets = _chosen(trainers)
    _patch.peer = f"trl {version_of('trl')}"
    return _patch.apply(targets)


def unpatch() -> None:
    """Put TRL's own functions back."""
    _patch.undo()


@contextmanager
def patched(trainers: Sequence[str] | None = None) -> Iterator[tuple[str, ...]]:
    """Patch inside the block. A patch that was in place before it stays in place after it."""
    outer = _patch.active
    try:
        yield patch(trainers)
    finally:
        if not outer:
            unpatch()


def fit() -> list[tuple[str, bool | None, str]]:
    """Return (name, whether it fits, why) of each trainer; None: TRL is not installed."""
    found = version_of("trl")
    if found is None:
        return [("trl", None, f"not installed: {install('trl')}")]
    if _patch.active:
        return [("trl", True, f"trl {found}: in place, {', '.join(_patch.replaced)}")]
    lines: list[tuple[str, bool | None, str]] = []
    for name in TRAINERS:
        try:
            for target in _targets(name):
                check_signature(target.original(), target.known, target.path)
        except (UnknownPeer, ImportError) as error:
            lines.append((f"trl {name}", False, f"trl {found}: {error}"))
        else:
            lines.append((f"trl {name}", True, f"trl {found}: vigos.integrations.trl.patch()"))
    return lines
