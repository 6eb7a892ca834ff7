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

from helpers import triton_aot
from helpers.machine_code import BUDGET

# Bytes of a thread's stack. Spilled accumulators cost hundreds; a few words of spilled addresses cost nothing.
STACK_LIMIT = 32
FAST = (90, "divergence")
CASES = [
    pytest.param(arch, file, marks=[] if (arch, file) == FAST else [pytest.mark.slow])
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
    assert registry == {"without_variants": [], "without_kernel": []}, (
        "tests/helpers/triton_aot.py lists every kernel once"
    )
    assert variants
    for line in variants:
        name = f"{line['kernel']} variant {line['variant']} on sm_{arch}: {line}"
        assert line["shared"] <= triton_aot.SHARED_LIMIT[arch], name
        assert line["stack"] <= STACK_LIMIT, name
        assert line["local"] == 0, name


def test_every_file_of_kernels_is_listed():
    files = {path.stem for path in (Path(triton_aot.__file__).parents[2] / "kernels").glob("*.py")}
    assert files - set(triton_aot.VARIANTS) == {"numerics"}  # functions that kernels call, no kernel


def test_row_kernels_load_16_bytes_at_a_time(compiled):
    _, *variants = compiled(90, "divergence")
    rows = [x for x in variants if x["kernel"] in ("_stats_kernel", "_second_stats_kernel", "_grad_kernel")]
    assert len(rows) == 12
    assert all(line["wide_loads"] >= 2 for line in rows), rows


def test_instructions_a_pair(compiled):
    """The row kernels stay inside their budget: on a GPU they are bound by instructions, not by memory."""
    _, *variants = compiled(90, "divergence")
    lean = [x for x in variants if x["pair"]]
    assert {(x["kernel"], x["logits"]) for x in lean} == {
        (kernel, dtype) for kernel in ("_stats_kernel", "_grad_kernel") for dtype in ("fp32", "bf16")
    }
    for line in lean:
        for name, count in line["pair"].items():
            assert 10 < count <= BUDGET[name.split(",")[0]], f"{line['kernel']}, {line['logits']}: {name} {count:.1f}"


@pytest.mark.slow
def test_products_of_16_bits_use_the_tensor_cores(compiled):
    """wgmma on sm_90; only dq at head width 256 has blocks too small for it (64 rows would spill)."""
    _, *variants = compiled(90, "tree_attention")
    without = {(line["kernel"], line["variant"]) for line in variants if not line["wgmma"]}
    fp32 = {("_tree_fwd_kernel", 3), ("_tree_bwd_q_kernel", 3), ("_tree_bwd_kv_kernel", 3)}
    assert without == {*fp32, ("_tree_bwd_q_kernel", 2)}
