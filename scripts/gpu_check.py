"""Everything that only a GPU can prove, in one command, for a GPU that is there for a quarter of an hour.

    make gpu-check ARGS="--first --out OUT"                     # system Python, on the GPU machine
    python scripts/gpu_check.py --steps tests memcheck --minutes 4 --out OUT   # what an earlier part has found is kept
    make gpu-check ARGS="--first --device cpu --out /tmp/check" # small shapes: rehearses all of it on any machine

OUT gets three files, whatever happens: check.json (machine, steps, figures of the first run), summary.txt (to read) and
check.tar.gz (logs, CSVs, test reports), all written again after each step. With --first the extension is built in the
background while bench/first_run.py takes what a first run must bring home: ceilings, error, ratio, profile, chunk.

No network, no installs: it uses the torch, triton, pybind11, cmake, nvcc and pytest that the machine has. vigos._C is
built for the GPU that is there and put beside the package, as an editable install would. Every step has a limit and all
share --minutes; what does not fit is marked "no time". Peers (TRL, Liger) come from wheels in build/wheels, which
`make gpu-wheels` fills where there is a network; without them they are left out of the comparison. A copy of the tree
without its history is told its commit in VIGOS_COMMIT. Exit status: 0 if every step that ran passed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = ROOT / "vigos" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "pybind11")
SAME = ("device", "gpu", "commit", "modified")  # of parts of one check
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
    """A run: where, when, how, and what came out."""

    out: Path
    work: Path  # logs, CSVs and reports, on their way into the archive
    device: str
    deadline: float
    machine: dict[str, object] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    building: subprocess.Popen[bytes] | None = None

    def record(self, step: Step) -> None:
        """In the place of an earlier one of its name: a check may be made in parts."""
        self.steps = [kept for kept in self.steps if kept.name != step.name] + [step]
        self.write()

    def resume(self) -> None:
        """Takes over the steps and files that an earlier part of the same check has left."""
        try:
            before = json.loads((self.out / "check.json").read_text())
            if all(before["machine"].get(key) == self.machine.get(key) for key in SAME):
                self.steps = [Step(**step) for step in before["steps"]]
                with tarfile.open(self.out / "check.tar.gz") as archive:
                    archive.extractall(self.work, filter="data")
        except (OSError, ValueError, tarfile.TarError):
            return

    def write(self) -> None:
        """All three files, each through another, so that a cut-off never leaves half of one."""
        content: dict[str, object] = {"machine": self.machine, "steps": [asdict(step) for step in self.steps]}
        with suppress(OSError, ValueError):
            content["first"] = json.loads((self.work / "first.json").read_text())
        partial = self.out / "part"
        with tarfile.open(partial, "w:gz") as archive:
            for path in sorted(self.work.iterdir()):
                archive.add(path, path.name)
        partial.replace(self.out / "check.tar.gz")
        for name, text in (("check.json", json.dumps(content, indent=1)), ("summary.txt", self.summary())):
            partial.write_text(text + "\n")
            partial.replace(self.out / name)

    def summary(self) -> str:
        """The table of steps, then the end of what each printed."""
        about = (f"{key}: {value}" for key, value in self.machine.items())
        lines = [f"{s.name:18} {s.status:10} {s.seconds:6.1f} s  {s.detail}" for s in self.steps]
        tails = [f"\n== {s.name}\n{s.tail}" for s in self.steps if s.tail]
        return "\n".join([*lines, "", *about, *tails])

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def skip(self, name: str, reason: str) -> None:
        """Records a step that this machine or this checkout has no use for."""
        self.record(Step(name, "skipped", detail=reason))
        print(f"-- {name}: skipped, {reason}", flush=True)

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        """Starts `command`, its output in <name>.log."""
        print(f"-- {name}: {' '.join(command)}", flush=True)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        with (self.work / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(
        self, name: str, command: list[str], limit: float, summary: Callable[[str], str] | None = None,
        process: subprocess.Popen[bytes] | None = None, lines: int = 15,
    ) -> bool:  # fmt: skip
        """Runs `command`, or waits for a `process` of it, for at most `limit` seconds; keeps its last `lines`."""
        if self.left() < 5 and process is None:
            self.record(Step(name, "no time"))
            return False
        limit, begin = max(1.0, min(limit, self.left())), time.monotonic()
        try:
            process = process or self.start(name, command)
            code = process.wait(timeout=limit)
            status = "passed" if code == 0 else "failed"
            detail = "" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            assert process is not None
            os.killpg(process.pid, signal.SIGKILL)  # its children too
            process.wait()
            status, detail = "timed out", f"after {limit:.0f} s"
        except OSError as error:
            status, detail = "failed", str(error)
        text = (self.work / f"{name}.log").read_text(errors="replace")
        if summary is not None and status != "timed out":
            detail = "; ".join(filter(None, (detail, summary(text))))
        step = Step(name, status, time.monotonic() - begin, detail, "\n".join(text.splitlines()[-lines:]))
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


def start_build(check: Check) -> None:
    """vigos._C for the GPU that is there, beside the package; for a CPU, only where this Python has none there."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    pybind11 = _output(sys.executable, "-m", "pybind11", "--cmakedir")
    gpu = check.device == "cuda"
    reason = (
        "no cmake" if cmake is None else f"{sys.executable} has no pybind11" if not pybind11
        else "no nvcc; the CUDA engines are not tested" if gpu and shutil.which("nvcc") is None else None
    )  # fmt: skip
    if reason is not None or cmake is None:
        check.skip("build", str(reason))
        return
    into = ROOT / "build" / f"gpu-check-{check.device}-{sysconfig.get_config_var('SOABI')}"
    into.mkdir(parents=True, exist_ok=True)
    if gpu:
        os.environ["TORCH_CUDA_ARCH_LIST"] = str(check.machine["capability"])
    configure = [
        cmake, "-S", str(ROOT), "-B", str(into), "-DCMAKE_BUILD_TYPE=Release", f"-DVIGOS_CUDA={'ON' if gpu else 'OFF'}",
        f"-DVIGOS_OUTPUT_DIR={EXTENSION.parent if gpu or not EXTENSION.exists() else into}",
        f"-DVIGOS_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}", *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]  # fmt: skip
    jobs = max(1, (os.cpu_count() or 1) - 1)  # one core feeds the GPU
    both = f"{shlex.join(configure)} && {shlex.join([cmake, '--build', str(into), '--parallel', str(jobs)])}"
    check.building = check.start("build", ["bash", "-c", both])


