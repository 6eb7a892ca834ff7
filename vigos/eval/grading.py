r"""Is an answer right? Offline, deterministic, bounded in time; nothing that a model writes raises.

    grade(last_box(completion), "1/2")
    grade("red", "B", options=["blue", "red"])

`grade` brings both sides into one spelling (`normalise`) and asks in this order; the first question that applies
decides:

1. Is it the same text, or the same whole number in words?
2. Is the reference a choice, `B`, `(B)`, `B. red`, `A, C`? Then the letters of the prediction count, or the text of the
   option.
3. Is it mathematics? Then numbers and expressions are compared, by math-verify in a process of its own where they are
   more than a decimal or a fraction. Units of one kind are converted, different kinds are wrong, a unit or a name
   (`x = 5`) that only one side states is ignored, and 50 % is 50 as well as 0.5.
4. Otherwise it is wrong. Words never reach math-verify: as products of letters, `red` equals `der`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from vigos.eval.choices import chosen_letters, options_in
from vigos.eval.normalise import SCALES, number_in_words, plain, text_key
from vigos.eval.units import conversion, is_percent, singular, split_unit
from vigos.method.boxed import last_box
from vigos.sandbox import Worker, WorkerDied
from vigos.system.extras import install

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 2000  # of an answer; a longer one is compared as text alone
MAX_DEPTH = 6  # of brackets
MAX_DIGITS = 400  # of one number that is calculated with


def hints(problem: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an example says about its answers: the keyword arguments that `grade` takes.

    Args:
        problem: its question, from which options on lines of their own are read.
        extra: its other fields: `options`, `accepted` (further right answers) and `precision`, as the readers of
            benchmarks set them.
    """
    options = extra.get("options")
    accepted, precision = extra.get("accepted"), extra.get("precision")
    return {
        "options": [str(o) for o in options] if isinstance(options, list | tuple) else options_in(problem),
        "accepted": [str(a) for a in accepted] if isinstance(accepted, list | tuple) else [],
        "precision": int(precision) if isinstance(precision, int | float) and precision == precision else None,
    }


def grade(
    prediction: str | None,
    answer: str,
    *,
    options: Sequence[str] = (),
    accepted: Sequence[str] = (),
    precision: int | None = None,
    timeout_s: float = 0.8,
) -> bool:
    """Tell if `prediction` says the same as the reference `answer`, as the module's docstring defines it.

    Args:
        prediction: the content of the box, or text of which the last box counts; None: wrong.
        options: texts of the options in the order of their letters, if the question has any.
        accepted: further reference answers, of which one is enough.
        precision: decimals to which a number has to agree.
        timeout_s: CPU seconds that math-verify may take; an expression that takes longer is wrong, and logged.
    """
    if prediction is None:
        return False
    said = last_box(prediction) if "\\boxed" in prediction else None
    said = prediction if said is None else said
    for reference in (answer, *accepted):
        boxed = last_box(reference) if "\\boxed" in reference else None
        if _same(said, reference if boxed is None else boxed, options, precision, timeout_s):
            return True
    return False


