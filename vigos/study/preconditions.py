"""Measure whether a base model of the world is worth post-training: the preconditions P1 to P5, with intervals.

P1  The image-only teacher describes scenes that contradict the prior at least 15 points better than the student does
    under the question: its description gives the asked digit its true ink, among those that name the digit.
P2  The privileged teacher's descriptions leak the reference: at least 15 points between the true reference and the
    usual ink in its place.
P3  The student scores 25 to 65 % on conflicting images (Score), at least 90 % on agreeing ones (Prior), and 90 to
    99 % of its outputs are valid.
P4  Privileged teachers get the answer token right in at least 90 %: the reasoning teacher on the student's own
    rollouts, the reference teacher in what it writes itself.
P5  How often the answer follows the student's own description (reported, no threshold).

Everything is measured on triplets with held-out handwriting and wordings, by sampling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vigos.eval.statistics import wilson_interval
from vigos.method.spans import parse_rollout
from vigos.world.batch import FastEncoder, Prompt, ScoredText, image_features, scored_logits
from vigos.world.digits import CELL, INK_NAMES, Split, render
from vigos.world.prompts import world_prompts
from vigos.world.tasks import USUAL_INK, Asked, triplet

_MENTION = re.compile(rf"(\d+) in ({'|'.join(INK_NAMES)})\b")


def _rate(outcomes: Sequence[bool]) -> dict[str, float]:
    n, successes = len(outcomes), sum(outcomes)
    low, high = wilson_interval(successes, n)
    return {"rate": successes / n if n else math.nan, "low": low, "high": high, "n": n}


def _difference(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Return a - b with Newcombe's interval (his method 10: the Wilson intervals of both, combined)."""
    gap = a["rate"] - b["rate"]
    low = gap - math.hypot(a["rate"] - a["low"], b["high"] - b["rate"])
    high = gap + math.hypot(a["high"] - a["rate"], b["rate"] - b["low"])
    return {"rate": gap, "low": low, "high": high, "n": min(a["n"], b["n"])}


def described_ink(description: str, digit: int | None) -> str | None:
    """Return the ink that a description gives to `digit`; None where it does not name it."""
    return next((ink for name, ink in _MENTION.findall(description) if int(name) == digit), None)


