"""Run a Python script in a process of its own, for work that can be neither interrupted nor bounded in this one.

The script answers its first line with {"ready": true} or {"error": why}, and every question with one JSON line. Bytes
may follow a line; its own "bytes" says how many.

Not a process pool (pebble, concurrent.futures): those unpickle what the child sends, and one of the children decodes
images that somebody else made. JSON and bytes run nothing in this process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

START_S = 120.0  # imports on a busy machine
MAX_LINE = 2**20


class WorkerDied(ChildProcessError):
    """The process ended before it answered; `code` is its exit status, below 0 for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(f"it ended with code {code}")
        self.code = code


class Worker:
    """Ask a script that runs in a process of its own.

    The process starts with the first question, and anew after one that it did not survive. Safe to use from several
    threads; a forked child starts a process of its own.

    Args:
        script: path of the Python file that is run.
    """

    def __init__(self, script: Path) -> None:
        self.script = script
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.lock = threading.Lock()
        atexit.register(self.stop)
        if hasattr(os, "register_at_fork"):  # the lock may be another thread's, which the child does not have
            os.register_at_fork(after_in_child=self._unlock)

    def ask(self, question: Any, payload: bytes = b"", *, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        """Return the answer to a question and the bytes that came with it.

        Args:
            question: anything that JSON can hold.
            payload: bytes sent after it.
            timeout_s: seconds until the process is killed, sending and receiving included.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            WorkerDied: the process ended, by its own limits perhaps.
            ImportError: it could not start; the text is what it said.
        """
        with self.lock:
            process = self._running()
            try:
                return _exchange(process, json.dumps(question).encode() + b"\n" + payload, timeout_s)
            except (TimeoutError, WorkerDied):
                self.stop()
                raise

    def stop(self) -> None:
        """End the process, if this process started one."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # what it never read is still in the buffer
                        pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None:
            return self.process
        # -P: the folder of the script stays off the path, where its neighbours would hide other packages.
        command = [sys.executable, "-P", str(self.script)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.owner = os.getpid()
        try:
            ready, _ = _exchange(self.process, b"", START_S)
        except (TimeoutError, WorkerDied) as error:
            self.stop()
            raise ImportError(f"it did not start: {error}") from error
        if "error" in ready:
            self.stop()
            raise ImportError(ready["error"])
        return self.process

    def _unlock(self) -> None:
        self.lock = threading.Lock()


def _exchange(process: subprocess.Popen[bytes], message: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes]:
    """Write a message and read one answer; at the deadline the process is killed, which ends either."""
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout_s, kill)
    timer.daemon = True
    timer.start()
    answer, payload, complete = {}, b"", False
    try:
        process.stdin.write(message)
        process.stdin.flush()
        line = process.stdout.readline(MAX_LINE)
        answer = json.loads(line)
        payload = process.stdout.read(answer.get("bytes", 0))
        complete = len(payload) == answer.get("bytes", 0)
    except (BrokenPipeError, ValueError):  # it is gone, or was cut off in its line
        pass
    finally:
        timer.cancel()
    if complete:
        return answer, payload
    if late.is_set():
        raise TimeoutError(f"no answer in {timeout_s} s")
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:  # it lives, and wrote no JSON
        process.kill()
        code = process.wait()
    raise WorkerDied(code)
