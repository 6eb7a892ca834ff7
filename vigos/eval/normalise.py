r"""Write answers in one spelling: Unicode as LaTeX, without delimiters, wrappers, markdown and lead-ins.

plain("**The answer is** $\\text{2}\,\dfrac{1}{2}$")      # 2 \frac{1}{2}
"""

from __future__ import annotations

import re
import unicodedata

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "⁄": "/", "÷": "/", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∠": r"\angle ", "º": "°", "˚": "°", "’": "'", "‘": "'",
    "“": '"', "”": '"',
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_WRAPPERS = re.compile(
    r"\\(?:text\w*|math(?:rm|bf|it|sf|tt|cal|bb)|mbox|hbox|operatorname|bold|boldsymbol|bm|rm|emph)\s*\{([^{}]*)\}"
)
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|\\(?:quad|qquad|displaystyle|left|right|[bB]igg?[lr]?)(?![a-zA-Z])|~")
_REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\{,\}|,\s*\\!\s*", ","),
        (r"\\!", ""),
        (r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", ","),  # a thin space between thousands
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:leqslant|leq)(?![a-z])", r"\\le"),
        (r"\\(?:geqslant|geq)(?![a-z])", r"\\ge"),
        (r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)", "°"),
        (r"√\s*(\d+(?:\.\d+)?|[a-zA-Z]|\{[^{}]*\})", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\([%$&#])", r"\1"),
        (r"\*\*|__", ""),
        (r"\\\\(?=(?:frac|sqrt|le|ge|leq|geq|lt|gt|pi|times|cdot|in|infty|text|circ)(?![a-z]))", r"\\"),
    )
)
_DELIMITERS = re.compile(r"\\[()\[\]]|\$\$")
_LEAD_IN = re.compile(
    r".*(?:\b(?:answer|solution|result)\b\s*(?:is\b|are\b|[:=])\s*:?|\b(?:is|are|equals|it's)\s+(?=[-+$€£\d\\(]))",
    re.IGNORECASE | re.DOTALL,
)


def plain(text: str) -> str:
    """Return `text` in the spelling in which answers are read; words keep their case.

    Args:
        text: an answer of at most a few thousand characters.
    """
    text = re.sub(r"\s*([¼½¾⅐-⅞])", lambda m: " " + unicodedata.normalize("NFKC", m[1]), text)  # 1½ is not 11/2
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀-₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    text = re.sub("[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))", r"\\,", text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _DELIMITERS.sub(" ", text)
    if text.count("$") % 2 == 0:  # an odd one is money
        text = text.replace("$", " ")
    for _ in range(8):  # wrappers nest
        text, count = _WRAPPERS.subn(r" \1 ", text)
        if not count:
            break
    text = _SPACES.sub(" ", text)
    if (lead_in := _LEAD_IN.match(text)) and text[lead_in.end() :].strip(" .*"):
        text = text[lead_in.end() :]
    return " ".join(text.split()).strip("\"'`* ").strip()


def text_key(text: str) -> str:
    """Return a plain answer without case, spaces, leading article and final stop, to be compared as text."""
    text = re.sub(r"^(?:the|an?) (?=\S)", "", text.casefold())
    text = re.sub(r"_\{?(\w+)\}?", r"\1", text)  # CO_2
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).rstrip(".,;")


# --- Numbers in words -------------------------------------------------------------------------------------------------

_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ORDINALS = {"first": "one", "second": "two", "third": "three", "fifth": "five", "eighth": "eight", "ninth": "nine",
             "twelfth": "twelve"}  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_WORD_VALUES = (
    {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, 2)} | {"a": 1, "an": 1}
)


def number_in_words(text: str) -> int | None:
    """Read a whole number in English words, cardinal or ordinal ("twenty-one", "third"); None for anything else."""
    words = [w for w in re.split(r"[\s-]+", text.casefold().rstrip(".")) if w != "and"]
    if not words or words in (["a"], ["an"]):
        return None
    last = words[-1]
    words[-1] = _ORDINALS.get(last) or (re.sub("ieth$", "y", last).removesuffix("th") if last.endswith("th") else last)
    total = part = 0
    for word in words:
        if word in _WORD_VALUES:
            part += _WORD_VALUES[word]
        elif word in SCALES:
            scale = SCALES[word]
            total, part = (total, max(part, 1) * scale) if scale < 1000 else (total + max(part, 1) * scale, 0)
        else:
            return None
    return total + part
