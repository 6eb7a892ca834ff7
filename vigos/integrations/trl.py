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

from vigos.divergence.api import linear_divergence, logits_divergence
from vigos.divergence.supervision import Supervision, kind_and_beta
from vigos.integrations._logits import generalized_jsd, token_divergence
from vigos.integrations._patching import Patch, Target, UnknownPeer, check_signature, say_once, version_of

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
# Elements of one chunk's float32 logits on the path where student and teacher transform their logits differently.
_CHUNK_ELEMENTS = 2**25


# --- from hidden states ----------------------------------------------------------------------------------------------


def _gathered(*parameters: Tensor | None) -> Any:
    """TRL's context in which DeepSpeed ZeRO-3 partitioned parameters are whole; each is gathered once."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    distinct: list[Any] = list({id(p): p for p in parameters if p is not None}.values())
    return maybe_gather_lm_head_ctx(*distinct)


def _whole(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """A head that FSDP2 shards (a DTensor), gathered once.

    Its shards are the ranks' storage of one head for different tokens, not a vocabulary split over the same tokens, so
    it must not reach `linear_divergence` as a DTensor.
    """
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor().to(hidden.dtype)
    if bias is not None and hasattr(bias, "full_tensor"):
        bias = bias.full_tensor()
    return weight, bias


def _in(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


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
    """TRL's `_chunked_divergence_loss`: (loss, sum of the student's entropies in nats, tokens counted).

    Args:
        student_hidden_states: (B, K, H), differentiable. teacher_hidden_states: (B, K, H_t).
        student_lm_head_weight: (V, H), differentiable. teacher_lm_head_weight: (V, H_t).
        completion_mask: (B, K), 0: token left out.
        beta: 0 forward KL, 1 reverse KL, between them JSD(beta).
        num_items_in_batch: the loss is the sum over tokens divided by it; None: by the tokens counted (at least 1).
        The rest: each side's bias (V,), scale and softcap, and the temperature of both.
    """
    kind, beta = kind_and_beta(beta)
    supervision = Supervision.from_mask(completion_mask != 0, kind=kind)
    rows = supervision.student_row
    student = student_hidden_states.reshape(-1, student_hidden_states.shape[-1])
    teacher = teacher_hidden_states.reshape(-1, teacher_hidden_states.shape[-1])
    shared = teacher_lm_head_weight is student_lm_head_weight and teacher_lm_head_bias is student_lm_head_bias
    w_s, b_s = _whole(student_lm_head_weight, student_lm_head_bias, student)
    w_t, b_t = (w_s, b_s) if shared else _whole(teacher_lm_head_weight, teacher_lm_head_bias, teacher)
    with _gathered(w_s, b_s, w_t, b_t):
        if not torch.is_autocast_enabled(student.device.type):
            w_s, b_s = _in(student.dtype, w_s, b_s)
            w_t, b_t = _in(teacher.dtype, w_t, b_t)
        same = (student_logit_scale, student_final_logit_softcapping) == (
            teacher_logit_scale,
            teacher_final_logit_softcapping,
        )
        if same and student_logit_scale > 0:
            shared = shared and student.dtype == teacher.dtype
            out = linear_divergence(
                student, w_s, teacher, None if shared else w_t,
                supervision=supervision, temperature=float(temperature), beta=beta,
                student_bias=b_s, teacher_bias=None if shared else b_t,
                logit_softcap=student_final_logit_softcapping, logit_scale=float(student_logit_scale),
            )  # fmt: skip
            loss, entropy = out.loss, out.student_entropy.sum()
        else:
            options = {
                "scales": (float(student_logit_scale), float(teacher_logit_scale)),
                "softcaps": (student_final_logit_softcapping, teacher_final_logit_softcapping),
                "kind": kind, "beta": beta, "temperature": float(temperature),
            }  # fmt: skip
            loss, entropy = _UnlikeHeads.apply(student, w_s, b_s, teacher, w_t, b_t, rows, options)
    kept = (completion_mask != 0).sum()
    divisor = kept.clamp(min=1) if num_items_in_batch is None else _divisor(num_items_in_batch, loss)
    return loss / divisor, entropy, kept


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(C, V) logits that are float32 before any rounding, whatever the operands are (float64 for float64)."""
    if hidden.dtype in (torch.float32, torch.float64):
        z = hidden @ weight.T
    elif hidden.is_cuda:
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        z = hidden.float() @ weight.float().T
    return z if bias is None else z + bias.to(z.dtype)


