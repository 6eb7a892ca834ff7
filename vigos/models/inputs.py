"""A model's inputs from prompts of different lengths: padding, token types, the images of several prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vigos.method.encode import EncodedPrompt, ImageInputs
from vigos.models.parts import token_types_name


def padded_batch(
    base: Any,
    members: Sequence[tuple[Tensor, EncodedPrompt]],
    *,
    pad_token_id: int | None = None,
    left: bool = False,
) -> dict[str, Tensor]:
    """Build the inputs of one forward of a transformers model, on its device.

    Args:
        members: ids (T,) int64 that begin with those of their prompt, and the prompt.
        pad_token_id: fills padding; None takes the model's, or 0.
        left: pad before the ids, as generation needs it, instead of after them.
    """
    width = max(len(ids) for ids, _ in members)
    pad = pad_token_id if pad_token_id is not None else _pad_token_id(base)

    def stacked(rows: list[Tensor], value: int = 0) -> Tensor:
        missing = [width - len(row) for row in rows]
        return torch.stack(
            [F.pad(r, (n, 0) if left else (0, n), value=value) for r, n in zip(rows, missing, strict=True)]
        )

    inputs = {
        "input_ids": stacked([ids.cpu() for ids, _ in members], pad),
        "attention_mask": stacked([torch.ones(len(ids), dtype=torch.int64) for ids, _ in members]),
    }
    images = [prompt.images for _, prompt in members if prompt.images is not None]
    name = token_types_name(base)
    # Without them Qwen2.5-VL silently counts image positions along one axis.
    if name is not None and any(prompt.token_type_ids is not None for _, prompt in members):
        inputs[name] = stacked([token_types(prompt, len(ids)) for ids, prompt in members])
    if images:
        inputs |= concat_images(images)
    return {name: tensor.to(base.device) for name, tensor in inputs.items()}


def token_types(prompt: EncodedPrompt, length: int) -> Tensor:
    """Return mm_token_type_ids (length,): the prompt's, then 0 for its completion."""
    types = prompt.token_type_ids
    if types is None:
        return torch.zeros(length, dtype=torch.int64)
    return F.pad(types.cpu().long(), (0, max(length - len(types), 0)))[:length]


def _pad_token_id(base: Any) -> int:
    pad = getattr(base.config.get_text_config(), "pad_token_id", None)
    return pad if pad is not None and pad >= 0 else 0


def concat_images(images: Sequence[ImageInputs]) -> dict[str, Tensor]:
    """Join the images of several prompts as one processor call would have returned them.

    Every family stacks along the first axis (patches, tiles, images or prompts). Where the second axis counts tiles or
    images and differs, it is filled with zeros, the filling that these families' own processors use and models skip; so
    are height and width where `image_sizes` say how much of each image is real (Pixtral's tower).
    """
    names = list(images[0].tensors)
    for each in images:
        if list(each.tensors) != names:
            raise ValueError(f"images of one batch must carry the same tensors {names}, got {list(each.tensors)}")
    joined = {}
    for name in names:
        tensors = [each.tensors[name] for each in images]
        if "target_sizes" in names and name == "pixel_values":  # MiniCPM-V lays patches end to end in one row
            joined[name] = torch.cat(tensors, -1)
            continue
        if tensors[0].ndim >= 4:
            if name == "pixel_values" and "image_sizes" in names and tensors[0].ndim == 4:
                height, width = (max(t.shape[axis] for t in tensors) for axis in (2, 3))
                tensors = [F.pad(t, (0, width - t.shape[3], 0, height - t.shape[2])) for t in tensors]
            second = max(t.shape[1] for t in tensors)
            if len({t.shape[2:] for t in tensors}) > 1:
                raise ValueError(
                    f"{name} of one batch must agree beyond the second axis, got {[tuple(t.shape) for t in tensors]}; "
                    "let the image processor resize them to one size"
                )
            tensors = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, second - t.shape[1])) for t in tensors]
        joined[name] = torch.cat(tensors)
    return joined
