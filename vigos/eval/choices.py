"""Read answers to multiple-choice questions: letters, letters with their text, and the options of a question."""

from __future__ import annotations

import re

from vigos.eval.normalise import plain

_LETTER = r"[(\[]?\s*([A-J])\s*[)\]]?"
_ALONE = re.compile(rf"(?:option|choice)?\s*{_LETTER}\s*[.,:;)]*", re.IGNORECASE)
_WITH_TEXT = re.compile(
    r"(?:(?:option|choice)\s+)?(?:[(\[]\s*([A-Ja-j])\s*[)\]]\s*[.:-]?|([A-J])\s*[.):]|([A-J])\s+-\s|([A-J])(?=\s+\())"
    r"\s*(\S.*)",
    re.DOTALL | re.IGNORECASE,
)
_REASONED = re.compile(r"([A-J])\s*(?:,|because|since|as\s)\s*\S.*", re.DOTALL)
_SEVERAL = re.compile(rf"{_LETTER}(?:\s*(?:[,;&/]|and|\s)\s*{_LETTER})+\s*\.?", re.IGNORECASE)
_OTHER_MARK = re.compile(r"\(\s*[a-jA-J]\s*\)|\b[a-jA-J]\s*[:)]")
_OPTION_LINE = re.compile(r"^\s*(?:\(([A-J])\)|([A-J])\s*[.):])\s*(\S.*?)\s*$", re.MULTILINE)


def chosen_letters(text: str, *, reasons: bool = False) -> tuple[frozenset[str], str] | None:
    """Return the letters that an answer names, and the text given with a single one; None if it names none.

    Args:
        text: `B`, `(b)`, `**B**`, `Option B`, `B. red`, `B - red`, `B (red)`, `A, C`; a list of labelled answers such
            as `(a) 5, (b) 6` names none.
        reasons: also take a letter with a reason after it, `B because …`.
    """
    text = plain(text)
    if match := _ALONE.fullmatch(text):
        return frozenset(match[1].upper()), ""
    if _SEVERAL.fullmatch(text):
        return frozenset(re.findall("[A-J]", re.sub("(?i)and", "", text).upper())), ""
    match = _WITH_TEXT.fullmatch(text)
    if match and not _OTHER_MARK.search(match[5]):
        *letters, rest = match.groups()
        return frozenset(next(letter for letter in letters if letter).upper()), rest.strip().rstrip(".")
    if reasons and (match := _REASONED.fullmatch(text)):
        return frozenset(match[1]), ""
    return None


def options_in(problem: str) -> list[str]:
    """Return the options that a question lists on lines of their own as `(A) …`, `A. …` or `A: …`; [] without any."""
    options: list[str] = []
    for match in _OPTION_LINE.finditer(problem):
        letter = match[1] or match[2]
        if letter == "A":
            options = [match[3]]
        elif options and letter == chr(ord("A") + len(options)):
            options.append(match[3])
    return options if len(options) > 1 else []
