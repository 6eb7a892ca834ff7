"""The built-in world: its generator, its tokenizer, its checkpoint and the recipe that makes one."""

import json
import re
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vigos.method.encode import encode_prompt
from vigos.method.spans import parse_rollout
from vigos.study.preconditions import check, described_ink, print_check, sample
from vigos.world import checkpoint_path, load_base, world_prompts, write_world
from vigos.world.batch import FastEncoder, ScoredText, image_features, scored_logits
from vigos.world.build import SPECIAL_TOKENS, build_model, build_processor, build_tokenizer
from vigos.world.digits import CELL, INK_NAMES, INKS, Scene, draw_scene, handwriting, render
from vigos.world.tasks import KINDS, USUAL_INK, WORDINGS, Asked, ask, completion, describe, draw_digits, reason, triplet
from vigos.world.warmup import MIXTURE, Mixture, Recipe, damage, learn, pretrain, see

SIZE = (CELL, 2 * CELL)


@pytest.fixture(scope="module")
def base():
    model, processor = load_base()
    return model, processor, FastEncoder(model, processor, world_prompts())


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def some_scene(seed=0, digits=(7, 3), inks=("red", "blue"), split="train"):
    return draw_scene(np.random.default_rng(seed), split, digits=digits, inks=inks)


# --- generator -------------------------------------------------------------------------------------------------------


def test_same_seed_writes_the_same_bytes(tmp_path):
    paths = [write_world(tmp_path / name, "train", 12, seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    files = [{p.name: p.read_bytes() for p in sorted(path.parent.rglob("*.*"))} for path in paths]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_the_same_world_can_be_written_anew_while_it_is_read(tmp_path):
    """As ranks do, each of which writes what all of them read."""

    def files():
        return {p.name: p.read_bytes() for p in (path, *sorted((tmp_path / "images").iterdir()))}

    path, found = write_world(tmp_path, "train", 8, 5), []
    first = files()
    write_world(tmp_path, "train", 8, 5, progress=lambda *_: found.append(files()))
    assert found == [first] * 8
    assert files() == first
    assert {p.name for p in tmp_path.iterdir()} == {"train.jsonl", "images"}


def test_a_killed_writer_leaves_the_old_questions_with_the_old_pictures(tmp_path):
    """Killed before its lines are in place, over an older world; written again it leaves nothing of the older one."""
    path = write_world(tmp_path, "train", 6, seed=0)
    program = f"""
import os, signal, vigos.world.generate as generate
generate.replace_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
generate.write_world({str(tmp_path)!r}, "train", 6, seed=1)
"""

    def shown():
        lines = path.read_text().splitlines()
        return lines, [(tmp_path / json.loads(line)["images"][0]).read_bytes() for line in lines]

    before = shown()
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "images").iterdir())) == 12, "the new pictures are there, beside the old ones"
    assert shown() == before
    write_world(tmp_path, "train", 6, seed=1)
    assert shown() != before
    assert len(list((tmp_path / "images").iterdir())) == 6


def test_handwriting_and_wordings_of_the_test_split_are_held_out():
    for digit in range(10):
        train, test = (set(handwriting(split)[digit].tolist()) for split in ("train", "test"))
        assert not train & test
        assert 0.2 < len(test) / len(train | test) < 0.3
    assert sum(len(rows) for split in ("train", "test") for rows in handwriting(split)) == 1797
    for kind in (*KINDS, "fact", "place"):
        assert not set(WORDINGS["train"][kind]) & set(WORDINGS["test"][kind])
    rng = np.random.default_rng(0)
    allowed = np.concatenate(handwriting("test"))
    scenes = [scene for _ in range(30) for scene in triplet(rng, "test", count=3, variant="P")[0]]
    assert all(glyph in allowed for scene in scenes for glyph in scene.glyphs)


