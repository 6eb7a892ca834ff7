"""Every Triton kernel compiles for the chips we support, fits their shared memory and keeps to registers.

No GPU is needed. The compiler runs in a process of its own: in this one the kernels may be in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton_aot

# Bytes of a thread's stack. Spilled accumulators cost kilobytes; a few words of spilled addresses cost nothing.
STACK_LIMIT = 32


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """arch -> lines of triton_aot.py."""
    results: dict[int, list[dict]] = {}

    def run(arch: int) -> list[dict]:
        if arch not in results:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
            script = Path(triton_aot.__file__)
            done = subprocess.run(
                [sys.executable, str(script), str(arch)], env=environment, capture_output=True, text=True, timeout=500
            )
            assert done.returncode == 0, done.stderr[-4000:]
            results[arch] = [json.loads(line) for line in done.stdout.splitlines()]
        return results[arch]

    return run


@pytest.mark.parametrize(
    "arch", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_every_kernel_compiles_and_fits(compiled, arch):
    registry, *variants = compiled(arch)
    assert registry == {"without_variants": [], "without_kernel": []}, "tests/triton_aot.py lists every kernel once"
    for line in variants:
        name = f"{line['kernel']} variant {line['variant']} on sm_{arch}: {line}"
        assert line["shared"] <= triton_aot.SHARED_LIMIT[arch], name
        assert line["stack"] <= STACK_LIMIT, name
        assert line["local"] == 0, name


def test_row_kernels_load_16_bytes_at_a_time(compiled):
    _, *variants = compiled(90)
    rows = [x for x in variants if x["kernel"] in ("_stats_kernel", "_second_stats_kernel", "_grad_kernel")]
    assert len(rows) == 9
    assert all(line["wide_loads"] >= 2 for line in rows), rows
