"""The trainer: accumulation, seeds, restarts, the corners of a step, its run folder, bad input."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import (
    CUT_OFF,
    PROMPTS,
    TAGLESS,
    TEXTS,
    VALID_A,
    VALID_B,
    GradientRecorder,
    completion_ids,
    config,
    metrics_of,
    move,
    parameters,
    picture,
    processor,
    rows,
    tiny_student,
    trainer,
)
from torch import Tensor

from vigos.data.examples import ImageLimits, load_rows
from vigos.train.trainer import ViGOSTrainer

# --- Seeds, accumulation, restarts -----------------------------------------------------------------------------------


SAMPLED = {"max_steps": 3, "clip_mode": "none", "max_completion_length": 12}


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    """Rollouts sampled by the model itself: they, the divisor and so the parameters are the same."""
    results = []
    for accumulation, size in ((4, 1), (2, 2), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        args = config(tmp_path, **SAMPLED, **options, learning_rate=0.1)
        engine = trainer(tiny_student(torch.float64), args, rows(12), texts=None)
        engine.train()
        results.append((metrics_of(engine), parameters(engine)))
    for logs, after in results[1:]:
        for log, expected in zip(logs, results[0][0], strict=True):
            assert log == pytest.approx(expected, rel=1e-7)
        for name, parameter in after.items():
            assert torch.allclose(parameter, results[0][1][name], rtol=1e-9, atol=1e-12), name


@pytest.mark.slow
def test_one_seed_one_run(tmp_path: Path) -> None:
    """LoRA's own draw, its dropout, the order of the rows and the rollouts all follow from the seed."""

    def run(seed: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        torch.manual_seed(torch.seed() % 1000)  # what the process did before must not matter
        args = config(tmp_path, **SAMPLED, seed=seed, lora_dropout=0.1, num_generations=2)
        model = tiny_student()
        torch.rand(int(torch.randint(1, 9, ())))
        engine = ViGOSTrainer(model, args, processor(), rows(12), prompts=PROMPTS)
        engine.train()
        return metrics_of(engine), parameters(engine)

    (logs, after), (again, after_again), (other, _) = run(3), run(3), run(4)
    assert logs == again
    assert all(torch.equal(after[n], after_again[n]) for n in after)
    assert logs != other


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    options = {**SAMPLED, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    options |= {"teacher": "ema", "ema_decay": 0.5, "completion_steps": 1, "lr_scheduler_type": "linear"}

    def make(folder: str) -> ViGOSTrainer:
        return ViGOSTrainer(
            tiny_student(), config(tmp_path / folder, **options), processor(), rows(12), prompts=PROMPTS
        )

    whole = make("whole")
    whole.train()
    resumed = make("whole")  # the same folder: records past the checkpoint are written anew
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert metrics_of(resumed)[2:] == metrics_of(whole)[2:]
    means = [engine.state.log_history[-1]["train_loss"] for engine in (whole, resumed)]
    assert means[0] == means[1] == pytest.approx(sum(log["loss"] for log in metrics_of(whole)) / 4)
    after = parameters(whole)
    assert all(torch.equal(p, after[n]) for n, p in parameters(resumed).items())
    assert all(torch.equal(c, whole.teacher.copies[n]) for n, c in resumed.teacher.copies.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    files = sorted(p.name for p in (tmp_path / "whole" / "completions").glob("step-*"))
    assert files == [f"step-{i:06d}.jsonl" for i in (1, 2, 3, 4)]
    assert all(len((tmp_path / "whole" / "completions" / f).read_text().splitlines()) == 2 for f in files)


@pytest.mark.parametrize("train_head", [False, True], ids=["", "head"])
def test_resumed_full_run_equals_the_uninterrupted_one(train_head: bool, tmp_path: Path) -> None:
    """Its checkpoint holds the hub's names of the tensors, which are not those of the modules."""
    options = {**SAMPLED, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora": False}
    options |= {"train_head": train_head, "teacher": "frozen", "lr_scheduler_type": "linear"}

    def make() -> ViGOSTrainer:
        return trainer(tiny_student(), config(tmp_path, **options), rows(12))

    whole = make()
    whole.train()
    after, initial = parameters(whole), tiny_student().state_dict()
    assert any(not torch.equal(p, initial[n]) for n, p in after.items()), "nothing was trained"
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert metrics_of(resumed)[2:] == metrics_of(whole)[2:]
    assert all(torch.equal(p, after[n]) for n, p in parameters(resumed).items())
    assert all(torch.equal(c, initial[n]) for n, c in resumed.teacher.copies.items()), "frozen"


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "full"])
def test_checkpoint_without_a_tensor_is_refused(lora: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    options = {**SAMPLED, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lora": lora}
    trainer(tiny_student(), config(tmp_path, **options), rows(8)).train()
    path = tmp_path / "checkpoint-1" / ("adapter_model.safetensors" if lora else "model.safetensors")
    tensors = load_file(path)
    name = next(n for n in tensors if "layers.0" in n)
    tensors["stranger.weight"] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    resumed = trainer(tiny_student(), config(tmp_path, **options), rows(8))
    with pytest.raises(ValueError, match=r"checkpoint-1 must hold .* tensor.*missing"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_ema_needs_its_own_file_to_resume(tmp_path: Path) -> None:
    options = {**SAMPLED, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tiny_student(), config(tmp_path, **options), rows(8)).train()
    ema = trainer(tiny_student(), config(tmp_path, **options, teacher="ema"), rows(8))
    with pytest.raises(
        ValueError, match=r"teacher='ema' must resume from a checkpoint that holds the average of .*got 0 tensors"
    ):
        ema.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# --- Corners of a step -----------------------------------------------------------------------------------------------


def test_nothing_supervised_is_an_exact_zero_with_a_graph(tmp_path: Path) -> None:
    recorder = GradientRecorder()
    args = config(tmp_path, lambda_reference=0.0, weight_decay=0.0)
    engine = trainer(tiny_student(), args, rows(2), texts=[CUT_OFF, TAGLESS], callbacks=[recorder])
    engine.train()
    assert engine.state.log_history[0]["loss"] == 0.0
    (gradients,) = recorder.steps
    assert gradients.keys() == parameters(engine).keys()
    assert all((g == 0).all() for g in gradients.values())


def test_empty_term_is_zero_in_the_log(tmp_path: Path) -> None:
    engine = trainer(tiny_student(), config(tmp_path), rows(2), texts=[VALID_A, VALID_B])
    engine.train()
    log = engine.state.log_history[0]
    assert log["loss/reference"] == 0.0
    assert "kl/reference" not in log, "a mean over no tokens is left out"
    assert log["loss/perception"] > 0


def test_metrics_of_a_known_step(tmp_path: Path) -> None:
    data = rows(4)
    data[0]["answer"], data[2]["answer"] = "red", "7"
    args = config(tmp_path, per_device_train_batch_size=4, grade_rollouts=True, token_clip=0.05)
    engine = trainer(tiny_student(), args, data, texts=TEXTS)
    move(engine)
    engine.train()
    log = engine.state.log_history[0]
    lengths = [len(completion_ids(t)) for t in TEXTS]
    assert log["rollout/valid"] == 0.5
    assert log["rollout/accuracy"] == 0.25, "the second valid rollout is wrong"
    assert log["rollout/finished"] == 0.75
    assert log["rollout/tagless"] == 0.5
    assert log["rollout/invalid/tagless"] == 0.5
    assert "rollout/invalid/no_box" not in log
    assert log["length/completion"] == sum(lengths) / 4
    assert log["token_share/reference"] == pytest.approx((lengths[1] + lengths[3]) / sum(lengths))
    assert log["examples/skipped"] == 0
    assert 0 < log["clipped_kl/reference"] < 1
    assert log["kl/reference"] > log["loss/reference"] > 0
    for name in (
        "perf/rollout_s",
        "perf/teacher_s",
        "perf/student_s",
        "perf/step_s",
        "perf/tokens_per_s",
        "perf/peak_gib",
    ):
        assert log[name] > 0
    assert log["perf/step_s"] >= log["perf/rollout_s"] + log["perf/teacher_s"] + log["perf/student_s"]
    assert 0 < log["student_entropy/perception"] < 7


def test_sampled_placeholder_costs_its_rollout_alone(tmp_path: Path) -> None:
    stolen = "A <|image_pad|> digit.</description> <think>x</think> \\boxed{red}"
    engine = trainer(tiny_student(), config(tmp_path), rows(2), texts=[stolen, VALID_A])
    engine.train()
    log = engine.state.log_history[0]
    assert log["rollout/invalid/image_token"] == 0.5
    assert log["token_share/reference"] == 0.0


def test_several_rollouts_of_a_row(tmp_path: Path) -> None:
    args = config(tmp_path, num_generations=4, per_device_train_batch_size=1, clip_mode="none", completion_steps=1)
    engine = trainer(tiny_student(torch.float64), args, rows(1), texts=TEXTS)
    move(engine)
    engine.train()
    records = (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()
    assert len(records) == 4
    assert {json.loads(r)["problem_id"] for r in records} == {"row-0"}
    fourfold = trainer(
        tiny_student(torch.float64),
        config(tmp_path, per_device_train_batch_size=4, clip_mode="none"),
        rows(1) * 4,
        texts=TEXTS,
    )
    move(fourfold)
    fourfold.train()
    assert engine.state.log_history[0]["loss"] == pytest.approx(fourfold.state.log_history[0]["loss"], rel=1e-9)


# --- The run folder --------------------------------------------------------------------------------------------------


def test_run_folder(tmp_path: Path) -> None:
    import yaml
    from peft import PeftModel

    args = config(tmp_path, per_device_train_batch_size=4, completion_steps=1, grade_rollouts=True, token_clip=0.3)
    engine = trainer(tiny_student(), args, rows(4), texts=TEXTS)
    move(engine)
    engine.train()
    document = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert document["vigos"]["token_clip"] == 0.3
    assert document["vigos"]["reasoning_prefix"] == "student", "presets are resolved"
    assert document["vigos"]["learning_rate"] == 1e-3
    assert document["transformers"]["lr_scheduler_type"] == "constant"
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["step"] == 1
    assert metrics[0]["loss"] == engine.state.log_history[0]["loss"]
    records = [json.loads(line) for line in (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()]
    assert [r["valid"] for r in records] == [True, False, True, False]
    assert [r["reason"] for r in records] == ["", "tagless", "", "tagless"]
    assert [r["finished"] for r in records] == [True, False, True, True]
    assert [r["correct"] for r in records] == [True, False, False, False]
    assert records[0]["answer_text"] == "red"
    assert "".join(records[0]["tokens"]) == VALID_A + "<|im_end|>"
    assert records[0]["teachers"].keys() == {"perception", "reasoning"}
    assert records[1]["teachers"].keys() == {"reference"}
    scored = records[0]["teachers"]["perception"]
    start, end = records[0]["description"]
    assert scored["tokens"] == list(range(start, end))
    kl, clipped = scored["divergence"], scored["clipped"]
    assert len(kl) == len(scored["teacher_logprob"]) == len(scored["student_logprob"]) == len(clipped) == end - start
    assert clipped == [k > 0.3 for k in kl]
    terms = [k for r in records for t in r["teachers"].values() for k in t["divergence"]]
    kinds = ("perception", "reasoning", "reference")
    logged = sum(metrics[0][f"kl/{t}"] * metrics[0][f"token_share/{t}"] for t in kinds) * sum(
        len(r["tokens"]) for r in records
    )
    assert sum(terms) == pytest.approx(logged, rel=1e-4)
    adapted = PeftModel.from_pretrained(tiny_student(), tmp_path / "adapter")
    state = dict(adapted.named_parameters())
    assert all(torch.equal(state[n], p) for n, p in engine.model.named_parameters())
    assert not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.rglob("*.pt"))


def test_full_training_saves_a_model(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    engine = trainer(tiny_student(), config(tmp_path, lora=False, clip_mode="none"), rows(2), texts=TEXTS[:2])
    engine.train()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, dict(loaded.named_parameters())[n]) for n, p in engine.model.named_parameters())
    assert AutoProcessor.from_pretrained(tmp_path / "model").tokenizer.eos_token == "<|im_end|>"


def test_new_run_in_an_old_folder_starts_its_records_anew(tmp_path: Path) -> None:
    for _ in range(2):
        args = config(tmp_path, max_steps=2, completion_steps=1)
        trainer(tiny_student(), args, [*rows(3), {**rows(1)[0], "answer": " "}], texts=TEXTS).train()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2]
    assert len((tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_bad_rows_are_skipped_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    picture(0).save(folder / "good.png")
    picture(1, 2, 2).save(folder / "tiny.png")
    picture(2, 64, 64).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:300])
    good = {"problem": "Which ink?", "images": ["good.png"], "answer": "red"}
    records = [
        good,
        good | {"images": ["absent.png"]},
        good | {"images": ["cut.jpg"]},
        good | {"images": ["tiny.png"]},
        good | {"answer": ""},
        good | {"answer": "\\frac{1}{2"},
        good | {"problem": "Which ink? " * 40},
        good,
    ]
    lines = [json.dumps(r | {"problem_id": f"r{i}"}) for i, r in enumerate(records)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    args = config(tmp_path / "run", per_device_train_batch_size=4, max_steps=2, max_prompt_length=100)
    engine = trainer(tiny_student(), args, load_rows(folder / "train.jsonl"), texts=[VALID_A])  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, logger="vigos.train.rollouts"):
        engine.train()
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    reasons = {s["example"]: s["reason"] for s in skipped}
    assert reasons == {
        "r1": "missing_image",
        "r2": "unreadable_image",
        "r3": "too_small",
        "r4": "empty_answer",
        "r5": "unbalanced_answer",
        "r6": "prompt_too_long",
    }
    assert "max_prompt_length is 100" in next(s["detail"] for s in skipped if s["example"] == "r6")
    logs = [log for log in engine.state.log_history if "loss" in log]
    assert [log["examples/skipped"] for log in logs] == [3, 3]
    assert engine.rollouts.examples_used == 2
    assert engine.rollouts.skipped.total() == 6
    assert all(f"skipped example r{i}:" in caplog.text for i in range(1, 7))


def test_row_that_the_processor_refuses_is_skipped(tmp_path: Path) -> None:
    strip = {"problem": "Which ink?", "images": [picture(0, 4000, 8)], "answer": "red", "problem_id": "strip"}
    data = load_rows([strip, *rows(1)])
    images = replace(data.reader.images, limits=ImageLimits(max_aspect=1e9))
    data.reader = replace(data.reader, images=images)  # type: ignore[union-attr]
    engine = trainer(tiny_student(), config(tmp_path), data, texts=[VALID_A])  # type: ignore[arg-type]
    engine.train()
    (skipped,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (skipped["example"], skipped["reason"]) == ("strip", "not_encodable")
    assert "aspect ratio" in skipped["detail"]
    assert engine.rollouts.examples_used == 1


def test_a_step_of_bad_rows_alone_goes_by(tmp_path: Path) -> None:
    data = [{**row, "answer": ""} for row in rows(2)] + rows(2)
    engine = trainer(tiny_student(), config(tmp_path, max_steps=2), data, texts=[VALID_A])
    engine.train()
    losses = [log["loss"] for log in engine.state.log_history if "loss" in log]
    assert losses[0] == 0.0
    assert losses[1] > 0


def test_dataset_without_a_usable_row(tmp_path: Path) -> None:
    data = [{**row, "answer": ""} for row in rows(3)]
    with pytest.raises(ValueError, match=r"none of the 3 examples read .*\(empty_answer 3\); the first: example row-0"):
        trainer(tiny_student(), config(tmp_path), data).train()
    with pytest.raises(ValueError, match=r"none of the 2 examples .* is usable \(prompt_too_long 2\)"):
        trainer(tiny_student(), config(tmp_path, max_prompt_length=8), rows(2)).train()
    args = config(tmp_path, max_prompt_length=8, max_steps=1000, per_device_train_batch_size=16)
    with pytest.raises(ValueError, match=r"none of the 64 examples"):  # not after a whole run
        trainer(tiny_student(), args, rows(16)).train()


def test_run_without_a_valid_rollout_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vigos.train.trainer"):
        trainer(tiny_student(), config(tmp_path), rows(2), texts=[TAGLESS]).train()
    assert "no rollout of this run was valid" in caplog.text


def text_model() -> tuple[Any, Any]:
    from helpers.tiny_models import tiny_model

    tokenizer = copy.deepcopy(processor().tokenizer)
    tokenizer.chat_template = processor().chat_template
    return tiny_model("qwen3", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer


def test_images_need_a_vision_tower(tmp_path: Path) -> None:
    model, tokenizer = text_model()
    engine = ViGOSTrainer(model, config(tmp_path), tokenizer, rows(2), prompts=PROMPTS)
    with pytest.raises(ValueError, match=r"example row-\d has 1 image\(s\), but Qwen3ForCausalLM .* has no vision"):
        engine.train()


@pytest.mark.parametrize("family", ["text", "vision"])
def test_rows_without_images(tmp_path: Path, family: str) -> None:
    data = [{k: v for k, v in row.items() if k != "images"} for row in rows(2)]
    args = config(tmp_path, clip_mode="none", completion_steps=1)
    if family == "vision":
        engine = trainer(tiny_student(), args, data, texts=[VALID_A, CUT_OFF])
    else:
        model, tokenizer = text_model()
        engine = ViGOSTrainer(model, args, tokenizer, data, prompts=PROMPTS)
    engine.train()
    log = engine.state.log_history[0]
    assert log["token_share/perception"] == 0, "nothing to perceive"
    assert log["loss/reference"] >= 0
    assert log["length/completion"] > 0


def test_a_stream_goes_on_in_its_second_pass(tmp_path: Path) -> None:
    """Five rows, two a step: the checkpoint of step 4 lies in the middle of the second pass."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i, row in enumerate(rows(5)):
        row["images"][0].save(folder / f"{i}.png")
        lines.append(json.dumps(row | {"images": [f"{i}.png"]}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    options = {"max_steps": 6, "clip_mode": "none", "save_strategy": "steps", "save_steps": 4, "completion_steps": 1}

    def make(name: str) -> ViGOSTrainer:
        stream = load_rows(folder / "train.jsonl", streaming=True)
        return ViGOSTrainer(tiny_student(), config(tmp_path / name, **options), processor(), stream, prompts=PROMPTS)

    def seen(name: str) -> list[str]:
        files = sorted((tmp_path / name / "completions").glob("step-*"))
        return [json.loads(line)["problem_id"][4:] for file in files for line in file.read_text().splitlines()]

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    assert "".join(seen("whole")) == "012340123401"
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", dirs_exist_ok=True)
    resumed.train(str(tmp_path / "resumed" / "checkpoint-4"))
    assert seen("resumed") == seen("whole")
    assert metrics_of(resumed)[4:] == metrics_of(whole)[4:]
    assert all(torch.equal(p, parameters(whole)[n]) for n, p in parameters(resumed).items())


def test_constructor_says_what_it_wants(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="args must be a ViGOSConfig, got TrainingArguments"):
        ViGOSTrainer(tiny_student(), TrainingArguments(str(tmp_path), use_cpu=True), processor(), rows(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="processing_class must be"):
        ViGOSTrainer(tiny_student(), config(tmp_path), None, rows(1))
    with pytest.raises(
        ValueError, match=r"answer_column 'answre' is not in the data.*did you mean answer_column='answer'"
    ):
        trainer(tiny_student(), config(tmp_path, answer_column="answre"), rows(1))


def test_a_model_that_is_sharded_already_is_refused(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model = tiny_student()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.lm_head.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(weight)
        with pytest.raises(ValueError, match=r"model must be unsharded .* got the DTensor lm_head\.weight"):
            trainer(model, config(tmp_path), rows(1))
    finally:
        dist.destroy_process_group()


def test_prompts_come_from_the_file_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text("student: 'Look. {problem}'\n")
    args = config(tmp_path / "run", prompts_file=str(tmp_path / "prompts.yaml"))
    engine = ViGOSTrainer(tiny_student(), args, processor(), rows(1))
    assert engine.prompts.student == "Look. {problem}"
