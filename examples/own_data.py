"""ViGOS, OPSD and supervised fine-tuning on data that nobody here made: easy-VQA, and scans of handwritten digits.

    pip install easy-vqa scikit-learn
    python examples/own_data.py --output-dir runs/own-data                # both; goes on where it was stopped
    python examples/own_data.py --output-dir runs/own-data --data digits  # one of them

The built-in model knows neither "triangle" nor "yes", and a teacher cannot teach what it cannot say. So half of the
training images are spent on a supervised warm-up, which also teaches a habit of the kind that such data invites: half
of the student's warm-up texts state what is usual whatever the image shows. What follows sees the other half of the
images, their questions and their answers, and nothing else; test images and test questions are apart. Accuracy is given
before and after, with 95 % intervals in which the questions of one image count as related, and with all outcomes in
`results.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own_data_digits
import own_data_easy_vqa
import torch
from PIL import Image

from vigos import ViGOSTrainer, load_rows
from vigos.eval.evaluate import evaluate
from vigos.eval.results import EvaluationResult, compare
from vigos.eval.statistics import holm
from vigos.study.cell import train_sft
from vigos.study.plan import MAX_TOKENS, world_config
from vigos.system.files import replace_file
from vigos.system.screen import make_console
from vigos.train.watch import Watch
from vigos.world import load_base, world_prompts
from vigos.world.batch import FastEncoder, ScoredText
from vigos.world.tasks import completion
from vigos.world.warmup import MIXTURE, READING, Mixture, Recipe, damage, learn, save

DATA: dict[str, Any] = {"easy-vqa": own_data_easy_vqa, "digits": own_data_digits}
METHODS = ("vigos", "opsd", "sft")
HABIT = 0.5  # share of the student's warm-up texts that state what is usual
Images = dict[int, Any]  # number -> (reader of pixels, scene or None, [(question, answer)])


def write_rows(data: Any, folder: Path, name: str, images: Images, questions: int, seed: int) -> Path:
    """Write `questions` a kind, drawn at random, as JSONL and PNG; return the path of the JSONL file.

    `triplet` names the image, so that intervals take its questions as related; `role` tells questions of images that
    contradict the habit (conflict) from those of images that agree with it (prior).
    """
    rng = np.random.default_rng([seed, len(images)])
    kinds: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for image, (_, _, asked) in images.items():
        for text, answer in asked:
            kinds[data.Question(text).kind].append((image, text, answer))
    rows = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for kind, pool in kinds.items():
        for index in rng.permutation(len(pool))[:questions]:
            image, text, answer = pool[index]
            pixels, scene, _ = images[image]
            path = folder / "images" / f"{name}-{image}.png"
            if not path.exists():
                Image.fromarray(pixels()).save(path)
            row = {"problem": text, "images": [f"images/{path.name}"], "answer": answer, "kind": kind,
                   "problem_id": f"{name}-{image}-{len(rows)}", "triplet": image}  # fmt: skip
            if scene and (role := data.Question(text).role(scene)):
                row["role"] = role
            rows.append(row | ({"scene": scene.text} if scene else {}))
    order = rng.permutation(len(rows))
    return replace_file(folder / f"{name}.jsonl", "".join(json.dumps(rows[i]) + "\n" for i in order))


def written(question: Any, scene: Any, answer: str, *, description: bool = True) -> str:
    """Return a completion in the format that follows from a scene."""
    return completion(scene.text if description else "", question.reason(scene, answer), answer)


class OwnMixture(Mixture):
    """Draw the warm-up's scenes from half of the training images, and the texts of every context about them."""

    def __init__(self, data: Any, encoder: FastEncoder, recipe: Recipe, images: Images) -> None:
        super().__init__(encoder, recipe, np.random.default_rng([recipe.seed, 1]))
        self.data, self.words = data, data.WORDS
        known = [(scene, pixels) for pixels, scene, _ in images.values() if scene]
        self.scenes = [replace(scene, pixels=pixels()) for scene, pixels in known]
        self.by_kind: dict[str, list[Any]] = {kind: [] for kind in data.SHARES}
        for _, _, asked in images.values():
            for text, _ in asked:
                self.by_kind[data.Question(text).kind].append(data.Question(text))
        shares = np.asarray(list(data.SHARES.values()))
        self.shares = shares / shares.sum()

    def scene(self) -> Any:
        return self.scenes[self.rng.integers(len(self.scenes))]

    def image(self, scene: Any) -> np.ndarray:
        return scene.pixels

    def caption(self, image: int, scene: Any) -> ScoredText:
        return self._example(image, self.encoder.prompt("perception", size=self.size), "", scene.text)

    def _fitting(self, scene: Any) -> Any:
        pool = self.by_kind[str(self.rng.choice(list(self.by_kind), p=self.shares))]
        while not (question := pool[self.rng.integers(len(pool))]).fits(scene):
            pass
        return question

    def example(self, image: int, scene: Any, context: str) -> ScoredText:
        rng, encoder = self.rng, self.encoder
        question = self._fitting(scene)
        believed = question.usual(scene) if rng.random() < HABIT else scene
        if context == "student":
            text = written(question, believed, question.answer(believed))
            text = damage(rng, text) if rng.random() < self.recipe.damaged else text
            return self._example(image, encoder.prompt("student", question.text, size=self.size), "", text)
        if context == "follow":
            read = self.data.misread(scene, rng) if rng.random() < 0.8 else scene
            text = written(question, read, question.answer(read), description=False)
            return self._example(image, encoder.prompt("student", question.text, size=self.size), read.text, text)
        wrong = rng.random() < self.recipe.wrong_references
        answer = str(rng.choice(self.data.ANSWERS[question.kind])) if wrong else question.answer(scene)
        told = question.made_true(scene, answer, rng)
        if context == "reference":
            where = encoder.prompt("reference", question.text, answer, size=self.size)
            return self._example(image, where, "", written(question, told, answer))
        prefill = "<description>" if context == "reasoning" else "<think>"
        where = encoder.prompt("reasoning", question.text, answer, size=self.size, prefill=prefill)
        text = written(question, told, answer, description=False)
        if context == "reasoning":
            return self._example(image, where, believed.text, text)
        return self._example(image, where, "", text[text.index("<think>") + len("<think>") :])