def _same(said: str, wanted: str, options: Sequence[str], precision: int | None, timeout_s: float) -> bool:
    if max(len(said), len(wanted)) > MAX_CHARACTERS:
        return (bool(said.strip()) and said.split() == wanted.split()) or _same_sentence(said, wanted, timeout_s)
    sentences = said, wanted
    choice = _same_choice(said, wanted, options, precision, timeout_s)
    if choice is not None:
        return choice
    said, wanted = plain(said), plain(wanted)
    if not said:
        return False
    if text_key(said) == text_key(wanted):
        return True
    said, wanted = _unnamed(said, wanted)
    if text_key(said) == text_key(wanted) or singular(said) == singular(wanted):
        return True
    (said, said_unit), (wanted, wanted_unit) = split_unit(_digits(said)), split_unit(_digits(wanted))
    factor = conversion(said_unit, wanted_unit)
    if factor is None:
        return False
    factors = [factor]
    if is_percent(said_unit) != is_percent(wanted_unit) and not (said_unit and wanted_unit):
        factors.append(0.01 if said_unit else 100.0)
    if re.fullmatch(r"-?\d*\.\d+", wanted):
        said = _DECIMAL_COMMA.sub(r"\1.\2", said)
    elif re.fullmatch(r"-?\d*\.\d+", said):
        wanted = _DECIMAL_COMMA.sub(r"\1.\2", wanted)
    said, wanted = _like_brackets(said, wanted)
    numbers = _number(said), _number(wanted)
    if numbers[0] is not None and numbers[1] is not None:
        return any(_close(numbers[0], numbers[1], f, precision) for f in factors)
    if not (_is_mathematics(said) and _is_mathematics(wanted)):
        return text_key(said) == text_key(wanted) or _same_sentence(*sentences, timeout_s)
    return any(_worker.verify((said, False), (wanted, False), f, timeout_s) for f in factors)


# --- Choices ----------------------------------------------------------------------------------------------------------


def _same_choice(
    said: str, wanted: str, options: Sequence[str], precision: int | None, timeout_s: float
) -> bool | None:
    """Grade a question of choices; None where the reference is no choice."""
    chosen = chosen_letters(wanted)
    if chosen is None and options:  # the text of an option as reference
        keys = [text_key(plain(option)) for option in options]
        if text_key(plain(wanted)) in keys:
            chosen = frozenset(chr(ord("A") + keys.index(text_key(plain(wanted))))), wanted
    if chosen is None:
        return None
    letters, text = chosen
    picked = chosen_letters(said, reasons=True)
    if picked is not None:
        return picked[0] == letters
    if len(letters) > 1:
        return frozenset(said.strip(" .*")) == letters
    number = ord(next(iter(letters))) - ord("A")
    text = options[number] if number < len(options) else text
    if text and _same(said, text, (), precision, timeout_s):
        others = [option for i, option in enumerate(options) if i != number]
        return not any(text_key(plain(said)) == text_key(plain(option)) for option in others)
    return text_key(plain(said)) == text_key(plain(wanted))


# --- Mathematics ------------------------------------------------------------------------------------------------------

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"([+-]?)\s*(?:(\d+)\s+)?(?:({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?"
    rf"|\\frac\s*\{{\s*(-?{_DECIMAL})\s*\}}\s*\{{\s*({_DECIMAL})\s*\}})"
)
_MIXED = re.compile(r"(?<![\d.])(\d+)\s*(?:\s(\d+)\s*/\s*(\d+)|\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\})")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d,])")
_DECIMAL_COMMA = re.compile(r"^(-?\d+),(\d+)$")
_SCIENTIFIC = re.compile(r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)")
_EXPONENT = re.compile(r"(?<=\d)[eE]([+-]?\d{1,3})(?!\w)")
_ORDINAL = re.compile(r"(?<=\d)\s*\^?\s*\{?\s*(?:st|nd|rd|th)\b\s*\}?")
_SCALE = re.compile(rf"(?<=\d)\s*({'|'.join(SCALES)})s?\b", re.IGNORECASE)
_FUNCTIONS = re.compile(r"\b(?:a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|pi|max|min|gcd|lcm|or|and|inf)\b")
_EQUALS = re.compile(r"(?<![<>!\\])=|\\(?:approx|in)(?![a-zA-Z])")
_NAME = re.compile(r"[a-zA-Z\\{}'|()\s]+")
_FORMULA = re.compile(r"[A-Z][a-z]?(?:_?\{?\d+\}?)?(?:[A-Z][a-z]?(?:_?\{?\d+\}?)?)+")  # H2O is no product
_BRACKETED = re.compile(r"(?:\\\{|[(\[{])(.*)(?:\\\}|[)\]}])", re.DOTALL)


