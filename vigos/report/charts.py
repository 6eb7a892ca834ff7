"""Figures that a report draws from the logs of one or two runs, by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from vigos.method.spans import REASONS
from vigos.report.figures import ACCENT, INK, OF_TERM, SERIES, Chart, Log, lines, own_terms, stacked

_REASON_WORDS = {"image_token": "image placeholder", "tagless": "no tags at all"}


def charts_of(logs: Sequence[Log]) -> list[tuple[str, str, list[Chart]]]:
    """Return (key, title, charts) of each section; charts without data and sections without charts are left out."""
    terms = (OF_TERM | dict(zip(own_terms(logs), cycle(SERIES), strict=False))).items()
    sections: list[tuple[str, str, list[Chart | None]]] = [
        (
            "training", "Training",
            [
                lines(
                    "loss", "Loss by term", "What each term adds to the loss before its weight, in nats a token.", logs,
                    [(f"loss/{t}", t, colour) for t, colour in terms],
                ),
                lines(
                    "kl", "Divergence before the clip", "Mean KL of the supervised tokens of each teacher, in nats.",
                    logs, [(f"kl/{t}", t, colour) for t, colour in terms],
                ),
                lines(
                    "accuracy", "Answers of the rollouts", "Share of the rollouts whose boxed answer is the reference.",
                    logs,
                    [("rollout/accuracy", "right", ACCENT), ("teacher/knows", "teacher knows", OF_TERM["reasoning"])],
                    share=True,
                ),
                lines(
                    "palr", "PALR", "Share of the supervision that the privileged answer buys, and not the image.",
                    logs,
                    [
                        ("palr/all", "all tokens", INK), ("palr/description", "description", OF_TERM["perception"]),
                        ("palr/reasoning", "reasoning", OF_TERM["reasoning"]),
                    ],
                    share=True,
                ),
                lines(
                    "clipped", "Clipped divergence",
                    "Share of each term's divergence above the clip, where a token has no gradient.", logs,
                    [(f"clipped_kl/{t}", t, colour) for t, colour in terms], share=True,
                ),
                lines(
                    "entropy", "Entropy of the student", "At the tokens each teacher supervises, in nats.", logs,
                    [(f"student_entropy/{t}", t, colour) for t, colour in terms],
                ),
                lines(
                    "length", "Lengths", "Mean tokens of a rollout and of its parts.", logs,
                    [
                        ("length/completion", "whole", INK),
                        ("length/description", "description", OF_TERM["perception"]),
                        ("length/reasoning", "reasoning", OF_TERM["reasoning"]),
                    ],
                ),
                lines(
                    "gradient", "Gradient norm", "Before it is clipped.", logs, [("grad_norm", "gradient", ACCENT)],
                ),
            ],
        ),
        (
            "validity", "Validity",
            [
                stacked(
                    "reasons", "Invalid rollouts, by reason",
                    "Share of the rollouts outside the format. The reference teacher supervises them.", logs,
                    _reasons(logs), share=True,
                ),
                lines(
                    "left_out", "Left out", "Unusable examples, and steps whose loss was not finite.", logs,
                    _happened(logs, [("examples/skipped", "examples", SERIES[1]),
                                      ("steps/dropped", "steps", SERIES[2])]),
                ),
                lines(
                    "valid", "Valid rollouts", "Share in the asked format, and share ended by an end token.", logs,
                    [("rollout/valid", "valid", ACCENT), ("rollout/finished", "ended", SERIES[1])],
                    share=True, low=None,
                ),
                stacked(
                    "supervised", "Who supervises", "Share of all completion tokens that each teacher supervises.",
                    logs, [(f"token_share/{t}", t, colour) for t, colour in terms], share=True,
                ),
            ],
        ),
        (
            "cost", "Time and memory",
            [
                stacked(
                    "phases", "Time of a step, by phase", "Seconds. The rest is optimizer and data.", logs,
                    [
                        (name, name, colour)
                        for name, colour in zip((*_PHASES, "rest"), (*SERIES, INK), strict=True)
                    ],
                    derive=_phases,
                ),
                lines(
                    "rate", "Throughput", "Completion tokens a second of the whole step.", logs,
                    [("perf/tokens_per_s", "tokens/s", ACCENT)],
                ),
                lines(
                    "rates", "Throughput of each phase", "Tokens that it reads or writes, a second.", logs,
                    [
                        (f"perf/{key}_tokens_per_s", name, colour)
                        for (name, key), colour in zip(_PHASES.items(), SERIES, strict=False)
                        if key != "sync"
                    ],
                ),
                lines(
                    "mismatch", "Engine against trainer",
                    "Difference of their log-probabilities of the sampled tokens, in nats.", logs,
                    [("mismatch/mean", "mean", ACCENT), ("mismatch/largest", "largest", SERIES[1])],
                ),
                lines(
                    "operations", "Model operations", "TFLOP a second, those of the student and its teachers alone.",
                    logs, [("perf/tflops", "TFLOP/s", ACCENT)],
                ),
                lines("memory", "Peak memory", "GiB of a process.", logs, [("perf/peak_gib", "GiB", ACCENT)]),
            ],
        ),
    ]  # fmt: skip
    kept = [(key, title, [c for c in charts if c is not None]) for key, title, charts in sections]
    return [section for section in kept if section[2]]


def _reasons(logs: Sequence[Log]) -> list[tuple[str, str, str]]:
    """Return the six most frequent reasons of all runs, most frequent first."""
    total = {r: sum(line.get(f"rollout/invalid/{r}") or 0.0 for log in logs for line in log) for r in REASONS}
    frequent = sorted((r for r in REASONS if total[r] > 0), key=lambda r: -total[r])[: len(SERIES)]
    return [
        (f"rollout/invalid/{r}", _REASON_WORDS.get(r, r.replace("_", " ")), colour)
        for r, colour in zip(frequent, SERIES, strict=False)
    ]


def _happened(logs: Sequence[Log], curves: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return the curves that are not 0 everywhere."""
    return [curve for curve in curves if any(line.get(curve[0]) for log in logs for line in log)]


# Phases of a step, and how their metrics are called.
_PHASES = {
    "rollouts": "rollout", "teachers": "teacher", "student": "student", "divergence": "divergence",
    "backward": "backward", "sync": "sync",
}  # fmt: skip


def _phases(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seconds of a step by phase: those that are timed, and the rest of the step."""
    known = {name: line.get(f"perf/{key}_s") or 0.0 for name, key in _PHASES.items()}
    known["rollouts"] = line.get("perf/rollout_wait_s", known["rollouts"]) or 0.0  # without what overlapped
    total = line.get("perf/step_s")
    return {"step": line["step"], **known, "rest": max(0.0, total - sum(known.values())) if total else 0.0}
