"""One cell of the study: its data, its training, its evaluation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vigos.study.plan import ARM, MAX_TOKENS, TEST_SEED, world_config

if TYPE_CHECKING:
    from vigos.eval.results import EvaluationResult
    from vigos.study.plan import Cell
    from vigos.train.config import ViGOSConfig


def measure(cell: Cell, base: Path | None, scratch: Path) -> dict[str, Any]:
    """Train the cell's arm in the folder `scratch` and measure it; return the measured columns of results.csv."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from vigos.data.examples import load_rows
    from vigos.eval.evaluate import evaluate
    from vigos.train.trainer import ViGOSTrainer
    from vigos.world import load_base, world_prompts, write_world

    plan, world, arm = cell.plan, cell.world, ARM[cell.arm]
    seen: dict[str, Any] = {"noise": world.noise, "asked": world.asked}
    test = write_world(scratch / "test", "test", plan.triplets, TEST_SEED, **seen)
    model: Any
    model, processor = load_base(base)
    found: dict[str, Any] = {}
    if arm.kind != "base":
        train = write_world(
            scratch / "train", "train", plan.steps * plan.examples_a_step, cell.seed, conflict=world.conflict,
            label_bias=world.label_bias, **seen,
        )  # fmt: skip
        if arm.reference != "own":
            change_references(train, arm.reference, cell.seed)
        if arm.boxes:
            add_boxes(train)
        options = cell_config(cell, scratch / "run")
        if arm.kind == "sft":
            records = [json.loads(line) for line in train.read_text(encoding="utf-8").split("\n") if line]
            model = train_sft(model, processor, load_rows(train), [stated(r) for r in records], options)
        else:
            if arm.sharpened:
                examples = list(islice(load_rows(train), plan.examples_a_step))
                found["temperature"] = write_sharpened(scratch / "sharpened", base, examples, options)
                options.teachers = [{"name": "sharpened", "reads": "student", "model": str(scratch / "sharpened")}]
            trainer = ViGOSTrainer(model=model, args=options, processing_class=processor, train_dataset=train)
            for printer in (ProgressCallback, PrinterCallback):  # the study says where it is
                trainer.remove_callback(printer)
            trainer.train()
            model = trainer.model
            rollouts = trainer.sample_rollouts(list(islice(load_rows(train), plan.palr_examples)))
            groups = trainer.measure_palr(rollouts).summary(resamples=1)["groups"]
            found |= {f"palr_{name}": groups.get(name, {}).get("palr") for name in ("all", "description", "reasoning")}
    result = evaluate(
        model, processor, load_rows(test), prompts=world_prompts(), temperature=1.0, max_new_tokens=MAX_TOKENS,
        batch_size=150, seed=TEST_SEED + cell.seed,
    )  # fmt: skip
    return found | outcomes(result)


def outcomes(result: EvaluationResult) -> dict[str, Any]:
    """Return shares, and the outcomes of the test examples as a string of 0 and 1 in the order of the file."""
    from vigos.study.preconditions import described_ink

    found: dict[str, Any] = {}
    for metric in ("score", "prior", "valid_rate"):
        values = list(result.values(metric).values())  # type: ignore[arg-type]
        found[metric] = sum(values) / len(values)
        if metric != "valid_rate":
            found[f"{metric}_items"] = "".join("1" if v else "0" for v in values)
    named, right, followed = [], [], []
    for record in result.examples_of("score"):
        sample, digit = record["samples"][0], _asked(record)
        ink = described_ink(sample["text"].split("</description>")[0], digit)
        named.append(ink is not None)
        if ink is not None:
            right.append(ink == record["answer"])
            followed.append(ink == (sample["prediction"] or "").strip())
    found["named"] = sum(named) / len(named)
    found["description"] = sum(right) / len(right) if right else None
    found["follows"] = sum(followed) / len(followed) if followed else None
    found["tokens"] = result.summary()["tokens_mean"]
    return found


def _asked(record: dict[str, Any]) -> int:
    """Return the digit that an ink question names: the one in the image whose ink is the answer."""
    return next(d for d, ink in zip(record["extra"]["digits"], record["extra"]["inks"], strict=True)
                if ink == record["answer"])  # fmt: skip


def change_references(path: Path, reference: str, seed: int) -> None:
    """Replace the answer of every line of the world's JSONL by "?", or by an answer of the same kind of question.

    "wrong" draws one that the line's own is not; "other" takes that of another line, which may be right by chance.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    answers = [record["answer"] for record in records]
    rng = np.random.default_rng([seed, 41])
    for kind in sorted({record["kind"] for record in records}):
        places = [i for i, record in enumerate(records) if record["kind"] == kind]
        shuffled = rng.permutation(places).tolist()
        for place, other in zip(shuffled, shuffled[1:] + shuffled[:1], strict=True):
            wrong = sorted({answers[i] for i in places} - {answers[place]})
            told = {"other": answers[other], "wrong": str(rng.choice(wrong or ["?"])), "none": "?"}
            records[place]["answer"] = told[reference]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _named(asked: str, digits: Sequence[int]) -> int | None:
    """Return the digit that a question names or whose place it names; None where it does neither."""
    place = re.search(r"\b(left|right)\b", asked)
    if place:
        return digits[place[1] == "right"]
    return next((int(d) for d in re.findall(r"\b\d\b", asked)), None)


def add_boxes(path: Path) -> None:
    """Add to every line of the world's JSONL the `box` of the digit that is asked about, of all where it is none."""
    from vigos.world.digits import CELL

    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for record in records:
        asked, found = re.split(r"[.] ", record["problem"])[-1], None
        if record["kind"] == "ink":
            found = record["digits"].index(_named(asked, record["digits"]))
        elif record["kind"] == "which":
            found = next(i for i, ink in enumerate(record["inks"]) if ink in asked)
        ends = (0, len(record["digits"])) if found is None else (found, found + 1)
        record["box"] = [CELL * ends[0], 0, CELL * ends[1], CELL]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def cell_config(cell: Cell, folder: Path) -> ViGOSConfig:
    """Return the options of every run on the world, with the plan's steps and learning rate and the arm's own."""
    plan, arm = cell.plan, ARM[cell.arm]
    return world_config(
        folder, seed=cell.seed, max_steps=plan.steps, per_device_train_batch_size=plan.examples_a_step,
        learning_rate=plan.learning_rate, completion_steps=0, save_merged=False, **arm.options,
    )  # fmt: skip


