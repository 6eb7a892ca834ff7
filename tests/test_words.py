"""Docstrings open with a verb, names are no prepositions, parameter lists and the package's top stay short.

python tests/test_words.py [FOLDER ...]    # what breaks a rule, one line each
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(p.name for p in (ROOT / "vigos").iterdir() if (p / "__init__.py").is_file())

# How the docstring of a function opens: a verb that is missing in this file is added to it.
VERBS = set((ROOT / "tests" / "verbs.txt").read_text(encoding="utf-8").split())
# How no docstring opens, be it of a class or a module: it would say nothing by itself in an editor's hover.
CLAUSES = set(
    re.findall(
        r"\w+",
        """
        Also And As At Because Before Both But By During Each For From Here How If In It Its Like No Not Of On Or
        Our Ours Own See Since So Such Than That Their These They This Those Though To Under Until Was Were What
        When Where Whether Which While Who Whose Why With Without
        """,
    )
)
PREPOSITIONS = {"of", "to", "at", "by", "own", "here", "held", "whole", "beside", "apart"}
MOST_PARAMETERS = 12
PEERS_SIGNATURES = {"chunked_divergence_loss"}  # a replacement takes what the peer's function takes
MOST_NAMES = 20


def python_files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    return (
        [p for p in found if "kernels" not in p.relative_to(ROOT / "vigos").parts] if folder[:5] == "vigos" else found
    )


def broken(path: Path) -> Iterator[str]:
    """Yield a line for every rule that a Python file breaks."""
    place = path.relative_to(ROOT)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    methods = {f for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
    for node in ast.walk(tree):
        line = f"{place}:{getattr(node, 'lineno', 1)}"
        for name in defined(node):
            if name in PREPOSITIONS and not (name == "to" and node in methods):  # `to(device)`, as torch calls it
                yield f"{line} `{name}` is no name of a thing"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            count = len([x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")])
            if count > MOST_PARAMETERS and place.parts[0] != "kernels" and node.name not in PEERS_SIGNATURES:
                yield f"{line} {node.name} has {count} parameters"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and not opens_well(text, node):
                yield f"{line} {getattr(node, 'name', 'module')}: {' '.join(text.split())[:80]}"


def defined(node: ast.AST) -> list[str]:
    """Return the names that a node makes."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.id if isinstance(node, ast.Name) else node.attr]
    return []


def opens_well(text: str, node: ast.AST) -> bool:
    """Functions open with a verb of `VERBS`; properties, classes and modules with anything but a clause."""
    word = re.split(r"[\s,.;:]", text, maxsplit=1)[0]
    decorators = {ast.unparse(d).rpartition(".")[2] for d in getattr(node, "decorator_list", [])}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not decorators & {"property", "cached_property"}:
        return word in VERBS
    return word not in CLAUSES and (not word.isalpha() or word[0].isupper() or isinstance(node, ast.Module))


@pytest.mark.parametrize("folder", sorted({*(f"vigos/{name}" for name in FOLDERS), "kernels"}))
def test_words_of_a_package(folder):
    lines = [line for path in python_files(folder) for line in broken(path)]
    assert not lines, "\n".join(lines)


def test_words_of_the_top():
    lines = [line for path in sorted((ROOT / "vigos").glob("*.py")) for line in broken(path)]
    assert not lines, "\n".join(lines)
    entries = (ROOT / "vigos").iterdir()
    names = {p.name for p in entries if p.suffix == ".py" or p.is_symlink() or (p / "__init__.py").is_file()}
    assert len(names) <= MOST_NAMES, sorted(names)


def test_cpp_names():
    found = []
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh", ".inl")):
        code = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), path.read_text(encoding="utf-8"), flags=re.S)
        for number, line in enumerate(code.splitlines(), 1):
            line = re.sub(r'"(\\.|[^"\\])*"', '""', re.sub(r"//.*", "", line))
            if not line.lstrip().startswith("#"):
                names = PREPOSITIONS & set(
                    re.findall(r"(?<![\w.:>])(?!at\()[a-z]+\b", line)
                )  # at(i, j), as C++ calls it
                found += [f"{path.relative_to(ROOT)}:{number} `{name}` is no name of a thing" for name in sorted(names)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    for folder in sys.argv[1:] or [*(f"vigos/{name}" for name in FOLDERS), "kernels"]:
        for file in [ROOT / folder] if folder.endswith(".py") else python_files(folder):
            print(*broken(file), sep="\n", end="\n" if list(broken(file)) else "")
