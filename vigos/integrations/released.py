"""The code that the authors of ViGOS released, on the fused loss: its two losses on logits, and a trainer mix-in.

Its package is called `vigos` too, so the two cannot be installed side by side: rename its folder (its imports are
relative), say to `vigos_released`. Then either keep its trainer and swap the loss,

    from vigos.integrations import released
    import vigos_released.losses, vigos_released.trainer
    released.patch(vigos_released.losses, vigos_released.trainer)

or build the trainer from the mix-in, which also keeps every logits tensor from existing:

    class Trainer(released.FusedLossMixin, vigos_released.trainer.ViGOSTrainer): ...

With the mix-in the student's and the teachers' forward passes return the hidden states that the head would have been
applied to (the head does nothing while the loss is computed), and each of the three terms is one `linear_divergence`
over its own live tokens. Rollouts, parsing, masks, normalisation and logging stay the released code's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.api import linear_divergence, logits_divergence
from vigos.divergence.head import Head
from vigos.divergence.supervision import FORWARD_KL, REVERSE_KL, Supervision
from vigos.integrations._logits import check_mask, check_pair, token_divergence
from vigos.integrations._patching import Patch, Target, UnknownPeer

KNOWN = {
    "masked_kl_loss": (
        "(source_logits, target_logits, token_mask, temperature=1.0, token_clip=None, post_clip_mask=None, "
        "post_token_clip=None)"
    ),
    "kl_tokens": "(source_logits, target_logits, temperature=1.0, token_clip=None)",
}
# What the mix-in stands on, besides `compute_loss` calling `masked_kl_loss` by its module's name.
METHODS = ("_build_vigos_rollout_batch", "_batched_teacher_completion_logits", "_unwrap_train_model")

INF = float("inf")
# The head, while a mix-in's compute_loss runs: the "logits" that `masked_kl_loss` gets are hidden states then.
_head: ContextVar[torch.nn.Module | None] = ContextVar("vigos_released_head", default=None)


def _direction(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return (student, teacher, kind) of KL(source || target): the student is the side that has a gradient."""
    if source.requires_grad and target.requires_grad:
        raise ValueError("source_logits and target_logits both require a gradient; detach the teacher's")
    return (source, target, REVERSE_KL) if source.requires_grad else (target, source, FORWARD_KL)


def _clip(value: float | None) -> float:
    """Translate the released code's None, 0 and negative numbers, which mean "no clip"."""
    return INF if value is None or value <= 0 else float(value)


def kl_tokens(
    source_logits: Tensor,
    target_logits: Tensor,
    temperature: float = 1.0,
    token_clip: float | None = None,
) -> Tensor:
    """Return min(KL(source || target), token_clip) of each token in nats: (..., V) twice -> (...).

    The side that requires a gradient is the student; a clipped token has none.
    """
    check_pair(source_logits, target_logits, ("source_logits", "target_logits"))
    student, teacher, kind = _direction(source_logits, target_logits)
    tokens = token_divergence(student, teacher, kind=kind, temperature=temperature)
    return tokens.clamp(max=_clip(token_clip))


def masked_kl_loss(
    source_logits: Tensor,
    target_logits: Tensor,
    token_mask: Tensor,
    temperature: float = 1.0,
    token_clip: float | None = None,
    post_clip_mask: Tensor | None = None,
    post_token_clip: float | None = None,
) -> Tensor:
    """Average over the tokens of `token_mask` (B, T) of min(KL(source || target), clip), in nats.

    Args:
        source_logits, target_logits: (B, T, V); inside `FusedLossMixin.compute_loss` hidden states (B, T, D).
        token_clip: of every token; None or not positive: none.
        post_clip_mask, post_token_clip: a further clip of the tokens in that mask (B, T).

    An empty mask gives 0, attached to the graph.
    """
    check_pair(source_logits, target_logits, ("source_logits", "target_logits"))
    for name, mask in (("token_mask", token_mask), ("post_clip_mask", post_clip_mask)):
        if mask is not None:
            check_mask(mask, source_logits, name)
    mask = token_mask.to(source_logits.device, torch.bool)
    clip = torch.full(mask.shape, _clip(token_clip), device=mask.device)
    if post_clip_mask is not None:
        clip = torch.where(post_clip_mask.to(mask.device, torch.bool), clip.clamp(max=_clip(post_token_clip)), clip)
    student, teacher, kind = _direction(source_logits, target_logits)
    options: dict[str, Any] = {
        "supervision": Supervision.from_mask(mask, kind=kind, clip=clip), "temperature": float(temperature),
        "reduction": "mean",
    }  # fmt: skip
    head = _head.get()
    if head is None:
        return logits_divergence(student, teacher, **options).loss
    weight, bias = head.weight, head.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if not torch.is_autocast_enabled(student.device.type):
        # Mixed precision hands hidden states out as float32; the head's own dtype is what they were computed in.
        student, teacher = student.to(weight.dtype), teacher.to(weight.dtype)
    return linear_divergence(student, Head(weight, bias), teacher, **options).loss


# --- the patch -------------------------------------------------------------------------------------------------------

_patches: dict[ModuleType, Patch] = {}


def _instead(ours: Any, _original: Any) -> Any:
    return ours


