"""The trainer: the whole loss against straight-line PyTorch, accumulation, seeds, teachers, adapters, bad input."""

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
    VALID_A,
    VALID_B,
    GradientRecorder,
    completion_ids,
    config,
    picture,
    processor,
    rows,
    tiny_student,
    trainer,
)
from torch import Tensor

from vigos.data.examples import ImageLimits, load_rows
from vigos.models.parts import lm_head
from vigos.train.adapters import build_lora, merged_copy, prepare_model
from vigos.train.config import ViGOSConfig
from vigos.train.teacher_weights import TeacherWeights
from vigos.train.trainer import ViGOSTrainer

TEXTS = [VALID_A, CUT_OFF, VALID_B, TAGLESS]
LAMBDAS = {"lambda_perception": 1.3, "lambda_reasoning": 0.7, "lambda_reference": 2.1}
UNTIMED = ("perf/", "train_", "epoch")


# --- The whole loss against straight-line PyTorch ---------------------------------------------------------------------


def chat(question: str, prefill: str = "") -> str:
    """The world's chat template, written out."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n{prefill}"


def full_log_probs(model: Any, text: str, image: Any, ids: Tensor) -> Tensor:
    """(C, V) float64: the distributions that predict each completion token, from a forward over everything."""
    prompt = processor()(text=[text], images=[[image]], return_tensors="pt", return_mm_token_type_ids=True)
    P = prompt["input_ids"].shape[1]
    out = model(
        input_ids=torch.cat([prompt["input_ids"], ids[None]], 1),
        attention_mask=torch.ones(1, P + len(ids), dtype=torch.int64),
        mm_token_type_ids=torch.cat([torch.as_tensor(prompt["mm_token_type_ids"]), torch.zeros_like(ids)[None]], 1),
        pixel_values=prompt["pixel_values"],
        image_grid_thw=prompt["image_grid_thw"],
    )
    return out.logits[0, P - 1 : P - 1 + len(ids)].double().log_softmax(-1)


def inside(ids: Tensor, start: int, end: int) -> list[int]:
    """The tokens that lie wholly in characters [start, end) of the completion; its texts are ASCII."""
    found, at = [], 0
    for i, token in enumerate(ids.tolist()):
        length = len(processor().tokenizer.decode([token]))
        if at >= start and at + length <= end:
            found.append(i)
        at += length
    return found


def straight_line(student: Any, teacher: Any, args: ViGOSConfig, data: list[dict[str, Any]]) -> Tensor:
    """The loss of one step over all rows, each teacher and row by itself, written from the paper's equations."""
    per_token: list[dict[str, Any]] = []
    for number, (row, text) in enumerate(zip(data, TEXTS, strict=True)):
        ids = completion_ids(text)
        image, problem, answer = row["images"][0], row["problem"], row["answer"]
        key = row.get("solution", answer) if args.reference_kind == "solution" else answer
        asked, told = f"{problem} Describe, think, answer.", f"{problem} Key: {key}. Explain."
        privileged = f"{problem} Key: {key}. Describe, think, answer."
        q = full_log_probs(student, chat(asked, "<description>"), image, ids)
        close = text.find("</description>")
        valid = text in (VALID_A, VALID_B)
        jobs: list[tuple[str, Tensor, list[int], str]] = []  # term, teacher's log-probabilities (C, V), tokens, kind
        with torch.no_grad():
            everything = list(range(len(ids)))
            if args.method == "opsd":
                p = full_log_probs(teacher, chat(privileged, "<description>"), image, ids)
                jobs.append(("reference", p, everything, "forward"))
            elif valid:
                opened, closed = text.find("<think>") + 7, text.find("</think>")
                box = text.find("\\boxed{") + 7
                end = text.find("}", box)
                p = full_log_probs(teacher, chat(""), image, ids)
                jobs.append(("perception", p, inside(ids, 0, close), "forward"))
                if args.span_style == "paper":
                    tokens = inside(ids, opened, closed) + inside(ids, box, end)
                else:
                    first = inside(ids, opened, len(text))[0]
                    tokens = [i for i in everything if i >= first and i <= max(inside(ids, 0, end + 1))]
                if args.reasoning_prefix == "student":
                    p = full_log_probs(teacher, chat(told, "<description>"), image, ids)
                else:
                    skipped = inside(ids, opened, len(text))[0]
                    p = full_log_probs(teacher, chat(told, "<think>"), image, ids[skipped:])
                    p = torch.cat([torch.full((skipped, p.shape[1]), float("nan"), dtype=p.dtype), p])
                jobs.append(("reasoning", p, tokens, "forward"))
            elif args.invalid_rollouts == "reference":
                p = full_log_probs(teacher, chat(privileged, "<description>"), image, ids)
                jobs.append(("reference", p, everything, "reverse"))
            else:
                p = full_log_probs(teacher, chat(told, "<description>"), image, ids)
                jobs.append(("reasoning", p, everything, "forward"))
        for term, p, tokens, kind in jobs:
            for place, i in enumerate(tokens):
                log_p, log_q = p[i], q[i]
                if args.divergence == "jsd":
                    beta = args.jsd_beta
                    log_m = ((1 - beta) * log_q.exp() + beta * log_p.exp()).log()
                    terms = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
                elif kind == "forward":
                    terms = log_p.exp() * (log_p - log_q)
                else:
                    terms = log_q.exp() * (log_q - log_p)
                if args.clip_mode == "entry":
                    terms = terms.clamp(max=args.entry_clip)
                value = terms.sum()
                if args.clip_mode == "token":
                    clip = args.token_clip
                    if term == "perception" and place == len(tokens) - 1 and args.description_end_clip is not None:
                        clip = args.description_end_clip
                    if term == "reasoning" and place == 0 and args.reasoning_start_clip is not None:
                        clip = args.reasoning_start_clip
                    value = value.clamp(max=clip)
                per_token.append({"row": number, "term": term, "value": value})
    weights = dict(zip(("perception", "reasoning", "reference"), args.objective.lambdas, strict=True))
    total = torch.zeros((), dtype=torch.float64)
    for term, weight in weights.items():
        mine = [t for t in per_token if t["term"] == term]
        if not mine:
            continue
        if args.normalize == "tokens":
            total = total + weight * torch.stack([t["value"] for t in mine]).mean()
        elif args.normalize == "sequence":
            means = [torch.stack([t["value"] for t in mine if t["row"] == r]).mean() for r in {t["row"] for t in mine}]
            total = total + weight * torch.stack(means).mean()
        else:
            size = args.per_device_train_batch_size
            for k in range(args.gradient_accumulation_steps):
                active = [t for t in per_token if t["row"] // size == k]
                values = [t["value"] for t in active if t["term"] == term]
                if values:
                    total = total + weight * torch.stack(values).sum() / len(active) / args.gradient_accumulation_steps
    return total


CASES: dict[str, dict[str, Any]] = {
    "paper": {"token_clip": 0.3},
    "separate": {"token_clip": 0.3, "teacher_scoring": "separate", "student_scoring": "separate"},
    # Boundary clips below and above what their tokens have, so that a clip on a neighbour shows.
    "boundary": {"token_clip": 0.4, "description_end_clip": 0.011, "reasoning_start_clip": 0.017},
    "released": {"preset": "released", "token_clip": 0.01, "description_end_clip": 9.0, "reasoning_start_clip": 9.0},
    "sequence": {"normalize": "sequence", "clip_mode": "none"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3, "token_clip": 0.1},
    "entry": {"clip_mode": "entry", "entry_clip": 0.02},
    "opsd": {"method": "opsd", "clip_mode": "entry"},
    "others": {"invalid_rollouts": "others", "token_clip": 0.4},
    "solution": {"reference_kind": "solution", "clip_mode": "none"},
    "no_perception": {"lambda_perception": 0.0, "clip_mode": "none"},
    "full": {"lora": False, "token_clip": 0.4},
    "full_head": {"lora": False, "train_head": True, "train_vision": True, "clip_mode": "none"},
    "live": {"teacher": "live", "clip_mode": "none"},
}


@pytest.mark.parametrize("case", CASES)
def test_step_equals_straight_line_float64(case: str, tmp_path: Path) -> None:
    """Two micro-batches of two rows; valid and invalid mixed; loss and every gradient to 1e-6 relative."""
    options = LAMBDAS | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} | CASES[case]
    args = config(tmp_path, **options)
    data = rows(4)
    data[1]["solution"] = "it is blue because 2 is"
    recorder = GradientRecorder()
    engine = trainer(tiny_student(torch.float64), args, data, texts=TEXTS, callbacks=[recorder])
    frozen = copy.deepcopy(engine.model)
    torch.manual_seed(1)  # the student has moved away from its teacher
    with torch.no_grad():
        for parameter in engine.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if args.teacher == "live":
        frozen = copy.deepcopy(engine.model)
    elif args.lora:
        frozen = frozen.get_base_model()  # its lora_B is still zero
    expected = straight_line(engine.model, frozen.eval(), args, data)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
    engine.model.zero_grad(set_to_none=True)

    engine.train()

    logged = engine.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-6)
    parts = [
        logged[f"loss/{t}"] * w
        for t, w in zip(("perception", "reasoning", "reference"), args.objective.lambdas, strict=True)
    ]
    assert sum(parts) == pytest.approx(expected.item(), rel=1e-6)
    (recorded,) = recorder.steps
    trained = {n for n, p in engine.model.named_parameters() if p.requires_grad}
    assert recorded.keys() == gradients.keys() == trained
    for name, exact in gradients.items():
        error = (recorded[name] - exact).abs().max().item()
        assert error <= 1e-6 * exact.abs().max().item(), f"{name}: {error:.1e} of {exact.abs().max().item():.1e}"
    assert any(g.abs().max() > 1e-4 for g in gradients.values())
    if args.clip_mode == "token":  # both sides of the clip are exercised
        clipped = [v for k, v in logged.items() if k.startswith("clipped_tokens/")]
        assert any(0 < share < 1 for share in clipped), clipped


