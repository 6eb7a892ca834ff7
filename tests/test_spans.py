"""Spans of rollouts: every kind of invalid, every split of every tag, any tokenizer.

The expected ranges never come from the code under test: a rollout is built from pieces whose bytes are known here, and
a token is expected in a span iff its own bytes lie wholly inside the part.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from vigos.method.boxed import fits_in_box, last_box
from vigos.method.spans import REASONS, parse_rollout, token_bytes

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def spell(data: bytes) -> str:
    """Bytes in the byte-level alphabet, by the tokenizers library itself where it can (valid UTF-8)."""
    table = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {b: chr(b) for b in table}
    spelled |= {b: chr(0x100 + k) for k, b in enumerate(b for b in range(256) if b not in spelled)}
    return "".join(spelled[b] for b in data)


def byte_level(pieces=(), merges=(), decoder=None):
    """A byte-level BPE whose vocabulary also holds `pieces` (bytes) and the results of `merges` (pairs of text)."""
    vocab = {c: i for i, c in enumerate(BYTES)}
    for piece in [spell(p) for p in pieces] + [a + b for a, b in merges]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def merges_of(*words):
    """BPE merges that build each word left to right, so that the word becomes one token wherever it occurs."""
    merges = []
    for word in map(spell, (w.encode() for w in words)):
        for k in range(1, len(word)):
            merges.append((word[:k], word[k]))
    return list(dict.fromkeys(merges))


def sentencepiece_like():
    words = ["▁so", "▁it", "▁is", "</", "▁<", "think>", "description>", "\\boxed", "{", "}"]
    chars = sorted({c for w in words for c in w} | set("abcdefghijklmnopqrstuvwxyz .\\{}</>0123456789▁"))
    vocab = {f"<0x{b:02X}>": b for b in range(256)}
    for piece in chars + [w[:k] for w in words for k in range(2, len(w) + 1)]:
        vocab.setdefault(piece, len(vocab))
    merges = list(dict.fromkeys((w[:k], w[k]) for w in words for k in range(1, len(w))))
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token=None, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in plain Python, without offsets: one token for every two characters."""

    def __init__(self, **kwargs):
        self.pieces: list[str] = ["<eos>", "<pad>"]
        super().__init__(eos_token="<eos>", pad_token="<pad>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {p: i for i, p in enumerate(self.pieces)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    def _convert_token_to_id(self, token):
        if token not in self.pieces:
            self.pieces.append(token)
        return self.pieces.index(token)

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def with_tags_added():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think>", "</think>", "</description>"])  # as Qwen3 has its <think>
    return tokenizer


TOKENIZERS = {
    "bytes": byte_level(),
    "merged": byte_level(
        merges=merges_of(
            ".</", ">\\", "{\\", "}}", "> ", ">\n", " <", "\n<", "boxed{", ".<", "description", "think", "7}"
        )
    ),
    "whole": byte_level(merges=merges_of("</description>", "<think>", "</think>", "\\boxed{")),
    "glued": byte_level(merges=merges_of("t.</description><think>s", ".</think>\\boxed{4", "2}")),
    "added": with_tags_added(),
    "sentencepiece": sentencepiece_like(),
    "incremental": byte_level(decoder=decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])),
    "slow": SlowTokenizer(),
}

D, R, A = "A red cat.", "so it is 42.", "42"


def rollout(d=D, r=R, a=A, between="", before_box="", after=""):
    return f"{d}</description>{between}<think>{r}</think>{before_box}\\boxed{{{a}}}{after}"