def _targets(module: ModuleType) -> list[Target]:
    ours = {"masked_kl_loss": masked_kl_loss, "kl_tokens": kl_tokens}
    present = [name for name in ours if name in vars(module)]
    if not present:
        raise UnknownPeer(f"{module.__name__} has neither {' nor '.join(ours)}; vigos knows {KNOWN}")
    return [Target(module, name, (KNOWN[name],), partial(_instead, ours[name])) for name in present]


def patch(*modules: ModuleType) -> tuple[str, ...]:
    """Put ours into the given modules of the released code: its `losses` and its `trainer`, which imports by name."""
    if not modules:
        raise ValueError("modules must name the released code's losses and trainer modules, got none")
    return tuple(name for m in modules for name in _of(m).apply(_targets(m) if not _of(m).active else ()))


def unpatch(*modules: ModuleType) -> None:
    """Put the released code's own back into the given modules; without arguments into all."""
    for module in modules or tuple(_patches):
        _of(module).undo()


@contextmanager
def patched(*modules: ModuleType) -> Iterator[tuple[str, ...]]:
    """Patch inside the block. What was patched before it stays so after it."""
    before = [module for module in modules if _of(module).active]
    try:
        yield patch(*modules)
    finally:
        for module in modules:
            if module not in before:
                _of(module).undo()


def _of(module: ModuleType) -> Patch:
    return _patches.setdefault(module, Patch("the released ViGOS code"))


def fit() -> list[tuple[str, bool | None, str]]:
    """Say that the released code cannot be looked for: its package has our name."""
    return [("released ViGOS", None, "not installable beside vigos: vigos.integrations.released.patch(...) checks it")]


# --- the mix-in ------------------------------------------------------------------------------------------------------


@contextmanager
def _without_head(head: torch.nn.Module) -> Iterator[None]:
    """Make the model's forward return, as its logits, what the head would have been applied to."""
    before = vars(head).get("forward")
    head.forward = lambda hidden: hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]


class FusedLossMixin:
    """Mix-in that gives the released `ViGOSTrainer` hidden states in place of its three logits tensors.

    It stands before that class among the bases.

    Needs a linear output head that is whole on every rank (LoRA, as released, or ZeRO up to stage 2) and a model that
    applies nothing to its logits after the head, which is measured on its own forward of one token.
    """

    _untouched: Any = None  # the model of which that was measured

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Run the released `compute_loss`. With `return_outputs` the second value holds hidden states, not logits."""
        module = self._released_module()
        unwrapped = self._unwrap_train_model(model)  # type: ignore[attr-defined]
        head = unwrapped.get_output_embeddings()
        _check_head(head, unwrapped)
        with patched(module), _without_head(head):
            if self._untouched is not unwrapped:
                _check_untouched(unwrapped, head)
                self._untouched = unwrapped
            token = _head.set(head)
            try:
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
            finally:
                _head.reset(token)
        if not return_outputs:
            return result
        loss, outputs = result
        return loss, {"hidden_states": outputs["logits"]}

    def _build_vigos_rollout_batch(self, model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Let the head work while rollouts are generated: sampling needs logits."""
        head = self._unwrap_train_model(model).get_output_embeddings()  # type: ignore[attr-defined]
        off = head.forward
        del head.forward
        try:
            return super()._build_vigos_rollout_batch(model, inputs)  # type: ignore[misc]
        finally:
            head.forward = off

    def _released_module(self) -> ModuleType:
        """Return the module whose `compute_loss` ours calls."""
        classes = type(self).__mro__
        for cls in classes[classes.index(FusedLossMixin) + 1 :]:
            if "compute_loss" in vars(cls):
                missing = [name for name in METHODS if not hasattr(cls, name)]
                if missing:
                    raise UnknownPeer(f"{cls.__qualname__} has no {', '.join(missing)}; vigos knows one with {METHODS}")
                return sys.modules[cls.__module__]
        raise UnknownPeer("FusedLossMixin must stand before the released ViGOSTrainer in a class's bases")


@torch.no_grad()
def _check_untouched(model: Any, head: Any) -> None:
    """Refuse a model that changes what its head returns; the head is off, and hands on what it was given."""
    given: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device)).logits
    finally:
        hook.remove()
    if len(given) != 1 or not torch.equal(out.float(), given[0].float()):
        raise ValueError(
            f"the model must apply nothing to its logits after the head, got {type(model).__name__}, whose forward "
            "returns something else than its head did; use released.patch, which keeps logits"
        )


def _check_head(head: Any, model: Any) -> None:
    """Refuse a head whose logits are not hidden @ weight.T + bias of tensors that it holds."""
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        raise ValueError(
            f"the model's output head must be a torch.nn.Linear, got {type(head).__module__}.{type(head).__name__}, "
            "whose logits its weight alone does not give (an adapter, or a quantized layer): leave the head out of "
            "target_modules and modules_to_save, or use released.patch, which keeps logits"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() == 0:
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(
            f"the model's output head must hold a whole (V, D) weight, got {type(head).__name__} with weight {shape}; "
            "ZeRO-3 shards it: use released.patch, which keeps logits, or ZeRO-2"
        )
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name, neutral in (
        ("final_logit_softcapping", (None,)),
        ("logit_scale", (None, 1.0)),
        ("logits_scaling", (None, 1.0)),
    ):
        if getattr(config, name, None) not in neutral:
            raise ValueError(
                f"the model must apply nothing to its logits after the head, got {name}={getattr(config, name)}; use "
                "released.patch, which keeps logits"
            )
