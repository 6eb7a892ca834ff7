"""ViGOS, OPSD and supervised fine-tuning on data that nobody here made: images, questions and answers of easy-VQA.

    pip install easy-vqa
    python examples/own_data.py --output-dir runs/easy-vqa
    python examples/own_data.py --output-dir runs/easy-vqa --method opsd  # goes on from the same warm-up

The built-in model knows neither "triangle" nor "yes", and a teacher cannot teach what it cannot say. So half of the
training images are spent on a supervised warm-up, which also teaches a habit of the kind that this data invites: every
shape has a usual colour, and half of the student's warm-up texts state it whatever the image shows. What follows sees
the other half of the images, their questions and their answers, and nothing else. Test images and test questions are
the package's own. Accuracy is given before and after, with 95 % intervals in which the questions of one image count as
related.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vigos import ViGOSTrainer, load_rows
from vigos.eval.evaluate import evaluate
from vigos.eval.results import EvaluationResult, compare
from vigos.eval.statistics import holm
from vigos.study.cell import train_sft
from vigos.study.plan import MAX_TOKENS, world_config
from vigos.world import load_base, world_prompts
from vigos.world.batch import FastEncoder, ScoredText
from vigos.world.tasks import completion
from vigos.world.warmup import MIXTURE, READING, Mixture, Recipe, damage, learn, save

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
USUAL = {"circle": "blue", "rectangle": "red", "triangle": "green"}
HABIT = 0.5  # share of the student's warm-up texts that state the usual colour
SIDE = 56  # pixels; the package has 64, which is no multiple of the tower's 14
METHODS = ("vigos", "opsd", "sft")


@dataclass(frozen=True)
class Scene:
    """A shape and its colour, and the pixels (H, W, 3) where they are known."""

    colour: str
    shape: str
    pixels: Any = None

    @property
    def text(self) -> str:
        """Describe the scene."""
        return f"A {self.colour} {self.shape}."


@dataclass(frozen=True)
class Question:
    """A question of the package: `kind` colour, shape or presence (yes or no) of what `asked` names."""

    text: str

    @property
    def kind(self) -> str:
        """Tell what is asked for."""
        colour = re.match(r"what color|what is the color", self.text)
        return "colour" if colour else "shape" if self.text.startswith("what") else "presence"

    @property
    def asked(self) -> str | None:
        """Return the colour or shape that the question names, if any."""
        return next((word for word in re.findall(r"\w+", self.text) if word in COLOURS + SHAPES), None)

    @property
    def negated(self) -> bool:
        """Tell whether "yes" means that it is not there."""
        return bool(re.search(r"\b(not|no)\b", self.text))

    def answer(self, scene: Scene) -> str:
        """Return the right answer for a scene."""
        if self.kind != "presence":
            return scene.colour if self.kind == "colour" else scene.shape
        return "yes" if (self.asked in (scene.colour, scene.shape)) != self.negated else "no"

    def made_true(self, scene: Scene, answer: str, rng: np.random.Generator) -> Scene:
        """Return the scene with as little changed as makes `answer` the right one."""
        if self.answer(scene) == answer:
            return scene
        if self.kind != "presence":
            return replace(scene, **{self.kind: answer})
        kind, words = ("colour", COLOURS) if self.asked in COLOURS else ("shape", SHAPES)
        there = (answer == "yes") != self.negated
        return replace(scene, **{kind: self.asked if there else str(rng.choice([w for w in words if w != self.asked]))})

    def reason(self, scene: Scene, answer: str) -> str:
        """Return one line that ends in the answer."""
        if self.kind == "presence":
            there = self.asked in (scene.colour, scene.shape)
            return f"The {scene.colour} {scene.shape} is {'' if there else 'not '}{self.asked}: {answer}."
        return f"The {scene.shape if self.kind == 'colour' else scene.colour} one is {answer}."

    def written(self, scene: Scene, answer: str, *, description: bool = True) -> str:
        """Return a completion in the format that follows from a scene."""
        return completion(scene.text if description else "", self.reason(scene, answer), answer)


def infer_scene(asked: list[tuple[str, str]]) -> Scene | None:
    """Return what the answers to an image's questions say about it; None where they leave colour or shape open."""
    found: dict[str, str] = {}
    for text, answer in asked:
        question = Question(text)
        if question.kind != "presence":
            found[question.kind] = answer
        true = question.kind != "presence" or (answer == "yes") != question.negated
        if true and question.asked:
            found["colour" if question.asked in COLOURS else "shape"] = question.asked
    return Scene(**found) if len(found) == 2 else None


