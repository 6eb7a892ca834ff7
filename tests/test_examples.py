"""The example scripts run from end to end, a few steps each."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.processes import output_of

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, folder: Path, *arguments: str, option: str = "--out") -> str:
    return output_of(EXAMPLES / name, [*arguments, option, str(folder)], folder / "log", {"CUDA_VISIBLE_DEVICES": ""})


def test_trl_world(tmp_path: Path) -> None:
    pytest.importorskip("trl", minversion="1.16")
    out = run("trl_world.py", tmp_path, "--steps", "2", "--rows", "40", "--evaluate", "0")
    assert "trl.trainer.distillation_trainer._chunked_divergence_loss" in out  # the fused loss is what trained
    loss = float(re.search(r"'train_loss': '?([\d.e-]+)", out).group(1))
    assert 0 < loss < 10


def test_text_opsd(tmp_path: Path) -> None:
    out = run("text_opsd.py", tmp_path, "--warm-up", "12", "--steps", "10")
    assert re.search(r"before: \d+% of 100 answers right", out)
    assert re.search(r"after: \d+% of 100 answers right", out)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(step.get("kl/reference", 0.0) for step in steps) > 0  # the teacher read what the student did not


def test_vigos_loop_is_the_trainer(tmp_path: Path) -> None:
    """The loop in plain PyTorch and `ViGOSTrainer`: same rollouts, same losses to 1e-6 over four steps."""
    from torch.utils.data import SequentialSampler

    from vigos import ViGOSConfig, ViGOSTrainer, load_rows
    from vigos.world import load_base, world_prompts, write_world

    sys.path.insert(0, str(EXAMPLES))
    from vigos_loop import adapted, train

    class InOrder(ViGOSTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    data = write_world(tmp_path / "world", n=32)
    args = ViGOSConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=8, gradient_accumulation_steps=1,
        learning_rate=3e-4, lr_scheduler_type="constant", max_grad_norm=1.0, seed=7, temperature=1.0, top_p=1.0,
        top_k=0, max_completion_length=96, lora_r=32, lora_alpha=64, lora_dropout=0.0, token_clip=0.2,
        report_to=[], use_cpu=True, save_strategy="no", save_merged=False, disable_tqdm=True,
    )  # fmt: skip
    model, processor = load_base()
    trainer = InOrder(model, args, processor, load_rows(data), prompts=world_prompts())
    trainer.train()
    wanted = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    model, processor = load_base()
    losses = train(
        adapted(model, seed=7), processor, load_rows(data), world_prompts(), objective=args.objective,
        sampling=args.sampling, steps=4, batch_size=8, learning_rate=3e-4, seed=7,
    )  # fmt: skip
    assert losses == pytest.approx(wanted, rel=1e-6)
    assert len({round(loss, 6) for loss in losses}) == 4, "no two steps alike"


@pytest.mark.parametrize(("name", "checked"), [("easy_vqa", 44_043), ("digits", 23_361)])  # easy-VQA asks 48,248
def test_own_data_answers_as_the_data_do(name: str, checked: int) -> None:
    """The warm-up's reading of scenes and questions gives the data's answers, wherever the scene is known."""
    sys.path.insert(0, str(EXAMPLES))
    data = importlib.import_module(f"own_data_{name}")
    rng = np.random.default_rng(0)
    numbers, count = [], 0
    for split in ("train", "test"):
        images = data.read(split)
        numbers.append(set(images) if name == "digits" else {f"{split}-{i}" for i in images})
        for _, scene, asked in images.values():
            if scene:
                questions = [data.Question(text) for text, _ in asked]
                assert [q.answer(scene) for q in questions] == [answer for _, answer in asked]
                assert data.scene_of(scene.text) == scene
                told = [str(rng.choice(data.ANSWERS[q.kind])) for q in questions]
                assert [q.answer(q.made_true(scene, a, rng)) for q, a in zip(questions, told, strict=True)] == told
                for q in questions:  # what the habit says is right where the image agrees with it, and only there
                    assert q.role(scene) in (
                        None,
                        "prior" if q.answer(q.usual(scene)) == q.answer(scene) else "conflict",
                    )
                count += len(asked)
    assert count == checked
    assert not numbers[0] & numbers[1]


def test_own_data(tmp_path: Path) -> None:
    sizes = ("--warm-up", "3", "--steps", "1", "--questions", "10")
    out = run("own_data.py", tmp_path, *sizes, option="--output-dir")
    for method in ("vigos", "opsd", "sft"):
        assert len(re.findall(rf"{method} +right [\d.]+ % .* against the warm-up", out)) == 2, out[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "easy-vqa" / "test.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"colour", "shape", "presence"}
    assert len(rows) == 30
    results, records = tmp_path / "results.csv", tmp_path / "digits" / "opsd.jsonl"
    first = results.read_text()
    records.unlink()
    assert "warm-up, read" not in run("own_data.py", tmp_path, *sizes, option="--output-dir")  # goes on: one arm alone
    assert results.read_text() == first
