"""PALR against full logits, its constructed ends (0 without an answer, 1 without an image), the command, the metric."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import (
    CUT_OFF,
    TAGLESS,
    VALID_A,
    VALID_B,
    ScriptedEngine,
    chat,
    config,
    full_log_probs,
    picture,
    processor,
    rows,
    tiny_student,
    trainer,
)
from PIL import Image
from torch import Tensor

from vigos.cli import main
from vigos.data.examples import load_rows
from vigos.launch import PalrSource, palr_from_source
from vigos.method.prompts import Prompts
from vigos.method.supervise import TERMS, Rollout, supervise
from vigos.train.palr import PALR, draw_other_images, draw_wrong_answers, measure_palr, mixture_logprob
from vigos.train.trainer import ViGOSTrainer
from vigos.world import load_base, world_prompts, write_world
from vigos.world.tasks import completion

WRONG = [["blue", "12"], ["a dark green", "red", "blue"], ["7"], ["red", "green"]]


def rollouts_of(made: ViGOSTrainer, data: list[dict[str, Any]]) -> list[Rollout]:
    return made.sample_rollouts(list(load_rows(data)))


def trained(folder: Path, data: list[dict[str, Any]], texts: Sequence[str], **options: Any) -> ViGOSTrainer:
    """A trainer whose adapter has moved away from the teacher, and whose engine starts again."""
    made = trainer(tiny_student(), config(folder, **options), data, texts=texts)
    moved(made, 0.3)
    return made


def moved(made: ViGOSTrainer, scale: float) -> None:
    """Random values for what is trained: the student is no longer its teacher."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def measured(made: ViGOSTrainer, found: Sequence[Rollout], **options: Any) -> PALR:
    arguments = {
        "student": made.model, "scorer": made.scorer, "teacher": made.teacher, "prompts": made.prompts,
        "processor": made.processing_class,
    }  # fmt: skip
    return measure_palr(found, made.args, **(arguments | options))


# --- Against straight-line PyTorch ------------------------------------------------------------------------------------


def straight_line(made: ViGOSTrainer, data: list[dict[str, Any]], found: Sequence[Rollout], seed: int) -> PALR:
    """Every context by itself, from full logits in float64, written from the definition."""
    donors = draw_other_images(found, seed=seed)
    columns: list[list[float]] = []
    for i, (row, rollout) in enumerate(zip(data, found, strict=True)):
        ids, spans, opsd = rollout.completion_ids, rollout.spans, made.args.method == "opsd"
        problem, own, donor = row["problem"], row["images"][0], donors[i]
        assert donor is not None
        other = data[donor]["images"][0]
        asked = f"{problem} Describe, think, answer."

        def told(key: str, full: bool, problem: str = problem) -> str:
            return f"{problem} Key: {key}. " + ("Describe, think, answer." if full else "Explain.")

        p = full_log_probs(made.model, chat(asked, "<description>"), own, ids)
        with made.model.disable_adapter():  # type: ignore[operator]
            jobs: list[tuple[str, list[int], Tensor, Tensor, list[Tensor]]] = []
            if opsd or not spans.valid:
                full, tokens, term = True, list(range(len(ids))), "reference"
            else:
                caption, elsewhere = (full_log_probs(made.model, chat(""), image, ids) for image in (own, other))
                jobs.append(("perception", list(range(*spans.description)), caption, elsewhere, []))
                full, term = False, "reasoning"
                tokens = [*range(*spans.reasoning), *range(*spans.answer)]
            q, elsewhere = (
                full_log_probs(made.model, chat(told(row["answer"], full), "<description>"), image, ids)
                for image in (own, other)
            )
            wrongs = [full_log_probs(made.model, chat(told(key, full), "<description>"), own, ids) for key in WRONG[i]]
            jobs.append((term, tokens, q, elsewhere, wrongs))
        for term, tokens, q, elsewhere, wrongs in jobs:
            for t in tokens:
                y = int(ids[t])
                mean = torch.stack([w[t, y].exp() for w in wrongs]).mean().log() if wrongs else q[t, y]
                parts = (spans.description, spans.reasoning, spans.answer)
                segment = next((k for k, (start, end) in enumerate(parts) if start <= t < end), 3)
                values = [p[t, y], q[t, y], mean, elsewhere[t, y], TERMS.index(term), segment, i, t]
                columns.append([float(v.detach() if isinstance(v, Tensor) else v) for v in values])
    table = torch.tensor(columns, dtype=torch.float64)
    return PALR(*table[:, :4].T, *table[:, 4:6].T.to(torch.int8), *table[:, 6:].T.long(), rollouts=len(found))


