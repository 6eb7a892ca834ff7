"""The prefix tree: sequences that begin alike are packed so that every distinct prefix is computed once.

Sequences are sorted, so that neighbours share the longest prefixes, and each adds to the pack only the tokens after
what it shares with the one before it:

    sequence 0   [system image question A | completion 0 ]      adds everything
    sequence 1   [system image question A | completion 1 ]      adds its completion
    sequence 2   [system image question B | completion 0 ]      adds question B and its completion

That is a depth-first walk over the tree of prefixes. Token q sees token k iff `k <= q and q < subtree_end[k]`: the
subtree of k is one run of the pack. For attention that works on variable lengths, sequence i is one segment: its own
tokens are the queries, its whole path from the root the keys, aligned at the bottom right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vigos.method.encode import ImageInputs, ScoredSequence


def model_input_ids(sequence: ScoredSequence) -> Tensor:
    """Return the ids (T,) a model has to read: prompt and completion up to the token before the last scored one."""
    if len(sequence.scored) == 0:
        return sequence.prompt.ids[:0]
    return torch.cat([sequence.prompt.ids, sequence.completion_ids[: int(sequence.scored[-1])].to(sequence.prompt.ids)])


def check_sequence(sequence: ScoredSequence) -> None:
    """Raise ValueError unless `scored` increases within the completion and something precedes it."""
    scored, length = sequence.scored, len(sequence.completion_ids)
    if len(scored) == 0:
        return
    if scored.dtype.is_floating_point or scored.dtype == torch.bool:
        raise ValueError(f"scored of {sequence.owner} must be integer indices, got dtype {scored.dtype}")
    if bool((scored[1:] <= scored[:-1]).any()) or int(scored[0]) < 0 or int(scored[-1]) >= length:
        raise ValueError(
            f"scored of {sequence.owner} must increase within [0, {length}), the completion's tokens, "
            f"got {scored.tolist()[:8]} … {int(scored[-1])}"
        )
    if len(sequence.prompt.ids) == 0:
        raise ValueError(f"prompt of {sequence.owner} must hold at least one token, got none")


def placeholders(sequence: ScoredSequence, image_token_id: int | None) -> Tensor:
    """Mark the prompt's ids that stand for image features, (P,) bool."""
    prompt = sequence.prompt
    if prompt.images is None:
        return torch.zeros(len(prompt.ids), dtype=torch.bool)
    if prompt.token_type_ids is not None:
        return prompt.token_type_ids != 0
    if image_token_id is None:
        return torch.ones(len(prompt.ids), dtype=torch.bool)  # unknown: nothing short of the whole prompt is shared
    return prompt.ids == image_token_id


@dataclass(frozen=True)
class PrefixPack:
    """One packed forward of T tokens, as CPU tensors.

    Attributes:
        members: which sequences, in the order they are packed.
        ids: (T,) int64.
        sequence: (T,) int64, the position in `members` of the sequence that brought each token.
        depth: (T,) int64, the token's index in that sequence; equal to its position in models with one position axis.
        uses: (T,) int64, how many sequences go through each token.
        subtree_end: (T,) int32, token q sees token k iff `k <= q and q < subtree_end[k]`.
        q_len, k_len: (S,) int64, queries and keys of each segment; the queries are contiguous and cover the pack.
        kv_index: (sum of k_len,) int64, the keys of each segment in order, as indices into the pack.
        positions: (m,) int64, indices into the pack of the wanted hidden states.
        rows: (m,) int64, the rows of the caller's output that these are.
        images: the image inputs to encode, in the order of their placeholders.
    """

    members: tuple[int, ...]
    ids: Tensor
    sequence: Tensor
    depth: Tensor
    uses: Tensor
    subtree_end: Tensor
    q_len: Tensor
    k_len: Tensor
    kv_index: Tensor
    positions: Tensor
    rows: Tensor
    images: tuple[ImageInputs, ...]

    @property
    def tokens(self) -> int:
        """T, which the model reads."""
        return len(self.ids)


