"""Other models as teachers: a step against its loss on full logits in float64, and folders that cannot teach."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import (
    CUT_OFF,
    VALID_A,
    GradientRecorder,
    chat,
    completion_ids,
    config,
    full_log_probs,
    move,
    processor,
    rows,
    tiny_student,
    trainer,
)
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vigos.method.teachers import Teacher

TEXTS = [VALID_A, CUT_OFF]


def saved(folder: Path, model: Any, tools: Any | None = None) -> str:
    model.save_pretrained(folder)
    (processor() if tools is None else tools).save_pretrained(folder)
    return str(folder)


def roster(path: str) -> list[dict[str, Any]]:
    large = {
        "name": "large", "reads": "{problem} {format}", "model": path, "offload": True, "control": "blank",
        "contrast": 1.0, "weigh": {"advantage": [0.0, 2.0]},
    }  # fmt: skip
    return [large, {"name": "own", "reads": "reference", "kind": "reverse", "weight": 0.5}]


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def stated(student: Any, large: Any, data: list[dict[str, Any]], n: int) -> Tensor:
    """The mean over tokens of each teacher's part: the large one's contrast, weighted, and the own one's reverse KL."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row, text in zip(data, TEXTS, strict=True):
        ids, image = completion_ids(text), row["images"][0]
        asked = chat(f"{row['problem']} Describe, think, answer.", "<description>")
        q = full_log_probs(student, asked, image, ids)
        with torch.no_grad():
            seen, erased = (
                full_log_probs(large, asked, shown, ids)[:, :n].log_softmax(-1)
                for shown in (image, Image.new("RGB", image.size, (127, 127, 127)))
            )
            with student.disable_adapter():
                told = chat(f"{row['problem']} Key: {row['answer']}. Describe, think, answer.", "<description>")
                own = full_log_probs(student, told, image, ids)
        weight = (seen - erased).gather(1, ids[:, None]).squeeze(1).clamp(0, 2)
        parts[0].append(weight * forward_kl((2 * seen - erased).log_softmax(-1), q[:, :n].log_softmax(-1)))
        parts[1].append(forward_kl(q, own))
    return torch.cat(parts[0]).mean() + 0.5 * torch.cat(parts[1]).mean()


@pytest.mark.parametrize(("theirs", "ours"), [(0, 0), (5, 0), (0, 3)], ids=["equal", "theirs", "ours"])
def test_a_step_is_its_statement(tmp_path: Path, theirs: int, ours: int, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "large", tiny_student(seed=7, width=48, padding=theirs))
    options = {"teachers": roster(path), "clip_mode": "none", "completion_steps": 1, "completion_top_k": 2}
    recorder = GradientRecorder()
    with caplog.at_level(logging.WARNING):
        engine = trainer(
            tiny_student(torch.float64, padding=ours), config(tmp_path / "run", weight_decay=0.0, **options), rows(2),
            texts=TEXTS, callbacks=[recorder],
        )  # fmt: skip
    assert ("entries in its head" in caplog.text) == (theirs != ours)
    move(engine)
    engine.model.eval()
    large = tiny_student(seed=7, width=48, padding=theirs).double()
    loss = stated(engine.model, large, rows(2), len(processor().tokenizer))
    trained = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    engine.train()
    assert engine.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    size = max(g.abs().max() for g in gradients.values())
    for n, g in recorder.steps[0].items():
        assert (g - gradients[n]).abs().max() <= 1e-6 * size, n
    (first, _) = map(json.loads, (tmp_path / "run" / "completions" / "step-000001.jsonl").read_text().splitlines())
    for of in first["teachers"].values():  # both supervise every token, in order, each with its own likeliest ones
        assert of["tokens"] == list(range(len(completion_ids(VALID_A))))
        assert all(t[0][1] >= t[1][1] for t in of["teacher_top"])
    assert first["teachers"]["large"]["teacher_logprob"] != first["teachers"]["own"]["teacher_logprob"]


def other_words() -> Any:
    from transformers import AutoProcessor

    from vigos.world import checkpoint_path

    tools = AutoProcessor.from_pretrained(checkpoint_path())
    tools.tokenizer.add_tokens(["zebra"])
    return tools


def plain_tokenizer() -> Any:
    """The same tokens without a processor around them."""
    return PreTrainedTokenizerFast(tokenizer_object=processor().tokenizer.backend_tokenizer)


def blind() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(processor().tokenizer), **sizes, **heads))


FOLDERS: dict[str, tuple[Any, str]] = {
    "missing": (None, r"model of teacher 'large' must be a local folder with config.json, got '.*missing'"),
    "vocabulary": (
        lambda folder: saved(folder, tiny_student(padding=1), other_words()),
        r"must have the student's vocabulary, got a tokenizer that differs in 1 tokens of \d+, such as 'zebra'",
    ),
    "short head": (
        lambda folder: saved(folder, tiny_student(padding=-2)), r"must have \d+ entries in its head, .*got \d+",
    ),
    "no weights": (lambda folder: tiny_student().config.save_pretrained(folder), "must be a model with its processor"),
    "no images": (
        lambda folder: saved(folder, blind(), plain_tokenizer()),
        r"teacher 'large' must have view: none, since .* sees no images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_teach(tmp_path: Path, name: str) -> None:
    make, message = FOLDERS[name]
    if make is not None:
        make(tmp_path / name)
    args = config(tmp_path / "run", teachers=roster(str(tmp_path / name)), clip_mode="none")
    with pytest.raises(ValueError, match=message):
        trainer(tiny_student(), args, rows(2), texts=TEXTS)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"model": ""}, "model must name a folder"), ({"offload": True}, "offload must be .* false without model")],
)
def test_mistakes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher.read({"name": "own", **given})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_an_offloaded_model_rests_on_the_cpu(tmp_path: Path) -> None:
    path = saved(tmp_path / "large", tiny_student(seed=7, width=48))
    args = config(tmp_path / "run", teachers=roster(path), clip_mode="none", use_cpu=False)
    engine = trainer(tiny_student().cuda(), args, rows(2), texts=TEXTS)
    engine.train()
    (model,) = engine.other_models.models.values()
    assert {p.device.type for p in model.model.parameters()} == {"cpu"}