def warm_up(data: Any, folder: Path, images: Images, steps: int, seed: int) -> None:
    """Teach the built-in model this data's words, its format and its habit; save it as a folder."""
    model, processor = load_base()
    recipe = Recipe(seed=seed, digits=1, cell=data.SIDE, read_steps=steps // 2, mixture_steps=steps, scenes=16)
    mixture = OwnMixture(data, FastEncoder(model, processor, world_prompts()), recipe, images)

    def progress(stage: str, step: int, total: int, metrics: dict[str, float]) -> None:
        if step % 50 == 0 or step == total:
            print(f"warm-up, {stage} {step}/{total}: loss {metrics['loss']:.3f}", flush=True)

    learn(model, mixture, steps // 2, shares=READING, contexts=1, stage="read", progress=progress)
    learn(model, mixture, steps, shares=MIXTURE, contexts=2, stage="mixture", progress=progress)
    save(model, processor, folder)
    (folder / "done").touch()


def train(data: Any, method: str, base: Path, rows: Path, args: argparse.Namespace) -> tuple[Any, Any]:
    """Train the warm model on `rows`; return it and its processor."""
    model, processor = load_base(base)
    options = world_config(
        base.parent / method, seed=args.seed, max_steps=args.steps, learning_rate=6e-4, per_device_train_batch_size=32,
        save_merged=False, **({} if method == "sft" else {"method": method}),
    )  # fmt: skip
    if method == "sft":
        records = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        return train_sft(model, processor, load_rows(rows), [stated(data, r) for r in records], options), processor
    trainer = ViGOSTrainer(model=model, args=options, processing_class=processor, train_dataset=load_rows(rows))
    Watch.attach(trainer, make_console(), every=10)
    trainer.train()
    return trainer.model, processor


def stated(data: Any, record: dict[str, Any]) -> str:
    """Return a completion that states the reference of a row, with a description where its image's answers give one."""
    answer = record["answer"]
    if "scene" not in record:
        return completion("A shape.", f"It is {answer}.", answer)
    return written(data.Question(record["problem"]), data.scene_of(record["scene"]), answer)


def measure(model: Any, processor: Any, test: Path, records: Path, seed: int) -> EvaluationResult:
    """Sample one answer a test question at temperature 1 under the student's own prompt; leave whole records alone."""
    part = records.with_suffix(".part")
    found = evaluate(model, processor, test, prompts=world_prompts(), temperature=1.0, max_new_tokens=MAX_TOKENS,
                     batch_size=150, seed=seed, records=part, resume=False)  # fmt: skip
    part.replace(records)
    return found


def run(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Warm up, train and evaluate on one data set, as far as it is not done yet; return the rows of results.csv."""
    data, folder = DATA[name], args.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("warm_up", "steps", "questions", "seed")}
    kept = folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"{folder} holds results of {kept.read_text(encoding='utf-8')}: give another --output-dir")
    replace_file(kept, json.dumps(settings))
    torch.manual_seed(args.seed)
    images, test = data.read("train"), data.read("test")
    early, late = ({i: v for n, (i, v) in enumerate(images.items()) if n % 2 == half} for half in (0, 1))
    rows = write_rows(data, folder, "train", late, args.steps * 32 // 3 + 1, args.seed)
    held_out = write_rows(data, folder, "test", test, args.questions, args.seed)
    base = folder / "warm-up"
    if not (base / "done").exists():
        warm_up(data, base, early, args.warm_up, args.seed)
    results = {}
    for arm in ("warm-up", *args.method):
        records = folder / f"{arm}.jsonl"
        if records.exists():
            results[arm] = EvaluationResult.load(records)
        else:
            model, processor = load_base(base) if arm == "warm-up" else train(data, arm, base, rows, args)
            results[arm] = measure(model, processor, held_out, records, args.seed)
    return report(name, results, args.seed)


def report(name: str, results: dict[str, EvaluationResult], seed: int) -> list[dict[str, Any]]:
    """Print accuracy by kind and against the warm-up, with intervals and p values corrected for their number."""
    tested = {arm: compare(results["warm-up"], result) for arm, result in results.items() if arm != "warm-up"}
    corrected = dict(zip(tested, holm([c.p_value for c in tested.values()]), strict=True))
    rows = []
    for arm, result in results.items():
        found = result.summary(group_by="kind")
        low, high = found["accuracy_interval"]
        kinds = {kind: group["accuracy"] for kind, group in sorted(found["groups"].items())}
        row = {"data": name, "arm": arm, "seed": seed, "examples": found["examples"], "accuracy": found["accuracy"],
               "low": low, "high": high, "score": found.get("score"), "prior": found.get("prior"),
               "valid_rate": found["valid_rate"], "kinds": "; ".join(f"{k} {100 * v:.1f}" for k, v in kinds.items()),
               "difference": None, "difference_low": None, "difference_high": None, "p_holm": None,
               "from_vigos": None, "from_vigos_low": None, "from_vigos_high": None}  # fmt: skip
        line = f"{name} {arm:8} right {100 * found['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f}); "
        line += row["kinds"]
        if "score" in found:
            line += f"; Score {100 * found['score']:.1f}, Prior {100 * found['prior']:.1f}"
        line += f"; in the format {100 * found['valid_rate']:.1f}"
        if arm in tested:
            gap, (low, high) = tested[arm].difference, tested[arm].interval
            row |= {"difference": gap, "difference_low": low, "difference_high": high, "p_holm": corrected[arm]}
            line += f"; against the warm-up {100 * gap:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            line += f", p {corrected[arm]:.2g}"
        if arm in tested and arm != "vigos" and "vigos" in results:
            other = compare(results["vigos"], result)
            row |= {"from_vigos": other.difference, "from_vigos_low": other.interval[0],
                    "from_vigos_high": other.interval[1]}  # fmt: skip
        print(line, flush=True)
        row["outcomes"] = "".join("1" if right else "0" for right in result.values("accuracy").values())
        row["roles"] = "".join(r["extra"].get("role", "-")[0] for r in result.answered)
        rows.append({key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()})
    return rows


def main() -> None:
    """Run on each data set; write results.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--data", choices=DATA, nargs="+", default=list(DATA))
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--warm-up", type=int, default=300, help="steps of the warm-up's mixture")
    parser.add_argument("--steps", type=int, default=50, help="training steps of 32 questions")
    parser.add_argument("--questions", type=int, default=200, help="test questions a kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [row for name in args.data for row in run(name, args)]
    with (args.output_dir / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
