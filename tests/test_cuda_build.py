"""The CUDA part as nvcc builds it for sm_80 and sm_90a: registers, spills, instructions, and what a launcher refuses.

No GPU is needed; without nvcc these tests skip. What the numbers are is in test_engines.py and
test_cuda_rows.py (emulated on the CPU) and test_engines_gpu.py (on a GPU).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from helpers import machine_code
from helpers.processes import HELPERS

ROOT = Path(__file__).resolve().parent.parent
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
NVCC = shutil.which("nvcc")
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc"),
    pytest.mark.skipif(CMAKE is None, reason="no cmake"),
    pytest.mark.timeout(1800),  # about 80 s of compiling on two idle cores, the first time
]


def configure(into: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    assert CMAKE is not None
    env = {k: v for k, v in os.environ.items() if k not in ("TORCH_CUDA_ARCH_LIST", "VIGOS_CUDA")} | environment
    env["PATH"] = env["PATH"] if "PATH" in environment else f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    ninja = ["-G", "Ninja"] if shutil.which("ninja", path=env["PATH"]) else []
    return subprocess.run(
        [
            CMAKE, *ninja, "-S", str(ROOT), "-B", str(into), "-DCMAKE_BUILD_TYPE=Release",
            f"-DVIGOS_OUTPUT_DIR={into}", "-DVIGOS_SUFFIX=.so", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
        ],
        capture_output=True, text=True, env=env,
    )  # fmt: skip


# What is compiled for an architecture: on sm_80 the pairs of dtypes with the most and the fewest bytes; the others are
# the same template.
SOURCES = {
    "sm_90a": (
        "logits_rows_bf16_bf16", "logits_rows_f16_f16", "logits_rows_f32_bf16", "logits_rows_f32_f32",
        "logits_rows_f32_f16", "logits_rows_pair_bf16", "logits_rows_pair_f16", "linear_hopper",
    ),
    "sm_80": ("logits_rows_bf16_bf16", "logits_rows_f32_f32"),
}  # fmt: skip


@cache
def build(into: Path, arch: str) -> Path:
    """Compile for an architecture into a folder that is kept between runs: the next one compiles what changed."""
    capability, host = {"sm_80": "8.0"}.get(arch, "9.0a"), str(HELPERS / "unoptimized.sh")
    done = configure(into, "-DVIGOS_CUDA=ON", TORCH_CUDA_ARCH_LIST=capability, CMAKE_CXX_COMPILER_LAUNCHER=host)
    assert done.returncode == 0, done.stdout + done.stderr
    objects = [f"CMakeFiles/vigos_cuda.dir/csrc/cuda/{source}.cu.o" for source in SOURCES[arch]]
    targets = ["all"] if arch == "sm_90a" else objects
    assert CMAKE is not None
    command = [CMAKE, "--build", str(into), "--parallel", "2", "--target", *targets]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return into


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return the build folder of an architecture."""
    return lambda arch: build(request.config.cache.mkdir(f"cuda-build-{arch}"), arch)


@pytest.fixture(scope="module")
def module(built: Callable[[str], Path]) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", built("sm_90a") / "_C.so")
    assert spec is not None
    assert spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)  # loads without a driver: the CUDA runtime is linked in
    return extension.cuda


