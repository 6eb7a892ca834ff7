"""Answers `vigos.eval.grading`: reads [prediction, answer, timeout_s] a line, writes {"equal": bool} a line."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TextIO

MEMORY_BYTES = 4 * 2**30


def verify_pair(prediction: str, answer: str, timeout_s: float) -> bool:
    """math-verify's judgement; the reference is read first, since the comparison is not symmetric."""
    from math_verify import parse, verify

    seconds = max(1, int(timeout_s))
    gold, said = (parse(rf"\boxed{{{text}}}", parsing_timeout=seconds) for text in (answer, prediction))
    return bool(gold and said and verify(gold, said, timeout_seconds=seconds))


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answers until the input ends."""
    logging.disable(logging.CRITICAL)  # expressions that do not parse are everyday business
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in requests:
        prediction, answer, timeout_s = json.loads(line)
        try:
            equal = verify_pair(prediction, answer, timeout_s)
        except (Exception, RecursionError, MemoryError):  # whatever sympy trips over is not an equal expression
            equal = False
        print(json.dumps({"equal": equal}), file=replies, flush=True)


if __name__ == "__main__":
    if sys.platform == "linux":  # other systems do not enforce such a bound, or refuse it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like a reply
    serve(sys.stdin, channel)