def _digits(text: str) -> str:
    """Rewrite numbers: digits for words, no thousands separators, powers of ten and mixed numbers as LaTeX."""
    words = text.split() if text[:1].isalpha() else []
    for count in range(min(len(words), 8), 0, -1):
        value = number_in_words(" ".join(words[:count]))
        if value is not None:
            text = " ".join([str(value), *words[count:]])
            break
    text = _ORDINAL.sub("", text)
    if not re.search(r"[(\[]|\\\{", text):  # in brackets, 1,000 is a list
        text = _THOUSANDS.sub(lambda m: re.sub("[ ,]", "", m[0]), text)
    text = _SCALE.sub(lambda m: rf" \times {SCALES[m[1].casefold()]}", text)
    return _EXPONENT.sub(r"\\times 10^{\1}", _SCIENTIFIC.sub(r"\\times ", text))


def _unnamed(said: str, wanted: str) -> tuple[str, str]:
    """Take names off (`x = 5`, `Area = 5`, `5 = s`) where one side alone has them; of several, the order counts."""
    if bool(_EQUALS.search(said)) == bool(_EQUALS.search(wanted)):
        return said, wanted
    (said, names), (wanted, others) = _values(said), _values(wanted)
    return (_tuple(said), _tuple(wanted)) if max(names, others) > 1 else (said, wanted)


def _tuple(text: str) -> str:
    match = _BRACKETED.fullmatch(text) if len(_elements(text)) == 1 else None
    return text if match is None and len(_elements(text)) == 1 else f"({match[1] if match else text})"


def _values(text: str) -> tuple[str, int]:
    """Return the text without its names, and how many different ones there were."""
    names = set()
    parts = _elements(text)
    sides = [[side.strip() for side in _EQUALS.split(part)] for part in parts]
    if all(len(s) == 1 for s in sides):
        return text, 0
    found = []
    for values in sides:
        names.update(values[:1] if len(values) > 1 else [])
        if len(values) == 1 or _is_name(values[0]):
            found.append(values[1] if len(values) > 1 and "\\approx" in text else values[-1])
        elif len(values) == 2 and _is_name(values[1]):
            found.append(values[0])
        else:
            return text, 0
    return ", ".join(found), len(names)


def _is_name(text: str) -> bool:
    bare = re.sub(r"_\s*(?:\{[^{}]*\}|\w)", "", text)
    return bool(re.search(r"[a-zA-Z]", bare)) and bool(_NAME.fullmatch(bare))


def _elements(text: str) -> list[str]:
    """Split a list at its commas and semicolons outside brackets, and at "and" and "or" between values."""
    text = re.sub(r"(?<=[\w)}\]°])\s*\b(?:and|or)\b\s*(?=[\d({\[\\a-zA-Z-])", ", ", text)
    text = re.sub(r"(?<=[)}\]])\s*(?:and|or)\s*(?=[({\[\\])", ", ", text)
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in (*parts, text[start:].strip()) if part]


def _like_brackets(said: str, wanted: str) -> tuple[str, str]:
    """Take the brackets off a list where the other side has the list without them; write lists with commas."""
    lists = [_elements(said), _elements(wanted)]
    for i, text in enumerate((said, wanted)):
        match = _BRACKETED.fullmatch(text)
        if match and len(lists[i]) == 1 and len(lists[1 - i]) > 1:
            inside = _elements(match[1].removesuffix("\\"))
            if len(inside) == len(lists[1 - i]):
                lists[i] = inside
    return ", ".join(lists[0]), ", ".join(lists[1])


