"""Every Triton kernel compiles for the chips we support, fits their shared memory and keeps to registers.

No GPU is needed. The compiler runs in a process of its own: in this one the kernels may be in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton_aot

# Bytes of a thread's stack. Spilled accumulators cost hundreds; a few words of spilled addresses cost nothing.
STACK_LIMIT = 32
SLOW = pytest.mark.slow
CASES = [
    pytest.param(arch, file, marks=[SLOW] if arch != 90 else [])
    for arch in triton_aot.SHARED_LIMIT
    for file in triton_aot.VARIANTS
]


@cache
def _compiled(arch: int, file: str, cache_dir: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache_dir}
    done = subprocess.run(
        [sys.executable, triton_aot.__file__, str(arch), file], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(arch, file of kernels/) -> lines of triton_aot.py."""
    folder = tmp_path_factory.mktemp("triton")
    return lambda arch, file: _compiled(arch, file, str(folder))


@pytest.mark.parametrize(("arch", "file"), CASES)
def test_every_kernel_compiles_and_fits(compiled, arch, file):
    registry, *variants = compiled(arch, file)
    assert registry == {"without_variants": [], "without_kernel": []}, "tests/triton_aot.py lists every kernel once"
    assert variants
    for line in variants:
        name = f"{line['kernel']} variant {line['variant']} on sm_{arch}: {line}"
        assert line["shared"] <= triton_aot.SHARED_LIMIT[arch], name
        assert line["stack"] <= STACK_LIMIT, name
        assert line["local"] == 0, name


def test_every_file_of_kernels_is_listed():
    files = {path.stem for path in (Path(triton_aot.__file__).parents[1] / "kernels").glob("*.py")}
    assert files - set(triton_aot.VARIANTS) == {"entries"}  # functions that kernels call, no kernel


def test_row_kernels_load_16_bytes_at_a_time(compiled):
    _, *variants = compiled(90, "divergence")
    rows = [x for x in variants if x["kernel"] in ("_stats_kernel", "_second_stats_kernel", "_grad_kernel")]
    assert len(rows) == 9
    assert all(line["wide_loads"] >= 2 for line in rows), rows


def test_products_of_16_bits_use_the_tensor_cores(compiled):
    for file, full in (("streaming", 5), ("tree_attention", 9)):
        _, *variants = compiled(90, file)
        assert sum(line["wgmma"] for line in variants) == full, file
