"""Image features computed once and used by every forward that sees the image.

A step shows each image to the model many times: to three teachers, to the student, in every micro-batch and pack. With
a frozen vision tower the features never differ, so the first forward computes them and the others get them from here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vigos.method.encode import ImageInputs
from vigos.models.parts import inner_model, text_model
from vigos.models.sharding import sharding_of

# What the models read of their vision tower's output. Where there is a pooled one, the tower's own hidden states are
# not kept; Llama 4 has none, and reads those.
_FIELDS = ("pooler_output", "deepstack_features", "last_hidden_state")


class Features(SimpleNamespace):
    """Hold what a tower returned, as a `ModelOutput` of transformers does."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values; transformers 5.24 asks for them."""
        return tuple(vars(self).values())


class VisionCache:
    """Keep the features of the last `max_images` prompts' images, by `ImageInputs.key`.

    One cache serves one model. It holds for as long as the weights of the vision tower do, so it takes frozen ones
    only: `obstacle` says what stands against it.
    """

    def __init__(self, max_images: int = 64) -> None:
        if max_images < 1:
            raise ValueError(f"max_images must be at least 1, got {max_images}")
        self.max_images = max_images
        self._features: OrderedDict[str, Features] = OrderedDict()
        self._base: Any = None

    @classmethod
    def for_model(cls, base: Any, max_images: int = 64) -> VisionCache | None:
        """Return a cache if the features of this transformers model can be kept, else None."""
        return cls(max_images) if cls.obstacle(base) is None else None

    @staticmethod
    def obstacle(base: Any) -> str | None:
        """Return why features of this transformers model cannot be kept; None if they can."""
        inner = inner_model(base)
        if not hasattr(inner, "get_image_features"):
            return f"{type(base).__name__} has no get_image_features"
        if sharding_of(base) != "unsharded":
            return "the model is sharded, and every rank has to run the tower as often as the others"
        language: set[nn.Module] = {text_model(base), base.get_output_embeddings()}
        for name, module in _outside(base, language):
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                return f"{name} is being trained"
            if module.training and isinstance(module, nn.Dropout) and module.p > 0:
                return f"{name} drops out at random"
        return None

    @contextmanager
    def serving(self, base: Any, images: Sequence[ImageInputs]) -> Iterator[None]:
        """Let the next forward of `base` over these images, in this order, take their features from here."""
        if self._base is not None and self._base is not base:
            raise ValueError("vision must serve one model, got a second one; make a cache for each")
        reason = self.obstacle(base)
        if reason is not None:
            raise ValueError(f"vision features can only be kept for a frozen tower, got a model where {reason}")
        self._base = base
        inner = inner_model(base)
        original = inner.get_image_features

        def get_image_features(*_: Any, **__: Any) -> Features:
            return self._joined(original, images, base.device)

        inner.__dict__["get_image_features"] = get_image_features
        try:
            yield
        finally:
            del inner.__dict__["get_image_features"]

    @torch.no_grad()
    def _joined(self, compute: Any, images: Sequence[ImageInputs], device: torch.device) -> Features:
        accepted = signature(compute).parameters
        shown = []
        for each in images:
            features = self._features.get(each.key)
            if features is None:
                inputs = {name: tensor.to(device) for name, tensor in each.tensors.items() if name in accepted}
                output = compute(**inputs, return_dict=True)
                kept = {f: getattr(output, f) for f in _FIELDS if getattr(output, f, None) is not None}
                if "pooler_output" in kept:
                    kept.pop("last_hidden_state", None)
                features = Features(**kept)
                self._features[each.key] = features
            self._features.move_to_end(each.key)
            shown.append(features)
        while len(self._features) > self.max_images:
            self._features.popitem(last=False)
        if not hasattr(shown[0], "pooler_output"):
            return Features(last_hidden_state=_concat([f.last_hidden_state for f in shown]))
        pooled = _concat([f.pooler_output for f in shown])
        if not hasattr(shown[0], "deepstack_features"):
            return Features(pooler_output=pooled)
        layers = zip(*(f.deepstack_features for f in shown), strict=True)
        return Features(pooler_output=pooled, deepstack_features=[_concat(list(each)) for each in layers])


def _concat(parts: list[Any]) -> Any:
    """Join tensors along their first axis, and lists, which hold a tensor an image, end to end."""
    return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(x for part in parts for x in part)


def _outside(module: nn.Module, skipped: set[nn.Module], prefix: str = "model") -> Iterator[tuple[str, nn.Module]]:
    if module in skipped:
        return
    yield prefix, module
    for name, child in module.named_children():
        yield from _outside(child, skipped, f"{prefix}.{name}")
