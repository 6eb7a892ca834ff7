r"""Find `\boxed{…}` in text or UTF-8 bytes, in one pass.

Braces nest, and a backslash takes the next character's meaning away: `\{` opens nothing. `\boxed {` is not a box.
"""

from __future__ import annotations

import re
from typing import AnyStr

from vigos.method.prompts import BOX_CLOSE, BOX_OPEN

# A doubled backslash before `boxed{`, as in text that was escaped twice, still opens a box.
_TOKEN_TEXT = re.compile(r"\\+boxed\{|\\.|[{}]", re.DOTALL)
_TOKEN_BYTES = re.compile(rb"\\+boxed\{|\\.|[{}]", re.DOTALL)

_JOINT = re.compile(r"(?:[\s,;$&]|\\(?:quad|qquad|[,;: ()\[\]])|\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b)*")


def boxes(text: AnyStr, start: int = 0) -> list[tuple[int, int]]:
    r"""List the content ranges of the closed boxes from `start` on, in the order in which they open.

    Returns:
        half-open ranges (first, end) in characters or bytes; `text[end]` is the closing brace. A box that is never
        closed is left out; boxes inside it are not.
    """
    token: re.Pattern[AnyStr] = _TOKEN_TEXT if isinstance(text, str) else _TOKEN_BYTES  # type: ignore[assignment]
    opened: list[int] = []  # content starts of open braces; -1: not a box
    found = []
    for match in token.finditer(text, start):
        last = match.group()[-1:]
        if len(match.group()) > 2:
            opened.append(match.end())
        elif len(match.group()) == 2:  # an escaped character
            continue
        elif last in ("{", b"{"):
            opened.append(-1)
        elif opened and (first := opened.pop()) >= 0:
            found.append((first, match.start()))
    return sorted(found)


def last_box(text: str) -> str | None:
    r"""Return the content of the last closed `\boxed{…}`, stripped; None without one.

    Boxes with nothing but commas, "and" or "or" between them are one answer: `\boxed{1}, \boxed{2}` gives "1, 2".
    """
    found = boxes(text)
    if not found:
        return None
    first, end = found[-1]
    contents = [text[first:end].strip()]
    for left, right in reversed(found[:-1]):
        if right >= first or not _JOINT.fullmatch(text, right + 1, first - len(BOX_OPEN)):
            break
        contents.insert(0, text[left:right].strip())
        first = left
    return ", ".join(dict.fromkeys(contents))


def fits_in_box(text: str) -> bool:
    r"""Tell if `\boxed{text}` holds all of `text`: its braces match, and no backslash at its end escapes the brace."""
    boxed = BOX_OPEN + text + BOX_CLOSE
    return (len(BOX_OPEN), len(BOX_OPEN) + len(text)) in boxes(boxed)
