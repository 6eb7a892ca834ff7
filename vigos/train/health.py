"""Warnings about a run that looks healthy and in which nothing can be learned."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

STEPS = 10  # logged before a share is judged
_FAQ = "docs/faq.md, "
# Metric -> (a share from which on it is bad, whether above or below it, what to say).
CHECKS: dict[str, tuple[float, int, str]] = {
    "teacher/knows": (
        0.5, -1, "the privileged teacher's likeliest token at the box begins the reference in {:.0%} of the valid "
        f"rollouts: it cannot teach the answer ({_FAQ}'The teacher does not say the reference')",
    ),
    "clipped": (0.9, 1, f"{{:.0%}} of the divergence is clipped away ({_FAQ}'Everything is clipped')"),
    "rollout/valid": (0.5, -1, f"{{:.0%}} of the rollouts are in the format ({_FAQ}'The format is lost')"),
}  # fmt: skip


def clipped_share(logs: dict[str, Any]) -> float | None:
    """Return the share of the divergence of all terms together that the clip took away; None where there is none."""
    terms = [name.removeprefix("kl/") for name in logs if name.startswith("kl/")]
    parts = [(logs.get(f"kl/{t}", 0.0) * logs.get(f"token_share/{t}", 0.0), logs.get(f"clipped_kl/{t}")) for t in terms]
    total = sum(kl for kl, share in parts if share is not None)
    return sum(kl * share for kl, share in parts if share is not None) / total if total > 0 else None


class Health(TrainerCallback):
    """Say once for each share that its mean over the last steps leaves nothing to learn."""

    def __init__(self) -> None:
        self.recent: dict[str, list[float]] = defaultdict(list)
        self.said: set[str] = set()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Judge the metrics of a step with those before it."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        for name, (limit, sign, words) in CHECKS.items():
            value = clipped_share(logs) if name == "clipped" else logs.get(name)
            if not isinstance(value, int | float):
                continue
            recent = self.recent[name] = [*self.recent[name][1 - STEPS :], float(value)]
            mean = sum(recent) / len(recent)
            if len(recent) == STEPS and sign * (mean - limit) > 0 and name not in self.said:
                self.said.add(name)
                logger.warning("step %d: %s", state.global_step, words.format(mean))