def cuobjdump(built: Path, source: str, *options: str) -> str:
    """Its report on one object file. Triton's package carries the tool."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    (object_file,) = built.rglob(f"{source}.cu.o")
    return subprocess.run([tool, *options, str(object_file)], capture_output=True, text=True, check=True).stdout


def functions(sass: str) -> dict[str, str]:
    """SASS by mangled name."""
    return {body.split("\n")[0].strip(): body for body in sass.split("Function : ")[1:]}


@pytest.mark.slow
@pytest.mark.parametrize("arch", SOURCES)
def test_no_kernel_spills(built: Callable[[str], Path], arch: str) -> None:
    """Spilled registers are device-memory traffic in the middle of a kernel whose cost is device-memory traffic."""
    seen = 0
    for source in SOURCES[arch]:
        report = cuobjdump(built(arch), source, "-res-usage", "-arch", arch)
        for name, registers, stack, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report
        ):
            seen += 1
            assert (int(stack), int(local)) == (0, 0), f"{name} for {arch}: stack {stack}, local {local} bytes"
            if "logits_rows_kernel" in name:  # two blocks of 384 threads share 65,536
                assert int(registers) <= 80, f"{name} for {arch}: {registers} registers"
            if "pair_product_kernel" in name:  # 384 threads; setmaxnreg moves them from the producer to the consumers
                assert int(registers) <= 168, f"{name} for {arch}: {registers} registers"
    # Five row kernels a pair of dtypes, gradients of three dtypes (two), two kernels over stored pairs, four products.
    assert seen == {"sm_90a": 5 * 5 + 3 * 3 + 2 * 2 + 4, "sm_80": 2 * 5 + 2 * 3}[arch]


@pytest.mark.slow
def test_hopper_kernel_instructions(built: Callable[[str], Path]) -> None:
    bodies = functions(cuobjdump(built("sm_90a"), "linear_hopper", "-sass", "-arch", "sm_90a"))
    kernels = {name: body for name, body in bodies.items() if "pair_product_kernel" in name}
    assert len(kernels) == 4
    for name, body in kernels.items():
        kind = "HGMMA.64x128x16.F32.BF16" if "Lb1EEEv" in name else "HGMMA.64x128x16.F32 "
        assert body.count(kind) == 8, f"{name}: 4 steps of K on both sides"
        shared = "ILb1E" in name
        assert body.count("UTMALDG.2D.MULTICAST") == 1, f"{name}: one side's rows go to both blocks"
        assert body.count("UTMALDG.2D") == (2 if shared else 3), name
        assert body.count("gsb0") == 1 + 2, f"{name}: one group of products a stage, and its two waits"
        loop = body[body.index("HGMMA") : body.rindex("HGMMA")]
        assert "MEMBAR" not in loop, f"{name}: a stage is freed without a fence over the cluster"
        assert body.count("SYNCS.PHASECHK") >= 2, f"{name}: waits on both kinds of barrier"
        assert "USETMAXREG.DEALLOC" in body, name
        assert "USETMAXREG.TRY_ALLOC" in body, name
        assert "STL" not in body, f"{name}: local memory"
        assert "LDL" not in body, f"{name}: local memory"


@pytest.mark.slow
def test_row_kernel_instructions(built: Callable[[str], Path]) -> None:
    bodies = functions(cuobjdump(built("sm_90a"), "logits_rows_bf16_bf16", "-sass", "-arch", "sm_90a"))
    (body,) = (body for name, body in bodies.items() if "logits_rows_kernel" in name and "Lb1ELb0EEES3_Lb1E" in name)
    assert "UBLKCP" in body, "bulk copies of the logits"
    assert re.search(r"LDS(\.\w+)*\.128", body), "16-byte loads of the logits"
    assert "SYNCS.PHASECHK" in body, "a wait for a copy"
    assert re.search(r"STG\.E(\.\w+)*\.128", body), "16-byte stores of the gradient"
    assert "UCGABAR_ARV" in body, "a barrier over the cluster"
    assert re.search(r"\bLD\.E", body), "loads through addresses that may lie in another block of the cluster"
    assert not re.search(r"\b(ATOM|RED)", body), "atomics would end bitwise repeatability"


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    ["logits_rows_f32_bf16", "logits_rows_f32_f32", "logits_rows_bf16_bf16", "logits_rows_pair_bf16", "linear_hopper"],
)
def test_instructions_a_pair(built: Callable[[str], Path], source: str) -> None:
    """Hold CUDA's row kernels to the budgets that test_triton_aot.py holds Triton's to, and the product's epilogue."""
    (object_file,) = built("sm_90a").rglob(f"{source}.cu.o")
    kernels = machine_code.of_cuda(machine_code.disassemble(object_file))
    names = {
        "linear_hopper": {"pair_product", "pair_product two heads"},
        "logits_rows_pair_bf16": {"pair_rows resident", "pair_rows two_pass"},
        "logits_rows_f32_bf16": {"logits_rows resident", "logits_rows two_pass"},
    }  # fmt: skip
    others = {"logits_rows resident", "logits_rows two_pass", "logits_gradient"}
    assert set(kernels) == names.get(source, others)
    for kernel, counts in kernels.items():
        for name, count in counts.items():
            assert 10 < count <= machine_code.BUDGET[name], f"{source}, {kernel}: {name} {count:.1f}"


