"""Compare an engine's log-probabilities with the trainer's: differences, importance ratios, phases of a step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import config, processor, rows, tiny_student, trainer

from vigos.method.encode import EncodedPrompt
from vigos.method.supervise import importance_ratio
from vigos.rollout.engine import Completion, Sampling
from vigos.rollout.generate import TransformersEngine
from vigos.train.metrics import PARTS, Metrics

NAN = float("nan")


class Shifted(TransformersEngine):
    """The model's own engine, off by `shift` nats in what it says of its tokens."""

    shift = 0.0

    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Completion]:
        return [replace(c, logprobs=c.logprobs + self.shift) for c in super().sample(prompts, sampling, seed)]


def run(folder: Path, shift: float, **options: Any) -> list[dict[str, float]]:
    """The logs of steps whose weights do not move."""
    model = tiny_student()
    engine = Shifted.for_model(model, processor())
    engine.shift = shift
    args = config(folder, learning_rate=0.0, clip_mode="none", **options)
    trained = trainer(model, args, rows(4), texts=None)
    engine.model = trained.model
    trained.rollouts.engine = engine
    trained.train()
    return [log for log in trained.state.log_history if "loss" in log]


def test_engine_and_trainer_agree_up_to_rounding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (log,) = run(tmp_path, 0.0)
    assert 0 < log["mismatch/mean"] <= log["mismatch/largest"] < 1e-4
    assert "nats a token" not in caplog.text


def test_a_drift_is_measured_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        logs = run(tmp_path, 0.25, max_steps=2)
    for log in logs:
        assert log["mismatch/mean"] == pytest.approx(0.25, abs=1e-4)
        assert log["mismatch/largest"] == pytest.approx(0.25, abs=1e-3)
    assert caplog.text.count("differ by 0.250 nats a token") == 1


def test_another_temperature_of_the_divergence_is_not_compared(tmp_path: Path) -> None:
    (log,) = run(tmp_path, 0.25, divergence_temperature=2.0)
    assert not any(name.startswith("mismatch") for name in log)


def test_importance_ratio_multiplies_each_tokens_loss(tmp_path: Path) -> None:
    """Sampled as if by weights that wrote every token twice as often: half the loss; half as often: up to the clip."""
    log2 = torch.tensor(2.0).log().item()
    (plain,), (half,), (cut,) = (
        run(tmp_path / str(i), shift, importance_clip=clip)
        for i, (shift, clip) in enumerate(((log2, 0.0), (log2, 3.0), (-log2, 1.5)))
    )
    assert plain["loss"] > 0
    assert half["loss"] == pytest.approx(plain["loss"] / 2, rel=1e-3)
    assert cut["loss"] == pytest.approx(plain["loss"] * 1.5, rel=1e-3)
    assert half["grad_norm"] == pytest.approx(plain["grad_norm"] / 2, rel=1e-3)


def test_importance_ratio_of_what_is_not_known() -> None:
    trained = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    ratio = importance_ratio(trained, torch.tensor([-1.0, NAN, -9.0]), 2.0)
    assert ratio.tolist() == [1.0, 1.0, 2.0]
    assert not ratio.requires_grad
    with pytest.raises(ValueError, match="an engine whose sample"):
        importance_ratio(trained, torch.full((3,), NAN), 2.0)


@pytest.mark.parametrize("options", [{"importance_clip": 0.5}, {"importance_clip": 2, "divergence_temperature": 2.0}])
def test_importance_clip_out_of_range(tmp_path: Path, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="importance_clip must be 0, or at least 1 with divergence_temperature 1, got"):
        config(tmp_path, **options)


def test_the_largest_mismatch_is_kept_in_a_state() -> None:
    metrics = Metrics()
    metrics.add_mismatch(torch.tensor([-1.0, NAN, -2.0]), torch.tensor([-1.5, -7.0, -2.0]))
    state = metrics.state()
    metrics.add_mismatch(torch.tensor([0.0]), torch.tensor([-3.0]))
    metrics.restore(state)
    assert metrics.collect(lambda sums: sums) == {"mismatch/mean": 0.25, "mismatch/largest": 0.5}
    assert metrics.collect(lambda sums: sums) == {}


def test_the_phases_of_a_step_add_up(tmp_path: Path) -> None:
    (log,) = run(tmp_path, 0.0)
    assert all(log[f"perf/{part}_s"] > 0 and log[f"perf/{part}_tokens_per_s"] > 0 for part in PARTS)
    assert sum(log[f"perf/{part}_s"] for part in PARTS) <= log["perf/step_s"]
    assert "perf/sync_s" not in log, "nothing was sent"
