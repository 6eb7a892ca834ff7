"""Text that data, models or servers wrote, made safe to print."""

from __future__ import annotations

from vigos.system.secrets import masked


def printable(text: str) -> str:
    """Mask keys, and escape what a terminal would obey: control and format characters, line ends, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in masked(text))
