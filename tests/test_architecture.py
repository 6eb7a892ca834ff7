"""Imports inside vigos point one way: a package imports only from those before it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "vigos"

# As in docs/architecture.md. A floor imports only from floors before it; packages of one floor do not meet.
FLOORS: list[set[str]] = [
    {"errors", "sandbox", "system", "kernels"},
    {"divergence"},
    {"method"},
    {"data", "models", "world", "integrations"},
    {"scoring"},
    {"rollout"},
    {"eval"},
    {"train"},
    {"report", "launch", "study"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    """Modules of vigos that a file imports, late imports and those for types alone included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "vigos" and "." in name}


FILES = sorted(p for p in ROOT.rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = room(path)
    if here in ("__init__", "__main__"):
        return  # lazy exports, and the way in
    for name in imports(path):
        there = name.split(".")[1]
        if there in FLOOR and there != here:
            assert FLOOR[there] < FLOOR[here], f"{path.name} imports {name}, which comes later"


def test_every_room_has_a_floor():
    rooms = {room(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms | {"kernels"} == set(FLOOR)


def test_no_circles_inside_a_room():
    modules = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(("vigos", *parts)).removesuffix(".__init__")] = imports(path)
    graph = {
        name: {next((m for m in (i, i.rpartition(".")[0]) if m in modules), name) for i in found} - {name}
        for name, found in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_page_lists_the_floors():
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = [re.findall(r"`(\w+)`", line) for line in re.findall(r"^\d+\. (.+)$", page, re.M)]
    assert listed == [sorted(rooms) for rooms in FLOORS]


# Where a private name of another library stands outside vigos/models/compat.py; its docstring says why.
PRIVATE = {
    ("errors.py", "_run_exitfuncs"),
    ("divergence/call.py", "_resolve_process_group"),
    ("rollout/vllm_worker.py", "_registry"),
    *(("train/trainer.py", name) for name in ("_get_output_dir", "_save_checkpoint", "_load_from_checkpoint")),
    *(("cli/options.py", name) for name in ("_get_value", "_check_value")),  # overrides of argparse's
}
PUBLIC = {"_exit", "_replace"}  # os._exit and namedtuple._replace are documented


def test_private_names_of_libraries_stand_in_one_file():
    found = set()
    for path in FILES:
        name = str(path.relative_to(ROOT))
        if name == "models/compat.py" or name.startswith("integrations/"):  # those patch others' code by its names
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        ours = {node.attr for node in nodes if written_on_self(node)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and (is_super(node.value) or node.attr not in ours | PUBLIC):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("vigos"):
                names = [alias.name for alias in node.names]
            else:
                continue
            found |= {(name, n) for n in names if n.startswith("_") and not n.startswith("__")}
    assert found == PRIVATE


def written_on_self(node: ast.AST) -> bool:
    """Tell whether a node gives an object of ours a private attribute or reads its own."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def is_super(node: ast.AST) -> bool:
    """Tell whether a node is a call of `super`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