def read_package(split: str) -> dict[int, tuple[Path, list[tuple[str, str]]]]:
    """Return image path and (question, answer) pairs of every image of a split, by the package's image number."""
    try:
        import easy_vqa
    except ModuleNotFoundError:
        raise SystemExit("this example reads the package easy-vqa: pip install easy-vqa") from None
    texts, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for text, answer, image in zip(texts, answers, images, strict=True):
        asked[image].append((text, answer))
    return {image: (Path(paths[image]), asked[image]) for image in sorted(asked)}


def pixels(path: Path) -> np.ndarray:
    """Read an image at the side that the vision tower takes."""
    return np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def write_rows(folder: Path, name: str, images: dict[int, Any], questions: int, seed: int) -> Path:
    """Write `questions` a kind, drawn at random, as JSONL and PNG; return the path of the JSONL file.

    `triplet` names the image, so that intervals take its questions as related; `role` tells questions for a colour that
    is not the usual one of the shape (conflict) from those for one that is (prior).
    """
    rng = np.random.default_rng([seed, len(images)])
    kinds: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for image, (_, asked) in images.items():
        for text, answer in asked:
            kinds[Question(text).kind].append((image, text, answer))
    rows = []
    for kind, pool in kinds.items():
        for index in rng.permutation(len(pool))[:questions]:
            image, text, answer = pool[index]
            path = folder / "images" / f"{name}-{image}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels(images[image][0])).save(path)
            scene = infer_scene(images[image][1])
            row = {"problem": text, "images": [f"images/{path.name}"], "answer": answer, "kind": kind,
                   "problem_id": f"{name}-{image}-{len(rows)}", "triplet": image}  # fmt: skip
            if kind == "colour" and scene:
                row["role"] = "prior" if USUAL[scene.shape] == answer else "conflict"
            rows.append(row | ({"scene": scene.text} if scene else {}))
    order = rng.permutation(len(rows))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in order), encoding="utf-8")
    return folder / f"{name}.jsonl"


class EasyMixture(Mixture):
    """Draw the warm-up's scenes from half of the training images, and the texts of every context about them."""

    words = (*COLOURS, *SHAPES, "yes", "no")

    def __init__(self, encoder: FastEncoder, recipe: Recipe, rng: np.random.Generator, images: dict[int, Any]) -> None:
        super().__init__(encoder, recipe, rng)
        self.scenes, self.questions = [], []
        for path, asked in images.values():
            if scene := infer_scene(asked):
                self.scenes.append(replace(scene, pixels=pixels(path)))
            self.questions += [Question(text) for text, _ in asked]
        self.by_kind = {k: [q for q in self.questions if q.kind == k] for k in ("colour", "shape", "presence")}

    def scene(self) -> Any:
        return self.scenes[self.rng.integers(len(self.scenes))]

    def image(self, scene: Any) -> np.ndarray:
        return scene.pixels

    def caption(self, image: int, scene: Any) -> ScoredText:
        return self._example(image, self.encoder.prompt("perception", size=self.size), "", scene.text)

    def _drawn(self, words: tuple[str, ...]) -> str:
        return str(words[self.rng.integers(len(words))])

    def _fitting(self, scene: Scene) -> Question:
        """Draw a question that the package could ask of the scene: one that names it calls it by its true name."""
        kind = self._drawn(("colour", "colour", "shape", "presence"))
        while True:
            pool = self.by_kind[kind]
            question = pool[self.rng.integers(len(pool))]
            if kind == "presence" or question.asked in (None, scene.colour, scene.shape):
                return question

    def example(self, image: int, scene: Any, context: str) -> ScoredText:
        rng, encoder = self.rng, self.encoder
        question = self._fitting(scene)
        believed = replace(scene, colour=USUAL[scene.shape]) if rng.random() < HABIT else scene
        if context == "student":
            text = question.written(believed, question.answer(believed))
            text = damage(rng, text) if rng.random() < self.recipe.damaged else text
            return self._example(image, encoder.prompt("student", question.text, size=self.size), "", text)
        if context == "follow":
            read = replace(scene, colour=self._drawn(COLOURS)) if rng.random() < 0.8 else scene
            text = question.written(read, question.answer(read), description=False)
            return self._example(image, encoder.prompt("student", question.text, size=self.size), read.text, text)
        wrong = {"colour": COLOURS, "shape": SHAPES, "presence": ("yes", "no")}[question.kind]
        answer = self._drawn(wrong) if rng.random() < self.recipe.wrong_references else question.answer(scene)
        told = question.made_true(scene, answer, rng)
        if context == "reference":
            where = encoder.prompt("reference", question.text, answer, size=self.size)
            return self._example(image, where, "", question.written(told, answer))
        prefill = "<description>" if context == "reasoning" else "<think>"
        where = encoder.prompt("reasoning", question.text, answer, size=self.size, prefill=prefill)
        text = question.written(told, answer, description=False)
        if context == "reasoning":
            return self._example(image, where, believed.text, text)
        return self._example(image, where, "", text[text.index("<think>") + len("<think>") :])