def test_files_are_png_and_jsonl_as_a_user_brings_them(tmp_path):
    seen = []
    path = write_world(tmp_path, "train", 40, digits=(2, 4), progress=lambda done, total: seen.append((done, total)))
    rows = rows_of(path)
    assert path == tmp_path / "train.jsonl"
    assert len(rows) == 40
    assert seen[-1] == (40, 40)
    assert {len(row["digits"]) for row in rows} == {2, 3, 4}
    assert len({row["problem_id"] for row in rows}) == 40
    for row in rows:
        assert isinstance(row["problem"], str)
        assert isinstance(row["answer"], str)
        assert row["answer"]
        with Image.open(tmp_path / row["images"][0]) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert image.size == (CELL * len(row["digits"]), CELL)
    from vigos.data.examples import load_rows

    loaded = next(iter(load_rows(path)))
    assert loaded["problem"] == rows[0]["problem"]
    assert loaded["answer"] == rows[0]["answer"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_true_of_the_scene(split, tmp_path):
    for row in rows_of(write_world(tmp_path, split, 200, 3, triplets=False, digits=(2, 4))):
        inks = dict(zip(row["digits"], row["inks"], strict=True))
        digits, answer = row["digits"], row["answer"]
        words = row["problem"].replace(".", " ").replace("?", " ").split()
        named = [word for word in words if word in INKS]
        if row["kind"] == "ink":
            assert any(str(d) in words and inks[d] == answer for d in digits)
        elif row["kind"] == "which":
            assert inks[int(answer)] == named[-1]
            assert row["inks"].count(named[-1]) == 1
        elif row["kind"] == "larger":
            assert answer == str(max(digits))
        elif row["kind"] == "sum":
            assert answer == str(sum(digits))
        else:
            assert answer == str(row["inks"].count(named[-1]))


def test_triplets_agree_once_and_contradict_twice(tmp_path):
    rows = rows_of(write_world(tmp_path, "test", 20))
    assert len(rows) == 60
    for start in range(0, 60, 3):
        trio = rows[start : start + 3]
        assert {row["triplet"] for row in trio} == {start // 3}
        assert [row["role"] for row in trio] == ["prior", "conflict", "conflict"]
        assert len({row["problem"] for row in trio}) == 1
        assert len({tuple(row["digits"]) for row in trio}) == 1
        answers = [row["answer"] for row in trio]
        assert len(set(answers)) == 3
        asked = next(d for d in trio[0]["digits"] if f" {d} " in trio[0]["problem"].translate({46: " ", 63: " "}))
        assert answers[0] == USUAL_INK[asked]
        for row in trio:
            assert row["inks"][row["digits"].index(asked)] == row["answer"]
        # F states the usual fact, P does not mention any ink.
        assert (USUAL_INK[asked] in trio[0]["problem"]) == (trio[0]["variant"] == "F")
    assert {row["variant"] for row in rows} == {"F", "P"}


def test_knobs_act(tmp_path):
    def usual_share(rows, key):
        pairs = [(d, i) for row in rows for d, i in zip(row["digits"], row["inks"], strict=True)]
        return np.mean([USUAL_INK[d] == i for d, i in pairs]) if key == "inks" else None

    ink_only = {"ink": 1.0}
    for conflict, low, high in ((0.0, 1.0, 1.0), (0.5, 0.4, 0.6), (1.0, 0.0, 0.0)):
        rows = rows_of(write_world(tmp_path / str(conflict), "train", 150, conflict=conflict))
        assert low <= usual_share(rows, "inks") <= high
    # With every reference biased and every scene in conflict, every ink reference is false and says the usual ink.
    biased = rows_of(write_world(tmp_path / "b", "train", 60, conflict=1.0, label_bias=1.0, kind_weights=ink_only))
    assert all(row["answer"] in {USUAL_INK[d] for d in row["digits"]} for row in biased)
    assert not any(
        row["answer"] in row["inks"] and row["answer"] not in {USUAL_INK[d] for d in row["digits"]} for row in biased
    )
    clean = rows_of(write_world(tmp_path / "c", "train", 60, conflict=1.0, label_bias=0.0, kind_weights=ink_only))
    assert all(row["answer"] in row["inks"] for row in clean)

    for split in ("train", "test"):  # a question that names a place names neither digit nor ink, and its digit is faint
        rows = rows_of(write_world(tmp_path / "p", split, 12, asked=Asked(0.9, 1.0), noise=0.0, kind_weights=ink_only))
        assert {row.get("variant", "P") for row in rows} == {"P"}
        for row in rows:
            assert not re.search(rf"\d|{'|'.join(INKS)}", row["problem"])
            place = row["problem"].count("right")
            assert row["inks"][place] == row["answer"]
            with Image.open(tmp_path / "p" / row["images"][0]) as image:
                darkest = np.asarray(image).min(-1).reshape(CELL, 2, CELL).min((0, 2))
            assert darkest[place] > 220
            assert darkest[1 - place] < 150
    scene = some_scene()
    corners = [render(scene, np.random.default_rng(1), noise=noise)[:2].std() for noise in (0.0, 0.1, 0.3)]
    assert corners[0] < corners[1] < corners[2]
    assert render(scene, np.random.default_rng(1), cell=40).shape == (40, 80, 3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "dev"}, "split"), ({"n": -1}, "n must"), ({"digits": 1}, "digits"), ({"digits": (3, 5)}, "digits"),
        ({"conflict": 1.5}, "conflict"), ({"label_bias": -0.1}, "label_bias"), ({"noise": 2.0}, "noise"),
        ({"asked": Asked(place=1.0), "digits": 3}, "digits must be 2"),
        ({"kind_weights": {"shape": 1.0}}, "kind_weights"),
    ],
)  # fmt: skip
def test_wrong_knobs_are_named(arguments, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        write_world(tmp_path, **{"n": 2, **arguments})


def test_wrong_questions_are_refused():
    rng, scene = np.random.default_rng(0), some_scene(inks=("red", "red"))
    with pytest.raises(ValueError, match="used once"):
        ask(rng, scene, "which", "train")
    with pytest.raises(ValueError, match="kind must"):
        ask(rng, scene, "shape", "train")
    with pytest.raises(ValueError, match="F variant"):
        ask(rng, scene, "sum", "train", variant="F")
    with pytest.raises(ValueError, match="cell must be at least 8 pixels, got 4"):
        render(scene, rng, cell=4)
    with pytest.raises(ValueError, match="faint must lie between 0 and 1"):
        Asked(faint=1.1)
    with pytest.raises(ValueError, match="place needs an ink question about two digits"):
        ask(rng, scene, "sum", "train", place=True)
    with pytest.raises(ValueError, match="split"):
        handwriting("dev")


def test_a_digit_is_drawn_in_its_ink():
    for ink in INK_NAMES:
        image = render(some_scene(inks=(ink, "red")), np.random.default_rng(0), noise=0.0)[:, :CELL].astype(float)
        darkest = image[image.sum(-1).argmin() // CELL, image.sum(-1).argmin() % CELL]
        assert np.abs(darkest - np.array(INKS[ink])).max() < 40


# --- tokenizer and processor -----------------------------------------------------------------------------------------


def test_merges_cross_the_borders_of_tags(base):
    tokenizer = base[1].tokenizer
    tokens = tokenizer.tokenize(completion("7 in red.", "The 7 is red.", "red"))
    assert {".</", "><", ">\\"} <= set(tokens)
    assert {"{\\", "}}"} <= set(tokenizer.tokenize(r"\boxed{\text{red}}"))
    ordinary = ("<description>", "</description>", "<think>", "</think>", "\\boxed{")
    assert not any(word in tokenizer.get_vocab() for word in ordinary)
    # The answer and the words that carry content are whole tokens, so that spans hold them.
    for word in (*INK_NAMES, *map(str, range(18))):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
        assert len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1


def test_any_text_survives_the_tokenizer(base):
    tokenizer = base[1].tokenizer
    for text in ("plain", "größer, 数字 🙂\n\n\t x", "</think>}}{{<|im_end", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for token in SPECIAL_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_tokenizer_is_rebuilt_alike(base):
    assert build_tokenizer().get_vocab() == base[1].tokenizer.get_vocab()


def test_chat_template_handles_systems_strings_and_images(base):
    render_chat = base[1].apply_chat_template
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "This."},
    ]
    assert render_chat(conversation, tokenize=False) == (
        "<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?"
        "<|im_end|>\n<|im_start|>assistant\nThis.<|im_end|>\n"
    )


def test_a_correct_completion_parses(base):
    tokenizer = base[1].tokenizer
    scene, rng = some_scene(), np.random.default_rng(0)
    for kind in KINDS:
        question = ask(rng, scene, kind, "train")
        text = completion(describe(scene), reason(scene, question, question.answer), question.answer)
        ids = tokenizer.encode(text, add_special_tokens=False)
        spans = parse_rollout(ids, tokenizer)
        assert spans.valid
        assert spans.answer_text == question.answer
        assert tokenizer.decode(ids[slice(*spans.answer)]) == question.answer
        # The full stop went to the tag: that is the merge the spans are tested on.
        assert tokenizer.decode(ids[slice(*spans.description)]) == describe(scene)[:-1]


def test_damaged_targets_are_invalid(base):
    tokenizer, rng = base[1].tokenizer, np.random.default_rng(0)
    text = completion("7 in red, 3 in blue.", "The 7 is red.", "red")
    reasons = {parse_rollout(tokenizer.encode(damage(rng, text)), tokenizer).reason for _ in range(60)}
    assert reasons == {"no_description_close", "no_think_open", "no_think_close", "no_box", "unbalanced_box"}


# --- checkpoint ------------------------------------------------------------------------------------------------------


def test_checkpoint_is_small_and_loads_with_plain_transformers():
    from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

    folder = checkpoint_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert not any(info.values())
    assert model.dtype == torch.float16
    assert 0.5e6 <= sum(p.numel() for p in model.parameters()) <= 3e6
    batch = processor(
        text=["<|vision_start|><|image_pad|><|vision_end|>"], images=[[Image.new("RGB", (56, 28))]], return_tensors="pt"
    )
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 8
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8]]


