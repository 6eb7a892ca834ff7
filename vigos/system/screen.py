"""Printing for people and for pipes: tables that never cut a number, errors on stderr, foreign text without markup.

Needs rich.
"""

from __future__ import annotations

import codecs
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from rich.box import ASCII, SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vigos.system.text import printable

UNLIMITED = 100_000  # columns of a pipe: whoever reads it cuts lines or does not
_PLAIN = {
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "‖": "||",
    "λ": "lambda",
    "β": "beta",
    "·": "*",
    "×": "x",
    "→": "->",
}


def make_console(**options: Any) -> Console:
    """Return a console on stdout without highlighting; in a pipe its lines are not wrapped.

    A terminal that knows no Unicode gets ASCII in place of our dashes and dots, and a question mark for the rest.
    """
    codecs.register_error("vigos", lambda error: (_spelled(error), error.end))  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="vigos")
    console = Console(highlight=False, **options)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def _spelled(error: Any) -> str:
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end])


def screen_width() -> int:
    """Return the columns for running text: those of the terminal, up to 120; 100 in a pipe."""
    return min(120, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 100


def print_error(message: object) -> None:
    """Write one line to stderr, with control characters escaped."""
    sys.stdout.flush()
    line = " ".join(part.strip() for part in str(message).splitlines())
    print(f"error: {printable(line)}", file=sys.stderr, flush=True)


def print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print rows of text as a table; where the terminal is too narrow for it, as one block of lines a row."""
    cells = [[printable(cell) for cell in row] for row in rows]
    table = Table(box=SIMPLE_HEAD if console.encoding.startswith("utf") else ASCII, title=title, title_justify="left")
    for column in columns:
        table.add_column(Text(column), no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    unlimited = console.options.update(width=UNLIMITED)
    if Measurement.get(console, unlimited, table).maximum <= console.width:
        console.print(table)
        return
    if title:
        console.print(Text(title))
    for row in cells:
        console.print(Text(row[0]), soft_wrap=True)
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                console.print(Text(f"  {column}: {cell}"), soft_wrap=True)


def per_cent(share: float, interval: Sequence[float] | None = None) -> str:
    """Return a share as per cent to one decimal, with its interval in parentheses."""
    text = f"{100 * share:.1f} %"
    return text if interval is None else f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
