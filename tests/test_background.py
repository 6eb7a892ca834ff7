"""Work on threads that nobody has to wait for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vigos.rollout.threads import Background, each


def test_results_in_order_whatever_the_number_of_threads() -> None:
    def work(i: int) -> int:
        time.sleep(0.01 * (5 - i))  # the last one is done first
        return i * i

    for threads in (1, 2, 9):
        assert each(work, range(5), threads) == [0, 1, 4, 9, 16]
    assert each(work, [], 3) == []


def test_no_more_threads_than_asked_for() -> None:
    together, most, lock = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.02)
        with lock:
            together -= 1

    each(work, range(12), 3)
    assert most == 3


def test_one_failure_ends_it_and_begins_nothing_more() -> None:
    begun: list[int] = []

    def work(i: int) -> None:
        begun.append(i)
        if i == 1:
            raise KeyError("no such thing")
        time.sleep(0.05)

    with pytest.raises(KeyError, match="no such thing"):
        each(work, range(50), 2)
    time.sleep(0.2)
    assert len(begun) < 6


def test_what_happens_beside_is_told_where_it_is_asked_for() -> None:
    started = time.perf_counter()
    beside = Background(lambda: time.sleep(0.2) or "done")
    assert time.perf_counter() - started < 0.15, "it is not waited for"
    assert beside.result() == "done"
    assert beside.failure() is None
    assert 0.2 <= beside.seconds < 2

    broken = Background(lambda: 1 // 0)
    assert isinstance(broken.failure(), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        broken.result()


def test_the_process_ends_without_waiting(tmp_path: Path) -> None:
    """Neither for what is beside it, nor for the threads that work has started in turn."""
    program = (
        "import time, threading\n"
        "from vigos.rollout.threads import Background, each\n"
        "inside = threading.Event()\n"
        "Background(lambda: each(lambda _: (inside.set(), time.sleep(60)), range(4), 2))\n"
        "assert inside.wait(20)\n"
        "raise SystemExit(3)\n"
    )
    started = time.perf_counter()
    code = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], timeout=50).returncode
    assert code == 3
    assert time.perf_counter() - started < 30
