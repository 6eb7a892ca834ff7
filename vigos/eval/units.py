r"""Split a quantity into number and unit, and convert units of one kind.

split_unit("9 \pi cm^{2}")         # ("9 \pi", "cm^{2}")
conversion("cm", "m")              # 0.01
"""

from __future__ import annotations

import math
import re
from collections import Counter

_NAMES: dict[str, dict[str, float]] = {
    "length": {
        "m meter metre": 1, "mm millimeter millimetre": 1e-3, "cm centimeter centimetre": 1e-2,
        "dm decimeter decimetre": 0.1, "km kilometer kilometre": 1e3, "in inch inches": 0.0254, "ft foot feet": 0.3048,
        "yd yard": 0.9144, "mi mile": 1609.344, "nm nanometer nanometre": 1e-9,
    },
    "mass": {
        "g gram": 1, "mg milligram": 1e-3, "kg kilogram": 1e3, "lb pound": 453.59237, "oz ounce": 28.349523125,
    },
    "time": {
        "s sec second": 1, "ms millisecond": 1e-3, "min minute": 60, "h hr hour": 3600, "day": 86400,
        "week": 604800, "yr year": 31557600,
    },
    "volume": {"l liter litre": 1, "ml milliliter millilitre": 1e-3},
    "angle": {"° deg degree": 1, "rad radian": 180 / math.pi},
    "dollar": {"$ dollar usd": 1, "cent ¢": 0.01},
    "euro": {"€ euro eur": 1}, "pound sterling": {"£ gbp": 1}, "yen": {"¥ jpy": 1}, "rupee": {"₹ inr": 1},
    "percent": {"% percent percentage pct": 1},
    "celsius": {"°c celsius": 1}, "fahrenheit": {"°f fahrenheit": 1}, "kelvin": {"k kelvin": 1},
    "force": {"n newton": 1, "kn": 1e3}, "energy": {"j joule": 1, "kj": 1e3, "cal calorie": 4.184, "kcal": 4184},
    "power": {"w watt": 1, "kw": 1e3, "mw": 1e6}, "voltage": {"v volt": 1, "mv": 1e-3, "kv": 1e3},
    "current": {"a amp ampere": 1, "ma": 1e-3}, "resistance": {"Ω ω ohm": 1, "kΩ kω": 1e3},
    "frequency": {"hz hertz": 1, "khz": 1e3, "mhz": 1e6}, "pressure": {"pa pascal": 1, "kpa": 1e3, "atm": 101325},
    "amount": {"mol mole": 1, "mmol": 1e-3},
}  # fmt: skip
_UNITS = {
    spelling: (kind, factor)
    for kind, units in _NAMES.items()
    for names, factor in units.items()
    for name in names.split()
    for spelling in (name, name + "s")
}
_SPELLED_OUT = (
    (r"\bmph\b", "mile/hour"), (r"\bk(?:mp|p|m)h\b", "km/h"),
    (r"\bdegrees?\s+([cf])\w*", r"°\1"), (r"°\s+([cf])", r"°\1"),
    (r"\b(?:square|sq\.?)\s+([a-z]+)", r"\1^2"), (r"\bcubic\s+([a-z]+)", r"\1^3"), (r"\s+squared\b", "^2"),
    (r"\s+cubed\b", "^3"), (r"\s*\b(?:per)\b\s*", "/"), (r"\\cdot|·|\*", " "), (r"[{}]", ""), (r"\s*\^\s*", "^"),
)  # fmt: skip
# Split after the first thing that can end a number and is followed by words alone.
_SPLIT = re.compile(
    r"(.*?(?:[\d.)}\]!]|\\pi|\\infty))(\s*)([%°$€£¥₹¢]|(?:[a-zA-ZµΩ%°'./*-]|\s|\^\s*\{?\s*-?\d\s*\}?|\\cdot)+)",
    re.DOTALL,
)
_MONEY = re.compile(r"([+-]?)\s*([$€£¥₹])\s*(.*)", re.DOTALL)
# "7 and red" is not seven of something, nor is "2 sin x" two of something.
_NO_UNIT = re.compile(
    r"\b(?:and|or|is|not|to|but|of|mod|a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|pi|max|min|gcd|lcm|inf|i)\b"
)


