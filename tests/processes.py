"""Real ranks for the tests: one program started several times, as torchrun starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent


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
