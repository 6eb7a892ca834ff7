"""Builds vigos._C with CMake. Everything else about the package stands in pyproject.toml.

VIGOS_BUILD=0        leaves the extension out (pure Python: the `reference` engine still runs).
VIGOS_BUILD=1        (default) builds it and goes on without it, with a warning, when no compiler is found.
VIGOS_BUILD=require  fails when it cannot be built.
VIGOS_CUDA=AUTO      (default) adds the CUDA kernels where nvcc is found and either an NVIDIA driver is present or
                     TORCH_CUDA_ARCH_LIST is set; an install without a GPU stays at seconds. No nvcc: no failure.
VIGOS_CUDA=ON | OFF  builds them (for sm_80 and sm_90a unless TORCH_CUDA_ARCH_LIST says otherwise), or never does.
TORCH_CUDA_ARCH_LIST, MAX_JOBS: as elsewhere in the PyTorch world.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = os.environ.get("VIGOS_BUILD", "1")


def jobs() -> int:
    """One job a core, but no more than memory for 2 GiB each."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory_gib // 2)))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        import pybind11

        configure = [
            "cmake", "-S", str(ROOT), "-B", str(work), "-DCMAKE_BUILD_TYPE=Release",
            f"-DVIGOS_OUTPUT_DIR={out.parent}", f"-DVIGOS_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVIGOS_CUDA={os.environ.get('VIGOS_CUDA', 'AUTO')}",
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(work), "--parallel", str(jobs())], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if BUILD == "require":
                raise
            print(f"warning: vigos._C was not built ({error}); `vigos doctor` says what that costs", file=sys.stderr)


extensions = [] if BUILD == "0" else [Extension("vigos._C", sources=[], optional=BUILD != "require")]
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
