"""Batches without the processor: prompts rendered once and kept, images patched together, all of one length.

The results equal what `encode_prompt` and the model's own forward give, which a test checks; they only
come some twenty times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vigos.method.prompts import Prompts, Role


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids (P,) with expanded image placeholders and its positions (3, P) on the three mrope axes."""

    ids: Tensor
    positions: Tensor
    image_start: int
    image_end: int


@dataclass(frozen=True)
class ScoredText:
    """One sequence to learn from: `scored[i]` says whether `completion[i]` is learned or only read."""

    image: int  # row of the batch's images
    prompt: Prompt
    completion: list[int]
    scored: list[bool]


class FastEncoder:
    """Prompts and images of the world as tensors, equal to the processor's."""

    def __init__(self, model: Any, processor: Any, prompts: Prompts) -> None:
        self.model, self.tokenizer, self.prompts = model, processor.tokenizer, prompts
        self.processor = processor
        self._prompts: dict[tuple[Role, str, str, str | None, int, int], Prompt] = {}
        self._texts: dict[str, list[int]] = {}
        self._encode = self.tokenizer.backend_tokenizer.encode  # ten times faster than the tokenizer around it
        image = processor.image_processor
        self.patch, self.merge, self.frames = image.patch_size, image.merge_size, image.temporal_patch_size
        self.mean, self.std = (
            torch.tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (image.image_mean, image.image_std)
        )
        self.image_token = model.config.image_token_id
        self.eos = self.tokenizer.eos_token_id

    def text(self, text: str) -> list[int]:
        """Return the ids of a completion's text."""
        if text not in self._texts:
            self._texts[text] = self._encode(text, add_special_tokens=False).ids
        return self._texts[text]

    def prompt(
        self, role: Role, problem: str = "", answer: str = "", *, size: tuple[int, int], prefill: str | None = None
    ) -> Prompt:  # fmt: skip
        """Return the prompt of `role` over one image of `size` (height, width) pixels."""
        key = (role, problem, answer, prefill, *size)
        if key not in self._prompts:
            opening = (self.prompts.prefill if role in ("student", "reference") else "") if prefill is None else prefill
            messages = self.prompts.messages(role, problem, answer)
            rendered = (
                self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + opening
            )
            grid = torch.tensor([[1, size[0] // self.patch, size[1] // self.patch]])
            tokens = int(grid.prod()) // self.merge**2
            pad = self.tokenizer.convert_ids_to_tokens(self.image_token)
            ids = torch.tensor([self.tokenizer.encode(rendered.replace(pad, pad * tokens), add_special_tokens=False)])
            types = (ids == self.image_token).int()
            positions, _ = self.model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)
            start = int(types[0].argmax())
            self._prompts[key] = Prompt(ids[0], positions[:, 0], start, start + tokens)
        return self._prompts[key]

    def patches(self, images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
        """Cut images (B, H, W, 3) uint8, sides multiples of patch * merge, into patches (B, P, C * frames * patch²)."""
        pixels = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float()
        pixels = (pixels * (1 / 255) - self.mean) / self.std
        batch, channels, height, width = pixels.shape
        side = self.patch * self.merge
        if height % side or width % side:
            raise ValueError(f"images must have sides that are multiples of {side}, got {height} x {width}")
        blocks = pixels.view(
            batch, channels, height // side, self.merge, self.patch, width // side, self.merge, self.patch
        ).permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, gh, gw, mh, mw, C, ph, pw)
        blocks = blocks.unsqueeze(6).expand(*blocks.shape[:6], self.frames, *blocks.shape[6:])
        return blocks.reshape(batch, -1, channels * self.frames * self.patch**2)


def image_features(visual: Any, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Run the vision tower on a batch of images of one size, (B, P, ·) → (B, P / merge², out).

    The tower's own forward packs images into one sequence and attends to each in turn; with equal sizes and every
    layer attending to the whole image that is a batch, and one call a layer.

    Args:
        grid: patches along height and width.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    batch, count, _ = patches.shape
    side = visual.window_size // visual.patch_size
    if grid[0] > side or grid[1] > side or len(visual.fullatt_block_indexes) != len(visual.blocks):
        raise ValueError(f"grid must fit into one window of {side} patches a side, got {grid}")
    hidden = visual.patch_embed(patches.reshape(batch * count, -1)).view(batch, count, -1)
    merge = visual.spatial_merge_size
    rows = torch.arange(grid[0]).view(-1, 1).expand(grid)
    columns = torch.arange(grid[1]).view(1, -1).expand(grid)
    order = [
        axis.reshape(grid[0] // merge, merge, grid[1] // merge, merge).transpose(1, 2).reshape(-1)
        for axis in (rows, columns)
    ]
    # rotary_pos_emb took a length before transformers 5.20 and positions since; both give angles of the same table.
    frequencies = visual.rotary_pos_emb.inv_freq.float()
    angles = torch.cat([order[0][:, None] * frequencies, order[1][:, None] * frequencies], dim=-1)
    cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(batch, count, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=attention.scaling
        )
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(batch, count, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden.reshape(batch * count, -1)).view(batch, count // merge**2, -1)


def scored_logits(model: Any, features: Tensor, examples: Sequence[ScoredText]) -> tuple[Tensor, Tensor]:
    """Return logits (S, V) that predict the scored completion tokens of all examples, and those tokens (S,).

    Args:
        features: image features (B, K, D) of the batch's images, from `image_features`.
    """
    text = model.model.language_model
    lengths = [len(e.prompt.ids) + len(e.completion) for e in examples]
    longest = max(lengths)
    pad = model.config.text_config.pad_token_id or 0
    ids = torch.full((len(examples), longest), pad)
    positions = torch.zeros(3, len(examples), longest, dtype=torch.long)
    wanted = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        start, end = len(example.prompt.ids), lengths[row]
        ids[row, :start] = example.prompt.ids
        ids[row, start:end] = torch.tensor(example.completion)
        positions[:, row, :start] = example.prompt.positions
        positions[:, row, start:] = example.prompt.positions.max() + 1 + torch.arange(longest - start)
        wanted[row, start:end] = torch.tensor(example.scored)
    embeddings = text.embed_tokens(ids)
    first, last = examples[0].prompt.image_start, examples[0].prompt.image_end
    if any((e.prompt.image_start, e.prompt.image_end) != (first, last) for e in examples):
        raise ValueError("examples must hold their images at the same place, got several places or sizes in one batch")
    pictures = features[torch.tensor([e.image for e in examples])]
    embeddings = torch.cat([embeddings[:, :first], pictures, embeddings[:, last:]], dim=1)
    # Padding stands on the right: causal attention alone keeps it out of every scored position.
    hidden = text(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, :-1][wanted[:, 1:]]), ids[wanted]
