"""The engines behind `impl=`. Each is a module here that offers

    why_not(problem) -> str | None             None: it can run this LinearProblem; else the reason, for people
    forward(problem) -> LinearResult
    logits_why_not(problem) -> str | None      the same for a LogitsProblem, where the engine has such a kernel
    logits_forward(problem) -> LogitsResult
    logits_backward(problem, state, row_grad) -> Tensor     dlogits (N, V), rows scaled by row_grad (R,)

`logits_backward` takes the keyword `out`: the tensor to write to, which may be the student's logits themselves; that of
an engine in ONE_VISIT also `kept` (R,): `out` holds the gradient under these already, and only other rows are written.
A module is imported on first use; one whose requirements are missing imports all the same and says so in `why_not`.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

from vigos.divergence.engines.problem import LinearProblem, LogitsProblem
from vigos.divergence.engines.self_check import agrees

IMPLS = ("reference", "cpu", "triton", "cuda")

# No run on a GPU has checked these yet: they run under their names alone, and `vigos doctor` says so.
UNPROVEN = ("cuda",)
PROVEN = ("cpu", "reference")  # by the tests, on any machine

# What `auto` tries, in order; on a GPU, after the engine agreed with float64 there (`self_check`).
AUTO = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
}

# Whose `logits_forward` writes the gradient with the statistics: a row is read once for both. Triton's kernels have no
# place to keep a row; on a CPU, where arithmetic decides, it saves nothing (54 to 95 ms either way), and costs a third
# more where the loss is scaled. None of them is in AUTO.
ONE_VISIT = ("cuda",)

_MODULES = {"reference": "chunked"}  # where a module is called otherwise


def engine(impl: str) -> ModuleType:
    """Return the module of a named engine."""
    if impl not in IMPLS:
        raise ValueError(f'impl must be "auto" or one of {", ".join(map(repr, IMPLS))}, got {impl!r}')
    return importlib.import_module(f"vigos.divergence.engines.{_MODULES.get(impl, impl)}")


def _why_not(module: ModuleType, problem: LinearProblem | LogitsProblem) -> str | None:
    if problem.skewed and module is not engine("reference"):
        return "it has no kernel for a skew KL; the reference engine has"
    if isinstance(problem, LinearProblem):
        return module.why_not(problem)
    if not hasattr(module, "logits_why_not"):
        return "it has no kernel for logits that exist already"
    return module.logits_why_not(problem)


@cache
def _say_once(name: str, reason: str) -> None:
    warnings.warn(f'impl="auto" does without the faster {name!r} engine: {reason}', stacklevel=4)


def choose(impl: str, problem: LinearProblem | LogitsProblem) -> ModuleType:
    """Return the engine that runs `problem`: the named one, or for "auto" the first that can.

    Raises:
        ValueError: a named engine cannot run it; the message says why.
    """
    if impl != "auto":
        module = engine(impl)
        reason = _why_not(module, problem)
        if reason is not None:
            raise ValueError(f"impl={impl!r} cannot run this call: {reason}")
        return module
    for name in AUTO.get(problem.device.type, ("reference",)):
        module = engine(name)
        reason = _why_not(module, problem)
        if reason is None and (name in PROVEN or agrees(module, problem.device, problem.dtype)):
            return module
        if reason is not None and reason.startswith(("vigos._C", "Triton is not")):
            _say_once(name, reason)  # of the installation, not of the call
    raise AssertionError("the reference engine runs everything")
