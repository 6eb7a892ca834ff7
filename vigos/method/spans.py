r"""Positions of the description, the reasoning and the answer among a rollout's tokens.

    <description> … </description> <think> … </think> \boxed{ … }
    (prefilled)^ the completion starts here

The text is found first and mapped back to tokens by offsets. Offsets come from the ids themselves (each token's own
bytes), never from tokenising the text again: BPE may split a tag over several tokens or merge it with its neighbours,
and re-tokenised text need not give the sampled ids back. Offsets count bytes: the delimiters are ASCII, and an ASCII
byte is never part of a longer UTF-8 character, so a character split over tokens needs no special case.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

from vigos.method.boxed import boxes, last_box
from vigos.method.prompts import BOX_OPEN, DESCRIPTION_CLOSE, THINK_CLOSE, THINK_OPEN

SpanStyle = Literal["paper", "released"]
Validity = Literal["loose", "strict"]

# Every value of `Spans.reason`, in the order in which they are looked for.
REASONS = (
    "image_token",  # an image placeholder was sampled: the row cannot be scored at all
    "tagless",  # none of </description>, <think>, </think>: the model did not take up the format
    "no_description_close",
    "no_think_open",
    "no_think_close",
    "no_box",
    "unbalanced_box",  # \boxed{ was opened after </think>, and never closed
    "empty_description",
    "empty_reasoning",
    "text_before_think",  # validity="strict": more than white space between </description> and <think>
    "text_before_box",
    "text_after_box",
)

_NONE = (0, 0)
_DESCRIPTION_CLOSE, _THINK_OPEN, _THINK_CLOSE, _BOX_OPEN = (
    tag.encode() for tag in (DESCRIPTION_CLOSE, THINK_OPEN, THINK_CLOSE, BOX_OPEN)
)


@dataclass(frozen=True)
class Spans:
    """The parts of one completion as half-open ranges of its token indices; (0, 0) where a part is absent.

    A token that straddles a boundary belongs to the delimiter, so a range holds the tokens that lie wholly inside the
    part; it is (0, 0) as well when no token does (an answer `7` in the token `{7}`). An invalid rollout keeps the
    ranges of the parts that were found before it broke off.

    Attributes:
        valid: the rollout follows the format.
        reason: "" if valid, otherwise one of `REASONS`.
        description: the text before `</description>`.
        reasoning: style "paper": the text between `<think>` and `</think>`. Style "released": everything from after
            `<think>` up to and including the token that closes the box (`</think>` and `\\boxed{…}` are inside).
        answer: style "paper": the text in the box. Style "released": (0, 0), since it is part of `reasoning`.
        length: completion tokens up to and including the first end-of-sequence token; padding is not counted.
        finished: the completion ends with an end-of-sequence token. A rollout cut at the token limit does not.
        think_start: index of the first token that starts after `<think>`; None without `<think>`.
        answer_text: the text of the last box, of valid and invalid rollouts alike: what is graded. It is the text of
            `answer` unless there are several boxes. None without a balanced box.
    """

    valid: bool
    reason: str
    description: tuple[int, int] = _NONE
    reasoning: tuple[int, int] = _NONE
    answer: tuple[int, int] = _NONE
    length: int = 0
    finished: bool = False
    think_start: int | None = None
    answer_text: str | None = None


def parse_rollout(
    ids: Any,
    tokenizer: Any,
    *,
    style: SpanStyle = "paper",
    validity: Validity = "loose",
    eos_token_ids: int | Collection[int] | None = None,
    image_token_ids: Collection[int] = (),
) -> Spans:
    r"""Find description, reasoning and answer in a completion that follows a prefilled `<description>`.

    Valid means, in this order: `</description>`, a later `<think>`, a later `</think>`, a later `\boxed{` whose braces
    balance, and something but white space in the description and in the reasoning. Each is the first one after the
    part before it; the box is the first *balanced* one after `</think>`. Braces nest, and a backslash takes the next
    character's meaning away (`\{` opens nothing). `\boxed {` is not a box. An empty box is valid: a wrong answer is.

    Args:
        ids: (C,) completion ids: list, array or tensor on any device (fetched once).
        tokenizer: a transformers tokenizer, or a processor that has one.
        style: which tokens count as supervised, see `Spans`.
        validity: "loose", or "strict": also nothing but white space between the parts and after the box.
        eos_token_ids: ids that end a completion. None: the tokenizer's own. Models whose generation config stops at
            several ids need them all here.
        image_token_ids: placeholders of image features; one of them in the completion makes it invalid, with no spans.
    """
    if style not in get_args(SpanStyle):
        raise ValueError(f"style must be one of {', '.join(get_args(SpanStyle))}, got {style!r}")
    if validity not in get_args(Validity):
        raise ValueError(f"validity must be one of {', '.join(get_args(Validity))}, got {validity!r}")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    content, length, finished = _content_ids(_as_list(ids), tokenizer, eos_token_ids)

    pieces = token_bytes(content, tokenizer)
    text = b"".join(pieces)
    answer_text = last_box(text.decode("utf-8", "replace"))

    def result(reason: str, **parts: Any) -> Spans:
        return Spans(not reason, reason, length=length, finished=finished, answer_text=answer_text, **parts)

    if image_token_ids and not set(image_token_ids).isdisjoint(content):
        return result("image_token")

    ends = list(accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]

    def tokens_within(start: int, end: int) -> tuple[int, int]:
        """Return [first, last) of the tokens that lie entirely in bytes [start, end)."""
        first, last = bisect_left(starts, start), bisect_right(ends, end)
        return (first, last) if first < last else _NONE

    def blank(start: int, end: int) -> bool:
        return not text[start:end].decode("utf-8", "replace").strip()

    parts: dict[str, Any] = {}
    description_end = text.find(_DESCRIPTION_CLOSE)
    if description_end < 0:
        tagless = _THINK_OPEN not in text and _THINK_CLOSE not in text
        return result("tagless" if tagless else "no_description_close")
    parts["description"] = tokens_within(0, description_end)
    after_description = description_end + len(_DESCRIPTION_CLOSE)

    think_open = text.find(_THINK_OPEN, after_description)
    if think_open < 0:
        return result("no_think_open", **parts)
    reasoning_start = think_open + len(_THINK_OPEN)
    parts["think_start"] = bisect_left(starts, reasoning_start)

    reasoning_end = text.find(_THINK_CLOSE, reasoning_start)
    if reasoning_end < 0:
        return result("no_think_close", **parts)
    after_think = reasoning_end + len(_THINK_CLOSE)
    if style == "paper":
        parts["reasoning"] = tokens_within(reasoning_start, reasoning_end)

    closed = boxes(text, after_think)
    if not closed:
        return result("unbalanced_box" if _BOX_OPEN in text[after_think:] else "no_box", **parts)
    answer_start, answer_end = closed[0]
    if style == "paper":
        parts["answer"] = tokens_within(answer_start, answer_end)
    else:  # the token that carries the closing brace is the last one, whatever else it carries
        first, last = parts["think_start"], bisect_right(starts, answer_end)
        parts["reasoning"] = (first, last) if first < last else _NONE

    if blank(0, description_end):
        return result("empty_description", **parts)
    if blank(reasoning_start, reasoning_end):
        return result("empty_reasoning", **parts)
    if validity == "strict":
        gaps = {
            "text_before_think": (after_description, think_open),
            "text_before_box": (after_think, answer_start - len(_BOX_OPEN)),
            "text_after_box": (answer_end + 1, len(text)),
        }
        for reason, gap in gaps.items():
            if not blank(*gap):
                return result(reason, **parts)
    return result("", **parts)


def token_bytes(ids: Sequence[int], tokenizer: Any) -> list[bytes]:
    """Return the bytes that each token adds to the text; joined they are the UTF-8 text of `ids`.

    Special tokens count with their literal text. Ids that the tokenizer does not know (padded vocabularies) are empty.
    Byte-level BPE and SentencePiece-like tokenizers (`▁` and `<0xAB>` pieces) are read off their vocabulary; all others
    are decoded incrementally, and there a character split over tokens is put on the first of them.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    table = _tables.get(tokenizer)
    if table is None:
        table = _tables[tokenizer] = _TokenTable(_scheme(tokenizer))
    if table.scheme == "other":
        return _decode_incrementally(ids, tokenizer)
    known = table.pieces
    missing = sorted({i for i in ids if i not in known})
    if missing:
        known |= _read_pieces(missing, tokenizer, table.scheme)
    return [known[i] for i in ids]


