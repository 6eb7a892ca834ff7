r"""Is an answer right? Offline, deterministic, bounded in time.

    grade(last_box(completion), "1/2")

`grade` asks in this order, and the first question that applies decides:

1. The same text, after LaTeX wrappers, case, spaces, a final full stop and a leading article are taken off?
2. Is the reference a choice, `B`, `(B)`, `B.` or `(B) red`? Then the letter of the prediction counts, or the text of
   that choice.
3. Are both a number, with or without a unit (`1,200`, `\frac{3}{4}`, `1 1/2`, `3 \times 10^4`, `50\%`, `two`, `5 cm`)?
   Then they must be equal to 1e-6 relative; units of one kind are converted, different kinds are wrong, a unit that
   only one side states is ignored, and 50 % is 50 as well as 0.5.
4. Are both mathematics, with no words in them? Then math-verify compares them, in a process of its own.
5. Otherwise it is wrong. Words never reach step 4: as products of letters, `red` equals `der`.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from fractions import Fraction
from pathlib import Path

from vigos.sandbox import Worker, WorkerDied

logger = logging.getLogger(__name__)


def grade(prediction: str | None, answer: str, *, timeout_s: float = 5.0) -> bool:
    """Whether `prediction` says the same as the reference `answer`, see the module's docstring.

    Args:
        prediction: the content of the box, or None where there is no box: wrong.
        timeout_s: bound on step 4. An expression that takes longer is wrong, and logged.
    """
    if prediction is None or not prediction.strip():
        return False
    said, wanted = normalise(prediction), normalise(answer)
    if said == wanted:
        return True
    choice = _choice(answer)
    if choice is not None:
        letter, text = choice
        picked = _choice(prediction)
        if picked is not None:
            return picked[0] == letter
        return bool(text) and said == normalise(text)
    ours, theirs = _quantity(said), _quantity(wanted)
    if ours is not None and theirs is not None:
        return _same_quantity(ours, theirs)
    if _is_mathematics(said) and _is_mathematics(wanted):
        return _worker.verify(_unwrapped(prediction), _unwrapped(answer), timeout_s)
    return False


# --- 1. Text ----------------------------------------------------------------------------------------------------------

_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:quad|qquad|left|right|displaystyle)(?![a-zA-Z])|~")
_SUPERSCRIPTS = str.maketrans({"²": "^2", "³": "^3", "−": "-", "–": "-", "⁄": "/", "’": "'", "×": r"\times "})
_LEAD_IN = re.compile(r"^(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*[:=])\s*:?\s*", re.IGNORECASE)


def _unwrapped(text: str) -> str:
    """`text` without math delimiters, text wrappers and spacing commands."""
    text = unicodedata.normalize("NFKC", text.translate(_SUPERSCRIPTS)).translate(_SUPERSCRIPTS).strip()
    text = _LEAD_IN.sub("", text)
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)]
    before = None
    while before != text:  # wrappers nest
        before, text = text, _WRAPPERS.sub(r"\1", text)
    text = _SPACING.sub(" ", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace(r"\%", "%").replace(r"\$", "$").replace("{,}", ",")
    text = re.sub(r"\^\s*\{?\\circ\}?", "°", text)
    return " ".join(text.split())


def normalise(text: str) -> str:
    """`text` in the form in which answers are compared as text."""
    text = _unwrapped(text).casefold().strip("\"'`")
    text = re.sub(r"\.$", "", text).strip()
    text = re.sub(r"\s*([,;:()\[\]{}=+*/<>])\s*", r"\1", text)
    return re.sub(r"^(?:the|an?) (?=\S)", "", text)


# --- 2. Choices -------------------------------------------------------------------------------------------------------

_CHOICE = re.compile(
    r"^(?:(?i:option|choice))?\s*(?:\(([A-Ja-j])\)|([A-J])\s*[.):]|([A-J])(?=\s*$))\s*(.*)$", re.DOTALL
)


def _choice(text: str) -> tuple[str, str] | None:
    """(letter, text of the choice) of `B`, `(B)`, `(b)`, `B.`, `B) red`, `Option B`; None for anything else."""
    match = _CHOICE.match(_unwrapped(text).rstrip(".").strip())
    if match is None:
        return None
    parenthesised, marked, alone, rest = match.groups()
    return (parenthesised or marked or alone).upper(), rest.strip()


# --- 3. Quantities ----------------------------------------------------------------------------------------------------

_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_QUANTITY = re.compile(
    rf"""^(?P<sign>[-+]?)\s*\$?\s*(?:
        (?:(?P<whole>\d+)[ ])?(?:\\frac\s*\{{(?P<top>-?{_DECIMAL})\}}\s*\{{(?P<bottom>{_DECIMAL})\}}
                              |\\frac\s*(?P<top1>\d)\s*(?P<bottom1>\d)
                              |(?P<top2>{_DECIMAL})/(?P<bottom2>{_DECIMAL}))
        |(?P<mantissa>{_DECIMAL})(?:e(?P<exponent>[-+]?\d{{1,3}})|\s*(?:\\times|\\cdot|\*)\s*10\^\{{?(?P<power>-?\d{{1,3}})\}}?)?
        |10\^\{{?(?P<bare>-?\d{{1,3}})\}}?
    )\s*(?P<unit>%|[^\d\s{{}}\\^+*/=<>(),-][^\d{{}}\\+*=<>(),-]*(?:\^\{{?[23]\}}?)?)?$""",
    re.VERBOSE,
)

_NO_UNIT = re.compile(r"\b(?:and|or|is|not|to|but|of)\b")  # "7 and red" is not seven of something


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """(value, unit or "") of a normalised text that is one number; None otherwise."""
    if text in _WORDS:
        return Fraction(_WORDS.index(text)), ""
    match = _QUANTITY.match(text)
    if match is None or _NO_UNIT.search(match["unit"] or ""):
        return None
    part = {name: value.replace(",", "") if value else value for name, value in match.groupdict().items()}
    top = part["top"] or part["top1"] or part["top2"]
    if top is not None:
        bottom = Fraction(part["bottom"] or part["bottom1"] or part["bottom2"])
        if bottom == 0:
            return None
        value = Fraction(part["whole"] or 0) + Fraction(top) / bottom
    elif part["bare"] is not None:
        value = Fraction(10) ** int(part["bare"])
    else:
        value = Fraction(part["mantissa"].rstrip(".")) * Fraction(10) ** int(part["exponent"] or part["power"] or 0)
    return (-value if part["sign"] == "-" else value), (match["unit"] or "").strip()


# Unit: (what it measures, how many of the first one of its kind it is).
_UNITS: dict[str, tuple[str, float]] = {
    name: (kind, factor)
    for kind, units in {
        "length": {
            "m meter metre meters metres": 1, "mm millimeter millimeters millimetre millimetres": 1e-3,
            "cm centimeter centimeters centimetre centimetres": 1e-2,
            "km kilometer kilometers kilometre kilometres": 1e3,
            "in inch inches": 0.0254, "ft foot feet": 0.3048, "yd yard yards": 0.9144, "mi mile miles": 1609.344,
        },
        "mass": {
            "g gram grams": 1, "mg milligram milligrams": 1e-3, "kg kilogram kilograms": 1e3,
            "lb lbs pound pounds": 453.59237, "oz ounce ounces": 28.349523125,
        },
        "time": {
            "s sec second seconds": 1, "ms millisecond milliseconds": 1e-3, "min mins minute minutes": 60,
            "h hr hrs hour hours": 3600, "day days": 86400,
        },
        "volume": {"l liter liters litre litres": 1, "ml milliliter milliliters millilitre millilitres": 1e-3},
        "angle": {"° degree degrees deg": 1, "rad radian radians": 180 / math.pi},
        "money": {"dollar dollars usd": 1, "cent cents": 0.01},
    }.items()
    for names, factor in units.items()
    for name in names.split()
}  # fmt: skip


def _unit(text: str) -> tuple[str, float]:
    power = 1
    for mark, exponent in (("square ", 2), ("sq ", 2), ("cubic ", 3)):
        if text.startswith(mark):
            text, power = text.removeprefix(mark), exponent
    match = re.fullmatch(r"(.*?)\s*\^\{?([23])\}?", text)
    if match:
        text, power = match[1], int(match[2])
    if text in _UNITS:
        kind, factor = _UNITS[text]
        return f"{kind}^{power}", factor**power
    return f"{text.removesuffix('s')}^{power}", 1.0


def _same_quantity(a: tuple[Fraction, str], b: tuple[Fraction, str]) -> bool:
    def close(x: float, y: float) -> bool:
        return math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-12)

    (x, unit_x), (y, unit_y) = (float(a[0]), a[1]), (float(b[0]), b[1])
    if unit_x == unit_y:
        return close(x, y)
    if not unit_x or not unit_y:
        if "%" in (unit_x, unit_y) and close(x / 100 if unit_x else x, y / 100 if unit_y else y):
            return True
        return close(x, y)
    (kind_x, factor_x), (kind_y, factor_y) = _unit(unit_x), _unit(unit_y)
    return kind_x == kind_y and close(x * factor_x, y * factor_y)


# --- 4. Mathematics ---------------------------------------------------------------------------------------------------

_FUNCTIONS = re.compile(r"\b(?:a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|pi|max|min|gcd|lcm|or|and|inf)\b")


def _is_mathematics(text: str) -> bool:
    """Has digits or operators, and no words: names of two letters and more other than those of functions."""
    bare = re.sub(r"\\[a-z]+", " ", text)
    if re.search(r"[^\W\d_]{2,}", _FUNCTIONS.sub(" ", bare)):
        return False
    return bool(re.search(r"[\d\\^=+*/<>]", text))


class _Verifier(Worker):
    """math-verify in a process of its own: a power tower cannot be interrupted otherwise, and its memory is bounded."""

    def verify(self, prediction: str, answer: str, timeout_s: float) -> bool:
        try:
            reply, _ = self.ask([prediction, answer, timeout_s], timeout_s=timeout_s + 1)
        except ImportError as error:
            raise ImportError(f"grading mathematics needs math-verify: pip install 'vigos[train]' ({error})") from error
        except (TimeoutError, WorkerDied):
            logger.warning("comparing %r with %r took more than %s s: counted as wrong", prediction, answer, timeout_s)
            return False
        return bool(reply["equal"])


_worker = _Verifier(Path(__file__).with_name("math_verify_worker.py"))