# name: (text, reason, reason when strict, description, reasoning, answer text); None: the part is not there.
CASES = {
    "plain": (rollout(), "", "", D, R, A),
    "newlines": (rollout("\nA cat.\n", "\nso\n", "4", "\n", "\n\n", "\n"), "", "", "\nA cat.\n", "\nso\n", "4"),
    "unicode": (rollout("Ein 黒い猫 😀", "½ · ñ → 猫", "猫"), "", "", "Ein 黒い猫 😀", "½ · ñ → 猫", "猫"),
    "fraction": (rollout(a=r"\frac{1}{2}"), "", "", D, R, r"\frac{1}{2}"),
    "deep braces": (rollout(a="{{{x}}{y}}"), "", "", D, R, "{{{x}}{y}}"),
    "set": (rollout(a=r"\{1, 2\}"), "", "", D, R, r"\{1, 2\}"),
    "escaped brace alone": (rollout(a=r"\{"), "", "", D, R, r"\{"),
    "escaped backslash": (rollout(a="x\\\\"), "", "", D, R, "x\\\\"),
    "empty box": (rollout(a=""), "", "", D, R, ""),
    "blank box": (rollout(a="  "), "", "", D, R, "  "),
    "one letter each": (rollout("a", "b", "c"), "", "", "a", "b", "c"),
    "angle brackets inside": (rollout("a < b > c </", "x <think y", "1"), "", "", "a < b > c </", "x <think y", "1"),
    "think twice": (rollout(r="one <think> two"), "", "", D, "one <think> two", A),
    "think in the description": (rollout(d="no <think> yet"), "", "", "no <think> yet", R, A),
    "opening tag again": (rollout(d="<description> a cat"), "", "", "<description> a cat", R, A),
    "box in the reasoning": (rollout(r="it is \\boxed{3}, no"), "", "", D, "it is \\boxed{3}, no", A),
    "open box in the reasoning": (rollout(r="it is \\boxed{3"), "", "", D, "it is \\boxed{3", A),
    "wrong answer": (rollout(a="never"), "", "", D, R, "never"),
    "text between": (rollout(between=" Now "), "", "text_before_think", D, R, A),
    "text before the box": (rollout(before_box=" It is $"), "", "text_before_box", D, R, A),
    "text after the box": (rollout(after="$."), "", "text_after_box", D, R, A),
    "second box": (rollout(after=" or \\boxed{9}"), "", "text_after_box", D, R, A),
    "unclosed, then closed": (rollout(before_box="\\boxed{x "), "", "text_before_box", D, R, A),
    "second end of thought": (rollout(before_box="wait</think>"), "", "text_before_box", D, R, A),
    "description twice": (rollout(between="b</description>"), "", "text_before_think", D, R, A),
    "double backslash": (rollout(before_box="\\"), "", "text_before_box", D, R, A),
    "nothing": ("", "tagless", None, None, None, None),
    "tagless": ("The cat is red, so \\boxed{4}.", "tagless", None, None, None, None),
    "description never ends": ("A red cat <think>so</think>\\boxed{4}", "no_description_close", None, None, None, None),
    "only </think>": ("A red cat</think>", "no_description_close", None, None, None, None),
    "damaged close": (rollout().replace("</desc", "</dsc"), "no_description_close", None, None, None, None),
    "upper case": (rollout().replace("</desc", "</DESC"), "no_description_close", None, None, None, None),
    "cut in the tag": (D + "</descriptio", "tagless", None, None, None, None),
    "cut after the description": (D + "</description>", "no_think_open", None, D, None, None),
    "think before": ("<think>a</description> \\boxed{1}", "no_think_open", None, "<think>a", None, None),
    "damaged think": (rollout().replace("<think>", "<thnk>"), "no_think_open", None, D, None, None),
    "cut in the reasoning": (D + "</description><think>so it", "no_think_close", None, D, None, None),
    "damaged think close": (rollout().replace("</think>", "</thin>"), "no_think_close", None, D, None, None),
    "no box": (D + "</description><think>so</think> 42", "no_box", None, D, "so", None),
    "box in the reasoning only": ("b</description><think>\\boxed{1}</think>", "no_box", None, "b", "\\boxed{1}", None),
    "box with a space": (D + "</description><think>so</think>\\boxed {4}", "no_box", None, D, "so", None),
    "fbox": (D + "</description><think>so</think>\\fbox{4}", "no_box", None, D, "so", None),
    "cut in the box": (D + "</description><think>so</think>\\boxed{4", "unbalanced_box", None, D, "so", None),
    "brace missing": (D + "</description><think>so</think>\\boxed{\\frac{1}{2}", "unbalanced_box", None, D, "so", None),
    "brace escaped": (D + "</description><think>so</think>\\boxed{4\\}", "unbalanced_box", None, D, "so", None),
    "empty description": (rollout(d=""), "empty_description", None, "", R, A),
    "blank description": (rollout(d=" \n\t"), "empty_description", None, " \n\t", R, A),
    "unicode blank description": (rollout(d="\u3000\u00a0"), "empty_description", None, "\u3000\u00a0", R, A),
    "empty reasoning": (rollout(r=""), "empty_reasoning", None, D, "", A),
    "blank reasoning": (rollout(r="\n\n"), "empty_reasoning", None, D, "\n\n", A),
    "both empty": (rollout(d="", r=""), "empty_description", None, "", "", A),
}  # fmt: skip


def find_parts(text, description, reasoning, answer):
    """Byte ranges of the parts in `text`, from their known contents. "" for the answer's brace if it is absent."""
    ranges, position = {}, 0
    for name, content, opener in (
        ("description", description, ""),
        ("reasoning", reasoning, "<think>"),
        ("answer", answer, "\\boxed{"),
    ):
        if content is None:
            break
        closer = {"description": "</description>", "reasoning": "</think>", "answer": "}"}[name]
        start = text.index(opener + content + closer, position) + len(opener)
        ranges[name] = (len(text[:start].encode()), len(text[: start + len(content)].encode()))
        position = start + len(content)
    return ranges