# --- Byte offsets of tokens -------------------------------------------------------------------------------------------

Scheme = Literal["byte_level", "sentencepiece", "other"]


class _TokenTable:
    """Bytes of the tokens seen so far; a vocabulary of 150,000 entries is not worth reading whole."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.pieces: dict[int, bytes] = {}


_tables: WeakKeyDictionary[Any, _TokenTable] = WeakKeyDictionary()


def _scheme(tokenizer: Any) -> Scheme:
    """Tell from the decoder of a fast tokenizer how the vocabulary spells bytes; anything unfamiliar is "other"."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return "other"
    state = json.loads(decoder.__getstate__())
    kinds = [d["type"] for d in state["decoders"]] if state["type"] == "Sequence" else [state["type"]]
    if kinds == ["ByteLevel"]:
        return "byte_level"
    if kinds == ["Metaspace"]:
        return "sentencepiece" if state["replacement"] == "▁" else "other"
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replaces = [d for d in state["decoders"] if d["type"] == "Replace"]
        if all(d["pattern"] == {"String": "▁"} and d["content"] == " " for d in replaces):
            return "sentencepiece"
    return "other"


def _read_pieces(ids: Sequence[int], tokenizer: Any, scheme: Scheme) -> dict[int, bytes]:
    added = tokenizer.added_tokens_decoder
    pieces: dict[int, bytes] = {}
    for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if i in added:
            pieces[i] = added[i].content.encode()
        elif piece is None:
            pieces[i] = b""
        elif scheme == "byte_level":
            values = [_byte_alphabet().get(c) for c in piece]
            # A piece outside the alphabet stands for itself, as in the tokenizers library.
            pieces[i] = piece.encode() if None in values else bytes(v for v in values if v is not None)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            pieces[i] = bytes([int(piece[3:5], 16)])
        else:
            pieces[i] = piece.replace("▁", " ").encode()
    return pieces


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's spelling of the 256 bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + k): b for k, b in enumerate(rest)}


