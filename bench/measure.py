"""What every benchmark here shares: whose numbers they are, time, peak memory, and the CSV they are kept in.

A number belongs to a machine, to versions and to a commit; each row of a CSV says which. Contenders take turns within a
round, so that a busy moment slows them alike, and the median over rounds counts.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import importlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from vigos.divergence.engines import cpu

RESULTS = Path(__file__).resolve().parent / "results"


def results_file(device: str, name: str) -> Path:
    """Return bench/results/cuda/NAME.csv, or bench/results/cpu-ISA/NAME.csv: processors of different kinds differ."""
    if device == "cpu":
        device = f"cpu-{importlib.import_module('vigos._C').isa()}"
    return RESULTS / device / f"{name}.csv"


def machine(device: str, *packages: str) -> dict[str, str]:
    """Device, versions of torch and of `packages`, and the commit ("+" after it: with changes not in it).

    A copy without its history takes the commit from the variable VIGOS_COMMIT.
    """

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # not a checkout
            return ""

    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
        name = f"{cpu}, {torch.get_num_threads()} threads"
    out = {"device": name, "torch": torch.__version__}
    for package in packages:
        with suppress(PackageNotFoundError):
            out[package] = version(package)
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    commit = git("rev-parse", "--short", "HEAD") or os.environ.get("VIGOS_COMMIT", "")[:7]
    out["commit"] = commit + ("+" if changed else "")
    return out


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one call. On a GPU the L2 cache is overwritten before, and the device's own clock counts."""
    if device == "cuda":
        torch.empty(2**28, dtype=torch.int8, device=device).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def take_turns(runs: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of each; every one has run before, so that imports and compilation are behind it."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: median(of) for name, of in times.items()}


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Highest memory above what stood before: the allocator's on a GPU, resident memory on a CPU (Linux)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu.release_memory()  # what earlier calls left would hide what this one takes
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||."""
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def checked(
    name: str, gradient: Callable[[], Tensor], exact: Tensor, allowed: float | None, failed: list[str]
) -> float | None:
    """Error of a contender's gradient; None, and a line that says why, where there is nothing to time.

    What is not installed, or does not fit the memory, is no fault. What cannot be built or run is, and an error that is
    not below `allowed`: `failed` gets a line, and the other contenders their turn.
    """
    fault = True
    try:
        error = relative_error(gradient(), exact)
        if allowed is None or error < allowed:
            return error
        reason = f"the gradient is off by {error:.1e}; no time is worth printing"
    except (ValueError, ImportError, torch.OutOfMemoryError) as problem:
        fault, reason = False, str(problem)
    except Exception as problem:  # whatever a compiler or a driver raises
        reason = f"{type(problem).__name__}: {problem}"
    line = f"{name}: {(reason.splitlines() or ['no reason given'])[0]}"
    print(f"  {line}", flush=True)
    if fault:
        failed.append(line)
    return None


class Table:
    """Rows of a CSV, rewritten after each so that a run that is cut off leaves what it had.

    `groups`: what is measured anew, values of the column "group"; rows of other groups that the file has are kept.
    """

    def __init__(self, path: Path, about: dict[str, str], groups: Iterable[str] | None = None) -> None:
        self.path, self.about, self.rows = path, about, list[dict[str, object]]()
        if groups is not None and path.exists():
            with path.open(newline="") as file:
                self.rows += [row for row in csv.DictReader(file) if row["group"] not in set(groups)]

    def add(self, rows: Iterable[dict[str, object]]) -> None:
        self.rows += [{k: _short(v) for k, v in row.items()} | self.about for row in rows]
        fields = list(dict.fromkeys(key for row in self.rows for key in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value
