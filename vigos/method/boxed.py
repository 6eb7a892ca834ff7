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
    r"""Return the content of the last closed `\boxed{…}`, stripped; None without one."""
    found = boxes(text)
    return text[slice(*found[-1])].strip() if found else None


def fits_in_box(text: str) -> bool:
    r"""Tell if `\boxed{text}` holds all of `text`: its braces match, and no backslash at its end escapes the brace."""
    boxed = BOX_OPEN + text + BOX_CLOSE
    return (len(BOX_OPEN), len(BOX_OPEN) + len(text)) in boxes(boxed)
