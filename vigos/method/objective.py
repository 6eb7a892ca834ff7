"""`Objective`: the options that define the loss, apart from how it is computed and what is trained.

Objective()                                   # as the paper states it
Objective.preset("released", token_clip=0.1)  # as the published code runs, one option changed
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

# What the paper states, and what the code its authors released does instead.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "reasoning_prefix": "student",
        "span_style": "paper",
        "normalize": "tokens",
        "reference_kind": "answer",
        "description_end_clip": None,
        "reasoning_start_clip": None,
    },
    "released": {
        "reasoning_prefix": "think",
        "span_style": "released",
        "normalize": "active",
        "reference_kind": "answer",
        "description_end_clip": 0.05,
        "reasoning_start_clip": 0.05,
    },
}


@dataclass(frozen=True)
class Objective:
    """Define which teacher supervises which tokens, in which direction, clipped and weighted how.

    The options are those of `ViGOSConfig` with the same names (docs/configuration.md explains each), the preset's
    already filled in. Invalid values raise a ValueError that names the option.
    """

    method: Literal["vigos", "opsd"] = "vigos"
    lambda_perception: float = 1.0
    lambda_reasoning: float = 1.0
    lambda_reference: float = 2.0
    reasoning_prefix: Literal["student", "think"] = "student"
    span_style: Literal["paper", "released"] = "paper"
    validity: Literal["loose", "strict"] = "loose"
    invalid_rollouts: Literal["reference", "others"] = "reference"
    reference_kind: Literal["answer", "solution"] = "answer"
    reference_kl: Literal["reverse", "forward"] = "reverse"
    divergence: Literal["kl", "jsd"] = "kl"
    jsd_beta: float = 0.5
    divergence_temperature: float = 1.0
    clip_mode: Literal["token", "entry", "none"] = "token"
    token_clip: float = 0.05
    entry_clip: float = 0.05
    description_end_clip: float | None = None
    reasoning_start_clip: float | None = None
    normalize: Literal["tokens", "sequence", "active"] = "tokens"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("divergence_temperature", "token_clip", "entry_clip", *_BOUNDARY_CLIPS):
            value = getattr(self, name)
            if not (value is None and name in _BOUNDARY_CLIPS) and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("lambda_perception", "lambda_reasoning", "lambda_reference"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(f"jsd_beta must be in (0, 1), got {self.jsd_beta}; its limits are divergence='kl'")
        if not any(self.lambdas):
            raise ValueError("at least one of lambda_perception, lambda_reasoning, lambda_reference must be above 0")

    @classmethod
    def preset(cls, name: Literal["paper", "released"], **changes: Any) -> Objective:
        """Return the objective of a preset, with `changes` to its options."""
        return cls(**(PRESETS[name] | changes))

    @property
    def lambdas(self) -> tuple[float, float, float]:
        """Return the weights of the perception, reasoning and reference terms under `method`."""
        if self.method == "opsd":
            return (0.0, 0.0, 1.0)
        return (self.lambda_perception, self.lambda_reasoning, self.lambda_reference)

    @property
    def divergence_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `linear_divergence` that this objective decides."""
        return {
            "temperature": self.divergence_temperature,
            "beta": self.jsd_beta,
            "entry_clip": self.entry_clip if self.clip_mode == "entry" else None,
        }


_BOUNDARY_CLIPS = ("description_end_clip", "reasoning_start_clip")


def choices_of(kind: type) -> dict[str, tuple[str, ...]]:
    """Return the fields that a dataclass itself declares with one of a few words as value, with these words."""
    hints = get_type_hints(kind)
    found = {}
    for f in fields(kind):
        if f.name not in kind.__annotations__:
            continue
        options = [hints[f.name], *get_args(hints[f.name])]
        literal = next((o for o in options if get_origin(o) is Literal), None)
        if literal is not None:
            found[f.name] = get_args(literal)
    return found


def check_choices(options: Any, unset: Mapping[str, Any] | None = None) -> None:
    """Raise a ValueError for a field of the dataclass `options` whose word is unknown; it suggests the nearest.

    Args:
        unset: names of fields that may be None.
    """
    for name, choices in choices_of(type(options)).items():
        value = getattr(options, name)
        if value in choices or (value is None and name in (unset or ())):
            continue
        near = get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")
