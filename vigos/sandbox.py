"""A Python script in a process of its own: for work that can be neither interrupted nor bounded in this one.

The script answers its first line with {"ready": true} or {"error": why}, and every question with one JSON line. Bytes
may follow a line; its own "bytes" says how many.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

START_S = 120.0  # imports on a busy machine


class WorkerDied(ChildProcessError):
    """Before it answered; `code` is its exit status, below 0 for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(f"it ended with code {code}")
        self.code = code


class Worker:
    """Starts with the first question, and anew after one that it did not survive.

    Safe to use from several threads; a forked child starts a process of its own.
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
        """The answer and the bytes that came with it.

        Raises:
            TimeoutError: it took longer than `timeout_s`, and was killed.
            WorkerDied: by its own limits perhaps.
            ImportError: it could not start; the text is what it said.
        """
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n" + payload)
                process.stdin.flush()
                return _answer(process, timeout_s)
            except BrokenPipeError as error:
                code = process.wait()
                self.stop()
                raise WorkerDied(code) from error
            except (TimeoutError, WorkerDied):
                self.stop()
                raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None:
            return self.process
        # -P: the folder of the script stays off the path, where its neighbours would hide other packages.
        process = subprocess.Popen(
            [sys.executable, "-P", str(self.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            ready, _ = _answer(process, START_S)
        except (TimeoutError, WorkerDied) as error:
            process.kill()
            raise ImportError(f"it did not start: {error}") from error
        if "error" in ready:
            process.kill()
            raise ImportError(ready["error"])
        self.process, self.owner = process, os.getpid()
        return process

    def _unlock(self) -> None:
        self.lock = threading.Lock()

    def stop(self) -> None:
        """Ends the process, if this process started one."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # what it never read is still in the buffer
                        pipe.close()


def _answer(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[dict[str, Any], bytes]:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            raise TimeoutError(f"no answer in {timeout_s} s")
    line = process.stdout.readline()  # answers are flushed whole
    answer = json.loads(line) if line.endswith(b"\n") else None
    count = answer.get("bytes", 0) if answer is not None else 0
    payload = process.stdout.read(count)
    if answer is None or len(payload) < count:
        raise WorkerDied(process.wait())
    return answer, payload
