"""Real ranks for the tests: one program started several times, as torchrun starts it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

HELPERS = Path(__file__).parent  # programs that tests start
TESTS = HELPERS.parent


def start_ranks(
    script: Path, arguments: list[str], ranks: int, folder: Path, env: Mapping[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Starts `ranks` processes of `script` on one port; what each prints goes to `folder/rank<r>.log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(ranks):
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1,
            "PYTHONFAULTHANDLER": 1,
        }  # fmt: skip
        own = os.environ | {name: str(value) for name, value in variables.items()} | dict(env or {})
        own["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), own.get("PYTHONPATH", "")])
        with (folder / f"rank{rank}.log").open("wb") as log:
            command = [sys.executable, str(script), *arguments]
            started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    return started


def wait_for(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> list[int]:
    """Exit codes; whoever is left after `timeout` seconds is killed. The logs of failures are printed."""
    try:
        for process in processes:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        print(f"not finished after {timeout:.0f} s")
    finally:
        for process in processes:
            process.kill()
    codes = [process.wait() for process in processes]
    for rank, code in enumerate(codes):
        if code != 0:
            print(f"--- rank {rank}: exit code {code}")
            print((folder / f"rank{rank}.log").read_text(errors="replace")[-4000:])
    return codes


def run_ranks(
    script: Path, arguments: list[str], ranks: int, folder: Path, timeout: float, env: Mapping[str, str] | None = None
) -> list[int]:
    """Exit codes of ranks that leave their results in `folder`.

    Once, where a thread of torch's own has crashed, they begin again: one of gloo's has, in malloc, in one of some
    fifty runs of test_distributed.py. A crash with Python on its stack, ours included, stands.
    """
    codes = wait_for(start_ranks(script, arguments, ranks, folder, env), folder, timeout)
    for rank, code in enumerate(codes):
        if code < 0 and crashed_outside_python((folder / f"rank{rank}.log").read_text(errors="replace")):
            warnings.warn(f"rank {rank} of {script.name} crashed in a thread without Python; once more", stacklevel=2)
            shutil.rmtree(folder)
            return wait_for(start_ranks(script, arguments, ranks, folder, env), folder, timeout)
    return codes


def crashed_outside_python(log: str) -> bool:
    """Whether what PYTHONFAULTHANDLER has printed names no thread of the interpreter's as the one that crashed."""
    return "Fatal Python error: Segmentation fault" in log and "Current thread" not in log
