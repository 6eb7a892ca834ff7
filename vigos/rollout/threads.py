"""Work beside the main thread that nobody has to wait for.

Its threads are daemons: a run that has failed elsewhere ends at once. The pools of concurrent.futures are joined when
the interpreter leaves, so that one request to a server that hangs would keep the process for as long as the request may
take.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Background(Generic[T]):
    """`work()` on a thread of its own, started at once."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.seconds = 0.0  # that it took, once it is over
        self._future: Future[T] = Future()
        threading.Thread(target=self._run, args=(work,), name="vigos-background", daemon=True).start()

    def _run(self, work: Callable[[], T]) -> None:
        started = time.perf_counter()
        try:
            result = work()
        except BaseException as error:  # raised where the result is asked for
            self.seconds = time.perf_counter() - started
            self._future.set_exception(error)
        else:
            self.seconds = time.perf_counter() - started
            self._future.set_result(result)

    def result(self) -> T:
        """Waits; what `work` raised is raised here."""
        return self._future.result()

    def failure(self) -> BaseException | None:
        """Waits; what `work` raised, None if it did its work."""
        return self._future.exception()


def each(work: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """`[work(item) for item in items]`, on up to `threads` threads.

    The first item, in their order, whose work fails ends it: its error is raised, items that have not been begun never
    are, and those under way are left to themselves.
    """
    futures: list[Future[R]] = [Future() for _ in items]
    waiting: queue.SimpleQueue[tuple[Future[R], T]] = queue.SimpleQueue()
    for pair in zip(futures, items, strict=True):
        waiting.put(pair)

    def run() -> None:
        while True:
            try:
                future, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                future.set_result(work(item))
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(threads, len(items))):
        threading.Thread(target=run, name="vigos-each", daemon=True).start()
    try:
        return [future.result() for future in futures]
    except BaseException:
        with suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        raise
