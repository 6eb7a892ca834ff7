"""A teacher as data: what it reads and sees, which spans it supervises, in which direction, weighted how.

    teachers:
      - {name: crop, reads: "{problem}\n{format}", view: {crop: box}, spans: all, weight: 1.0}

ViGOS's three teachers and OPSD's one are instances, made of an objective's options (`vigos.method.objective`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from vigos.divergence.supervision import FORWARD_KL, JSD, KINDS, REVERSE_KL
from vigos.method.prompts import ROLES
from vigos.method.views import View

SPANS = ("description", "reasoning", "answer", "all")
ROLLOUTS = ("valid", "invalid", "all")
NAME = re.compile(r"[a-z][a-z0-9_]*")
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Teacher:
    """One term of the loss.

    Attributes:
        name: of its metrics and records.
        reads: the role whose template it reads, or a template of its own; `{problem}`, `{answer}`, `{format}` and any
            column in braces are filled in, and "" is the image alone.
        view: of the images; None: as they are.
        spans: description, reasoning, answer, or all.
        rollouts: which it supervises: valid, invalid, all.
        kind: direction, a value of `vigos.divergence.supervision.KINDS`.
        beta: of JSD and skew KL; None: the objective's `jsd_beta`.
        weight: lambda.
        prefix: "student": it reads the completion from its start; "think": from `<think>` on.
        prefill: opens the assistant's turn; None: the student's, or the one of `<think>`.
        control: view of its control; None: it has none.
        contrast, plausibility: alpha and gamma of the target, as in `vigos.Supervision`.
        token_clip: nats; None: the objective's. soft_clip: tau of tau * tanh(d / tau) in its place.
        weigh: names of `vigos.method.weights.WEIGHTS`, each with its number or numbers.
        model: folder of another model that teaches, of the student's vocabulary; None: the run's `teacher`.
        offload: keep that model on the CPU between optimizer steps.
    """

    name: str
    reads: str = "reasoning"
    view: View | None = None
    spans: tuple[str, ...] = ("all",)
    rollouts: str = "all"
    kind: int = FORWARD_KL
    beta: float | None = None
    weight: float = 1.0
    prefix: str = "student"
    prefill: str | None = None
    control: View | None = None
    contrast: float = 0.0
    plausibility: float = 0.0
    token_clip: float | None = None
    soft_clip: float | None = None
    weigh: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    offload: bool = False

    @classmethod
    def read(cls, given: Any) -> Teacher:
        """Return the teacher that a mapping of YAML describes.

        Raises:
            ValueError: naming the teacher and the field.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"teachers must hold mappings of fields, got {given!r}")
        known = [f.name for f in fields(cls)]
        where = f"teacher {given.get('name', '?')!r}"
        for key in given:
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                raise ValueError(f"{where}: unknown field {key!r}; " + (f"did you mean {near[0]!r}?" if near else ""))
        options = dict(given)
        try:
            for name in ("view", "control"):
                options[name] = View.read(options.get(name))
            spans = options.get("spans", "all")
            options["spans"] = (spans,) if isinstance(spans, str) else tuple(spans)
            options["kind"] = KINDS.get(options.get("kind", "forward"), options.get("kind"))
            return cls(**options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    def __post_init__(self) -> None:
        from vigos.method.weights import check_weights

        if not NAME.fullmatch(str(self.name)) or self.name in ("student", "all"):
            raise ValueError(f"name must be a word of small letters, digits and _, got {self.name!r}")
        if self.reads not in ROLES and self.reads != "" and not PLACEHOLDER.search(self.reads):
            raise ValueError(
                f"reads must be one of {', '.join(ROLES)}, or a template with {{problem}}, got {self.reads!r}"
            )
        for name, values, known in (
            ("spans", self.spans, SPANS), ("rollouts", (self.rollouts,), ROLLOUTS),
            ("kind", (self.kind,), tuple(KINDS.values())), ("prefix", (self.prefix,), ("student", "think")),
        ):  # fmt: skip
            if not values or any(value not in known for value in values):
                shown = KINDS if name == "kind" else known
                raise ValueError(f"{name} must be of {', '.join(map(str, shown))}, got {', '.join(map(str, values))}")
        for name, least, most in (("weight", 0, math.inf), ("contrast", 0, math.inf), ("plausibility", 0, 1)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not least <= value <= most or math.isinf(value):
                raise ValueError(f"{name} must be a number of at least {least}, got {value!r}")
        if self.beta is not None and (self.kind < JSD or not (isinstance(self.beta, float) and 0 < self.beta < 1)):
            raise ValueError(f"beta must be in (0, 1), for jsd, skew_forward or skew_reverse, got {self.beta!r}")
        for name in ("token_clip", "soft_clip"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.model is not None and not (isinstance(self.model, str) and self.model):
            raise ValueError(f"model must name a folder, got {self.model!r}")
        if not isinstance(self.offload, bool) or (self.offload and self.model is None):
            raise ValueError(f"offload must be true or false, and false without model, got {self.offload!r}")
        if self.contrast > 0 and self.control is None:
            raise ValueError("control must name a view with contrast, got None")
        if self.plausibility > 0 and self.kind == REVERSE_KL:
            raise ValueError("plausibility must be 0 for reverse KL, which a cut target makes infinite")
        check_weights(self.weigh, has_control=self.control is not None)

    @property
    def columns(self) -> set[str]:
        """Return the columns that its template names."""
        return set(PLACEHOLDER.findall(self.reads)) - {"problem", "answer", "format"}

    @property
    def privileged(self) -> bool:
        """Tell whether it reads the reference."""
        return self.reads in ("reasoning", "reference") or "{answer}" in self.reads

    @property
    def composed(self) -> bool:
        """Tell whether its part of the loss is composed outside the divergence's kernels."""
        return bool(self.weigh) or self.soft_clip is not None

    @property
    def has_control_rows(self) -> bool:
        """Tell whether its control has to be scored."""
        return self.control is not None and (self.contrast > 0 or "advantage" in self.weigh)
