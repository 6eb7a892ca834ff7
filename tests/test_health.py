"""Test the warnings that nothing can be learned, and the model card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.training import (
    PROMPTS,
    VALID_A,
    VALID_B,
    chat,
    config,
    full_log_probs,
    processor,
    rows,
    tiny_student,
    trainer,
)  # fmt: skip

from vigos.divergence.head import Head
from vigos.train.health import CHECKS, STEPS, Health, clipped_share


def told(logs: dict[str, Any], caplog: pytest.LogCaptureFixture, steps: int = 3 * STEPS) -> list[str]:
    caplog.clear()
    health = Health()
    with caplog.at_level(logging.WARNING):
        for step in range(1, steps + 1):
            state: Any = SimpleNamespace(global_step=step, is_world_process_zero=True)
            health.on_log(None, state, None, {"loss": 0.1, **logs})  # type: ignore[arg-type]
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("bad", "good", "message"),
    [
        ({"teacher/knows": 0.2}, {"teacher/knows": 0.9}, "likeliest token at the box begins the reference in 20%"),
        ({"rollout/valid": 0.3}, {"rollout/valid": 0.6}, "30% of the rollouts are in the format"),
        (
            {
                "kl/reasoning": 1.0,
                "token_share/reasoning": 0.5,
                "clipped_kl/reasoning": 0.95,
                "clipped_kl/perception": 0.0,
            },
            {"kl/reasoning": 1.0, "token_share/reasoning": 0.5, "clipped_kl/reasoning": 0.5},
            "95% of the divergence is clipped away",
        ),
    ],
)
def test_each_is_said_once_after_ten_steps(
    bad: dict[str, Any], good: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = told(bad, caplog)
    assert line.startswith(f"step {STEPS}: ")
    assert message in line
    assert told(bad, caplog, steps=STEPS - 1) == told(good, caplog) == told({}, caplog) == []


def test_their_pages_are_there() -> None:
    page = (Path(__file__).parents[1] / "docs" / "faq.md").read_text()
    for _, _, words in CHECKS.values():
        assert f"## {words.split(chr(39))[-2]}\n" in page


def test_the_clipped_share_is_of_all_terms_together() -> None:
    logs = {"kl/perception": 1.0, "token_share/perception": 0.1, "clipped_kl/perception": 1.0,
            "kl/reasoning": 0.1, "token_share/reasoning": 1.0, "clipped_kl/reasoning": 0.0}  # fmt: skip
    assert clipped_share(logs) == pytest.approx(0.5)
    assert clipped_share({}) is None


def test_teacher_knows_is_its_likeliest_token_where_the_box_begins(tmp_path: Path) -> None:
    """Against the full logits of the base, then with teachers that always say "red", where row-0's reference is red."""
    tokenizer, data, seen = processor().tokenizer, rows(2), []
    made = trainer(tiny_student(), config(tmp_path, max_steps=1), data, texts=[VALID_A, VALID_B])
    count = made.recorder.teacher_knows
    made.recorder.teacher_knows = lambda *args: (seen.append(args), count(*args))  # type: ignore[method-assign]
    made.train()
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["teacher/knows"]
    known = 0
    for row, text in zip(data, (VALID_A, VALID_B), strict=True):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        box = next(i for i in range(len(ids)) if tokenizer.decode(ids[: i + 1]).endswith("boxed{"))
        told = chat(PROMPTS.user_text("reasoning", row["problem"], row["answer"]), PROMPTS.prefill)
        likeliest = full_log_probs(tiny_student(), told, row["images"][0], ids)[box + 1].argmax()
        says = tokenizer.decode([int(likeliest)]).strip().casefold()
        known += bool(says) and row["answer"].startswith(says)
    assert logged == known / 2
    made.recorder.logs()
    for batch, hidden, _, pairs in seen:
        always = torch.zeros(len(hidden), len(tokenizer))
        always[:, tokenizer("red", add_special_tokens=False)["input_ids"][0]] = 1.0
        count(batch, always, Head(torch.eye(len(tokenizer))), pairs)
    assert made.recorder.logs()["teacher/knows"] == 0.5


def test_the_adapters_card_is_ours(tmp_path: Path) -> None:
    made = trainer(tiny_student(), config(tmp_path, max_steps=2, save_merged=True), rows(4), texts=[VALID_A, VALID_B])
    made.facts = {"data": "/secret/folder/train.jsonl", "data_digest": "0123", "versions": {"torch": "2.13"}}
    made.train()
    for name in ("adapter", "merged"):
        card = (tmp_path / name / "README.md").read_text()
        assert "[More Information Needed]" not in card
        assert "| data | train.jsonl |" in card
        assert "| optimizer steps | 2 |" in card
        assert "| version of torch | 2.13 |" in card
        assert "100.0 % of the rollouts in the format" in card
        assert "/secret" not in card
        assert str(tmp_path.parent) not in card
        assert f"library_name: {'peft' if name == 'adapter' else 'transformers'}" in card
