"""Plan the forwards that sequences are scored in: padded batches, or packs that run every prefix once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vigos.method.encode import ImageInputs, ScoredSequence
from vigos.models.compat import is_stateful
from vigos.models.families import BLOCKWISE_IMAGES, SHARED_LAYERS, STATE_LAYERS, family_of, tree_refusal
from vigos.models.inputs import concat_images, padded_batch, token_types
from vigos.models.parts import base_model, image_token_id_of, inner_model, lm_head, token_types_name
from vigos.scoring.prefix_tree import PrefixPack, PrefixTree, check_sequence, model_input_ids, placeholders
from vigos.scoring.tree_attention import TreePlan, dummy_mask

Scoring = Literal["tree", "separate"]
SCORINGS: tuple[Scoring, ...] = ("tree", "separate")


@dataclass(frozen=True)
class Forward:
    """One forward of the model: how to build its inputs, and which of its states become which rows of the result.

    Attributes:
        build: returns the model's inputs.
        positions: (m,) int64, which of its B * T flat positions are scored.
        rows: (m,) int64, the rows of the call's output that they become.
        tokens: B * T, padding included.
        images: the images it encodes.
        uses: (B * T,) how many sequences each position stands for; 0 for padding.
        packed: True for a pack of shared prefixes, False for a padded batch.
        members: which of the call's sequences it holds.
    """

    build: Callable[[], dict[str, Any]]
    positions: Tensor
    rows: Tensor
    tokens: int
    uses: Tensor
    images: tuple[ImageInputs, ...] = ()
    packed: bool = False
    members: tuple[int, ...] = ()


def plan_forwards(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    scoring: Scoring,
    token_budget: int,
    backend: str,
    pad_token_id: int | None,
) -> list[Forward]:
    """Plan the forwards that score `sequences`; arguments as in `hidden_states`.

    Raises:
        ValueError: the sequences are not what the model takes, or scoring="tree" and it cannot share prefixes.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    base = base_model(model)
    lm_head(model)
    for sequence in sequences:
        check_sequence(sequence)
        _check_images(base, sequence)
    if scoring == "separate":
        return _separate_forwards(base, sequences, token_budget, pad_token_id)
    check_tree(base)
    tree = PrefixTree(sequences, token_budget=token_budget, image_token_id=image_token_id_of(base))
    return [_tree_forward(base, sequences, pack, backend) for pack in tree.packs]


def dummy_forward(base: Any) -> Forward:
    """Return a forward of one token that gives no row."""
    nothing = torch.empty(0, dtype=torch.int64)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=base.device)
    return Forward(lambda: {"input_ids": ids}, nothing, nothing, 1, torch.zeros(1))


# ---- separate: right-padded batches ------------------------------------------------------------------------------


def _separate_forwards(
    base: Any, sequences: Sequence[ScoredSequence], token_budget: int, pad_token_id: int | None
) -> list[Forward]:
    ids = [model_input_ids(s) for s in sequences]
    first_row = [0]
    for sequence in sequences:
        first_row.append(first_row[-1] + len(sequence.scored))
    # Longest first: a batch is padded to its first sequence.
    order = sorted((i for i in range(len(ids)) if len(ids[i])), key=lambda i: -len(ids[i]))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * len(ids[batches[-1][0]]) <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    forwards = []
    for batch in batches:
        width = len(ids[batch[0]])
        positions = [
            b * width + len(sequences[i].prompt.ids) + sequences[i].scored.cpu() - 1 for b, i in enumerate(batch)
        ]
        rows = [torch.arange(first_row[i], first_row[i + 1]) for i in batch]
        members = [(ids[i], sequences[i].prompt) for i in batch]
        forwards.append(
            Forward(
                build=lambda members=members: (  # type: ignore[misc]
                    padded_batch(base, members, pad_token_id=pad_token_id) | {"use_cache": False}
                ),
                positions=torch.cat(positions),
                rows=torch.cat(rows),
                tokens=len(batch) * width,
                uses=torch.cat([(torch.arange(width) < len(ids[i])).long() for i in batch]),
                images=tuple(prompt.images for _, prompt in members if prompt.images is not None),
                members=tuple(batch),
            )
        )
    return forwards


# ---- tree: one packed row --------------------------------------------------------------------------------------------