def build(check: Check) -> None:
    """Start the build, if nothing has, and wait for it."""
    if check.building is None:
        start_build(check)
    if check.building is not None:
        check.run("build", [], 210, process=check.building)


def _pytest_summary(text: str) -> str:
    lines = [line.strip("= ") for line in text.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    return lines[-1] if lines else ""


def first(check: Check) -> None:
    """Measure what a first run must bring home, in a process of its own."""
    command = [sys.executable, "bench/first_run.py", "--device", check.device, "--out", str(check.work / "first.json")]
    check.run("first", command, 150, lines=90)


def _bench(name: str, script: str, limit: float, gpu: str, cpu: str = "") -> Callable[[Check], None]:
    """A benchmark whose rows go to <name>.csv; options for either device, none for a CPU: not there."""

    def run(check: Check) -> None:
        if check.device == "cpu" and not cpu:
            check.skip(name, "nothing that a CPU could rehearse")
            return
        csv, options = str(check.work / f"{name}.csv"), shlex.split(gpu if check.device == "cuda" else cpu)
        command = [sys.executable, f"bench/{script}.py", "--device", check.device, *options, "--out", csv]
        check.run(name, command, limit if check.device == "cuda" else 4 * limit, lines=40)

    return run


def tests(check: Check) -> None:
    """Every test marked gpu, and those of the engines and of Triton, which take the GPU when there is one."""
    # Files by name: collecting the others takes packages that a GPU machine without network may lack.
    files = {p: p.read_text() for p in sorted(ROOT.glob("tests/test_*.py"))}
    chosen = [str(p.relative_to(ROOT)) for p, text in files.items() if "mark.gpu" in text]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={check.work / 'tests.xml'}"]
    if check.device == "cuda":
        chosen += [f"tests/test_{name}.py" for name in ("engines", "engines_logits", "triton_divergence")]
        options = ["-v", "-n", "12", "--dist", "worksteal", "-o", "timeout=60", "-k", "gpu or triton or cuda"]
    else:  # collected, and skipped
        options = ["-q", "-m", "gpu"]
    check.run("tests", [*pytest, *options, *chosen], 240, _pytest_summary, lines=40)


def _sanitizer(kind: str, cases: str) -> Callable[[Check], None]:
    """compute-sanitizer over the CUDA kernels at small sizes."""

    def run(check: Check) -> None:
        tool = shutil.which("compute-sanitizer")
        if check.device == "cpu" or tool is None:
            check.skip(kind, "no GPU asked for" if check.device == "cpu" else "compute-sanitizer is not installed")
            return
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_engines_gpu.py"]
        command = [tool, "--tool", kind, "--error-exitcode", "9", *pytest, "-k", cases]
        check.run(kind, command, 75, _pytest_summary)

    return run


TARGET = "--cases target --repeats 10 --only"
SMALL = "--cases small --repeats 1 --only"
# In this order, so that what matters most is there when time runs out; --first puts `first` before the build.
STEPS: dict[str, Callable[[Check], None]] = {
    "build": build,
    "first": first,
    "cuda": _bench(
        "cuda", "divergence", 90, f"{TARGET} 'vigos cuda' 'vigos cuda, fp32 logits'", f"{SMALL} 'vigos cpu'"
    ),
    "rows": _bench(
        "rows", "logits_rows", 60, "--vocab 151936 --dtypes bfloat16",
        "--rows 16 --vocab 2000 --repeats 1 --dtypes float32",
    ),
    "peers": _bench(
        "peers", "divergence", 120, f"{TARGET} PyTorch torch.compile TRL Liger 'Liger Triton'", f"{SMALL} PyTorch TRL"
    ),
    "tests": tests,
    "tree": _bench("tree", "prefix_tree", 90, "--size 3b", "--repeats 1 --size 2m --cases 2"),
    "training": _bench(
        "training", "train_step", 60, "--size 3b", "--repeats 1 --size 2m --image-tokens 64 --rollouts 2"
    ),
    "sweeps": _bench(
        "sweeps", "divergence", 180,
        "--cases rows live head kind contrast n shape vocabulary --only 'vigos triton' 'vigos cuda'",
    ),
    "memcheck": _sanitizer("memcheck", "small"),
    # It knows ordinary shared memory; what goes through the copy engine it does not.
    "racecheck": _sanitizer("racecheck", "small_paths"),
}  # fmt: skip


def carry_peers(work: Path) -> None:
    """Unpack the wheels of build/wheels, and let every step import what they hold."""
    wheels = sorted((ROOT / "build/wheels").glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work.with_suffix(".peers"))
    if wheels:
        folder, known = str(work.with_suffix(".peers")), os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, known)))
        sys.path.insert(0, folder)  # for their versions


def main() -> int:
    """Runs the steps in order and prints the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/<GPU name>")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--first", action="store_true", help="build in the background of the first figures")
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
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "check"
        work.mkdir()
        carry_peers(work)
        check = Check(out, work, args.device, start + 60 * args.minutes - 5)
        check.machine = identity(args.device)
        if len(args.steps) < len(STEPS):
            check.resume()
        check.write()
        steps = [name for name in STEPS if name in args.steps]
        if args.first and (args.device == "cuda" or EXTENSION.exists()):  # a CPU's first figures need the extension
            steps.sort(key=lambda name: name != "first")
            if "build" in steps:
                start_build(check)
        for name in steps:
            STEPS[name](check)
        check.machine["seconds"] = time.monotonic() - start
        check.write()

    print(f"\n{gpu}, commit {str(check.machine['commit'])[:10]}, {check.machine['seconds']:.0f} s, results in {out}")
    for step in check.steps:
        print(f"  {step.name:18} {step.status:10} {step.seconds:6.1f} s  {step.detail}")
    return 1 if any(step.status in ("failed", "timed out") for step in check.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
