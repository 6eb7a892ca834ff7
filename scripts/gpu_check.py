"""Everything that only a GPU can prove, in one command: build, tests, benchmarks, sanitizer; results as data.

    make gpu-check                                              # system Python, on the GPU machine
    python scripts/gpu_check.py --out bench/results/h200        # the same
    python scripts/gpu_check.py --steps benchmarks --minutes 10 # in parts: what an earlier run has measured is kept
    python scripts/gpu_check.py --device cpu --out /tmp/check   # small shapes: exercises all of it on any machine

No network, no installs: it uses the torch, triton, pybind11, cmake, nvcc and pytest that the machine has. vigos._C is
built for the GPU that is there and put beside the package, as an editable install would. Every step has a limit and all
share --minutes; what does not fit is marked "no time". `check.json` is rewritten after each step, and benchmarks write
their CSV as they go, so that a run that is cut off leaves what it had. Peers (TRL, Liger) that Python cannot import are
left out of the comparison; PYTHONPATH may name a folder with their unpacked wheels. A copy of the tree without its
history is told its commit in VIGOS_COMMIT. Exit status: 0 if every step that ran passed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "pybind11")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


@dataclass
class Step:
    """One step's outcome. status: "passed", "failed", "timed out", "no time" or "skipped"."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    tail: str = ""  # end of what it printed


@dataclass
class Check:
    """A run: where, when, how, and what came out. Written to check.json after every step."""

    out: Path
    device: str
    deadline: float
    machine: dict[str, object] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def record(self, step: Step) -> None:
        """In the place of an earlier one of its name: a check may be made in parts."""
        self.steps = [kept for kept in self.steps if kept.name != step.name] + [step]
        self.write()

    def resume(self) -> None:
        """Takes over the steps that an earlier part of the same check has left."""
        try:
            before = json.loads((self.out / "check.json").read_text())
        except (OSError, ValueError):
            return
        if all(before["machine"].get(key) == self.machine.get(key) for key in ("device", "gpu", "commit", "modified")):
            self.steps = [Step(**step) for step in before["steps"]]

    def write(self) -> None:
        """Through another file, so that a cut-off never leaves half of one."""
        content = {"machine": self.machine, "steps": [asdict(step) for step in self.steps]}
        partial = self.out / "check.json.part"
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(self.out / "check.json")

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def skip(self, name: str, reason: str) -> None:
        """Records a step that this machine or this checkout has no use for."""
        self.record(Step(name, "skipped", detail=reason))
        print(f"-- {name}: skipped, {reason}", flush=True)

    def run(self, name: str, command: list[str], limit: float, summary: Callable[[str], str] | None = None) -> bool:
        """Runs `command` for at most `limit` seconds; its output goes to <out>/<name>.log."""
        if self.left() < 5:
            self.record(Step(name, "no time"))
            return False
        print(f"-- {name}: {' '.join(command)}", flush=True)
        limit, start = min(limit, self.left()), time.monotonic()
        log = self.out / f"{name}.log"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        try:
            with log.open("w") as file:
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
            status = "passed" if code == 0 else "failed"
            detail = "" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status, detail = "timed out", f"after {limit:.0f} s"
        except OSError as error:
            status, detail = "failed", str(error)
        text = log.read_text(errors="replace")
        if summary is not None and status != "timed out":
            detail = "; ".join(filter(None, (detail, summary(text))))
        step = Step(name, status, time.monotonic() - start, detail, "\n".join(text.splitlines()[-15:]))
        self.record(step)
        print(f"   {status} in {step.seconds:.0f} s {detail}", flush=True)
        return status == "passed"