def _decode_incrementally(ids: Sequence[int], tokenizer: Any) -> list[bytes]:
    """Decode growing windows into the text of each token, where the vocabulary says nothing about bytes.

    Each window starts with tokens already emitted, since decoding may treat the first token of a text specially.
    """

    def decode(window: Sequence[int]) -> str:
        return tokenizer.decode(list(window), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces = [b""] * len(ids)
    context, read = 0, 0  # ids[context:read] are emitted and are the window's context
    emitted = ""
    for i in range(len(ids)):
        text = decode(ids[context : i + 1])
        # U+FFFD at the end: a character that is not complete yet. After four tokens it never will be.
        if text.endswith("\ufffd") and i - read < 3 and i + 1 < len(ids):
            continue
        new = text[len(emitted) :]
        if read < i:  # ids[read:i] were held back: what they left incomplete is the first character that changed
            complete = decode(ids[context : read + 1])[len(emitted) :].rstrip("\ufffd")
            cut = min(len(complete) + 1, len(new))
            pieces[read], pieces[i] = new[:cut].encode(), new[cut:].encode()
        else:
            pieces[i] = new.encode()
        context, read = read, i + 1
        emitted = decode(ids[context:read])
    return pieces


# --- Completion ids -------------------------------------------------------------------------------------------------


def _as_list(ids: Any) -> list[int]:
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if values and isinstance(values[0], Iterable):
        raise ValueError(
            "ids must be one completion of shape (C,), got a nested sequence; parse one completion at a time"
        )
    return values


def _content_ids(
    ids: list[int], tokenizer: Any, eos_token_ids: int | Collection[int] | None
) -> tuple[list[int], int, bool]:
    """Return the ids before the first end-of-sequence token, the length with it, and whether there is one."""
    if eos_token_ids is None:
        eos = tokenizer.eos_token_id
        eos_token_ids = () if eos is None else eos
    ends = {eos_token_ids} if isinstance(eos_token_ids, int) else set(eos_token_ids)
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i], i + 1, True
    end, pad = len(ids), tokenizer.pad_token_id
    while end > 0 and ids[end - 1] == pad:  # a rollout cut at the limit, padded to a longer one of its batch
        end -= 1
    return ids[:end], end, False
