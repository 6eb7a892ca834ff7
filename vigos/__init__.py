"""Fused divergences, prefix-tree teacher scoring and a trainer for visually grounded on-policy self-distillation.

Names load on first use, so that `import vigos` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {  # name -> module
    "linear_divergence": "vigos.divergence",
    "logits_divergence": "vigos.divergence",
    "DivergenceOutput": "vigos.divergence",
    "Supervision": "vigos.supervision",
    "FORWARD_KL": "vigos.supervision",
    "REVERSE_KL": "vigos.supervision",
    "JSD": "vigos.supervision",
    "PrefixTree": "vigos.prefix_tree",
    "TeacherScorer": "vigos.scoring",
    "ViGOSConfig": "vigos.config",
    "ViGOSTrainer": "vigos.trainer",
    "parse_rollout": "vigos.spans",
    "evaluate": "vigos.evaluation",
}

_MODULES = ("reference",)  # reached as vigos.reference without an import of its own

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vigos.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vigos' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_MODULES})