def split_unit(text: str) -> tuple[str, str]:
    """Return the number and the unit of a plain answer; the unit is "" where there is none.

    A symbol after a number is a unit only if a space or more than its one letter says so: `3x` and `6 n` have none,
    `5 m`, `5cm` and `3 cats` have one.
    """
    text = text.rstrip(" .")
    if match := _MONEY.fullmatch(text):
        return match[1] + split_unit(match[3])[0], match[2]
    match = _SPLIT.fullmatch(text)
    if match is None:
        return text, ""
    number, space, unit = match[1], match[2], " ".join(match[3].split()).strip(" .")
    known = _kind(unit) is not None
    words = re.findall(r"[a-zA-ZµΩ]+", unit)
    is_unit = known if not space else known or (len(words) <= 4 and all(len(w) > 1 for w in words) and bool(words))
    if not space and len(unit) == 1 and unit.isalpha():
        is_unit = False
    if not is_unit or (_NO_UNIT.search(unit.casefold()) and not known):
        return text, ""
    return number.strip(), unit


def conversion(unit: str, other: str) -> float | None:
    """Return how many of `other` one `unit` is: 1.0 where either is missing, None for units of other kinds."""
    if not unit or not other:
        return 1.0
    first, second = _kind(unit), _kind(other)
    if first is None or second is None:
        return 1.0 if singular(unit) == singular(other) else None
    return first[1] / second[1] if first[0] == second[0] else None


def is_percent(unit: str) -> bool:
    """Tell if a unit is the per cent sign or word."""
    return _kind(unit) == (frozenset({("percent", 1)}), 1.0)


# Short forms and British spellings that answers about pictures are full of.
_SAME_WORD = {
    "tv": "television", "phone": "telephone", "cellphone": "telephone", "fridge": "refrigerator", "bike": "bicycle",
    "plane": "airplane", "aeroplane": "airplane", "photo": "photograph", "mic": "microphone", "limo": "limousine",
    "hippo": "hippopotamus", "rhino": "rhinoceros", "math": "mathematics", "maths": "mathematics", "lab": "laboratory",
    "grey": "gray", "colour": "color", "centre": "center", "theatre": "theater", "tyre": "tire", "doughnut": "donut",
}  # fmt: skip


def singular(text: str) -> str:
    """Return English words without case, plural endings and short forms, to compare two spellings of one word."""
    words = []
    for written in text.casefold().split():
        word = _SAME_WORD.get(written.removesuffix("s"), written)
        for ending, new in (("ies", "y"), ("ves", "f"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh")):
            if word.endswith(ending) and len(word) > len(ending) + 1:
                words.append(word.removesuffix(ending) + new)
                break
        else:
            words.append(word.removesuffix("s") if len(word) > 3 and not word.endswith(("ss", "us", "is")) else word)
    return " ".join(words)


def _kind(unit: str) -> tuple[frozenset[tuple[str, int]], float] | None:
    """Return (dimensions with their powers, factor) of a unit whose every part is known; None otherwise."""
    unit = unit.casefold().strip()
    for pattern, new in _SPELLED_OUT:
        unit = re.sub(pattern, new, unit)
    powers, factor = Counter[str](), 1.0
    for side, part in zip((1, -1), unit.split("/", 1), strict=False):
        for name in part.split():
            match = re.fullmatch(r"(.+?)(?:\^(-?\d))?", name)
            if match is None or match[1] not in _UNITS:
                return None
            kind, size = _UNITS[match[1]]
            power = side * int(match[2] or 1)
            powers[kind] += power
            factor *= size**power
    return (frozenset(powers.items()), factor) if powers else None
