"""Fused divergences, prefix-tree teacher scoring and a trainer for visually grounded on-policy self-distillation.

Names load on first use, so that `import vigos` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {  # name -> module
    "linear_divergence": "vigos.divergence.api",
    "logits_divergence": "vigos.divergence.api",
    "DivergenceOutput": "vigos.divergence.output",
    "Head": "vigos.divergence.head",
    "Supervision": "vigos.divergence.supervision",
    "FORWARD_KL": "vigos.divergence.supervision",
    "REVERSE_KL": "vigos.divergence.supervision",
    "JSD": "vigos.divergence.supervision",
    "SKEW_FORWARD": "vigos.divergence.supervision",
    "SKEW_REVERSE": "vigos.divergence.supervision",
    "kind_and_beta": "vigos.divergence.supervision",
    "PrefixTree": "vigos.scoring.prefix_tree",
    "TeacherScorer": "vigos.scoring.teacher",
    "ViGOSConfig": "vigos.train.config",
    "ViGOSTrainer": "vigos.train.trainer",
    "Prompts": "vigos.method.prompts",
    "load_rows": "vigos.data.examples",
    "parse_rollout": "vigos.method.spans",
    "evaluate": "vigos.eval.evaluate",
}

_MODULES = {"reference": "vigos.divergence.reference"}  # `vigos.reference` works without importing the module

__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vigos")
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vigos' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "vigos":
            raise
        from vigos.system.extras import install

        raise ImportError(f"vigos.{name} needs {error.name}: {install('train')}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
