"""The plan of a pack against the definition: every sequence finds its own tokens, in order, and nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import IMAGE, fed, fed_alone, prompt, visible_keys, words
from hypothesis import given, settings
from hypothesis import strategies as st

from vigos.method.encode import EncodedPrompt, ImageInputs, ScoredSequence
from vigos.scoring.prefix_tree import PrefixTree, model_input_ids


def sequence(ids, completion, scored, images=None, types=None):
    encoded = EncodedPrompt(torch.tensor(ids), None if types is None else torch.tensor(types), images)
    return ScoredSequence(encoded, torch.tensor(completion, dtype=torch.int64), torch.tensor(scored, dtype=torch.int64))


def image(value: float) -> ImageInputs:
    return ImageInputs.from_tensors({"pixel_values": torch.full((2, 3), value)})


def check(tree: PrefixTree, budget: int) -> None:
    """Every property of the plan that the model's result rests on, from the definition and token by token."""
    rows = torch.cat([pack.rows for pack in tree.packs]) if tree.packs else torch.empty(0, dtype=torch.int64)
    assert sorted(rows.tolist()) == list(range(sum(len(s.scored) for s in tree.sequences)))
    first_row = [0]
    for each in tree.sequences:
        first_row.append(first_row[-1] + len(each.scored))
    for pack in tree.packs:
        mask, ids = visible_keys(pack), pack.ids
        assert len(pack.members) == 1 or pack.tokens <= budget
        for token, row in zip(pack.positions.tolist(), pack.rows.tolist(), strict=True):
            i = max(j for j in range(len(tree.sequences)) if first_row[j] <= row and len(tree.sequences[j].scored))
            member = tree.sequences[i]
            length = len(member.prompt.ids) + int(member.scored[row - first_row[i]])
            seen = torch.nonzero(mask[token])[:, 0]
            assert ids[seen].tolist() == torch.cat([member.prompt.ids, member.completion_ids])[:length].tolist()
            assert pack.depth[seen].tolist() == list(range(length))
        # The segments describe the same visibility: query j of a segment sees its keys up to k_len - q_len + j.
        q_start = k_start = 0
        for q_len, k_len in zip(pack.q_len.tolist(), pack.k_len.tolist(), strict=True):
            keys = pack.kv_index[k_start : k_start + k_len]
            for j in range(q_len):
                assert torch.nonzero(mask[q_start + j])[:, 0].tolist() == keys[: k_len - q_len + j + 1].tolist()
            q_start, k_start = q_start + q_len, k_start + k_len
        assert q_start == pack.tokens
        assert k_start == len(pack.kv_index)


@st.composite
def token_sets(draw):
    """Sequences over three letters, so that prefixes collide at every depth; repeats included."""
    out = []
    for _ in range(draw(st.integers(0, 9))):
        ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        completion = draw(st.lists(st.integers(0, 2), max_size=6))
        scored = sorted(draw(st.sets(st.integers(0, max(len(completion) - 1, 0)), max_size=len(completion))))
        out.append(sequence(ids, completion, scored if completion else []))
    return out


@settings(max_examples=150, deadline=None)
@given(token_sets(), st.integers(1, 40))
def test_plan_is_the_tree_of_prefixes(sequences, budget):
    tree = PrefixTree(sequences, token_budget=budget)
    check(tree, budget)
    whole = PrefixTree(sequences, token_budget=10**6)
    check(whole, 10**6)
    distinct = {
        tuple(model_input_ids(s)[:n].tolist()) for s in sequences for n in range(1, len(model_input_ids(s)) + 1)
    }
    assert fed(whole) == len(distinct), "a prefix is computed twice, or one that nobody needs"


def test_images_decide_what_is_shared():
    ids, types = [5, IMAGE, IMAGE, 6, 7], [0, 1, 1, 0, 0]
    a, b = image(1.0), image(2.0)
    same = PrefixTree([sequence(ids, [1, 2], [1], a, types), sequence(ids, [1, 3], [1], a, types)])
    assert [p.tokens for p in same.packs] == [6]  # the whole prompt and token 1; the last scored token is never fed
    assert len(same.packs[0].images) == 1
    other = PrefixTree([sequence(ids, [1, 2], [1], a, types), sequence(ids, [1, 2], [1], b, types)])
    assert fed(other) == fed_alone(other.sequences) == 12, "equal ids with different images were shared"
    assert [each.key for each in other.packs[0].images] == [a.key, b.key]