class PrefixTree:
    """Pack sequences depth-first under a token budget, every shared prefix once a pack.

    Two sequences share a prefix iff its ids are equal, their images are the same, and it covers every image
    placeholder of both. Sequences are cut after what their last scored token needs; those with nothing scored are left
    out. A tree larger than the budget is split between sequences, its prefix repeated in each part.

    Args:
        sequences: what to score; output rows are numbered in this order.
        token_budget: tokens of a pack; a single longer sequence still gets a pack.
        image_token_id: marks placeholders in prompts that have images but no token types.
    """

    def __init__(
        self, sequences: Sequence[ScoredSequence], *, token_budget: int = 16_384, image_token_id: int | None = None
    ) -> None:
        if token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, got {token_budget}")
        for sequence in sequences:
            check_sequence(sequence)
        self.sequences = list(sequences)
        self._ids = [model_input_ids(s).cpu().numpy().astype(np.int64) for s in sequences]
        counts = np.array([len(s.scored) for s in sequences], dtype=np.int64)
        self._first_row = np.concatenate([[0], np.cumsum(counts)])
        order, shared = self._sorted(image_token_id)
        self.packs = [self._pack(order[a:b], shared[a:b]) for a, b in self._cuts(order, shared, token_budget)]

    def summary(self) -> str:
        """Return in a line how much is shared: tokens with and without sharing, images shown and different ones."""
        separate, packed = sum(map(len, self._ids)), sum(pack.tokens for pack in self.packs)
        keys = [s.prompt.images.key for s in self.sequences if s.prompt.images is not None]
        return (
            f"{len(self.sequences)} sequences of {separate} tokens run as {packed}, "
            f"{1 - packed / max(separate, 1):.0%} shared; {len(keys)} show images, {len(set(keys))} different ones"
        )

    def _sorted(self, image_token_id: int | None) -> tuple[list[int], list[int]]:
        """Order the scored sequences so that neighbours share most; count the tokens each shares with the one before.

        Groups of equal images and equal ids up to the last placeholder come in order of first appearance; within a
        group, ids are sorted.
        """
        groups: dict[tuple[str, bytes, bytes], list[int]] = {}
        for i, sequence in enumerate(self.sequences):
            if len(self._ids[i]) == 0:
                continue
            marks = placeholders(sequence, image_token_id).cpu().numpy()
            must = int(np.flatnonzero(marks)[-1]) + 1 if marks.any() else 0
            image_key = sequence.prompt.images.key if sequence.prompt.images is not None else ""
            key = (image_key, self._ids[i][:must].tobytes(), marks[:must].tobytes())
            groups.setdefault(key, []).append(i)
        order, shared = [], []
        for group in groups.values():
            group.sort(key=lambda i: self._ids[i].astype(">i8").tobytes())  # big-endian bytes compare as the ids do
            order += group
            shared.append(0)
            shared += [_common_prefix(self._ids[a], self._ids[b]) for a, b in pairwise(group)]
        return order, shared

    def _cuts(self, order: list[int], shared: list[int], budget: int) -> list[tuple[int, int]]:
        """Cut the sorted sequences into packs. A tree that fits a pack of its own is not split."""
        trees = [i for i, n in enumerate(shared) if n == 0] + [len(order)]
        cuts: list[tuple[int, int]] = []
        start, used = 0, 0
        for a, b in pairwise(trees):
            size = sum(len(self._ids[order[i]]) - shared[i] for i in range(a, b))
            if used and used + size > budget and size <= budget:
                cuts.append((start, a))
                start, used = a, 0
            for i in range(a, b):
                length = len(self._ids[order[i]])
                new = length - (shared[i] if i > start else 0)
                if used and used + new > budget:
                    cuts.append((start, i))
                    start, used, new = i, 0, length
                used += new
        return [*cuts, (start, len(order))] if order else []

    def _pack(self, members: list[int], shared: list[int]) -> PrefixPack:
        shared = [0, *shared[1:]]  # nothing precedes the first sequence of a pack
        ids = [self._ids[i] for i in members]
        k_len = np.array([len(x) for x in ids], dtype=np.int64)
        first = np.array(shared, dtype=np.int64)
        q_len = k_len - first
        offset = np.concatenate([[0], np.cumsum(q_len)])
        total = int(offset[-1])

        path = np.empty(0, dtype=np.int64)
        paths, positions = [], []
        end, uses = np.empty(total, dtype=np.int32), np.zeros(total, dtype=np.int64)
        # Tokens whose subtree is still open lie on the current path; a sequence that shares n tokens closes the rest.
        for j, n in enumerate(shared):
            end[path[n:]] = offset[j]
            path = np.concatenate([path[:n], np.arange(offset[j], offset[j + 1])])
            uses[path] += 1
            if q_len[j]:
                paths.append(path)
            sequence = self.sequences[members[j]]
            positions.append(path[len(sequence.prompt.ids) + sequence.scored.cpu().numpy() - 1])
        end[path] = total

        sequence_of = np.repeat(np.arange(len(members)), q_len)
        depth = np.arange(total) - np.repeat(offset[:-1] - first, q_len)
        rows = [np.arange(self._first_row[i], self._first_row[i + 1]) for i in members]
        # A prefix with placeholders is shared by the whole group: its images are fed where the group begins.
        images = [self.sequences[i].prompt.images for i, n in zip(members, shared, strict=True) if n == 0]
        live = q_len > 0
        return PrefixPack(
            members=tuple(members),
            ids=torch.from_numpy(np.concatenate([x[n:] for x, n in zip(ids, shared, strict=True)])),
            sequence=torch.from_numpy(sequence_of),
            depth=torch.from_numpy(depth),
            uses=torch.from_numpy(uses),
            subtree_end=torch.from_numpy(end),
            q_len=torch.from_numpy(q_len[live]),
            k_len=torch.from_numpy(k_len[live]),
            kv_index=torch.from_numpy(np.concatenate(paths)),
            positions=torch.from_numpy(np.concatenate(positions)),
            rows=torch.from_numpy(np.concatenate(rows)),
            images=tuple(each for each in images if each is not None),
        )


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
