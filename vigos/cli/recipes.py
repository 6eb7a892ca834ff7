"""Recipes: configurations of published methods, `vigos train --recipe NAME`."""

from __future__ import annotations

from pathlib import Path

from vigos.cli.options import UsageError

FOLDER = Path(__file__).parents[1] / "train" / "recipes"  # a link to configs/recipes


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    """Return the file of a recipe. Raises UsageError for an unknown name."""
    import difflib

    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--recipe must be one of {', '.join(names())}, got {name!r}{hint}")
    return FOLDER / f"{name}.yaml"


def summary(name: str) -> str:
    """Return the comment at the head of a recipe: its source, and what it leaves out."""
    lines = path_of(name).read_text(encoding="utf-8").splitlines()
    head = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.removeprefix("#").strip() for line in head)