def check_tree(base: Any) -> None:
    """Refuse models in which the state at a token is more than a shared prefix can give."""
    reason = tree_refusal(base.config)
    if reason is None and family_of(base.config) is None and is_stateful(base):
        reason = "it carries recurrent state along the sequence"
    if reason is not None:
        raise ValueError(
            f"scoring='tree' cannot share prefixes of {type(base).__name__}: {reason}; use scoring='separate' "
            "(--student-scoring separate --teacher-scoring separate)"
        )


def _tree_forward(base: Any, sequences: Sequence[ScoredSequence], pack: PrefixPack, backend: str) -> Forward:
    def build() -> dict[str, Any]:
        members = [sequences[i] for i in pack.members]
        limit = None
        if base.config.model_type in BLOCKWISE_IMAGES and pack.images:
            limit = _block_limits(pack, members, image_token_id_of(base))
        plan = TreePlan(pack, backend=backend, device=base.device, limit=limit)
        mask: Any = dummy_mask(base.device)
        kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
        if limit is not None or STATE_LAYERS & kinds:  # these families take their masks by layer type
            mask = {kind: None if kind in STATE_LAYERS else mask for kind in SHARED_LAYERS}
        inputs = {"input_ids": pack.ids[None], "position_ids": pack_positions(base, pack, members)}
        if pack.images:
            inputs |= concat_images(pack.images)
        on_device = {name: tensor.to(base.device) for name, tensor in inputs.items()}
        return on_device | {"attention_mask": mask, "tree_plan": plan, "use_cache": False}

    return Forward(
        build, pack.positions, pack.rows, pack.tokens, pack.uses, pack.images, packed=True, members=tuple(pack.members)
    )


def pack_positions(base: Any, pack: PrefixPack, members: Sequence[ScoredSequence]) -> Tensor:
    """Return the position ids of a pack: (3, 1, T) for models with three position axes, (1, T) for the others.

    Three axes come from the model's own rule, applied to every whole sequence; text goes on after the largest position
    of what precedes it.
    """
    inner = inner_model(base)
    if not hasattr(inner, "get_rope_index"):
        return pack.depth[None]
    if not pack.images:
        return pack.depth.expand(3, 1, -1)
    ids = [model_input_ids(s) for s in members]
    width = max(len(x) for x in ids)
    rule = {
        "input_ids": torch.stack([F.pad(x, (0, width - len(x))) for x in ids]),
        "attention_mask": torch.stack([(torch.arange(width) < len(x)).long() for x in ids]),
        "mm_token_type_ids": torch.stack([token_types(s.prompt, width) for s in members]),
    } | concat_images([s.prompt.images for s in members if s.prompt.images is not None])
    accepted = signature(inner.get_rope_index).parameters
    positions = inner.get_rope_index(**{k: v.cpu() for k, v in rule.items() if k in accepted})[0]  # (3, B, width)
    return positions[:, pack.sequence, pack.depth][:, None]


def _block_limits(pack: PrefixPack, members: Sequence[ScoredSequence], image_token_id: int | None) -> Tensor:
    """Return the last depth each token of the pack sees, (T,): the end of its image, or itself."""
    limits = torch.empty_like(pack.depth)
    for j, sequence in enumerate(members):
        mine = pack.sequence == j
        marks = placeholders(sequence, image_token_id)
        limit = torch.arange(int(pack.depth[mine].max()) + 1 if bool(mine.any()) else 0)
        ends = torch.nonzero(marks & ~F.pad(marks, (0, 1))[1:])[:, 0]
        inside = torch.nonzero(marks[: len(limit)])[:, 0]
        limit[inside] = ends[torch.searchsorted(ends, inside)]
        limits[mine] = limit[pack.depth[mine]]
    return limits


def _check_images(base: Any, sequence: ScoredSequence) -> None:
    prompt = sequence.prompt
    if prompt.images is None:
        return
    if token_types_name(base) is not None and prompt.token_type_ids is None:
        # Without them Qwen2.5-VL silently places every image token on one axis, and Gemma 3 masks images causally.
        raise ValueError(
            f"token_type_ids of the prompt of {sequence.owner} must be the processor's mm_token_type_ids for "
            f"{type(base).__name__}, got None; ask the processor for them with return_mm_token_type_ids=True"
        )
    if prompt.token_type_ids is not None and prompt.token_type_ids.shape != prompt.ids.shape:
        raise ValueError(
            f"token_type_ids of the prompt of {sequence.owner} must match its ids {tuple(prompt.ids.shape)}, got "
            f"{tuple(prompt.token_type_ids.shape)}"
        )