def _output(*command: str) -> str:
    """What a command prints, or "" where it is not there or fails: for identity, which must never end a run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def identity(device: str) -> dict[str, object]:
    """GPU, driver, clocks, versions and commit."""
    import torch

    out: dict[str, object] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "device": device,
        "python": platform.python_version(), "platform": platform.platform(), "cpu_count": os.cpu_count(),
        "commit": _output("git", "rev-parse", "HEAD") or os.environ.get("VIGOS_COMMIT"),
        "modified": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "cuda": torch.version.cuda, "nvcc": (re.findall(r"release (\S+),", _output("nvcc", "--version")) or [None])[0],
        "packages": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        out |= {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count, "memory_gib": properties.total_memory / 2**30,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
        }  # fmt: skip
        values = _output("nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader").split(", ")
        out["clocks"] = dict(zip(CLOCKS, values, strict=False))
    return out


def build(check: Check) -> bool:
    """vigos._C for the GPU that is there, beside the package; with --device cpu, into the output folder only."""
    cmake = shutil.which("cmake")
    pybind11 = _output(sys.executable, "-m", "pybind11", "--cmakedir")
    if cmake is None or not pybind11:
        check.skip("build", "no cmake" if cmake is None else f"{sys.executable} has no pybind11")
        return False
    gpu = check.device == "cuda"
    if gpu and shutil.which("nvcc") is None:
        check.skip("build", "no nvcc; the CUDA engines are not tested")
        return False
    into = ROOT / "build" / f"gpu-check-{check.device}-{sysconfig.get_config_var('SOABI')}"
    into.mkdir(parents=True, exist_ok=True)
    if gpu:
        os.environ["TORCH_CUDA_ARCH_LIST"] = str(check.machine["capability"])
    configure = [
        cmake, "-S", str(ROOT), "-B", str(into), "-DCMAKE_BUILD_TYPE=Release", f"-DVIGOS_CUDA={'ON' if gpu else 'OFF'}",
        f"-DVIGOS_OUTPUT_DIR={ROOT / 'vigos' if gpu else check.out}",
        f"-DVIGOS_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}", *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]  # fmt: skip
    jobs = str(max(1, os.cpu_count() or 1))
    return check.run("configure", configure, 60) and check.run(
        "build", [cmake, "--build", str(into), "--parallel", jobs], 150
    )


def _pytest_summary(text: str) -> str:
    lines = [line.strip("= ") for line in text.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    return lines[-1] if lines else ""


def tests(check: Check) -> None:
    """On a GPU every test marked gpu, and the Triton tests, which take the GPU when there is one."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Files by name: collecting the others takes packages that a GPU machine without network may lack.
    marked = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in p.read_text()]
    # On a CPU they are collected, and skipped.
    check.run("tests", [*pytest, "-m", "gpu", *marked, f"--junitxml={check.out / 'tests.xml'}"], 150, _pytest_summary)
    if check.device == "cuda":
        for name in ("test_engines", "test_engines_logits", "test_triton_divergence", "test_tree_attention"):
            which = ["-k", "triton or cuda"] if "engines" in name else []
            check.run(name, [*pytest, f"tests/{name}.py", *which], 90, _pytest_summary)


def sanitizer(check: Check) -> None:
    """memcheck and racecheck over the CUDA kernels at small sizes."""
    tool = shutil.which("compute-sanitizer")
    if check.device == "cpu" or tool is None:
        check.skip("sanitizer", "no GPU asked for" if check.device == "cpu" else "compute-sanitizer is not installed")
        return
    # racecheck knows ordinary shared memory; the fused kernels' goes through the copy engine.
    for kind, cases in (("memcheck", "small"), ("racecheck", "small_paths")):
        check.run(
            f"sanitizer-{kind}",
            [
                tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-p",
                "no:cacheprovider", "tests/test_engines_gpu.py", "-k", cases,
            ],
            75, _pytest_summary,
        )  # fmt: skip


def benchmarks(check: Check) -> None:
    """Each writes a CSV beside check.json. On a CPU the smallest shapes."""
    plans: list[tuple[str, str, list[str], float]] = [
        ("logits_rows", "logits_rows", [], 60),
        ("divergence", "divergence", [], 180),
        ("prefix_tree", "prefix_tree_3b", ["--size", "3b"], 90),
        ("train_step", "train_step_3b", ["--size", "3b"], 60),
        ("prefix_tree", "prefix_tree_7b", ["--size", "7b"], 90),
    ]
    if check.device == "cpu":
        once = ["--repeats", "1"]
        plans = [
            ("logits_rows", "logits_rows", [*once, "--rows", "16", "--vocab", "2000"], 60),
            ("divergence", "divergence", [*once, "--cases", "small"], 120),
            ("prefix_tree", "prefix_tree_2m", [*once, "--size", "2m", "--cases", "2"], 60),
            ("train_step", "train_step_2m", [*once, "--size", "2m", "--image-tokens", "64", "--rollouts", "2"], 60),
        ]
    for script, name, options, limit in plans:
        csv = str(check.out / f"{name}.csv")
        command = [sys.executable, f"bench/{script}.py", "--device", check.device, *options, "--out", csv]
        check.run(f"bench-{name}", command, limit)


STEPS: dict[str, Callable[[Check], object]] = {
    "build": build, "tests": tests, "benchmarks": benchmarks,
    "sanitizer": sanitizer,  # last: the slowest, and the rest matters without it
}  # fmt: skip


def main() -> int:
    """Runs the steps in order and prints the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/<GPU name>")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="in the order given here")
    args = parser.parse_args()
    start = time.monotonic()

    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU is visible to torch; --device cpu exercises this script without one", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    out = (args.out or ROOT / "bench/results" / slug).resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, args.device, start + 60 * args.minutes - 5)
    check.machine = identity(args.device)
    if len(args.steps) < len(STEPS):
        check.resume()
    check.write()
    for name in STEPS:
        if name in args.steps:
            STEPS[name](check)
    check.machine["seconds"] = time.monotonic() - start
    check.write()

    print(f"\n{gpu}, commit {str(check.machine['commit'])[:10]}, {check.machine['seconds']:.0f} s, results in {out}")
    for step in check.steps:
        print(f"  {step.name:24} {step.status:10} {step.seconds:6.1f} s  {step.detail}")
    return 1 if any(step.status in ("failed", "timed out") for step in check.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
