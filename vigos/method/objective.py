"""`Objective`: the options that define the loss, apart from how it is computed and what is trained.

Objective()                                   # as the paper states it
Objective.preset("released", token_clip=0.1)  # as the published code runs, one option changed
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL
from vigos.method.prompts import ROLES
from vigos.method.teachers import Teacher
from vigos.method.views import View

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
    images_columns: Mapping[str, str] | None = None
    teachers: Sequence[Any] | None = None
    roster: tuple[Teacher, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("divergence_temperature", "token_clip", "entry_clip", *_BOUNDARY_CLIPS):
            value = getattr(self, name)
            if not (value is None and name in _BOUNDARY_CLIPS) and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in _LAMBDAS:
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(f"jsd_beta must be in (0, 1), got {self.jsd_beta}; its limits are divergence='kl'")
        if self.teachers is None and self.method == "vigos" and not any(getattr(self, name) for name in _LAMBDAS):
            raise ValueError(f"at least one of {', '.join(_LAMBDAS)} must be above 0")
        columns = self.images_columns or {}
        if (
            not isinstance(columns, Mapping)
            or not set(columns) <= set(ROLES)
            or (columns and self.teachers is not None)
        ):
            raise ValueError(
                f"images_columns must map roles ({', '.join(ROLES)}) to columns, and be unset with teachers, which "
                f"have views, got {self.images_columns!r}"
            )
        object.__setattr__(self, "roster", roster(self, self.teachers))

    @classmethod
    def preset(cls, name: Literal["paper", "released"], **changes: Any) -> Objective:
        """Return the objective of a preset, with `changes` to its options."""
        return cls(**(PRESETS[name] | changes))

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Return the weights of the teachers' terms, in their order."""
        return tuple(teacher.weight for teacher in self.roster)

    @property
    def terms(self) -> tuple[str, ...]:
        """Return the names of the teachers, which are those of their terms."""
        return tuple(teacher.name for teacher in self.roster)

    def teacher(self, name: str) -> Teacher:
        """Return a teacher by its name."""
        return self.roster[self.terms.index(name)]

    @property
    def composed(self) -> bool:
        """Tell whether a teacher's part of the loss is composed on the divergence of its pairs."""
        return any(teacher.composed for teacher in self.roster)

    def without_controls(self) -> Objective:
        """Return the objective of the same teachers without contrast and weights of pairs."""
        plain = [replace(t, control=None, contrast=0.0, plausibility=0.0, weigh={}) for t in self.roster]
        return replace(self, teachers=plain, images_columns=None)

    @property
    def divergence_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `linear_divergence` that this objective decides."""
        return {
            "temperature": self.divergence_temperature,
            "beta": self.jsd_beta,
            "entry_clip": self.entry_clip if self.clip_mode == "entry" else None,
        }


def built_in(objective: Objective) -> tuple[Teacher, ...]:
    """Return the three teachers of ViGOS, or OPSD's one beside two of weight 0."""
    rest = "valid" if objective.invalid_rollouts == "reference" else "all"
    opsd, jsd = objective.method == "opsd", objective.divergence == "jsd"
    last = FORWARD_KL if opsd or objective.reference_kl == "forward" else REVERSE_KL
    everyone = "all" if opsd else "invalid" if objective.invalid_rollouts == "reference" else "none"
    weights = (
        (0.0, 0.0, 1.0)
        if opsd
        else (objective.lambda_perception, objective.lambda_reasoning, objective.lambda_reference)
    )
    views = {name: View("column", column) for name, column in (objective.images_columns or {}).items()}
    forward = JSD if jsd else FORWARD_KL
    first = Teacher(
        "perception", "perception", spans=("description",), rollouts=rest, kind=forward, weight=weights[0], prefill="",
        view=views.get("perception"),
    )  # fmt: skip
    second = Teacher(
        "reasoning", "reasoning", spans=("reasoning", "answer"), rollouts=rest, kind=forward, weight=weights[1],
        prefix=objective.reasoning_prefix, view=views.get("reasoning"),
    )  # fmt: skip
    if everyone == "none":
        everyone, weights = "invalid", (*weights[:2], 0.0)
    third = Teacher(
        "reference", "reference", rollouts=everyone, kind=JSD if jsd else last, weight=weights[2],
        view=views.get("reference"),
    )  # fmt: skip
    return first, second, third


def roster(objective: Objective, given: Sequence[Any] | None) -> tuple[Teacher, ...]:
    """Return a run's own teachers, or the built-in ones of its method."""
    if given is None:
        return built_in(objective)
    found = tuple(x if isinstance(x, Teacher) else Teacher.read(x) for x in given)
    names = [teacher.name for teacher in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(f"teachers must have names of their own, got {names}")
    if not any(teacher.weight > 0 for teacher in found):
        raise ValueError("teachers must hold one with a weight above 0")
    return found


_LAMBDAS = ("lambda_perception", "lambda_reasoning", "lambda_reference")
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
