"""Errors that end a run, and how a rank leaves whose peers are gone."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class TrainingStopped(RuntimeError):
    """A run that cannot go on, with what to do about it."""


# How torch says that a peer has gone or is late; gloo has no exception type of its own.
_LOST = ("closed by peer", "reset by peer", "timed out", "timeout", "socket", "broken pipe", "connection refused")


def lost_peer(error: BaseException) -> bool:
    """Return whether a collective raises such an error when another rank is gone or late."""
    import torch.distributed as dist

    text = str(error).lower()
    # Other types, such as a rollout server's, are about something else.
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and any(word in text for word in _LOST))


@contextmanager
def watching_ranks(rank: int, ranks: int, timeout_s: float) -> Iterator[None]:
    """Turn what a collective raises when another rank is gone into one message: TrainingStopped."""
    try:
        yield
    except TrainingStopped:
        raise
    except RuntimeError as error:
        if ranks < 2 or not lost_peer(error):
            raise
        raise TrainingStopped(
            f"rank {rank} of {ranks} stops: another rank has gone, or did not answer within ddp_timeout="
            f"{timeout_s:.0f} s. The first error in the other ranks' output says why; go on with --resume auto"
        ) from error


def end_process(code: int) -> NoReturn:
    """End this process with `code`, also where a collective still waits for a rank that will not answer.

    The thread that waits there outlives the interpreter and aborts the process when it comes back to it: SIGABRT, now
    and then, in the place of `code`. So a rank of several runs what is registered for its exit and leaves at once.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
