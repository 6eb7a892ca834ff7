"""verl on a leaner top-k distillation loss: a registered loss name with per-token losses and masses.

verl's teacher is an inference server that returns the log-probabilities of its k most probable ids; the student's
logits exist. Its `forward_kl_topk` keeps a log-softmax of them for backward, in their own dtype. Ours needs the row's
log-sum-exp only: float32 sums, one chunk of rows at a time, and one gradient in the logits' dtype.

    export VERL_USE_EXTERNAL_MODULES=vigos.integrations.verl_plugin     # calls register() in every process of verl
    ... distillation.distillation_loss.loss_mode=vigos_forward_kl_topk

Per token, over the teacher's k ids: loss = sum p (log p - log q) with q the student's softmax over the whole
vocabulary, both log-probabilities bounded from below by `log_prob_min_clamp`; student_mass = sum q, teacher_mass =
sum p. The masses and the overlap diagnostics are detached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vigos.integrations._logits import once
from vigos.integrations._patching import Patch, Target, UnknownPeer, check_signature, version_of

LOSS = "vigos_forward_kl_topk"
_LOSSES = "verl.trainer.distillation.losses"
_FSDP = "verl.trainer.distillation.fsdp.losses"
_KNOWN = ("(student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format)",)
# Of one chunk's float32 logits: on a CPU it stays in the cache between one pass and the next.
_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Return slices over the rows of logits (N, V)."""
    n, v = logits.shape
    width = max(1, _CHUNK_ELEMENTS.get(logits.device.type, 2**25) // v)
    return (slice(start, start + width) for start in range(0, n, width))


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, teacher: Tensor, ids: Tensor, floor: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = logits.shape[0]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        lse = torch.empty(n, dtype=dtype, device=logits.device)
        picked = torch.empty(ids.shape, dtype=dtype, device=logits.device)
        overlap = torch.empty(ids.shape, dtype=torch.bool, device=logits.device)
        for chunk in _row_chunks(logits):
            z = logits[chunk].to(dtype)
            lse[chunk] = z.logsumexp(-1)
            picked[chunk] = z.gather(-1, ids[chunk])
            student_ids = z.topk(ids.shape[1], -1).indices
            overlap[chunk] = (ids[chunk, :, None] == student_ids[:, None, :]).any(-1)
        log_q, log_p = picked - lse[:, None], teacher.to(dtype)
        mass = log_q.exp().sum(-1)
        free = torch.ones_like(overlap) if floor is None else log_q >= floor
        if floor is not None:
            log_q, log_p = log_q.clamp(min=floor), log_p.clamp(min=floor)
        terms = log_p.exp() * (log_p - log_q)
        count = overlap.sum(-1)
        advantage = (-terms * overlap).sum(-1) / count.clamp(min=1)
        ctx.save_for_backward(logits, ids, lse, torch.where(free, log_p.exp(), 0.0))
        ctx.mark_non_differentiable(mass, count, advantage)
        return terms.sum(-1), mass, count, advantage

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits, ids, lse, p = ctx.saved_tensors
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        scale = grad.to(lse.dtype)[:, None]
        # Both factors of p_s = exp(z - lse) go into the exponent or into k ids: two passes over the vocabulary.
        shift = lse[:, None] - (p.sum(-1, keepdim=True) * scale.abs()).log()
        for chunk in _row_chunks(logits):
            g = (logits[chunk] - shift[chunk]).exp_()
            g.mul_(scale[chunk].sign()).scatter_add_(1, ids[chunk], -p[chunk] * scale[chunk])
            out[chunk] = g
        return once(out, logits), None, None, None


def topk_forward_kl(
    student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, *,
    log_prob_min_clamp: float | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Compute forward KL over the teacher's top-k ids, per token: logits (..., V), log-probabilities and ids (..., k).

    Returns `distillation_losses` (nats, differentiable in the logits), `student_mass`, `teacher_mass`, `overlap_count`
    and `overlap_token_advantage`, each (...). Ids of a token are distinct. A log-probability below `log_prob_min_clamp`
    counts as that, and a student's that is bounded so has no gradient.
    """
    if teacher_topk_ids.dtype != torch.int64 or teacher_topk_ids.shape != teacher_topk_log_probs.shape:
        raise ValueError(
            f"teacher_topk_ids must be int64 {tuple(teacher_topk_log_probs.shape)} like teacher_topk_log_probs, got "
            f"{tuple(teacher_topk_ids.shape)} {teacher_topk_ids.dtype}"
        )
    if teacher_topk_ids.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"teacher_topk_ids must be (*{tuple(student_logits.shape[:-1])}, k) like student_logits, got "
            f"{tuple(teacher_topk_ids.shape)}"
        )
    k = teacher_topk_ids.shape[-1]
    losses, mass, count, advantage = _TopK.apply(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_topk_log_probs.reshape(-1, k),
        teacher_topk_ids.reshape(-1, k),
        log_prob_min_clamp,
    )
    shape = student_logits.shape[:-1]
    return {
        "distillation_losses": losses.view(shape),
        "student_mass": mass.view(shape),
        "teacher_mass": teacher_topk_log_probs.to(mass.dtype).exp().sum(-1),
        "overlap_count": count.view(shape),
        "overlap_token_advantage": advantage.view(shape),
    }


def _make(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Return verl's FSDP top-k loss for every mode but ours."""

    def compute_forward_kl_topk(
        student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config: Any, data_format: str
    ) -> dict[str, Tensor]:
        options = config.distillation_loss
        if options.loss_mode != LOSS:
            return original(student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format)
        from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

        log_probs, ids = (x.values().unsqueeze(0) for x in (teacher_topk_log_probs, teacher_topk_ids))
        if get_ulysses_sequence_parallel_world_size() > 1:
            log_probs, ids = (slice_input_tensor(x, dim=1) for x in (log_probs, ids))
        return topk_forward_kl(student_logits, log_probs, ids.long(), log_prob_min_clamp=options.log_prob_min_clamp)

    return compute_forward_kl_topk


_patch = Patch("verl")


def _target() -> Target:
    return Target(_FSDP, "compute_forward_kl_topk", _KNOWN, _make)


def register() -> tuple[str, ...]:
    """Register the loss mode "vigos_forward_kl_topk"; other modes are untouched. Undone by `unregister`; twice is once.

    verl computes top-k losses where the logits are, by one function per training engine; ours stands before the FSDP
    engine's and hands every other mode on. Raises UnknownPeer if verl is missing or is not the verl it knows.
    """
    import importlib

    if _patch.active:
        return _patch.replaced
    try:
        losses = importlib.import_module(_LOSSES)
    except ModuleNotFoundError as error:
        raise UnknownPeer(f"verl with a registry of distillation losses is not installed: {error}") from None
    settings = losses.DistillationLossSettings(names=[LOSS], use_topk=True)
    unpack = losses.get_distillation_loss_fn("forward_kl_topk")
    target = _target()
    target.original()
    losses.register_distillation_loss(settings)(unpack)
    _patch.peer = f"verl {version_of('verl')}"
    return (LOSS, *_patch.apply([target]))


def unregister() -> None:
    """Take the loss mode out again."""
    import importlib

    if not _patch.active:
        return
    losses = importlib.import_module(_LOSSES)
    losses.DISTILLATION_LOSS_REGISTRY.pop(LOSS, None)
    losses.DISTILLATION_SETTINGS_REGISTRY.pop(LOSS, None)
    _patch.undo()


patch, unpatch = register, unregister


@contextmanager
def patched() -> Iterator[tuple[str, ...]]:
    """Register inside the block. A registration that was there before it stays after it."""
    outer = _patch.active
    try:
        yield register()
    finally:
        if not outer:
            unregister()


def fit() -> list[tuple[str, bool | None, str]]:
    """Return (name, whether it fits, why); None: verl is not installed."""
    found = version_of("verl")
    if found is None:
        return [("verl", None, "not installed")]
    target = _target()
    try:
        if not _patch.active:
            check_signature(target.original(), target.known, target.path)
    except (UnknownPeer, ImportError) as error:
        return [("verl", False, f"verl {found}: {error}")]
    return [("verl", True, f"verl {found}: vigos.integrations.verl.register(), loss mode {LOSS}")]