def inside(token_ranges, start, end):
    """Expected half-open range of the tokens that lie wholly inside bytes [start, end)."""
    chosen = [i for i, (a, b) in enumerate(token_ranges) if start <= a and b <= end and a < b]
    return (chosen[0], chosen[-1] + 1) if chosen else (0, 0)


def extents(pieces):
    ranges, position = [], 0
    for piece in pieces:
        ranges.append((position, position + len(piece)))
        position += len(piece)
    return ranges


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", CASES)
def test_constructed_rollouts(name, kind):
    text, reason, strict_reason, *parts = CASES[name]
    strict_reason = reason if strict_reason is None else strict_reason
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    padded = [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token_id]
    spans = parse_rollout(padded, tokenizer)
    assert (spans.valid, spans.reason) == (reason == "", reason)
    assert (spans.length, spans.finished) == (len(ids) + 1, True)
    assert spans.answer_text == last_box(text)  # the one rule for what is graded, tested in test_boxed.py
    if parts[2] is not None and name != "second box":
        assert spans.answer_text == parts[2].strip()
    strict = parse_rollout(padded, tokenizer, validity="strict")
    assert (strict.valid, strict.reason) == (strict_reason == "", strict_reason)
    assert (strict.description, strict.reasoning, strict.answer) == (spans.description, spans.reasoning, spans.answer)

    # What the tokens of a span decode to is the text of the part, less only what straddling tokens carry.
    for content, (start, end) in zip(parts, (spans.description, spans.reasoning, spans.answer), strict=True):
        if content is None:
            assert (start, end) == (0, 0)
            continue
        decoded = b"".join(token_bytes(ids, tokenizer)[start:end]).decode(errors="replace")
        assert decoded in content
        if kind == "bytes":
            assert decoded == content
        if kind in ("bytes", "merged", "whole", "added", "sentencepiece"):  # their tokens carry little over a boundary
            assert len(content) - len(decoded) <= 2

    released = parse_rollout(padded, tokenizer, style="released")
    assert (released.valid, released.reason, released.answer) == (spans.valid, spans.reason, (0, 0))
    assert (released.description, released.think_start) == (spans.description, spans.think_start)
    if parts[2] is None:
        assert released.reasoning == (0, 0)
    else:
        start, end = released.reasoning
        assert start == spans.think_start
        tail = b"".join(token_bytes(ids, tokenizer)[start:end]).decode(errors="replace")
        before_last = b"".join(token_bytes(ids, tokenizer)[start : end - 1]).decode(errors="replace")
        assert f"{{{parts[2]}}}" in tail[-len(parts[2]) - 20 :]
        assert not before_last.endswith(f"boxed{{{parts[2]}}}"), "a token after the closing brace is supervised"


def test_every_reason_is_constructed():
    seen = {case[1] for case in CASES.values()} | {case[2] for case in CASES.values()} - {None}
    assert seen | {"image_token"} == {"", *REASONS}
    assert len(CASES) * len(TOKENIZERS) >= 200


# Context of one character on each side, so that every merge with a neighbour is among the segmentations.
@pytest.mark.parametrize("tag", ["</description>", "<think>", "</think>", "\\boxed{", "}"])
def test_every_segmentation_of_a_tag(tag):
    text = rollout("dog", "run", "9", after=" ")
    at = text.index(tag)
    window = text[at - 1 : at + len(tag) + 1].encode()
    vocabulary = {window[i:j] for i in range(len(window)) for j in range(i + 1, len(window) + 1)}
    tokenizer = byte_level(pieces=sorted(vocabulary))
    to_id = {piece: tokenizer.convert_tokens_to_ids(spell(piece)) for piece in vocabulary}
    left, right = text[: at - 1].encode(), text[at + len(tag) + 1 :].encode()
    single = {bytes([b]): tokenizer.convert_tokens_to_ids(spell(bytes([b]))) for b in set(left + right)}
    ranges = find_parts(text, "dog", "run", "9")
    for cuts in product((False, True), repeat=len(window) - 1):
        pieces, start = [], 0
        for k, cut in enumerate(cuts, 1):
            if cut:
                pieces.append(window[start:k])
                start = k
        pieces.append(window[start:])
        all_pieces = [bytes([b]) for b in left] + pieces + [bytes([b]) for b in right]
        ids = [single[p] if p in single else to_id[p] for p in all_pieces]
        spans = parse_rollout(ids, tokenizer)
        token_ranges = extents(all_pieces)
        expected = {name: inside(token_ranges, *r) for name, r in ranges.items()}
        assert spans.valid
        assert {name: getattr(spans, name) for name in ranges} == expected, all_pieces
        released = parse_rollout(ids, tokenizer, style="released")
        first = next(i for i, (a, _) in enumerate(token_ranges) if a >= ranges["reasoning"][0])
        closing = next(i for i, (a, b) in enumerate(token_ranges) if a <= ranges["answer"][1] < b)
        assert released.reasoning == (first, closing + 1)