def test_own_teachers_with_views_columns_and_another_model(tmp_path: Path) -> None:
    """Every context by itself from full logits: a mask and a hint under another model, and a plain own teacher."""
    large = tiny_student(seed=7, width=48)
    large.save_pretrained(tmp_path / "large")
    processor().save_pretrained(tmp_path / "large")
    teachers = [
        {"name": "hinted", "reads": "{problem} {hints} Key: {answer}.", "view": {"mask": "box"},
         "model": str(tmp_path / "large")},
        {"name": "seer", "reads": "{problem} {format}", "spans": "description"},
    ]  # fmt: skip
    data = [row | {"hints": f"hint {i}", "box": [0, 0, 16, 16 * (i + 1) // 2]} for i, row in enumerate(rows(2))]
    data[1]["images"] = [picture(9)]
    made = trained(tmp_path / "run", data, [VALID_A, VALID_B], teachers=teachers, clip_mode="none", palr_steps=1)
    found = rollouts_of(made, data)
    palr = measured(made, found, wrong=[["blue", "12"], ["a dark green"]], other_models=made.other_models)
    assert palr.terms == ("hinted", "seer")

    def masked(row: dict[str, Any]) -> Image.Image:
        image = row["images"][0].copy()
        image.paste((127, 127, 127), tuple(row["box"]))
        return image

    for i, (row, rollout) in enumerate(zip(data, found, strict=True)):
        ids, donor = rollout.completion_ids, data[1 - i]
        places = torch.arange(len(ids))

        def hinted(key: str, image: Image.Image, row: dict[str, Any] = row, ids: Tensor = ids) -> Tensor:
            text = chat(f"{row['problem']} {row['hints']} Key: {key}.", "<description>")
            return full_log_probs(large, text, image, ids)[torch.arange(len(ids)), ids]

        asked = chat(f"{row['problem']} Describe, think, answer.", "<description>")
        with torch.no_grad():
            student = full_log_probs(made.model, asked, row["images"][0], ids)[places, ids]
            wrong = [hinted(key, masked(row)).exp() for key in (["blue", "12"], ["a dark green"])[i]]
            wanted = [student, hinted(row["answer"], masked(row)), torch.stack(wrong).mean(0).log(),
                      hinted(row["answer"], masked(donor))]  # fmt: skip
            with made.model.disable_adapter():  # type: ignore[operator]
                sees, elsewhere = (
                    full_log_probs(made.model, asked, x["images"][0], ids)[places, ids] for x in (row, donor)
                )
        for term, exact in ((0, wanted), (1, [student, sees, sees, elsewhere])):
            mine = (palr.owner == i) & (palr.term == term)
            assert len(palr.token[mine]) == (len(ids) if term == 0 else rollout.spans.description[1])
            for column, full in zip((palr.student, palr.teacher, palr.wrong, palr.other_image), exact, strict=True):
                torch.testing.assert_close(column[mine], full[palr.token[mine]], rtol=1e-4, atol=1e-4)
    made.train()
    logged = next(log for log in made.state.log_history if "palr/all" in log)
    assert {"palr/teacher/hinted", "palr/teacher/seer"} <= logged.keys()
    assert logged["palr/teacher/seer"] == 0


@pytest.mark.parametrize("method", ["vigos", "opsd"])
def test_equals_a_straight_line_computation_on_full_logits(tmp_path: Path, method: str) -> None:
    data = rows(4)
    made = trained(tmp_path, data, [VALID_A, CUT_OFF, VALID_B, TAGLESS], method=method)
    found = rollouts_of(made, data)
    ours, exact = measured(made, found, wrong=WRONG, seed=5), straight_line(made, data, found, 5)
    for name in ("term", "segment", "owner", "token"):
        torch.testing.assert_close(getattr(ours, name), getattr(exact, name), rtol=0, atol=0)
    for name in ("student", "teacher", "wrong", "other_image"):
        torch.testing.assert_close(getattr(ours, name), getattr(exact, name), rtol=0, atol=1e-5)
    for name, mask in exact.groups().items():
        assert abs(ours.ratio(mask) - exact.ratio(mask)) < 1e-5, name
    assert 0.05 < ours.ratio() < 0.95  # both shares are there to be mixed up
    assert (ours.wrong != ours.teacher).any()


@pytest.mark.slow
def test_measuring_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    """A run with the metric gives the losses of one without, bit for bit, and logs ratios in [0, 1]."""
    logs = []
    for palr_steps in (0, 2):
        folder = tmp_path / str(palr_steps)
        made = trainer(
            tiny_student(), config(folder, max_steps=3, palr_steps=palr_steps, lora_dropout=0.1, impl="cpu"), rows(6)
        )
        made.train()
        logs.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    for without, measured_run in zip(*logs, strict=True):
        assert without.get("loss") == measured_run.get("loss")
    assert [any(name.startswith("palr/") for name in line) for line in logs[1]][:3] == [False, True, False]
    assert 0 <= logs[1][1]["palr/all"] <= 1


def test_moving_average_teaches_in_palr_too(tmp_path: Path) -> None:
    """The log-probabilities of the teacher are those the step of training computes, whoever teaches."""
    data = rows(4)
    texts = [VALID_A, CUT_OFF, VALID_B, TAGLESS]
    made = trained(tmp_path, data, texts, teacher="ema", lora=False, train_head=True)
    found = rollouts_of(made, data)
    _, out = made.compute_loss(made.model, {"batch": supervise(found, made.args.objective)}, return_outputs=True)
    ours = measured(made, found, wrong=WRONG)
    torch.testing.assert_close(ours.teacher, out.teacher_logprob.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.student, out.student_logprob.double(), rtol=0, atol=1e-5)
    assert not torch.allclose(ours.student, ours.teacher, atol=0.1)
    elsewhere = measured(made, found, wrong=WRONG, teacher=None)
    assert not torch.allclose(elsewhere.wrong, ours.wrong, atol=0.1)


# --- Constructed cases ------------------------------------------------------------------------------------------------


def test_perception_supervision_is_exactly_zero(tmp_path: Path) -> None:
    data = rows(4)
    made = trained(tmp_path, data, [VALID_A, VALID_B])
    ours = measured(made, rollouts_of(made, data))
    seen = ours.term == TERMS.index("perception")
    assert seen.any()
    assert (ours.by_answer[seen] == 0).all()
    assert ours.ratio(seen) == 0.0
    assert ours.ratio(~seen) > 0


def in_the_world(tmp_path: Path, data: list[dict[str, Any]], prompts: Prompts) -> PALR:
    """PALR of the shipped base under OPSD's one teacher, whose prompt is `prompts.reference`, on completions that say
    what the reference says."""
    texts = []
    for row in data:
        digit = int(re.findall(r"\b\d\b", row["problem"])[0])
        parts = zip(row["digits"], row["inks"], strict=True)
        said = ", ".join(f"a {d} in {row['answer'] if d == digit else ink}" for d, ink in parts)
        texts.append(completion(f"A{said[1:]}.", f"The {digit} is {row['answer']}.", row["answer"]))
    model, processor = load_base()
    made = ViGOSTrainer(
        model=model, args=config(tmp_path, method="opsd", impl="cpu"), processing_class=processor, train_dataset=data,
        prompts=prompts, rollout_engine=ScriptedEngine(texts),
    )  # fmt: skip
    moved(made, 0.1)
    return measured(made, made.sample_rollouts(list(load_rows(data))))


@pytest.mark.slow
def test_separates_a_teacher_that_copies_from_one_that_looks(tmp_path: Path) -> None:
    """One model, one set of completions, three teachers: one reads the key and sees the picture; one sees the picture,
    and its prompt leaves the key out; one reads the key and sees grey noise."""
    path = write_world(tmp_path / "w", "train", n=24, kind_weights={"ink": 1.0}, conflict=1.0)
    data = [json.loads(line) for line in path.read_text().splitlines()]
    for row in data:
        row["images"] = [Image.open(path.parent / row["images"][0]).convert("RGB")]
    grey = []
    for i, row in enumerate(data):
        pixels = np.random.default_rng(i).normal(128, 4, (*row["images"][0].size[::-1], 3)).clip(0, 255)
        grey.append(row | {"images": [Image.fromarray(pixels.astype(np.uint8))]})
    prompts = world_prompts()
    both = in_the_world(tmp_path, data, prompts)
    looks = in_the_world(tmp_path, data, replace(prompts, reference=prompts.student))
    copies = in_the_world(tmp_path, grey, prompts)
    assert looks.ratio() < 1e-3
    assert looks.by_image.sum() > 10  # and it is taught something
    assert both.ratio() > looks.ratio() + 0.1
    assert copies.ratio() > both.ratio() + 0.2


def test_ends_of_the_ratio() -> None:
    """The definition on three tokens: bought by the answer, bought by the image, bought by both alike."""
    log = lambda *values: torch.tensor(values, dtype=torch.float64).log()  # noqa: E731
    index = torch.zeros(3, dtype=torch.int64)
    found = PALR(
        student=log(0.1, 0.1, 0.1), teacher=log(0.8, 0.8, 0.8), wrong=log(0.1, 0.8, 0.2),
        other_image=log(0.9, 0.2, 0.2), term=index.to(torch.int8), segment=torch.tensor([2, 1, 0], dtype=torch.int8),
        owner=index, token=torch.arange(3), rollouts=1,
    )  # fmt: skip
    each = [found.ratio(found.token == t) for t in range(3)]
    assert each == pytest.approx([1.0, 0.0, 0.5])
    s, both = math.log(8), math.log(4)
    assert found.ratio() == pytest.approx((s * math.log(8) + s * both) / (s * math.log(8) + 3 * s * both))
    assert math.isnan(found.ratio(found.token == 9))


def test_mixture_is_a_mean_of_probabilities() -> None:
    logprobs = torch.tensor([[0.5, 0.25, 0.0], [0.125, 0.5, 0.5]], dtype=torch.float64).log()
    counts = torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert mixture_logprob(logprobs, counts).exp().tolist() == pytest.approx([0.375, 0.375])


# --- What is swapped in -----------------------------------------------------------------------------------------------


def test_wrong_answers_are_other_answers_of_the_same_kind() -> None:
    answers = ["red", "Red ", "blue", "12", "12.0", "7", "B", "green"]
    drawn = draw_wrong_answers(answers, 2, seed=1)
    assert [len(d) for d in drawn] == [2] * len(answers)
    assert set(drawn[0]) <= {"blue", "green"}
    assert set(drawn[1]) <= {"blue", "green"}
    assert drawn[3][0] == "7"
    assert drawn[4][0] == "7"
    assert drawn[5][0] in ("12", "12.0")
    assert draw_wrong_answers(answers, 2, seed=1) == drawn
    assert draw_wrong_answers(["red", "red"], 3) == [[], []]
    right = {"4", "four", "4.0", r"\frac{8}{2}"}  # different texts, none of them wrong for another
    for answer, wrong in zip([*right, "5"], draw_wrong_answers([*right, "5"], 4), strict=True):
        assert wrong == ["5"] if answer in right else set(wrong) < right
    with pytest.raises(ValueError, match="k must be at least 1 wrong answer, got 0"):
        draw_wrong_answers(answers, 0)


def test_rollouts_that_cannot_be_swapped_are_counted(tmp_path: Path) -> None:
    data = rows(3)
    data[1]["images"] = []
    made = trained(tmp_path, data, [VALID_A])
    found = rollouts_of(made, data)
    ours = measured(made, found, wrong=[["blue"], ["blue"], []])
    assert (ours.rollouts, dict(ours.left_out)) == (1, {"no_image": 1, "no_wrong_answer": 1})
    assert set(ours.owner.tolist()) == {0}
    same = rows(2)
    same[0]["images"] = same[1]["images"] = [picture(9)]
    alone = measured(made, rollouts_of(made, same))
    assert (alone.rollouts, dict(alone.left_out)) == (0, {"no_other_image": 2})
    assert math.isnan(alone.ratio())
    joined = PALR.joined([ours, alone, ours])
    assert joined.rollouts == 2
    assert set(joined.owner.tolist()) == {0, 5}
    assert joined.summary()["groups"]["all"]["palr"] == pytest.approx(ours.ratio())
    with pytest.raises(ValueError, match="wrong must hold the wrong answers of 3 rollouts, got 1"):
        measured(made, found, wrong=[["blue"]])


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_world(tmp_path / "w", "test", n=4)
    options = ["--model", "builtin", "--data", str(data), "--method", "opsd", "--max-completion-length", "64"]
    with pytest.raises(SystemExit) as stop:
        main(["palr", *options, "--limit", "12", "--use-cpu", "true", "--report-to", "none", "--output-dir",
              str(tmp_path)])  # fmt: skip
    assert stop.value.code in (0, None)
    found = json.loads((tmp_path / "palr.json").read_text())
    assert found["method"] == "opsd"
    assert found["rollouts"] == 12
    low, high = found["groups"]["all"]["palr_interval"]
    assert 0 < low <= found["groups"]["all"]["palr"] <= high < 1
    assert "PALR" in capsys.readouterr().out


@pytest.mark.slow
def test_adapter_off_is_the_teacher_that_was_named(tmp_path: Path) -> None:
    """A student by its adapter folder; its teacher by switching the adapter off, or by name: the same figures."""
    data = write_world(tmp_path / "w", "train", n=8)
    model, processor = load_base()
    args = config(tmp_path / "run", method="opsd", impl="cpu", max_completion_length=64)
    made = ViGOSTrainer(model=model, args=args, processing_class=processor, train_dataset=data, prompts=world_prompts())
    moved(made, 0.05)
    made.model.save_pretrained(tmp_path / "adapter")
    source = PalrSource(model="builtin", data=str(data), dtype="float32", limit=8, adapter=str(tmp_path / "adapter"))
    first, second = (palr_from_source(replace(source, teacher_model=name), args, group=4) for name in (None, "builtin"))
    assert first["rollouts"] == 8
    assert first["groups"]["all"]["by_answer"] > 0.01
    for name, group in first["groups"].items():
        for key in ("by_answer", "by_image", "tokens"):
            assert group[key] == pytest.approx(second["groups"][name][key], rel=1e-4, abs=1e-5), (name, key)
    untouched = palr_from_source(replace(source, adapter=None), args, group=4)
    assert abs(untouched["groups"]["all"]["by_image"] - first["groups"]["all"]["by_image"]) > 1e-3
    with pytest.raises(
        ValueError, match="limit must be at least 2: examples lend each other answers and images; got 1"
    ):
        palr_from_source(replace(source, limit=1), args)