def _number(text: str) -> Fraction | None:
    """Read a decimal, a fraction or a mixed number; None for anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None or max(map(len, re.findall(r"\d+", text))) > MAX_DIGITS:
        return None
    sign, units, top, bottom, frac_top, frac_bottom = match.groups()
    if units is not None and bottom is None and frac_bottom is None:  # two numbers
        return None
    divisor = Fraction(bottom or frac_bottom or 1)
    if divisor == 0:
        return None
    value = Fraction(units or 0) + Fraction((top or frac_top).rstrip(".")) / divisor
    return -value if sign == "-" else value


def _close(said: Fraction, wanted: Fraction, factor: float, precision: int | None) -> bool:
    if said == wanted and factor == 1:
        return True
    if factor == 1 and said.denominator == wanted.denominator == 1:
        return False
    try:
        x, y = float(said) * factor, float(wanted)
    except OverflowError:
        return False
    if precision is not None and round(x, precision) == round(y, precision):
        return True
    if factor == 1 and 1 in (said.denominator, wanted.denominator):  # half a step from a million is not a million
        return abs(x - y) <= min(1e-4, 1e-7 * abs(y))
    return math.isclose(x, y, rel_tol=2e-6, abs_tol=1e-12)


def _same_sentence(said: str, wanted: str, timeout_s: float) -> bool:
    """Let math-verify find the answer in a sentence; False where there is none, or the other side is no mathematics."""
    sides = []
    for text in (said, wanted):
        sentence, shown = _is_sentence(text), plain(text[-MAX_CHARACTERS:])
        if re.search(rf"\d{{{MAX_DIGITS}}}", text) or not (
            sentence or (len(text) <= MAX_CHARACTERS and _is_mathematics(shown))
        ):
            return False
        sides.append((text[-2 * MAX_CHARACTERS :] if sentence else shown, sentence))
    return (sides[0][1] or sides[1][1]) and _worker.verify(sides[0], sides[1], 1.0, timeout_s)


def _is_sentence(text: str) -> bool:
    """Tell if a text has eight words, or a word and delimited mathematics."""
    words = len(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", text[: 4 * MAX_CHARACTERS]))
    return words >= 8 or (words > 0 and bool(re.search(r"\\[(\[]|\$[^$]+\$", text[-MAX_CHARACTERS:])))


def _is_mathematics(text: str) -> bool:
    """Tell if a text has digits or operators and no words: runs of letters that name no function and are no product."""
    if re.search(r"\d", text) and _FORMULA.fullmatch(text):
        return False
    bare = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)
    runs = re.findall(r"[^\W\d_]{2,}", _FUNCTIONS.sub(" ", bare))
    if any(len(run) > 3 for run in runs) or (runs and " " in text and not re.search(r"[\\^=+*/<>]", text)):
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    longest = max(map(len, re.findall(r"\d+", text)), default=0)
    bounded = depth == 0 and deepest <= MAX_DEPTH and longest <= MAX_DIGITS
    return bounded and bool(re.search(r"[\d\\^=+*/<>]", text))


class _Verifier(Worker):
    """Compare expressions with math-verify in a process of its own, where a power tower can be ended."""

    def verify(self, said: tuple[str, bool], wanted: tuple[str, bool], factor: float, timeout_s: float) -> bool:
        """Compare two texts, each with whether it is a sentence; `factor` multiplies the first."""
        sides = [
            (text if is_sentence else _MIXED.sub(_mixed_number, text), is_sentence)
            for text, is_sentence in (said, wanted)
        ]
        try:
            reply, _ = self.ask([*sides, factor, timeout_s], timeout_s=4 * timeout_s + 2)
        except ImportError as error:
            raise ImportError(f"grading mathematics needs math-verify: {install('train')} ({error})") from error
        except (TimeoutError, WorkerDied):
            reply = {"equal": None}
        if reply["equal"] is None:
            logger.warning("comparing %.200r with %.200r took more than %s s: wrong", said[0], wanted[0], timeout_s)
        return bool(reply["equal"])


def _mixed_number(match: re.Match[str]) -> str:
    return rf"({match[1]}+\frac{{{match[2] or match[4]}}}{{{match[3] or match[5]}}})"


_worker = _Verifier(Path(__file__).with_name("math_verify_worker.py"))