free_text = st.text(st.sampled_from("ab 7.\n{}\\<>/é猫😀") | st.characters(exclude_categories=["Cs"]), max_size=12)


def clean(text):
    return not any(tag in text for tag in ("</description>", "<think>", "</think>", "\\boxed{"))


@settings(max_examples=300, deadline=None)
@given(free_text, free_text, st.text("ab 7{}\\猫", max_size=8), free_text, free_text, free_text, st.data())
def test_any_text_cut_anywhere(d, r, a, between, before_box, after, data):
    """Any content, tokens cut at any byte: also inside characters, inside tags and over several parts at once."""
    if not all(map(clean, (d + "<", r + "<", between, before_box + "\\", after))) or not fits_in_box(a):
        reject()
    text = rollout(d, r, a, between, before_box, after)
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(raw) - 1), max_size=len(raw)), label="cuts"))
    pieces = [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    tokenizer = byte_level(pieces=pieces)
    ids = [tokenizer.convert_tokens_to_ids(spell(p)) for p in pieces]
    assert token_bytes(ids, tokenizer) == pieces
    spans = parse_rollout(ids, tokenizer)
    expected_reason = "" if d.strip() and r.strip() else "empty_reasoning" if d.strip() else "empty_description"
    assert spans.reason == expected_reason
    assert spans.answer_text == last_box(text) == a.strip()
    assert (spans.length, spans.finished) == (len(ids), False)
    for name, (start, end) in find_parts(text, d, r, a).items():
        assert getattr(spans, name) == inside(extents(pieces), start, end)
    blank_gaps = not (between.strip() or before_box.strip() or after.strip())
    strict = parse_rollout(ids, tokenizer, validity="strict")
    assert strict.valid == (expected_reason == "" and blank_gaps)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["</description>", "<think>", "</think>", "\\boxed{", "}", "{", "x", " "]), max_size=14)
)
def test_validity_equals_a_search_over_all_positions(tokens):
    """Soup of tags, against a reading of the rule by repeated splitting."""
    text = "".join(tokens)
    tokenizer = TOKENIZERS["bytes"]
    spans = parse_rollout(tokenizer(text)["input_ids"], tokenizer)

    def expected():
        head, sep, rest = text.partition("</description>")
        if not sep:
            return "no_description_close" if "think>" in text else "tagless"
        _, sep, rest = rest.partition("<think>")
        if not sep:
            return "no_think_open"
        thought, sep, rest = rest.partition("</think>")
        if not sep:
            return "no_think_close"
        boxes = rest.split("\\boxed{")
        if len(boxes) == 1:
            return "no_box"
        for k in range(1, len(boxes)):
            depth = 1
            for c in "\\boxed{".join(boxes[k:]):
                depth += {"{": 1, "}": -1}.get(c, 0)
                if depth == 0:
                    return (
                        ""
                        if head.strip() and thought.strip()
                        else f"empty_{'reasoning' if head.strip() else 'description'}"
                    )
        return "unbalanced_box"

    assert spans.reason == expected()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@pytest.mark.parametrize("kind", ["bytes", "merged", "incremental", "sentencepiece"])
def test_token_bytes_join_to_the_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    if kind == "sentencepiece":  # ▁ is its space
        text = text.replace("▁", "_")
    if kind == "incremental":  # a decoded U+FFFD cannot be told from an incomplete character
        text = text.replace("\ufffd", "?")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(ids, tokenizer)).decode() == text


def test_incremental_decoding_keeps_characters_off_the_delimiter():
    """A character split over tokens ends before the tag: its tokens stay in the description."""
    tokenizer = TOKENIZERS["incremental"]
    ids = tokenizer(rollout(d="a 😀"))["input_ids"]
    assert parse_rollout(ids, tokenizer).description == (0, 6)
    broken = [*tokenizer("a")["input_ids"], *tokenizer("😀")["input_ids"][:2], *tokenizer(rollout(d="b"))["input_ids"]]
    spans = parse_rollout(broken, tokenizer)  # bytes that never become a character
    assert spans.valid
    assert spans.description == (0, 4)