@pytest.mark.slow
def test_launchers_refuse_bad_arguments(module: ModuleType) -> None:
    """Every check comes before the first call to CUDA, so that it holds, and is tested, without a GPU."""
    launch = ("dtype", "gradient_dtype", "path")

    def called(name, fields):
        params = {"logits_rows": module.LogitsRowsParams, "logits_gradient": module.LogitsGradientParams}[name]
        options = {k: x for k, x in fields.items() if k in launch}
        getattr(module, name)(params(**{k: x for k, x in fields.items() if k not in launch}), **options)

    good = {
        "student": 4096, "teacher": 8192, "kind": 16, "weight": 16, "clip": 16, "divergence": 16, "clipped": 16,
        "student_entropy": 16, "teacher_entropy": 16, "student_lse": 16, "teacher_lse": 16, "rows": 2, "vocab": 8,
        "logical_vocab": 8, "stride_student": 8, "stride_teacher": 8, "dtype": "float32", "gradient_dtype": "float32",
    }  # fmt: skip
    for change, message in (
        ({"vocab": 0, "logical_vocab": 0}, "vocab must be > 0, got 0"),
        ({"vocab": -3}, "vocab must be > 0, got -3"),
        ({"rows": -1}, "rows must be >= 0, got -1"),
        ({"rows": 2**29}, "rows must be at most"),
        ({"logical_vocab": 9}, r"logical_vocab must be in \[1, 8\], got 9"),
        ({"stride_student": 7}, "stride_student must be at least vocab, got 7"),
        ({"student": 4098}, "student must be aligned to 4 bytes, got address 4098"),
        ({"teacher": 0}, "teacher must be a device pointer, got null"),
        ({"clip": 0}, "clip must be a device pointer, got null"),
        ({"labels": 64}, "student_logprob must be a device pointer"),
        ({"dtype": "float64"}, "dtype must be float32, float16, bfloat16 or stored_pair, got float64"),
        ({"dtype": "bfloat16", "gradient_dtype": "float16"}, "gradient_dtype must be the logits' dtype"),
        ({"path": "magic"}, "path must be auto, resident or two_pass, got magic"),
        ({"student_transform": (0.0, 0.0, 0.0)}, "student_transform must be a transform with alpha > 0"),
        ({"dlogits": 64, "stride_dlogits": 4}, "stride_dlogits must be at least vocab, got 4"),
        ({"dlogits": 4096, "stride_dlogits": 8, "gradient_dtype": "bfloat16"}, "dlogits must be another buffer"),
        (
            {"dlogits": 4096, "stride_dlogits": 8, "student_row": 16},
            "dlogits must be another buffer than student for gathered rows",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            called("logits_rows", good | change)
    called("logits_rows", good | {"rows": 0})  # nothing to do, nothing launched
    gradient = {
        "student": 4096, "teacher": 8192, "dlogits": 4096, "order": 16, "offsets": 16, "teacher_row": 16, "kind": 16,
        "row_grad": 16, "state": 16, "rows": 2, "vocab": 8, "logical_vocab": 8, "stride_student": 8,
        "stride_teacher": 8, "stride_dlogits": 8, "dtype": "float32",
    }  # fmt: skip
    for change, message in (
        ({"vocab": 0}, r"vocab must be in \[1, 2\*\*31\), got 0"),
        ({"offsets": 0}, "offsets must be a device pointer, got null"),
        ({"stride_dlogits": 9}, "stride_dlogits must be stride_student"),
        ({"rows": 2**31}, "rows must be fewer"),
    ):
        with pytest.raises(ValueError, match=message):
            called("logits_gradient", gradient | change)
    called("logits_gradient", gradient | {"rows": 0})


@pytest.mark.slow
def test_architectures_and_state(module: ModuleType) -> None:
    from vigos.divergence.engines.problem import STATE

    assert module.architectures == "90a-real"
    assert module.row_state == STATE


@pytest.mark.slow
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="AUTO builds the CUDA part where there is a GPU")
def test_auto_leaves_cuda_out_without_a_gpu(tmp_path: Path) -> None:
    folder = tmp_path / "with nvcc"  # for all of them: compilers are looked for once
    assert "CUDA kernels OFF" in configure(folder).stdout
    for wrong, message in (("7.5", "need 8.0 or newer"), ("hopper", "must hold names like")):
        refused = configure(folder, TORCH_CUDA_ARCH_LIST=wrong)
        assert refused.returncode != 0
        assert message in " ".join(refused.stderr.split())
    asked = configure(folder, TORCH_CUDA_ARCH_LIST="8.6 9.0+PTX")
    assert "CUDA kernels ON" in asked.stdout
    assert "CUDA architectures 86-real;90a\n" in asked.stdout
    without = configure(tmp_path / "without", TORCH_CUDA_ARCH_LIST="9.0a", PATH="/usr/bin:/bin")
    assert without.returncode == 0, without.stderr
    assert "CUDA kernels OFF" in without.stdout