def test_a_shared_prefix_covers_every_placeholder():
    """Two images' placeholders, of which only the first agree: nothing is shared, not even what precedes them."""
    a = image(1.0)
    one = sequence([5, IMAGE, IMAGE, 6, IMAGE], [1], [0], a, [0, 1, 1, 0, 1])
    two = sequence([5, IMAGE, IMAGE, 7, IMAGE], [1], [0], a, [0, 1, 1, 0, 1])
    tree = PrefixTree([one, two])
    assert fed(tree) == fed_alone(tree.sequences)
    assert len(tree.packs[0].images) == 2


def test_placeholders_without_token_types():
    ids = [5, IMAGE, IMAGE, 6, 7]
    pair = [sequence([*ids, 8], [1, 2], [1], image(1.0)), sequence([*ids, 9], [1, 2], [1], image(1.0))]
    assert fed(PrefixTree(pair, image_token_id=IMAGE)) == 5 + 2 * 2
    # No way to tell where the placeholders are: only whole prompts are shared.
    assert fed(PrefixTree(pair)) == fed_alone(PrefixTree(pair).sequences)


def test_a_split_tree_repeats_its_prefix_and_its_image():
    members = [sequence([5, IMAGE, 6], [i, 1, 1], [2], image(1.0), [0, 1, 0]) for i in range(10, 14)]
    tree = PrefixTree(members, token_budget=7)
    assert [p.tokens for p in tree.packs] == [7, 7]
    assert [len(p.images) for p in tree.packs] == [1, 1]
    check(tree, 7)


def test_a_tree_that_fits_a_pack_of_its_own_is_not_split():
    first = [sequence([1, 2, 3], [4, 5], [1])]
    second = [sequence([9, 8, 7], [i, 1], [1]) for i in range(3)]
    tree = PrefixTree([*first, *second], token_budget=6)
    assert [p.tokens for p in tree.packs] == [4, 6]


def test_nothing_to_score():
    assert PrefixTree([]).packs == []
    assert PrefixTree([sequence([1, 2], [3], [])]).packs == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixTree([sequence([1], [2], [1])]), r"scored of .* must increase within \[0, 1\)"),
        (lambda: PrefixTree([sequence([1], [2, 3], [1, 0])]), "must increase"),
        (lambda: PrefixTree([sequence([1], [2, 3], [-1])]), "must increase"),
        (lambda: PrefixTree([sequence([], [2, 3], [1])]), "at least one token, got none"),
        (lambda: PrefixTree([], token_budget=0), "token_budget must be at least 1, got 0"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def step(rollouts: int, image_tokens: int, invalid: int = 0) -> tuple[list[ScoredSequence], int]:
    """A step as the method routes it, and the tokens of the released scheme: three whole padded forwards a rollout.

    One prompt, descriptions of 100 tokens, completions of 300. `invalid` of the rollouts go to the reference teacher.
    """
    family, size = "qwen2_5_vl", [(2 * image_tokens // 16, 32)]
    perception = prompt(family, size, question=words(5, 1), head=20)
    reasoning = prompt(family, size, question=words(120, 2), head=20)
    reference = prompt(family, size, question=words(160, 3), head=20)
    out, longest = [], 0
    for r in range(rollouts):
        completion = words(300, 100 + r)
        longest = max(len(p.ids) for p in (perception, reasoning, reference)) + 300
        if r < invalid:
            out.append(ScoredSequence(reference, completion, torch.arange(300), (r, "reference")))
        else:
            out.append(ScoredSequence(perception, completion, torch.arange(100), (r, "perception")))
            out.append(ScoredSequence(reasoning, completion, torch.arange(105, 300), (r, "reasoning")))
    return out, 3 * rollouts * longest


def test_tokens_fall_as_designed():
    """Section 5 of the design: about 6.3 times fewer tokens than the released scheme at four rollouts a prompt."""
    sequences, released = step(4, 1024)
    tree = PrefixTree(sequences, image_token_id=IMAGE)
    check(tree, 16_384)
    assert released / fed(tree) > 6.3
    single, released_single = step(1, 1024)
    assert released_single / fed(PrefixTree(single, image_token_id=IMAGE)) > 2.8