def test_incomplete_characters_at_a_cut_rollout_are_not_lost():
    for kind in ("bytes", "incremental"):
        tokenizer = TOKENIZERS[kind]
        ids = tokenizer("ab😀")["input_ids"][:-2]
        assert len(token_bytes(ids, tokenizer)) == len(ids)
        assert parse_rollout(ids, tokenizer).reason == "tagless"


def test_end_of_sequence_and_padding():
    tokenizer = byte_level()
    ids = tokenizer(rollout())["input_ids"]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert parse_rollout([*ids, pad, pad], tokenizer).length == len(ids)
    assert not parse_rollout([*ids, pad, pad], tokenizer).finished
    assert parse_rollout([*ids, eos, *ids], tokenizer).length == len(ids) + 1
    # Several ids may end a turn (Qwen: <|im_end|> and <|endoftext|>); what follows the first of them is not read.
    cut = parse_rollout([*ids[:-1], pad, ids[-1]], tokenizer, eos_token_ids=[eos, pad])
    assert (cut.reason, cut.length, cut.finished) == ("unbalanced_box", len(ids), True)
    assert parse_rollout([*ids, eos], tokenizer, eos_token_ids=pad).finished is False
    assert parse_rollout([], tokenizer) == parse_rollout([pad], tokenizer)


def test_image_tokens_reject_the_row():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|image_pad|>"], special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = tokenizer(rollout())["input_ids"]
    spans = parse_rollout([*ids[:3], image, *ids[3:]], tokenizer, image_token_ids=[image])
    assert (spans.valid, spans.reason, spans.description, spans.length) == (False, "image_token", (0, 0), len(ids) + 1)
    # Unless told otherwise it is text like any other; after the end it does not matter.
    assert parse_rollout([*ids[:3], image, *ids[3:]], tokenizer).valid
    assert parse_rollout([*ids, tokenizer.eos_token_id, image], tokenizer, image_token_ids=[image]).valid


def test_ids_beyond_the_tokenizer_are_empty_text():
    """Padded vocabularies: a model can sample an id that its tokenizer does not have."""
    tokenizer = byte_level()
    ids = tokenizer(rollout())["input_ids"]
    assert parse_rollout([100_000, *ids, 100_001], tokenizer).valid


def test_tokens_added_later_are_read():
    tokenizer = byte_level()
    parse_rollout(tokenizer(rollout())["input_ids"], tokenizer)
    tokenizer.add_tokens(["<think>"])
    ids = tokenizer(rollout())["input_ids"]
    assert b"<think>" in token_bytes(ids, tokenizer)
    assert parse_rollout(ids, tokenizer).valid


@pytest.mark.parametrize(
    "kind", [list, torch.tensor, lambda x: torch.tensor(x).numpy()], ids=["list", "tensor", "array"]
)
def test_kinds_of_ids_and_processors(kind):
    tokenizer = byte_level()

    class Processor:
        pass

    processor = Processor()
    processor.tokenizer = tokenizer
    ids = tokenizer(rollout())["input_ids"]
    assert parse_rollout(kind(ids), processor) == parse_rollout(ids, tokenizer)


def test_wrong_arguments_are_named():
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="style must be one of paper, released, got 'papers'"):
        parse_rollout([1], tokenizer, style="papers")
    with pytest.raises(ValueError, match="validity must be one of loose, strict, got 'lax'"):
        parse_rollout([1], tokenizer, validity="lax")
    with pytest.raises(ValueError, match=r"ids must be one completion of shape \(C,\)"):
        parse_rollout([[1, 2]], tokenizer)


WORLD = Path(__file__).parents[1] / "vigos" / "world" / "checkpoint"


@pytest.mark.skipif(not (WORLD / "tokenizer.json").exists(), reason="the built-in checkpoint is not in this tree")
def test_built_in_tokenizer_crosses_tag_boundaries():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WORLD)
    text = rollout("the 7 is red.", "the 7 is red.", "red")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_bytes(ids, tokenizer)
    assert b"".join(pieces).decode() == text
    ranges = find_parts(text, "the 7 is red.", "the 7 is red.", "red")
    straddling = [(a, b) for a, b in extents(pieces) for edges in ranges.values() for e in edges if a < e < b]
    assert straddling, "no token crosses a tag boundary: the tokenizer does not exercise the rule"
    spans = parse_rollout(ids, tokenizer)
    assert spans.valid
    assert {n: getattr(spans, n) for n in ranges} == {n: inside(extents(pieces), *r) for n, r in ranges.items()}
