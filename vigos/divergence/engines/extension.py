"""The compiled extension, vigos._C: found, and built from the bindings that this package calls."""

from __future__ import annotations

import hashlib
import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

_BINDINGS = ("bindings.cpp", "cpu/register.cpp", "cuda/register.cpp")  # as in CMakeLists.txt
_AGAIN = "VIGOS_BUILD=require pip install -e ."


@cache
def interface(csrc: Path = Path(__file__).parents[3] / "csrc") -> str | None:
    """Digest the sources that name what the extension offers; None where there are none: a wheel holds both or neither.

    CMakeLists.txt compiles the same digest into the extension.
    """
    files = [csrc / name for name in _BINDINGS]
    if not all(file.is_file() for file in files):
        return None
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def find_extension() -> ModuleType | str:
    """Return vigos._C, or why it cannot be used and what to do about it."""
    try:
        module = importlib.import_module("vigos._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return "vigos._C is not built: install a C++ compiler, then pip install -e ."
        return f"vigos._C cannot be loaded ({error}); build again: {_AGAIN}"
    if getattr(module, "interface", None) not in (None, wanted := interface()) and wanted is not None:
        return f"vigos._C was built from other sources than those of {Path(__file__).parents[3]}; build again: {_AGAIN}"
    return module
