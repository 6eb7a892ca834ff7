"""Teachers as data: views, contexts, contrast and weights; every recipe's loss against its statement in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.training import (
    CUT_OFF,
    PROMPTS,
    VALID_A,
    VALID_B,
    GradientRecorder,
    completion_ids,
    config,
    move,
    picture,
    processor,
    rows,
    tiny_student,
    trainer,
)
from PIL import Image
from torch import Tensor

import vigos
from vigos.cli.options import UsageError
from vigos.cli.recipes import FOLDER, names, path_of, summary
from vigos.method.encode import ScoredSequence, encode_prompt
from vigos.method.objective import Objective
from vigos.method.teachers import Teacher
from vigos.method.views import BadView, View
from vigos.method.weights import WEIGHTS, Pairs
from vigos.models.parts import lm_head
from vigos.scoring.prefix_tree import PrefixTree
from vigos.world import write_world

TEXTS = [VALID_A, CUT_OFF, VALID_B]
GREY = (127, 127, 127)


# --- Recipes: what the trainer computes, and the loss written down on all logits --------------------------------------


@dataclass
class Stated:
    """One rollout for a statement: its row, tokens, spans, and logits under any context."""

    row: dict[str, Any]
    ids: Tensor
    spans: Any
    student: Tensor  # (C, V)
    teacher: Callable[..., Tensor]  # text, images, prefill, first token -> (C, V)

    def own(self, **changes: Any) -> Tensor:
        """The teacher without privilege: it reads what the student reads."""
        return self.teacher(f"{self.row['problem']}\n\n{PROMPTS.format}", **changes)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    m = ((p.softmax(-1) + q.softmax(-1)) / 2).log()
    return ((p.softmax(-1) * (p.log_softmax(-1) - m)) + (q.softmax(-1) * (q.log_softmax(-1) - m))).sum(-1) / 2


def mean(values: list[Tensor]) -> Tensor:
    return torch.cat(values).mean() if values else torch.zeros((), dtype=torch.float64)


def vigos_terms(stated: list[Stated], released: bool) -> Tensor:
    parts: list[list[Tensor]] = [[], [], []]
    for r in stated:
        text, key = r.row["problem"], r.row["answer"]
        if r.spans.valid:
            clipped = forward_kl(r.teacher("", prefill=""), r.student).clamp(max=0.05)
            parts[0].append(clipped[slice(*r.spans.description)])
            first = r.spans.think_start if released else 0
            prefill = "<think>" if released else "<description>"
            z = r.teacher(f"{text} Key: {key}. Explain.", prefill=prefill, first=first)
            clipped = forward_kl(z, r.student[first:]).clamp(max=0.05)
            spans = (r.spans.reasoning, r.spans.answer)
            parts[1] += [clipped[start - first : end - first] for start, end in spans]
        else:
            z = r.teacher(f"{text} Key: {key}. {PROMPTS.format}")
            parts[2].append(forward_kl(r.student, z).clamp(max=0.05))
    if released:
        total = sum(len(x) for part in parts for x in part)
        sums = [torch.cat(part).sum() / total for part in parts]
    else:
        sums = [mean(part) for part in parts]
    return sums[0] + sums[1] + 2 * sums[2]


def opsd(stated: list[Stated]) -> Tensor:
    found = []
    for r in stated:
        z = r.teacher(f"{r.row['problem']} Key: {r.row['answer']}. {PROMPTS.format}")
        terms = z.softmax(-1) * (z.log_softmax(-1) - r.student.log_softmax(-1))
        found.append(terms.clamp(max=0.05).sum(-1))
    return mean(found)


def crops(r: Stated) -> list[Image.Image]:
    return [image.crop(tuple(r.row["box"])) for image in r.row["images"]]


def written(z: Tensor, r: Stated) -> Tensor:
    return z.log_softmax(-1)[torch.arange(len(r.ids)), r.ids]


def crop_minus_negative(stated: list[Stated]) -> Tensor:
    from PIL import ImageFilter

    found = []
    for r in stated:
        positive = r.own(images=crops(r))
        blurred = [i.filter(ImageFilter.GaussianBlur(0.15 * min(i.size))) for i in r.row["images"]]
        weight = (written(positive, r) - written(r.own(images=blurred), r)).clamp(0, 2)
        found.append(weight * jsd(positive, r.student))
    return mean(found)


def visual_advantage(stated: list[Stated]) -> Tensor:
    found = []
    for r in stated:
        text = f"{r.row['problem']} Key: {r.row['answer']}. {PROMPTS.format}"
        z, blind = r.teacher(text), r.teacher(text, images=[])
        found.append((written(z, r) - written(blind, r)).clamp(0, 2) * forward_kl(z, r.student))
    return mean(found)


def contrast_erased(stated: list[Stated]) -> Tensor:
    found = []
    for r in stated:
        z = r.own()
        erased = r.own(images=[Image.new("RGB", i.size, GREY) for i in r.row["images"]])
        plausible = z.softmax(-1) >= 0.1 * z.softmax(-1).amax(-1, keepdim=True)
        p = torch.where(plausible, (2 * z - erased).exp(), 0.0)
        p = p / p.sum(-1, keepdim=True)
        found.append((p * (p.clamp_min(1e-300).log() - r.student.log_softmax(-1))).sum(-1))
    return mean(found)


def visual_cues(stated: list[Stated]) -> Tensor:
    texts = [f"{r.row['problem']}\n\nWhat to look at: {r.row['hints']}\n\n{PROMPTS.format}" for r in stated]
    return mean([forward_kl(r.teacher(text), r.student) for r, text in zip(stated, texts, strict=True)])


STATEMENTS: dict[str, Callable[[list[Stated]], Tensor]] = {
    "vigos-paper": lambda s: vigos_terms(s, released=False),
    "vigos-released": lambda s: vigos_terms(s, released=True),
    "opsd": opsd,
    "crop-teacher": lambda s: mean([jsd(r.own(images=crops(r)), r.student) for r in s]),
    "crop-minus-negative": crop_minus_negative,
    "visual-advantage": visual_advantage,
    "degraded-student": lambda s: mean([jsd(r.own(), r.student) for r in s]),
    "contrast-erased": contrast_erased,
    "visual-cues": visual_cues,
}


def data() -> list[dict[str, Any]]:
    return [row | {"box": [0, 0, 16, 32], "hints": f"the ink of digit {i}"} for i, row in enumerate(rows(3))]


def logits_of(model: Any, text: str, images: list[Any], prefill: str, ids: Tensor) -> Tensor:
    """(C, V) logits that predict `ids`, from one forward of the whole sequence."""
    content = [{"type": "image"}] * len(images) + ([{"type": "text", "text": text}] if text else [])
    turn = processor().apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = {"images": [images], "return_mm_token_type_ids": True} if images else {}
    batch = processor()(text=[turn + prefill], return_tensors="pt", **inputs)
    batch["input_ids"] = torch.cat([batch["input_ids"], ids[None]], 1)
    if "mm_token_type_ids" in batch:
        types = torch.as_tensor(batch["mm_token_type_ids"])
        batch["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(ids[None])], 1)
    batch.pop("attention_mask", None)
    pixels = {"pixel_values": batch.pop("pixel_values").double()} if images else {}
    return model(**batch, **pixels).logits[0, -len(ids) - 1 : -1]


def stated_rollouts(engine: Any, data: list[dict[str, Any]], student_images: Callable[[Any], Any]) -> list[Stated]:
    found = []
    for row, text in zip(data, TEXTS, strict=True):
        ids = completion_ids(text)
        spans = vigos.parse_rollout(
            ids, processor().tokenizer, style=engine.objective.span_style, eos_token_ids=(int(completion_ids("x")[-1]),)
        )
        seen = [student_images(image) for image in row["images"]]
        student = logits_of(engine.model, f"{row['problem']} {PROMPTS.format}", seen, "<description>", ids)

        def teacher(
            text: str, images: list[Any] | None = None, prefill: str = "<description>", first: int = 0,
            row: dict[str, Any] = row, ids: Tensor = ids,
        ) -> Tensor:  # fmt: skip
            with torch.no_grad(), engine.model.disable_adapter():
                images = row["images"] if images is None else images
                return logits_of(engine.model, text, images, prefill, ids[first:])

        found.append(Stated(row, ids, spans, student, teacher))
    return found


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_recipe_is_its_statement(name: str, tmp_path: Path) -> None:
    """One step of the trainer, loss and gradients, to 1e-6 of the loss on full logits that is written above."""
    step_is_stated(STATEMENTS[name], yaml.safe_load(path_of(name).read_text()), tmp_path)


def test_unlikely_tokens_alone_are_supervised(tmp_path: Path) -> None:
    kept: list[Tensor] = []

    def stated(rollouts: list[Stated]) -> Tensor:
        found = []
        for r in rollouts:
            z = r.teacher(f"{r.row['problem']} Key: {r.row['answer']}. {PROMPTS.format}")
            kept.append(written(r.student.detach(), r).exp() < below)
            found.append(kept[-1] * forward_kl(z, r.student))
        return mean(found)

    below = 1 / lm_head(tiny_student()).weight.shape[0]
    teacher = {"name": "told", "reads": "reference", "weigh": {"unlikely": below}}
    step_is_stated(stated, {"clip_mode": "none", "teachers": [teacher]}, tmp_path)
    assert 0.1 < torch.cat(kept).double().mean() < 0.9


def step_is_stated(statement: Callable[[list[Stated]], Tensor], options: dict[str, Any], tmp_path: Path) -> None:
    args = config(tmp_path, per_device_train_batch_size=3, weight_decay=0.0, **options)
    recorder = GradientRecorder()
    engine = trainer(tiny_student(torch.float64), args, data(), texts=TEXTS, callbacks=[recorder])
    move(engine)
    engine.model.eval()

    def degraded(image: Image.Image) -> Image.Image:
        return image.resize((max(1, round(image.width / 8)), max(1, round(image.height / 8)))).resize(image.size)

    seen = degraded if options.get("student_view") else lambda image: image
    loss = statement(stated_rollouts(engine, data(), seen))
    trained = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    engine.train()
    assert engine.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-9)
    size = torch.stack([g.abs().max() for g in gradients.values()]).max()
    assert size > 1e-6
    for n, g in recorder.steps[0].items():
        assert (g - gradients[n]).abs().max() <= 1e-6 * size, n


def test_recipes_name_their_source() -> None:
    assert set(names()) == set(STATEMENTS)
    for name in names():
        text = summary(name)
        assert "Leaves out" in text
        assert "arXiv" in text or "siyan-zhao" in text
    with pytest.raises(UsageError, match=r"--recipe must be one of .*did you mean 'opsd'"):
        path_of("opds")
    assert FOLDER.is_dir()


# --- Teachers of a run's own ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recipe_trains_from_the_command_line(tmp_path: Path) -> None:
    def vigos_says(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "vigos", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert {line for line in vigos_says("recipes").splitlines() if line and line[0] != " "} == set(names())
    data, run = write_world(tmp_path / "world", "train", 4), tmp_path / "run"
    options = "--max-steps 1 --per-device-train-batch-size 4 --gradient-accumulation-steps 1 --use-cpu true"
    where = ("--model", "builtin", "--data", str(data), "--output-dir", str(run), "--max-completion-length", "60")
    vigos_says("train", "--recipe", "opsd", *where, *options.split(), "--report-to", "none")
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["token_share/reference"] == 1  # one teacher supervises every token


def test_several_teachers_share_a_span_and_leave_their_views(tmp_path: Path) -> None:
    own = {"reads": "{problem} {hints}", "weight": 0.5}
    teachers = [
        own | {"name": "one", "view": {"mask": "box"}}, own | {"name": "two", "kind": "reverse", "soft_clip": 0.2},
        own | {"name": "swapped", "view": "other", "spans": ["description", "answer"], "weigh": {"position": 0.9}},
    ]  # fmt: skip
    args = config(tmp_path, per_device_train_batch_size=3, clip_mode="none", teachers=teachers, completion_steps=1)
    uneven = [row | {"images": [picture(i)]} for i, row in enumerate(data())]
    engine = trainer(tiny_student(torch.float64), args, uneven, texts=TEXTS)
    move(engine)
    engine.train()
    log = engine.state.log_history[0]
    assert log["loss"] == pytest.approx(0.5 * sum(log[f"loss/{name}"] for name in ("one", "two", "swapped")), rel=1e-6)
    records = [json.loads(line) for line in (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()]
    first = records[0]
    assert first["teachers"].keys() == {"one", "two", "swapped"}
    assert first["teachers"]["one"]["tokens"] == first["teachers"]["two"]["tokens"]
    assert first["views"].keys() == {"one", "swapped"}
    shown = Image.open(tmp_path / "completions" / first["views"]["one"][0])
    assert shown.getpixel((3, 3)) == GREY
    assert shown.getpixel((20, 3)) == uneven[0]["images"][0].getpixel((20, 3))
    other = [Image.open(tmp_path / "completions" / record["views"]["swapped"][0]).tobytes() for record in records]
    assert all(x != row["images"][0].tobytes() for x, row in zip(other, uneven, strict=True))
    soft = [0.2 * torch.tanh(torch.tensor(d) / 0.2) for r in records for d in r["teachers"]["two"]["divergence"]]
    assert log["loss/two"] == pytest.approx(float(torch.stack(soft).mean()), rel=1e-4)


def test_a_callable_weighs_pairs(tmp_path: Path) -> None:
    losses = []
    for hook in (None, lambda batch, pairs: 2.0 * torch.ones(batch.n_pairs), lambda batch, pairs: torch.ones(3)):
        engine = trainer(tiny_student(), config(tmp_path), rows(2), texts=TEXTS[:2], row_weights=hook)
        move(engine)
        if len(losses) == 2:
            with pytest.raises(ValueError, match=r"row_weights must return one weight a pair, .*got \(3,\)"):
                engine.train()
            return
        engine.train()
        losses.append(engine.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


def test_images_of_a_column_and_rows_without_it(tmp_path: Path) -> None:
    """`images_columns` gives a built-in teacher its own images; a row without them is skipped and counted."""
    given = [row | {"crops": [picture(50 + i)]} for i, row in enumerate(data())]
    given[1].pop("crops")
    args = config(tmp_path, per_device_train_batch_size=3, images_columns={"reasoning": "crops"}, completion_steps=1)
    engine = trainer(tiny_student(), args, given, texts=[VALID_A])
    engine.train()
    records = [json.loads(line) for line in (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()]
    assert [set(r["views"]) for r in records] == [{"reasoning"}] * 2
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [s["reason"] for s in skipped] == ["missing_field"]
    assert "crops" in skipped[0]["detail"]


VIEWS: dict[str, tuple[Any, Callable[[Image.Image], Any]]] = {
    "crop": ({"crop": "box"}, lambda x: x.crop((0, 0, 16, 32)).tobytes()),
    "blank": ("blank", lambda x: Image.new("RGB", x.size, GREY).tobytes()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    given, wanted = VIEWS[name]
    (seen,) = View.read(given)([picture(0)], {"box": [0, 0, 16, 32]}, seed="a")
    assert seen.tobytes() == wanted(picture(0))


def test_shuffled_patches_are_the_same_patches() -> None:
    image, view = picture(0, 64, 48), View.read({"shuffle": 16})
    (a,), (b,), (c,) = (view([image], {}, seed=seed) for seed in ("1", "1", "2"))
    assert a.tobytes() == b.tobytes()
    assert len({image.tobytes(), a.tobytes(), c.tobytes()}) == 3

    def patches(x: Image.Image) -> list[bytes]:
        return sorted(x.crop((i, j, i + 16, j + 16)).tobytes() for i in range(0, 64, 16) for j in range(0, 48, 16))

    assert patches(a) == patches(image)
    (blurred,), (small,) = (View.read(name)([image], {}, seed="") for name in ("blur", "downscale"))
    assert blurred.size == small.size == image.size
    assert View.read("none")([image], {}, seed="") == []


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0, 0, 40, 32], "not inside the image, 32 x 32"), ([8, 0, 8, 32], "not inside"), ([0, 0, 9], "a box for each"),
        (["a", 0, 1, 1], "in pixels"), (None, "no field 'box'"), ([[0, 0, 9, 9]] * 2, "a box for each of 1 image"),
    ],
)  # fmt: skip
def test_a_box_that_does_not_fit(box: Any, message: str) -> None:
    with pytest.raises(BadView, match=message):
        View.read({"crop": "box"})([picture(0)], {"box": box}, seed="")


def test_equal_views_share_in_the_tree_and_unequal_ones_do_not() -> None:
    """A second role with an equal view adds its text alone, one with another view all of its prompt."""

    def sequence(view: Any, problem: str) -> ScoredSequence:
        seen = View.read(view)([picture(0)], {}, seed="row-0") if view else [picture(0)]
        prompt = encode_prompt(processor(), PROMPTS, "{problem}", problem, images=seen)
        return ScoredSequence(prompt, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))

    def tokens(*sequences: ScoredSequence) -> int:
        return sum(pack.tokens for pack in PrefixTree(sequences).packs)

    first, again, other, plain = (sequence(*x) for x in (("blur", "A"), ("blur", "B"), ("blank", "A"), (None, "A")))
    same = int((first.prompt.ids != again.prompt.ids).nonzero()[0])
    assert tokens(first, again) == len(first.prompt.ids) + len(again.prompt.ids) - same
    assert same > len(first.prompt.ids) // 2, "the image is in front of the text"
    assert tokens(first, other, plain) == sum(len(s.prompt.ids) for s in (first, other, plain))
    run = tokens(first, again, other, plain)
    total = sum(len(s.prompt.ids) for s in (first, again, other, plain))
    said = PrefixTree([first, again, other, plain]).summary()
    assert said.startswith(f"4 sequences of {total} tokens run as {run}, {1 - run / total:.0%} shared; 4 show images")
    assert said.endswith("3 different ones")


MISTAKES = {
    "unknown view": ({"view": "blurr"}, r"teacher 'own': view must be one of .*did you mean 'blur'"),
    "view without a column": ({"view": "crop"}, r"view crop must name a column"),
    "view with a value": ({"view": {"blank": 3}}, r"view blank takes no value"),
    "unknown field": ({"veiw": "blur"}, r"unknown field 'veiw'; did you mean 'view'"),
    "name": ({"name": "Own one"}, r"name must be a word of small letters"),
    "role": ({"reads": "reasonning"}, r"reads must be one of student, .* or a template"),
    "span": ({"spans": "thoughts"}, r"spans must be of description, reasoning, answer, all, got thoughts"),
    "direction": ({"kind": "both"}, r"kind must be of forward, reverse, jsd, skew_forward, skew_reverse, got both"),
    "weight": ({"weight": -1}, r"weight must be a number of at least 0, got -1"),
    "contrast without a control": ({"contrast": 1.0}, r"control must name a view with contrast"),
    "a cut reverse KL": ({"kind": "reverse", "plausibility": 0.1}, r"plausibility must be 0 for reverse KL"),
    "advantage without a control": ({"weigh": {"advantage": [0, 2]}}, r"weigh advantage needs a control"),
    "unknown weight": ({"weigh": {"entropi": 1.0}}, r"weigh must be of advantage, entropy, position, unlikely"),
    "more than a probability": ({"weigh": {"unlikely": 1.5}}, r"weigh unlikely must be at most 1, got 1.5"),
    "bounds": ({"control": "none", "weigh": {"advantage": 2}}, r"weigh advantage must be two bounds"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    changes, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        Teacher.read({"name": "own", **changes})


def test_mistakes_of_the_whole() -> None:
    with pytest.raises(ValueError, match=r"names of their own, got \['a', 'a'\]"):
        Objective(teachers=[{"name": "a"}, {"name": "a"}])
    with pytest.raises(ValueError, match=r"images_columns must map roles"):
        Objective(images_columns={"reasonning": "crops"})
    with pytest.raises(ValueError, match="a weight above 0"):
        Objective(teachers=[{"name": "a", "weight": 0}])


def test_weights_of_pairs_by_hand() -> None:
    column = lambda *values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    pairs = Pairs(
        divergence=column(0.1, 0.2, 0.3), teacher_logprob=column(-1.0, -1.0, -3.0),
        control_logprob=column(-1.5, -9.0, -2.0), teacher_entropy=column(0.5, 2.0, 8.0), token=torch.tensor([0, 1, 3]),
        student_logprob=column(-0.6, -0.7, -3.0),
    )  # fmt: skip
    wanted = {
        "advantage": ([0.2, 4.0], [0.5, 4.0, 0.2]),
        "entropy": (4.0, [0.125, 0.5, 1.0]),
        "position": (0.5, [1.0, 0.5, 0.125]),
        "unlikely": (0.5, [0.0, 1.0, 1.0]),
    }
    for name, (value, weights) in wanted.items():
        torch.testing.assert_close(WEIGHTS[name](pairs, value), column(*weights), rtol=1e-12, atol=0.0)
