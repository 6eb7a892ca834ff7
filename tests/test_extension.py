"""A stale, broken or missing vigos._C says what to do, and auto goes on with one warning."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vigos.divergence.engines.extension import find_extension, interface

CSRC = Path(__file__).parents[1] / "csrc"


def test_the_extension_was_built_from_these_sources() -> None:
    extension = pytest.importorskip("vigos._C")
    assert find_extension() is extension, "csrc/ has changed since vigos._C was built: build again"


def test_the_digest_follows_the_bindings_alone(tmp_path: Path) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    (tmp_path / "csrc" / "cpu" / "divergence.cpp").write_text("// another body\n")
    assert interface(tmp_path / "csrc") == interface()
    with (tmp_path / "csrc" / "cpu" / "register.cpp").open("a") as file:
        file.write("// another argument\n")
    interface.cache_clear()
    assert interface(tmp_path / "csrc") != interface()
    assert interface(tmp_path) is None, "a wheel has no sources beside it"


def test_a_stale_extension_says_build_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the first call ended in an AttributeError."""
    stale = ModuleType("vigos._C")
    stale.interface = "0123456789abcdef"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vigos._C", stale)
    found = find_extension()
    assert isinstance(found, str)
    assert "was built from other sources" in found
    assert "build again: VIGOS_BUILD=require pip install -e ." in found
