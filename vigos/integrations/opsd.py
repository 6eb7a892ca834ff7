"""siyan-zhao/OPSD on the fused loss: `OPSDTrainer.generalized_jsd_loss`, with its per-entry clip and its top-k.

OPSD is a folder of scripts, not a package. In its `opsd_train.py`, after `from opsd_trainer import OPSDTrainer`:

    from vigos.integrations import opsd
    opsd.patch(OPSDTrainer)

The loss is the same function of the same logits: the temperature, then (top-k) the teacher's k most probable ids, on
which both sides are renormalised, then the divergence; `token_clip` bounds each *vocabulary entry's* term before the
sum. What differs: computed and returned in float32; a batch without a kept token is 0, not NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vigos.integrations._logits import check_pair, generalized_jsd
from vigos.integrations._patching import Patch, Target

_FIRST = (
    "(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction='batchmean', "
    "logits_are_probs=False, top_k=None"
)
KNOWN = (f"{_FIRST}, token_clip=None)", f"{_FIRST})")


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    top_k: int | None = None,
    token_clip: float | None = None,
) -> Tensor:
    """Compute OPSD's loss of logits (B, T, V), a scalar in nats, for reductions to a scalar.

    Args:
        labels: (B, T), -100: token left out. beta: 0 forward KL, 1 reverse KL, between them JSD(beta).
        reduction: "batchmean" divides the sum by the kept tokens (without labels by B), "mean" by tokens times the
            entries of a token (V, or top_k), "sum" by nothing.
        top_k: the teacher's k most probable ids only, renormalised on both sides. None or 0: all.
        token_clip: bound of each vocabulary entry's term. None: no bound.
    """
    if logits_are_probs:
        raise ValueError("logits_are_probs must be False: a fused loss needs logits")
    check_pair(student_logits, teacher_logits)
    if top_k is not None and top_k > 0:
        ids = torch.topk(teacher_logits, k=top_k, dim=-1).indices
        student_logits, teacher_logits = student_logits.gather(-1, ids), teacher_logits.gather(-1, ids)
    return generalized_jsd(
        student_logits, teacher_logits, labels=labels, beta=beta, temperature=temperature, reduction=reduction,
        entry_clip=token_clip,
    )  # fmt: skip


def _make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Call ours, but for what needs every entry's term or starts from probabilities: the original computes that."""

    def loss(
        student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, beta: float = 0.5,
        temperature: float = 1.0, reduction: str = "batchmean", logits_are_probs: bool = False,
        top_k: int | None = None, token_clip: float | None = None,
    ) -> Tensor:  # fmt: skip
        fusable = reduction in ("batchmean", "mean", "sum") and not logits_are_probs
        run = generalized_jsd_loss if fusable else original
        clip = {} if token_clip is None else {"token_clip": token_clip}  # the first release does not know the name
        return run(
            student_logits, teacher_logits, labels, beta, temperature, reduction, logits_are_probs, top_k, **clip
        )

    return loss


_patches: dict[type, Patch] = {}


def patch(trainer: type) -> tuple[str, ...]:
    """Put the fused loss into OPSD's trainer class; undone by `unpatch`; twice is once.

    Raises UnknownPeer, and changes nothing, if its `generalized_jsd_loss` has none of the signatures in `KNOWN`.
    """
    return _of(trainer).apply([Target(trainer, "generalized_jsd_loss", KNOWN, _make)])


def unpatch(trainer: type) -> None:
    """Put OPSD's own function back."""
    _of(trainer).undo()


@contextmanager
def patched(trainer: type) -> Iterator[tuple[str, ...]]:
    """Patch inside the block. A patch that was in place before it stays in place after it."""
    with _of(trainer).during([Target(trainer, "generalized_jsd_loss", KNOWN, _make)]) as replaced:
        yield replaced


def _of(trainer: type) -> Patch:
    return _patches.setdefault(trainer, Patch("OPSD"))


def fit() -> list[tuple[str, bool | None, str]]:
    """Say that OPSD cannot be looked for: it has no package."""
    return [("opsd", None, "not a package: vigos.integrations.opsd.patch(OPSDTrainer) checks it where it is used")]
