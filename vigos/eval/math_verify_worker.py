"""Serve `vigos.eval.grading`: one JSON line a question, one a reply.

[[prediction, is it a sentence], [answer, is it a sentence], factor, seconds of CPU] is answered by {"equal": …}, null
where the time ran out.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from typing import Any, TextIO

MEMORY_BYTES = 4 * 2**30
DIGITS = 30  # calculated, to compare numbers
MAX_LOG = 10**5  # digits of a number on the way
CLOSE = 2e-6  # relative


class OutOfTime(BaseException):
    """End a comparison: no Exception, so that no library takes it for a failure of its own."""


def read(text: str, sentence: bool = False) -> Any:
    """Return the expressions that math-verify reads in a LaTeX expression, or finds in a sentence.

    Units have to be off an expression: math-verify would take a variable `t` or `l` for one.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    if sentence:
        return parse(text, fallback_mode="no_fallback", parsing_timeout=None)
    reading = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=reading)]
    return parse(rf"\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=None)


def equal(said: Any, gold: Any, factor: float = 1.0) -> bool:
    """Tell if two readings are equal: numbers by their relative difference, everything else by math-verify.

    Args:
        said, gold: as `read` returns them; the comparison is not symmetric.
        factor: by which the prediction is multiplied.
    """
    from math_verify import verify

    if not gold or not said:
        return False
    if _is_huge(said[0]) or _is_huge(gold[0]):
        return bool(said[0] == gold[0])
    if factor != 1:
        said = [said[0] * factor]
    numeric = _numerically_equal(said[0], gold[0])
    if numeric is not None:  # math-verify rounds to six decimals, and takes what is tiny for zero
        return numeric
    return bool(verify(gold, said, timeout_seconds=None))


def _is_huge(expression: Any) -> bool:
    """Tell if calculating an expression takes numbers of more than `MAX_LOG` digits."""
    from sympy import Basic, MatrixBase, preorder_traversal

    if not isinstance(expression, Basic | MatrixBase):
        return False
    parts = expression.flat() if isinstance(expression, MatrixBase) else [expression]
    return any(_digits(node) > MAX_LOG for part in parts for node in preorder_traversal(part))


def _digits(expression: Any) -> float:
    """Bound the decimal digits of a constant, without calculating it; 0 for anything with a variable in it."""
    from sympy import Pow, factorial

    if getattr(expression, "free_symbols", True):
        return 0.0
    if expression.is_Rational:
        return max(expression.p.bit_length(), expression.q.bit_length()) / 3
    inside = [_digits(argument) for argument in expression.args]
    if isinstance(expression, Pow | factorial) and max(inside) <= MAX_LOG:
        return inside[0] * max(1.0, abs(complex(expression.args[-1].evalf(5))))
    return sum(inside)


def _numerically_equal(said: Any, gold: Any) -> bool | None:
    """Compare two numbers by their relative difference; None if they are not both numbers."""
    from sympy import Expr

    if not (isinstance(said, Expr) and isinstance(gold, Expr)) or said.free_symbols or gold.free_symbols:
        return None
    x, y = (value.doit().evalf(DIGITS) for value in (said, gold))
    if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
        return None
    if said.is_Integer and gold.is_Integer:
        return bool(said == gold)
    return bool(abs(x - y) <= CLOSE * abs(y))


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer until the input ends."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in requests:
        prediction, answer, factor, timeout_s = json.loads(line)
        found: bool | None
        try:
            signal.setitimer(signal.ITIMER_PROF, timeout_s)
            found = equal(read(*prediction), read(*answer), factor)
            signal.setitimer(signal.ITIMER_PROF, 0)
        except OutOfTime:
            found = None
        except (Exception, RecursionError, MemoryError):  # whatever sympy trips over is not an equal expression
            found = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"equal": found}), file=replies, flush=True)


def _out_of_time(*_: Any) -> None:
    raise OutOfTime


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # expressions that do not parse are everyday business
    if sys.platform == "linux":  # other systems do not enforce such a bound, or refuse it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _out_of_time)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like a reply
    serve(sys.stdin, channel)
