"""Real processes for the tests: programs, and ranks with the variables that torchrun sets.

They are forked by a server (one of each pytest process) that has torch and the trainer already, so that a program
starts at once, where an interpreter of its own imports for ten seconds.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

HELPERS = Path(__file__).parent  # programs that tests start
TESTS = HELPERS.parent
FORKSERVER = "forkserver"
SERVER = multiprocessing.get_context(FORKSERVER)
SERVER.set_forkserver_preload(["vigos.launch", "vigos.train.trainer"])


def _become(program: str, arguments: Sequence[str], log: str, variables: Mapping[str, str]) -> None:
    """Run a program as this process, as `python program arguments >log 2>&1` would."""
    os.environ.update(variables)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable(2)
    sys.argv = [program, *arguments]
    try:
        if program.endswith(".py"):
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def start(
    program: Path | str, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a program, a file or the name of a module, that prints into `log`."""
    process = SERVER.Process(target=_become, args=(str(program), arguments, str(log), dict(env or {})))
    process.start()
    return process


def output_of(program: Path | str, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> str:
    """Return what a program prints, which has to end well."""
    process = start(program, arguments, log, env)
    process.join()
    assert process.exitcode == 0, log.read_text(errors="replace")[-3000:]
    return log.read_text(errors="replace")


def start_ranks(
    script: Path, arguments: Sequence[str], ranks: int, folder: Path, env: Mapping[str, str] | None = None
) -> list[BaseProcess]:
    """Start `ranks` processes of `script` on one port; what each prints goes to `folder/rank<r>.log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    variables = {
        "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, **(env or {}),
    }  # fmt: skip
    shared = {name: str(value) for name, value in variables.items()}
    return [
        start(script, arguments, folder / f"rank{r}.log", shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(ranks)
    ]


def wait_for(processes: Sequence[BaseProcess], folder: Path, timeout: float) -> list[int | None]:
    """Return exit codes; whoever is left after `timeout` seconds is killed. The logs of failures are printed."""
    limit = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
    if any(process.is_alive() for process in processes):
        print(f"not finished after {timeout:.0f} s")
    for process in processes:
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    for rank, code in enumerate(codes):
        if code != 0:
            print(f"--- rank {rank}: exit code {code}")
            print((folder / f"rank{rank}.log").read_text(errors="replace")[-4000:])
    return codes


def run_ranks(
    script: Path, arguments: Sequence[str], ranks: int, folder: Path, timeout: float,
    env: Mapping[str, str] | None = None,
) -> list[int | None]:  # fmt: skip
    """Return exit codes of ranks that leave their results in `folder`.

    Once, where a thread of torch's own has crashed, they begin again: one of gloo's has, in malloc, in one of some
    fifty runs of test_distributed.py. A crash with Python on its stack, ours included, stands.
    """
    codes = wait_for(start_ranks(script, arguments, ranks, folder, env), folder, timeout)
    for rank, code in enumerate(codes):
        if code and code < 0 and crashed_outside_python((folder / f"rank{rank}.log").read_text(errors="replace")):
            warnings.warn(f"rank {rank} of {script.name} crashed in a thread without Python; once more", stacklevel=2)
            shutil.rmtree(folder)
            return wait_for(start_ranks(script, arguments, ranks, folder, env), folder, timeout)
    return codes


def crashed_outside_python(log: str) -> bool:
    """Tell whether faulthandler has named no thread of the interpreter's as the one that crashed."""
    return "Fatal Python error: Segmentation fault" in log and "Current thread" not in log