# --- A teacher that is sure of itself without being told --------------------------------------------------------------


@torch.no_grad()
def write_sharpened(folder: Path, base: Path | None, examples: Sequence[Any], options: ViGOSConfig) -> float:
    """Write the base with its logits divided by a temperature, and return that temperature.

    Under the student's prompt it then has, on rollouts of the base, the mean entropy of OPSD's privileged teacher.
    """
    from vigos.divergence.reference import entropy
    from vigos.method.encode import ScoredSequence
    from vigos.models.parts import lm_head
    from vigos.scoring.hidden_states import hidden_states
    from vigos.train.trainer import ViGOSTrainer
    from vigos.world import load_base

    model, processor = load_base(base)
    opsd = replace(options, method="opsd", teachers=None)
    rollouts = ViGOSTrainer(model=model, args=opsd, processing_class=processor, train_dataset=examples).sample_rollouts(
        examples
    )
    logits = {}
    for role in ("student", "reference"):
        sequences = [ScoredSequence(r.prompts[role], r.completion_ids, torch.arange(len(r.completion_ids)))
                     for r in rollouts]  # fmt: skip
        logits[role] = lm_head(model)(hidden_states(model, sequences, scoring="separate")).double()
    temperature = temperature_of(logits["student"], float(entropy(logits["reference"]).mean()))
    model, processor = load_base(base)  # the other one has an adapter
    model.model.language_model.norm.weight /= temperature
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return temperature


def temperature_of(logits: torch.Tensor, wanted: float) -> float:
    """Return the temperature (1/1000 to 1000) at which rows of logits (N, V) have a mean entropy of `wanted` nats."""
    from vigos.divergence.reference import entropy

    low, high = -math.log(1000), math.log(1000)
    for _ in range(50):  # entropy grows with the temperature
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(logits / math.exp(middle)).mean() < wanted else (low, middle)
    return math.exp((low + high) / 2)


# --- The off-policy arm -----------------------------------------------------------------------------------------------


def stated(row: dict[str, Any]) -> str:
    """Return a completion in the format that states the reference of `row`, a line of the world's JSONL.

    It describes the scene as it is, but for the asked digit, which gets the ink that the reference says.
    """
    from vigos.world.digits import INK_NAMES
    from vigos.world.tasks import completion, describe, reason

    kind, answer, problem = row["kind"], row["answer"], row["problem"]
    asked = re.split(r"[.] ", problem)[-1]  # the usual fact of an F question comes first
    digit = _named(asked, row["digits"])
    ink = next((i for i in INK_NAMES if i in asked), None)
    scene: Any = SimpleNamespace(digits=row["digits"], inks=row["inks"])
    question: Any = SimpleNamespace(kind=kind, digit=digit, ink=ink)
    override = {digit: answer} if kind == "ink" and digit is not None else None
    return completion(describe(scene, override), reason(scene, question, answer), answer)


def train_sft(
    model: nn.Module, processor: Any, examples: Any, completions: Sequence[str], options: ViGOSConfig
) -> nn.Module:
    """Train by the mean cross-entropy of the examples' completions; LoRA, optimizer, schedule are the other arms'."""
    from transformers import get_linear_schedule_with_warmup, set_seed

    from vigos.method.encode import ScoredSequence, encode_prompt
    from vigos.models.parts import lm_head
    from vigos.models.vision_cache import VisionCache
    from vigos.scoring.hidden_states import hidden_states
    from vigos.train.adapters import build_lora
    from vigos.world import world_prompts

    set_seed(options.seed)
    tokenizer, prompts = processor.tokenizer, world_prompts()
    adapted = build_lora(model, options)
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, int(options.warmup_steps), options.max_steps)
    head: Any = lm_head(adapted)
    adapted.train()
    order = torch.randperm(len(completions), generator=torch.Generator().manual_seed(options.seed)).tolist()
    size = options.per_device_train_batch_size
    for step in range(options.max_steps):
        sequences = []
        for i in order[step * size : (step + 1) * size]:
            row = examples[i]
            prompt = encode_prompt(processor, prompts, "student", row["problem"], images=row["images"])
            ids = [*tokenizer(completions[i], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            sequences.append(ScoredSequence(prompt, torch.tensor(ids), torch.arange(len(ids))))
        hidden = hidden_states(adapted, sequences, scoring="separate", vision=VisionCache.for_model(model))
        targets = torch.cat([s.completion_ids for s in sequences])
        nn.functional.cross_entropy(head(hidden).float(), targets).backward()
        nn.utils.clip_grad_norm_(weights, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return adapted.eval()