@pytest.mark.parametrize("role", ["student", "perception", "reasoning", "reference"])
def test_fast_batches_equal_the_processor_and_the_model(base, role):
    model, processor, encoder = base
    rng = np.random.default_rng(4)
    scenes = [some_scene(seed) for seed in range(3)]
    images = [render(scene, rng) for scene in scenes]
    problems = ["Which color is the 7?", "The 7 is usually blue. What ink is the 7?", "What is the sum?"]
    ids = [*encoder.text(completion(describe(scenes[0]), "The 7 is red.", "red")), encoder.eos]
    grid = (SIZE[0] // encoder.patch, SIZE[1] // encoder.patch)
    examples, expected = [], []
    patches = encoder.patches(images)
    for place, (image, problem) in enumerate(zip(images, problems, strict=True)):
        slow = encode_prompt(processor, world_prompts(), role, problem, "red", [Image.fromarray(image)])
        fast = encoder.prompt(role, problem, "red", size=SIZE)
        assert torch.equal(slow.ids, fast.ids)
        pixels = slow.images.tensors["pixel_values"]
        torch.testing.assert_close(patches[place], pixels, rtol=0, atol=1e-6)
        whole = torch.cat([slow.ids, torch.tensor(ids)])[None]
        with torch.no_grad():
            logits = model(
                input_ids=whole,
                mm_token_type_ids=torch.cat([slow.token_type_ids, torch.zeros(len(ids), dtype=torch.long)])[None],
                **slow.images.tensors,
            ).logits
        scored = [i % 2 == 0 for i in range(len(ids))]
        expected.append(logits[0, len(slow.ids) - 1 : -1][torch.tensor(scored)])
        examples.append(ScoredText(place, fast, ids, scored))
    with torch.no_grad():
        features = image_features(model.model.visual, patches, grid)
        logits, targets = scored_logits(model, features, examples)
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert targets.tolist() == ids[::2] * 3


def test_fast_batches_refuse_what_they_cannot_hold(base):
    model, _, encoder = base
    with pytest.raises(ValueError, match="multiples of 14"):
        encoder.patches([np.zeros((20, 28, 3), dtype=np.uint8)])
    with pytest.raises(ValueError, match="grid"):
        image_features(model.model.visual, torch.zeros(1, 400, 294), (20, 20))
    two = [ScoredText(0, encoder.prompt("perception", size=size), [5], [True]) for size in (SIZE, (CELL, 3 * CELL))]
    with pytest.raises(ValueError, match="same place"):
        scored_logits(model, torch.zeros(1, 8, 128), two)


def test_sampling_is_seeded_and_ends_at_the_end_token(base):
    model, _, encoder = base
    images = [render(some_scene(seed), np.random.default_rng(seed)) for seed in range(4)]
    prompts = [
        encoder.prompt("student", problem, size=SIZE) for problem in ["What ink is the 7?", "What is the sum?"] * 2
    ]
    runs = [
        sample(model, encoder, images, prompts, seed=seed, temperature=3.0, max_new_tokens=12) for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert all(len(ids) <= 12 and encoder.eos not in ids[:-1] for ids in runs[0])
    alone = sample(model, encoder, images[1:2], prompts[1:2], temperature=0, max_new_tokens=12)
    together = sample(model, encoder, images, prompts, temperature=0, max_new_tokens=12)
    assert together[1] == alone[0]  # padding on the left changes nothing


# --- recipe ----------------------------------------------------------------------------------------------------------


def test_contexts_of_the_mixture_are_those_of_the_trainer(base):
    _, processor, encoder = base
    tokenizer = processor.tokenizer
    mixture = Mixture(encoder, Recipe(damaged=0.0, kind_weights={"ink": 1.0}), np.random.default_rng(0))
    conflicts = dict.fromkeys(MIXTURE, 0)
    for _ in range(40):
        scene = mixture.scene()
        caption = mixture.caption(0, scene)
        assert tokenizer.decode(caption.completion) == describe(scene) + "<|im_end|>"
        assert all(caption.scored)
        for context in MIXTURE:
            example = mixture.example(0, scene, context)
            prompt = tokenizer.decode(example.prompt.ids)
            opening = "<think>" if context == "think" else "<description>"
            assert prompt.endswith(f"assistant\n{opening}")
            assert ("Key:" in prompt) == (context in ("reference", "reasoning", "think"))
            assert example.completion[-1] == encoder.eos
            text = tokenizer.decode(example.completion[:-1])
            if context == "think":
                assert text.startswith("The ")
            else:
                spans = parse_rollout(example.completion, tokenizer)
                assert spans.valid
                # What a teacher or a made-up description says is read, never learned.
                learned = example.scored[slice(*spans.description)]
                assert all(learned) if context in ("student", "reference") else not any(learned)
                assert all(example.scored[slice(*spans.answer)])
                conflicts[context] += spans.answer_text not in scene.inks
                if context == "student":
                    asked = next(d for d in scene.digits if f"The {d} is" in text)
                    assert described_ink(text, asked) == spans.answer_text
                    assert spans.answer_text in (scene.ink_of(asked), USUAL_INK[asked])
            if context in ("reference", "reasoning", "think"):
                key = prompt.split("Key: ")[1].split(".")[0]
                assert text.endswith(f"\\boxed{{{key}}}")
    # The prior, wrong references and made-up descriptions all contradict the image now and then.
    assert all(conflicts[context] for context in ("student", "reference", "reasoning", "follow"))
    with pytest.raises(ValueError, match="context"):
        mixture.example(0, scene, "caption")


def test_prior_strength_decides_how_often_the_student_is_biased(base):
    encoder = base[2]
    rng = np.random.default_rng(0)
    scene = Scene((7, 3), ("red", "blue"), (0, 0))
    question = ask(rng, scene, "ink", "train", digit=7)
    assert USUAL_INK[7] != "red"
    for strength, share in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5)):
        mixture = Mixture(encoder, Recipe(prior_strength=(strength,) * 10), rng)
        taken = np.mean([mixture.believed(question) == USUAL_INK[7] for _ in range(300)])
        assert abs(taken - share) < 0.12


