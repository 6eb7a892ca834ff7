"""Text that data, models or servers wrote, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape what a terminal would obey: control and format characters, line ends included, and lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