@torch.no_grad()
def sample(
    model: Any, encoder: FastEncoder, images: Sequence[np.ndarray], prompts: Sequence[Prompt], *, seed: int = 0,
    temperature: float = 1.0, max_new_tokens: int = 64, batch_size: int = 150,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Sample completions of prompts over one image each, up to and including the end token; temperature 0 is greedy."""
    config = model.config
    pad, eos = config.text_config.pad_token_id, encoder.eos
    completions: list[list[int]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            group = prompts[start : start + batch_size]
            longest = max(len(p.ids) for p in group)
            ids = torch.full((len(group), longest), pad)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(group):
                ids[row, longest - len(prompt.ids) :] = prompt.ids
                mask[row, longest - len(prompt.ids) :] = 1
            pictures = encoder.patches(images[start : start + batch_size])
            height, width = images[start].shape[:2]
            grid = torch.tensor([[1, height // encoder.patch, width // encoder.patch]]).repeat(len(group), 1)
            output = model.generate(
                input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == encoder.image_token).int(),
                pixel_values=pictures.flatten(0, 1), image_grid_thw=grid, max_new_tokens=max_new_tokens,
                do_sample=temperature > 0, temperature=temperature if temperature > 0 else None, top_k=None, top_p=None,
                eos_token_id=eos, pad_token_id=pad,
                suppress_tokens=[config.image_token_id, config.video_token_id],
            )  # fmt: skip
            for row in output[:, longest:].tolist():
                completions.append(row[: row.index(eos) + 1] if eos in row else row)
            if progress is not None:
                progress(len(completions), len(prompts))
    return completions


def check(
    model: Any = None, processor: Any = None, *, n: int = 200, seed: int = 0, split: Split = "test",
    temperature: float = 1.0, noise: float = 0.05, asked: Asked = Asked(), cell: int = CELL, digits: int = 2,  # noqa: B008 (frozen)
    show: bool = True, progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure P1 to P5, print them as a table and return them.

    Args:
        model: a `save_pretrained` folder, None for the checkpoint that ships, or a model in memory.
        processor: of a model in memory; folders bring their own.
        noise, asked: as in `vigos.world.write_world`.
        n: how many triplets (three images each) are drawn.
        temperature: of all sampling; 0 is greedy.
        show: print the table.
        progress: called with (what, done, total).

    Returns: {"P1": {…}, …, "P5": {…}}: each measured quantity is {"rate", "low", "high", "n"} with a 95 % interval;
    P1 to P4 also hold "met".
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if model is None or isinstance(model, str | Path):
        from vigos.world import load_base

        model, processor = load_base(model)
    elif processor is None:
        raise ValueError("processor must come with a model in memory, got None")
    model.eval()
    encoder = FastEncoder(model, processor, world_prompts())
    rng = np.random.default_rng([seed, 31])
    items = []  # (image, question, role)
    for index in range(n):
        by_place = asked.by_place(rng)
        variant = "P" if by_place else "FP"[index % 2]
        scenes, questions = triplet(rng, split, count=digits, variant=variant, place=by_place)  # type: ignore[arg-type]
        for position, (scene, question) in enumerate(zip(scenes, questions, strict=True)):
            washed = asked.washed(scene, question)
            items.append((render(scene, rng, cell=cell, noise=noise, faint=washed), question, bool(position)))
    size = (cell, cell * digits)
    conflicts = [item for item in items if item[2]]

    def run(what: str, rows: list[Any], prompts: list[Prompt]) -> list[list[int]]:
        tick = None if progress is None else lambda done, total: progress(what, done, total)
        images = [row[0] for row in rows]
        return sample(model, encoder, images, prompts, seed=seed, temperature=temperature, progress=tick)

    def text(ids: list[int]) -> str:
        return encoder.tokenizer.decode(ids, skip_special_tokens=True)

    def inks_right(rows: list[Any], outputs: list[list[int]]) -> tuple[list[bool], list[bool]]:
        """Return ink right or wrong for outputs whose description names the asked digit, and which outputs name it."""
        named = [described_ink(text(ids).split("<")[0], row[1].digit) for row, ids in zip(rows, outputs, strict=True)]
        right = [ink == row[1].answer for row, ink in zip(rows, named, strict=True) if ink is not None]
        return right, [ink is not None for ink in named]

    # The student on every image: P3, P5 and its side of P1.
    rollouts = run("student", items, [encoder.prompt("student", q.problem, size=size) for _, q, _ in items])
    parsed = [parse_rollout(ids, encoder.tokenizer) for ids in rollouts]
    right = [s.valid and (s.answer_text or "").strip() == row[1].answer for s, row in zip(parsed, items, strict=True)]
    follows = [
        described_ink(text(ids).split("<")[0], row[1].digit) == (s.answer_text or "").strip()
        for ids, s, row in zip(rollouts, parsed, items, strict=True)
        if s.valid and described_ink(text(ids).split("<")[0], row[1].digit) is not None
    ]
    on_conflicts = [i for i, row in enumerate(items) if row[2]]
    student_right, student_named = inks_right(conflicts, [rollouts[i] for i in on_conflicts])

    # The image-only teacher.
    captions = run("perception", conflicts, [encoder.prompt("perception", size=size)] * len(conflicts))
    teacher_right, teacher_named = inks_right(conflicts, captions)

    # The reference teacher under the true reference and under the usual ink.
    told = [
        [encoder.prompt("reference", q.problem, reference(q), size=size) for _, q, _ in conflicts]
        for reference in (lambda q: q.answer, lambda q: USUAL_INK[q.digit])
    ]
    told_true, told_usual = (run("reference", conflicts, prompts) for prompts in told)
    wrote = [parse_rollout(ids, encoder.tokenizer).answer_text for ids in told_true]
    true_ink, _ = inks_right(conflicts, told_true)
    usual_ink, _ = inks_right(conflicts, told_usual)

    # The reasoning teacher reads the student's rollouts; its favourite at the answer's token.
    scored = [(i, s) for i in on_conflicts if (s := parsed[i]).valid and s.answer[1] > s.answer[0]]
    answers = _answer_tokens(model, encoder, [(items[i][0], items[i][1], rollouts[i], s) for i, s in scored], size)

    p1_teacher, p1_student = _rate(teacher_right), _rate(student_right)
    p2_true, p2_usual = _rate(true_ink), _rate(usual_ink)
    p1_gap, p2_gap = _difference(p1_teacher, p1_student), _difference(p2_true, p2_usual)
    score = _rate([right[i] for i in on_conflicts])
    prior = _rate([r for r, row in zip(right, items, strict=True) if not row[2]])
    valid = _rate([s.valid for s in parsed])
    reasoning = _rate(answers)
    reference = _rate([(w or "").strip() == row[1].answer for w, row in zip(wrote, conflicts, strict=True)])
    report: dict[str, Any] = {
        "P1": {
            "teacher": p1_teacher, "student": p1_student, "difference": p1_gap,
            "teacher_names_digit": _rate(teacher_named), "student_names_digit": _rate(student_named),
            "met": p1_gap["rate"] >= 0.15,
        },
        "P2": {
            "true_reference": p2_true, "usual_reference": p2_usual, "difference": p2_gap,
            "met": p2_gap["rate"] >= 0.15,
        },
        "P3": {
            "score": score, "prior": prior, "valid": valid,
            "met": 0.25 <= score["rate"] <= 0.65 and prior["rate"] >= 0.9 and 0.9 <= valid["rate"] <= 0.99,
        },
        "P4": {
            "reasoning": reasoning, "reference": reference,
            "met": reasoning["rate"] >= 0.9 and reference["rate"] >= 0.9,
        },
        "P5": {"answer_follows_description": _rate(follows)},
    }  # fmt: skip
    if show:
        print_check(report)
    return report


@torch.no_grad()
def _answer_tokens(model: Any, encoder: FastEncoder, rows: list[Any], size: tuple[int, int]) -> list[bool]:
    """Test whether the reasoning teacher, after the student's rollout, prefers the reference at the answer's token."""
    right: list[bool] = []
    grid = (size[0] // encoder.patch, size[1] // encoder.patch)
    for start in range(0, len(rows), 150):
        group = rows[start : start + 150]
        features = image_features(model.model.visual, encoder.patches([row[0] for row in group]), grid)
        examples = []
        for place, (_, question, ids, spans) in enumerate(group):
            prompt = encoder.prompt(
                "reasoning", question.problem, question.answer, size=size, prefill=encoder.prompts.prefill
            )
            cut = spans.answer[0] + 1
            examples.append(ScoredText(place, prompt, ids[:cut], [False] * (cut - 1) + [True]))
        logits: Tensor = scored_logits(model, features, examples)[0]
        wanted = [encoder.text(row[1].answer)[0] for row in group]
        right += (logits.argmax(-1) == torch.tensor(wanted)).tolist()
    return right


_ROWS = (
    ("P1", "teacher", "image-only teacher: ink right"),
    ("P1", "student", "student under the question: ink right"),
    ("P1", "difference", "difference (at least 15 points)"),
    ("P1", "teacher_names_digit", "image-only teacher names the asked digit"),
    ("P1", "student_names_digit", "student names the asked digit"),
    ("P2", "true_reference", "privileged description right, true reference"),
    ("P2", "usual_reference", "privileged description right, usual ink as reference"),
    ("P2", "difference", "difference (at least 15 points)"),
    ("P3", "score", "Score: conflicting images (25 to 65 %)"),
    ("P3", "prior", "Prior: agreeing images (at least 90 %)"),
    ("P3", "valid", "valid outputs (90 to 99 %)"),
    ("P4", "reasoning", "reasoning teacher: answer token right (at least 90 %)"),
    ("P4", "reference", "reference teacher: answer right (at least 90 %)"),
    ("P5", "answer_follows_description", "answer follows the description"),
)


def print_check(report: dict[str, Any]) -> None:
    """Print a report of `check` as a table."""
    from vigos.system.screen import make_console, print_table

    rows = []
    shown: set[str] = set()
    for key, name, words in _ROWS:
        value = report[key][name]
        met = report[key].get("met") if key not in shown else None
        rows.append((
            "" if key in shown else key, words, f"{value['rate']:.1%}", f"{value['low']:.1%} to {value['high']:.1%}",
            str(value["n"]), "" if met is None else "yes" if met else "no",
        ))  # fmt: skip
        shown.add(key)
    columns = ("", "measured on held-out handwriting", "rate", "95 % interval", "n", "met")
    print_table(make_console(), columns, rows)