# --- Seeds, accumulation, restarts -----------------------------------------------------------------------------------


def metrics_of(engine: ViGOSTrainer) -> list[dict[str, Any]]:
    """What was logged at each step, without clocks and memory."""
    logs = [log for log in engine.state.log_history if "loss" in log]
    return [{k: v for k, v in log.items() if not k.startswith(UNTIMED)} for log in logs]


def parameters(engine: ViGOSTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in engine.model.named_parameters() if p.requires_grad}


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


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        recorder = GradientRecorder()
        args = config(tmp_path, clip_mode="none", gradient_checkpointing=on)
        engine = trainer(tiny_student(torch.float64), args, rows(2), texts=TEXTS[:2], callbacks=[recorder])
        _move(engine)
        engine.train()
        found.append(recorder.steps[0])
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-9, atol=1e-12), name


# --- Teachers and adapters -------------------------------------------------------------------------------------------


def _move(engine: ViGOSTrainer, scale: float = 0.1) -> None:
    """Takes the student away from its teacher."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_weights_are_bit_identical_after_lora_training(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_student(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = config(
        tmp_path, max_steps=4, clip_mode="none", save_merged=True, learning_rate=1e-2, max_completion_length=12
    )
    engine = trainer(model, args, rows(8))
    start = parameters(engine)
    engine.train()
    assert any(not torch.equal(p, start[n]) for n, p in parameters(engine).items()), "nothing was trained"
    after = dict(engine.model.get_base_model().named_parameters())
    for name, parameter in before.items():
        inside, _, last = name.rpartition(".")
        assert torch.equal(after.get(f"{inside}.base_layer.{last}", after.get(name)), parameter), name


def test_frozen_teacher_of_full_training_stays(tmp_path: Path) -> None:
    args = config(tmp_path, lora=False, max_steps=3, clip_mode="none", learning_rate=1e-2, max_completion_length=12)
    model = tiny_student()
    before = copy.deepcopy(model)
    engine = trainer(model, args, rows(6))
    names = set(engine.teacher.parameters)
    assert names
    assert not any(n.startswith(("model.visual", "lm_head")) for n in names), "tower and head are frozen by default"
    engine.train()
    own = dict(engine.model.named_parameters())
    assert any(not torch.equal(own[n], p) for n, p in before.named_parameters())
    with engine.teacher.weights():
        assert all(torch.equal(own[n], p) for n, p in before.named_parameters())
    assert any(not torch.equal(own[n], p) for n, p in before.named_parameters()), "the student's own weights are back"
    for name, parameter in before.named_parameters():
        if name.startswith(("model.visual", "lm_head")):
            assert torch.equal(own[name], parameter), name


def test_moving_average_follows_its_recursion(tmp_path: Path) -> None:
    for lora in (True, False):
        args = config(tmp_path, lora=lora)
        model = prepare_model(tiny_student(torch.bfloat16 if not lora else torch.float32), args)
        policy = TeacherWeights(model, "ema", decay=0.75)
        assert policy.adapter == "on"
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert policy.copies.keys() == trained.keys()
        expected = {n: p.detach().float().clone() for n, p in trained.items()}
        for step in range(3):
            with torch.no_grad():
                for p in trained.values():
                    p.add_(0.01 * (step + 1))
            policy.update()
            expected = {n: 0.75 * e + 0.25 * trained[n].detach().float() for n, e in expected.items()}
        for name, e in expected.items():
            assert policy.copies[name].dtype == torch.float32
            assert torch.allclose(policy.copies[name], e, rtol=1e-6, atol=1e-7), name
        with policy.weights():
            assert all(torch.equal(p, policy.copies[n].to(p)) for n, p in trained.items())


def test_weights_come_back_after_an_error() -> None:
    model = tiny_student()
    policy = TeacherWeights(model, "frozen")
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="while scoring"), policy.weights():
        raise RuntimeError("while scoring")
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers


def test_adapter_stays_in_the_language_model(tmp_path: Path) -> None:
    def adapted(**options: Any) -> set[str]:
        model = build_lora(tiny_student(), config(tmp_path, **options))
        return {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}

    names = adapted()
    assert len(names) == 2 * 7, "two layers of seven projections"
    assert all(".language_model.layers." in n for n in names)
    towered = adapted(train_vision=True)
    assert names < towered
    assert any(".visual." in n for n in towered - names)
    assert adapted(lora_target_modules=["all-linear"]) == names
    assert len(adapted(lora_target_modules=["q_proj"])) == 2


def test_adapter_on_the_head_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must not name the language-model head 'lm_head': with the adapter off"):
        trainer(tiny_student(), config(tmp_path, lora_target_modules=["q_proj", "lm_head"]), rows(1))
    with pytest.raises(ValueError, match=r"linear layers of the language model, got 'q_porj'; it has .*q_proj"):
        trainer(tiny_student(), config(tmp_path, lora_target_modules=["q_porj"]), rows(1))


def test_adapters_that_cannot_be_switched_off_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for options, message in (
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
    ):
        model = get_peft_model(tiny_student(), LoraConfig(target_modules=["q_proj"], **options))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            trainer(model, config(tmp_path), rows(1))
    head = get_peft_model(tiny_student(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="head"):
        trainer(head, config(tmp_path), rows(1))


def test_adapters_without_a_merged_copy_are_refused_at_the_start(tmp_path: Path) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    dora = LoraConfig(target_modules=["q_proj"], use_dora=True)
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    for adapter, name in ((dora, "DoRA"), (ia3, "IA3")):
        with pytest.raises(ValueError, match=rf"save_merged must be false for adapter 'default'.*got {name}"):
            trainer(get_peft_model(tiny_student(), adapter), config(tmp_path, save_merged=True), rows(1))
    engine = trainer(get_peft_model(tiny_student(), ia3), config(tmp_path, clip_mode="none"), rows(2), texts=TEXTS[:2])
    engine.train()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_own_adapter_is_trained(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_student(), LoraConfig(target_modules=["v_proj"], r=2))
    engine = trainer(model, config(tmp_path, clip_mode="none"), rows(2), texts=TEXTS[:2])
    start = parameters(engine)
    engine.train()
    assert {n.split(".")[-4] for n in start} == {"v_proj"}
    assert any(not torch.equal(p, start[n]) for n, p in parameters(engine).items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_copy_is_the_adapted_model(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    from transformers import AutoModelForImageTextToText

    args = config(tmp_path, max_steps=1, clip_mode="none", save_merged=True)
    engine = trainer(tiny_student(dtype, tied=tied), args, rows(2), texts=TEXTS[:2])
    _move(engine)
    engine.train()
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    merged = merged_copy(engine.model)
    assert all(torch.equal(p, before[n]) for n, p in engine.model.named_parameters())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=dtype)
    state = dict(loaded.named_parameters())
    assert (
        state.keys()
        == dict(merged.named_parameters()).keys()
        == dict(tiny_student(tied=tied).named_parameters()).keys()
    )
    assert all(torch.equal(p, state[n]) for n, p in merged.named_parameters())
    name = "model.language_model.layers.1.mlp.up_proj"
    layer = engine.model.get_base_model().get_submodule(name)
    delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    exact = layer.base_layer.weight.float() + 2.0 * delta  # lora_alpha / lora_r
    assert torch.equal(state[f"{name}.weight"], exact.to(dtype))
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        a, b = (m.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (engine.model, loaded))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1  # the merged weight is rounded once more
    assert (a - b).abs().max() <= tolerance * a.abs().max()


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
    _move(engine)
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
    _move(engine)
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
    _move(fourfold)
    fourfold.train()
    assert engine.state.log_history[0]["loss"] == pytest.approx(fourfold.state.log_history[0]["loss"], rel=1e-9)


# --- The run folder --------------------------------------------------------------------------------------------------


def test_run_folder(tmp_path: Path) -> None:
    import yaml
    from peft import PeftModel

    args = config(tmp_path, per_device_train_batch_size=4, completion_steps=1, grade_rollouts=True, token_clip=0.3)
    engine = trainer(tiny_student(), args, rows(4), texts=TEXTS)
    _move(engine)
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
    assert all(f"skipped row r{i}:" in caplog.text for i in range(1, 7))


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


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapter_that_changes_the_base_is_refused(start: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_student(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    with pytest.raises(ValueError, match=f"adapter 'default' must not be initialised by '{start}'"):
        trainer(model, config(tmp_path), rows(1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["embed_tokens"]}, "embed_tokens, a Embedding"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=["embedding", "bias", "tokens"],
)
def test_adapter_that_cannot_be_merged_is_refused_before_the_first_step(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_student(), LoraConfig(r=2, **options))
    with pytest.raises(ValueError, match=f"save_merged must be false for .*{named}"):
        trainer(model, config(tmp_path, save_merged=True), rows(1))


def test_prompts_come_from_the_file_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text("student: 'Look. {problem}'\n")
    args = config(tmp_path / "run", prompts_file=str(tmp_path / "prompts.yaml"))
    engine = ViGOSTrainer(tiny_student(), args, processor(), rows(1))
    assert engine.prompts.student == "Look. {problem}"


@pytest.mark.parametrize("train_head", [False, True], ids=["", "trained"])
def test_head_bias_and_logit_settings_of_the_model_are_used(train_head: bool, tmp_path: Path) -> None:
    """The divergence is that of the model's own logits, whatever stands between head and softmax."""
    model = tiny_student(torch.float64)
    old = lm_head(model)
    model.lm_head = torch.nn.Linear(old.in_features, old.out_features, bias=True, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.copy_(old.weight)
        model.lm_head.bias.normal_()
    own = {"lora": False, "train_head": True} if train_head else {}  # then the teacher keeps weight and bias
    args = config(tmp_path, clip_mode="none", per_device_train_batch_size=4, **own)
    data = rows(4)
    engine = trainer(model, args, data, texts=TEXTS)
    frozen = copy.deepcopy(engine.model).eval()
    frozen = frozen if train_head else frozen.get_base_model()
    _move(engine)
    expected = straight_line(engine.model, frozen, args, data)
    engine.train()
    assert engine.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
