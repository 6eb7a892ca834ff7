"""Writes docs/configuration.md from `ViGOSConfig`: every option, its default and what it does.

python scripts/configuration.py           # writes the page; a test fails where it is not up to date
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

from vigos.launch import Source
from vigos.method.objective import PRESETS, choices_of
from vigos.train.config import ViGOSConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

HEAD = """\
# Configuration

Every option of a training run, as a flag of `vigos train` (`--learning-rate 5e-6`), a line of its `--config` file
(`learning_rate: 5.0e-6`), or an argument of `ViGOSConfig`. Flags win over the file, the file over the defaults. An
unknown option is an error that names the nearest known one. All fields of `transformers.TrainingArguments` are options
as well; those listed last have other defaults here. The run folder's `config.yaml` says what ran.

This page is written by `scripts/configuration.py` from the help texts of the dataclass: change them there.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## Model and data\n", _table(dataclasses.fields(Source), Source)]
    for title, text, names in sections():
        own = [f for f in dataclasses.fields(ViGOSConfig) if f.name in names]
        parts += [f"\n## {title}\n\n{text}\n", _table(own, ViGOSConfig)]
    parts += ["\n## Presets\n", "\nA preset fills the options that were left unset.\n\n", _presets()]
    return "".join(parts)


def sections() -> list[tuple[str, str, list[str]]]:
    """List the groups in the source of `ViGOSConfig`: heading, the comment below it, and the fields."""
    found: list[tuple[str, str, list[str]]] = []
    lines = inspect.getsource(ViGOSConfig).splitlines()
    for line, below in itertools.pairwise(lines):
        if heading := re.fullmatch(r"    # --- (.+) ---", line):
            found.append((heading[1], below.strip().removeprefix("# "), []))
        elif (name := re.match(r"    (\w+): ", line)) and found:
            found[-1][2].append(name[1])
    return found


def _table(fields: Any, kind: type) -> str:
    choices = choices_of(kind)
    rows = ["\n| option | default | what it does |\n|---|---|---|\n"]
    for f in fields:
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        words = f.metadata.get("help", "")
        if f.name in choices:
            words += f" One of {', '.join(f'`{c}`' for c in choices[f.name])}."
        rows.append(f"| `{f.name}` | {_shown(default)} | {_cell(words)} |\n")
    return "".join(rows)


def _presets() -> str:
    names = list(PRESETS["paper"])
    rows = ["| option | " + " | ".join(f"`{p}`" for p in PRESETS) + " |\n|---|" + "---|" * len(PRESETS) + "\n"]
    rows += [f"| `{n}` | " + " | ".join(_shown(PRESETS[p][n]) for p in PRESETS) + " |\n" for n in names]
    return "".join(rows)


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, list):
        return ", ".join(f"`{v}`" for v in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "none"


def _cell(text: str) -> str:
    """A pipe would end the cell, a tag would be taken for one."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
