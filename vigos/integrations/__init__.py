"""The fused loss inside other people's distillation codebases, one line each.

    from vigos.integrations import trl
    trl.patch()            # undone by trl.unpatch(); or: with trl.patched(): ...

Importing this package imports none of them; `vigos.integrations.trl` and its like load on first use. What each drop-in
replaces, and what does not match, stands in docs/integrations.md.
"""

from __future__ import annotations

import importlib
from types import ModuleType

PEERS = ("trl", "liger", "opsd", "released", "verl")
__all__ = ["PEERS", "fit", *PEERS]


def __getattr__(name: str) -> ModuleType:
    if name not in PEERS:
        raise AttributeError(f"module 'vigos.integrations' has no attribute {name!r}")
    return importlib.import_module(f"vigos.integrations.{name}")


def fit() -> list[tuple[str, bool | None, str]]:
    """Return (name, whether the drop-in fits, why) of every peer, for `vigos doctor`; None: not installed."""
    return [line for name in PEERS for line in importlib.import_module(f"vigos.integrations.{name}").fit()]