@pytest.mark.slow
def test_seeing_and_describing_are_learned():
    """Losses of the first two stages fall on a fresh model within a few steps."""
    tokenizer = build_tokenizer()
    model, processor = build_model(tokenizer), build_processor(tokenizer)
    recipe = Recipe(see_images=32, scenes=8)
    mixture = Mixture(FastEncoder(model, processor, world_prompts()), recipe, np.random.default_rng(0))
    losses = []
    see(model, mixture, 20, lambda stage, step, steps, metrics: losses.append(metrics["loss"]))
    assert losses[0] > 3.5
    assert np.mean(losses[-3:]) < 0.75 * losses[0]
    losses.clear()
    learn(
        model,
        mixture,
        12,
        shares=MIXTURE,
        contexts=2,
        stage="mixture",
        progress=lambda *a: losses.append(a[3]["loss"]),
    )
    assert losses[0] > 5
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


@pytest.mark.slow
def test_pretrain_writes_a_folder_that_check_measures(tmp_path):
    recipe = Recipe(see_steps=2, read_steps=2, mixture_steps=2, see_images=8, scenes=4)
    stages = []
    report = pretrain(tmp_path / "base", recipe=recipe, progress=lambda stage, *_: stages.append(stage))
    assert stages == ["see"] * 2 + ["read"] * 2 + ["mixture"] * 2
    assert set(report) >= {"see", "read", "mixture", "parameters"}
    assert all(report[stage]["seconds"] > 0 for stage in ("see", "read", "mixture"))
    model, processor = load_base(tmp_path / "base")
    assert model.dtype == torch.float32
    again = pretrain(tmp_path / "again", recipe=recipe)
    assert again["mixture"]["loss"] == report["mixture"]["loss"]
    # Nothing an untrained model writes parses: every rate is still defined.
    measured = check(tmp_path / "base", n=1, show=False)
    assert set(measured) == {"P1", "P2", "P3", "P4", "P5"}
    assert measured["P4"]["reasoning"]["n"] == 0
    assert not measured["P3"]["met"]
    with pytest.raises(ValueError, match="n must"):
        check(model, processor, n=0)
    with pytest.raises(ValueError, match="processor"):
        check(model, n=1)


def test_check_of_the_shipped_base(base, capsys):
    model, processor, _ = base
    report = check(model, processor, n=20, show=True)
    for key in ("P1", "P2", "P3", "P4"):
        assert isinstance(report[key]["met"], bool)
    for rates in report.values():
        for value in rates.values():
            if isinstance(value, dict):
                assert value["low"] <= value["rate"] <= value["high"]
                assert value["n"] > 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in report)
    print_check(report)
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_the_shipped_base_meets_what_it_must(base):
    model, processor, _ = base
    report = check(model, processor, n=120, show=False)
    assert {key: report[key]["met"] for key in ("P1", "P3", "P4")} == {"P1": True, "P3": True, "P4": True}


# --- descriptions ----------------------------------------------------------------------------------------------------


def test_described_ink():
    assert described_ink("7 in red, 3 in blue.", 3) == "blue"
    assert described_ink("7 in red, 3 in blue.", 5) is None
    assert described_ink("nonsense", 5) is None
    assert draw_digits(np.random.default_rng(0), 10) != tuple(range(10))