def _adjusted(z: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


class _UnlikeHeads(torch.autograd.Function):
    """Student and teacher whose scales or softcaps differ, which `linear_divergence` does not take.

    Chunks of tokens: logits in float32, each side's own transform, `logits_divergence`, and the gradients at once, so
    that no chunk's logits outlive it. Returns (sum of divergences, sum of the student's entropies).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, w_s: Tensor, b_s: Tensor | None, teacher: Tensor, w_t: Tensor, b_t: Tensor | None,
        rows: Tensor, options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        device = student.device.type
        ctx.dtypes = student.dtype, w_s.dtype, None if b_s is None else b_s.dtype
        if torch.is_autocast_enabled(device):
            to = torch.get_autocast_dtype(device)
            student, teacher, w_s, w_t = (x.to(to) for x in (student, teacher, w_s, w_t))
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dhidden = torch.zeros(student.shape if need_hidden else 0, dtype=dtype, device=student.device)
        dweight = torch.zeros(w_s.shape if need_weight else 0, dtype=dtype, device=student.device)
        dbias = torch.zeros(w_s.shape[:1] if need_bias else 0, dtype=dtype, device=student.device)
        loss = torch.zeros((), dtype=dtype, device=student.device)
        entropy = torch.zeros_like(loss)
        with torch.autocast(device, enabled=False):
            for at in rows.split(max(1, _CHUNK_ELEMENTS // w_s.shape[0])):
                hidden = student[at]
                z_t = _adjusted(_project(teacher[at], w_t, b_t), options["scales"][1], options["softcaps"][1])
                raw = _project(hidden, w_s, b_s).requires_grad_(need_hidden or need_weight or need_bias)
                with torch.enable_grad():
                    z_s = _adjusted(raw, options["scales"][0], options["softcaps"][0])
                    own = torch.arange(at.shape[0], device=at.device)
                    out = logits_divergence(
                        z_s, z_t.to(z_s.dtype), supervision=Supervision(own, own, options["kind"]),
                        temperature=options["temperature"], beta=options["beta"],
                    )  # fmt: skip
                loss += out.loss.detach()
                entropy += out.student_entropy.sum()
                if raw.requires_grad:
                    # The head is used in its own dtype: float32 dlogits are rounded to it, their sums are not.
                    (dlogits,) = torch.autograd.grad(out.loss, raw)
                    if need_bias:
                        dbias += dlogits.sum(0)
                    if need_hidden:
                        dhidden[at] = _project(dlogits.to(hidden.dtype), w_s.T, None)
                    if need_weight:
                        dweight += _project(dlogits.to(hidden.dtype).T, hidden.T, None)
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        grads = [
            (x * grad).to(dtype) if need else None
            for x, need, dtype in zip(ctx.saved_tensors, ctx.needs_input_grad, ctx.dtypes, strict=False)
        ]
        return (*grads, None, None, None, None, None)


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
    """GKD's and GOLD's `generalized_jsd_loss` of logits (B, T, V) for reductions to a scalar, in nats.

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
    """SDFT's and SDPO's `compute_full_logit_self_distillation_loss`: (B, T, V) twice -> (B, T) nats per token."""
    kind, beta = kind_and_beta(distillation_alpha)
    return token_divergence(student_logits, teacher_logits, kind=kind, beta=beta)


def _fusable(reduction: str, logits_are_probs: bool = False) -> bool:
    """reduction="none" asks for every vocabulary entry's term; probabilities of a subset of the ids are no softmax."""
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
        raise UnknownPeer("trl is not installed; pip install 'vigos[trl]'")
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
    """`patch` inside the block. A patch that was in place before it stays in place after it."""
    outer = _patch.active
    try:
        yield patch(trainers)
    finally:
        if not outer:
            unpatch()


def fit() -> list[tuple[str, bool | None, str]]:
    """(name, whether it fits, why) of each trainer; None: TRL is not installed."""
    found = version_of("trl")
    if found is None:
        return [("trl", None, "not installed: pip install 'vigos[trl]'")]
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