def warm_up(folder: Path, images: dict[int, Any], steps: int, seed: int) -> None:
    """Teach the built-in model this data's words, its format and its habit; save it as a folder."""
    model, processor = load_base()
    recipe = Recipe(seed=seed, digits=1, cell=SIDE, read_steps=steps // 3, mixture_steps=steps, scenes=32)
    encoder = FastEncoder(model, processor, world_prompts())
    mixture = EasyMixture(encoder, recipe, np.random.default_rng([seed, 1]), images)

    def progress(stage: str, step: int, total: int, metrics: dict[str, float]) -> None:
        if step % 100 == 0 or step == total:
            print(f"warm-up, {stage} {step}/{total}: loss {metrics['loss']:.3f}", flush=True)

    learn(model, mixture, steps // 3, shares=READING, contexts=1, stage="read", progress=progress)
    learn(model, mixture, steps, shares=MIXTURE, contexts=2, stage="mixture", progress=progress)
    save(model, processor, folder)


def measure(model: Any, processor: Any, test: Path, records: Path, seed: int) -> EvaluationResult:
    """Sample one answer a test question at temperature 1 under the student's own prompt."""
    return evaluate(model, processor, test, prompts=world_prompts(), temperature=1.0, max_new_tokens=MAX_TOKENS,
                    batch_size=150, seed=seed, records=records, resume=False)  # fmt: skip


def main() -> None:
    """Warm up, train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--warm-up", type=int, default=900, help="steps of the warm-up's mixture")
    parser.add_argument("--steps", type=int, default=100, help="training steps of 32 questions")
    parser.add_argument("--questions", type=int, default=200, help="test questions a kind (colour, shape, presence)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    train, test = read_package("train"), read_package("test")
    early, late = ({i: v for i, v in train.items() if i % 2 == half} for half in (0, 1))
    rows = write_rows(folder, "train", late, args.steps * 32 // 3 + 1, args.seed)
    held_out = write_rows(folder, "test", test, args.questions, args.seed)
    base = folder / "warm-up"
    if not (base / "config.json").exists():
        warm_up(base, early, args.warm_up, args.seed)
    model, processor = load_base(base)
    results = {"warm-up": measure(model, processor, held_out, folder / "warm-up.jsonl", args.seed)}
    for method in args.method:
        model, processor = load_base(base)
        options = world_config(folder / method, seed=args.seed, max_steps=args.steps, learning_rate=6e-4,
                               per_device_train_batch_size=32, save_merged=False,
                               **({} if method == "sft" else {"method": method}))  # fmt: skip
        if method == "sft":
            records = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
            texts = [stated(record) for record in records]
            model = train_sft(model, processor, load_rows(rows), texts, options)
        else:
            trainer = ViGOSTrainer(model=model, args=options, processing_class=processor, train_dataset=load_rows(rows))
            trainer.train()
            model = trainer.model
        results[method] = measure(model, processor, held_out, folder / f"{method}.jsonl", args.seed)
    report(results)


def stated(record: dict[str, Any]) -> str:
    """Return a completion that states the reference of a row, with a description where its image's answers give one."""
    question, answer = Question(record["problem"]), record["answer"]
    if "scene" not in record:
        return completion("A shape.", f"It is {answer}.", answer)
    colour, shape = record["scene"].removeprefix("A ").removesuffix(".").split()
    return question.written(Scene(colour, shape), answer)


def report(results: dict[str, EvaluationResult]) -> None:
    """Print accuracy by kind and against the warm-up, with intervals and p values corrected for their number."""
    base = results["warm-up"]
    tested = {name: compare(base, result) for name, result in results.items() if name != "warm-up"}
    corrected = dict(zip(tested, holm([c.p_value for c in tested.values()]), strict=True))
    for name, result in results.items():
        found = result.summary(group_by="kind")
        low, high = found["accuracy_interval"]
        kinds = ", ".join(f"{kind} {100 * g['accuracy']:.1f}" for kind, g in sorted(found["groups"].items()))
        line = f"{name:8} right {100 * found['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f}); {kinds}; "
        line += f"Score {100 * found['score']:.1f}, Prior {100 * found['prior']:.1f}; in the format "
        line += f"{100 * found['valid_rate']:.1f}"
        if name in tested:
            low, high = tested[name].interval
            line += (
                f"; against the warm-up {100 * tested[name].difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            )
            line += f", p {corrected[name]:.2g}"
        print(line)


if __name__ == "__main__":
    main()
