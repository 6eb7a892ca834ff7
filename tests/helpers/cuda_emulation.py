"""The CUDA row kernels on the CPU, behind the engine `impl="cuda"`: see cuda_emulator.cpp for what that proves."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def build(into: Path, csrc: Path = ROOT / "csrc", *options: str) -> ModuleType:
    """The emulator as a Python module; compiled once for each state of its sources."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation of the CUDA kernels needs g++")
    pybind11 = pytest.importorskip("pybind11")
    sources = [ROOT / "tests/helpers/cuda_emulator.cpp", csrc / "cuda/register.cpp"]
    headers = [csrc / "numerics.h", *sorted((csrc / "cuda").glob("*.h")), *sorted((csrc / "cuda").glob("*.cuh"))]
    headers += sorted((ROOT / "tests/helpers").glob("cuda_*.h"))
    text = b"".join(path.read_bytes() for path in sources + headers) + " ".join((sys.version, *options)).encode()
    library = into / f"cuda_emulator-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas",
                '-DVIGOS_CUDA_ARCHITECTURES="emulated"', f"-I{pybind11.get_include()}",
                f"-I{sysconfig.get_path('include')}", f"-I{csrc / 'cuda'}", *options, *map(str, sources),
                "-o", str(partial),
            ],
            check=True,
        )  # fmt: skip
        partial.replace(library)
    # pybind11 keeps one module a name, and g++ one static a process: two states of the sources share neither.
    spec = importlib.util.spec_from_file_location(f"{library.stem}.cuda_emulator", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
