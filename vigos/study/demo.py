"""`vigos demo`: the whole method on the built-in world, evaluated before and after, on a laptop's two cores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from vigos.method.prompts import Prompts


@dataclass(frozen=True)
class DemoSize:
    """Size of a demo: training steps, examples a step, triplets of the evaluation."""

    steps: int
    examples_a_step: int
    triplets: int  # one image that agrees with the prior and two that contradict it, each


QUICK = DemoSize(steps=120, examples_a_step=32, triplets=100)
FULL = DemoSize(steps=240, examples_a_step=32, triplets=200)


def run_demo(
    output_dir: str | Path, *, quick: bool = False, seed: int = 0, console: Console | None = None
) -> dict[str, Any]:
    """Write data, evaluate the built-in base, train it, evaluate again; return the content of `summary.json`.

    Returns:
        `before` and `after`, each with `score`, `prior`, `valid_rate` (shares in [0, 1]) and their 95 % intervals,
        and `seconds`.
    """
    from vigos.data.examples import load_rows
    from vigos.study.plan import world_config
    from vigos.system.files import replace_json
    from vigos.system.screen import make_console, per_cent, print_table
    from vigos.train.facts import data_facts
    from vigos.train.trainer import ViGOSTrainer
    from vigos.train.watch import Watch
    from vigos.world import load_base, world_prompts, write_world

    console = console or make_console()
    size = QUICK if quick else FULL
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    console.print("[bold]1/4[/] writing the world: handwritten digits in inks")
    train = write_world(output_dir / "world", "train", size.steps * size.examples_a_step, seed, conflict=0.5)
    test = write_world(output_dir / "world", "test", size.triplets, seed)

    model, processor = load_base()
    prompts = world_prompts()
    console.print(f"[bold]2/4[/] evaluating the base on {3 * size.triplets} held-out questions")
    before = _evaluate(model, processor, test, prompts, output_dir / "before.jsonl", seed, console)

    console.print(f"[bold]3/4[/] ViGOS: {size.steps} steps of {size.examples_a_step} rollouts")
    options = world_config(
        output_dir / "train", max_steps=size.steps, per_device_train_batch_size=size.examples_a_step, seed=seed,
        completion_steps=5, completion_top_k=5,
    )  # fmt: skip
    trainer = ViGOSTrainer(
        model=model,
        args=options,
        processing_class=processor,
        train_dataset=load_rows(train),
    )
    trainer.facts = {"model": "builtin", **data_facts(train)}
    Watch.attach(trainer, console, every=20)
    trainer.train()

    console.print("[bold]4/4[/] evaluating the trained model on the same questions")
    after = _evaluate(trainer.model, processor, test, prompts, output_dir / "after.jsonl", seed, console)

    summary = {
        "before": before,
        "after": after,
        "seconds": round(time.perf_counter() - started, 1),
        "quick": quick,
        "seed": seed,
        "steps": size.steps,
    }
    replace_json(output_dir / "summary.json", summary)

    rows = []
    for name, meaning in (
        ("score", "right where the image contradicts the prior"),
        ("prior", "right where the image agrees with it"),
        ("valid_rate", "outputs in the asked format"),
    ):
        rows.append((name, *(per_cent(r[name], r[f"{name}_interval"]) for r in (before, after)), meaning))
    title = "held-out handwriting, held-out wordings (95 % intervals)"
    print_table(console, ("", "before", "after", "what it is"), rows, title=title)
    written = "summary.json, before.jsonl, after.jsonl, train/"
    for line in (
        f"{summary['seconds']:.0f} s; everything is in {output_dir}: {written}",
        f"a page about it: vigos report {output_dir}",
    ):
        console.print(line, soft_wrap=True, markup=False)
    return summary


def _evaluate(
    model: Any, processor: Any, rows: Path, prompts: Prompts, records: Path, seed: int, console: Console
) -> dict[str, Any]:
    """Return Score, Prior and the share in the asked format, one sample a question at temperature 1."""
    from rich.progress import Progress

    from vigos.eval.evaluate import evaluate
    from vigos.study.plan import MAX_TOKENS

    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("questions", total=None)
        result = evaluate(
            model, processor, rows, prompts=prompts, temperature=1.0, max_new_tokens=MAX_TOKENS, batch_size=150,
            seed=seed, records=records, resume=False,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    found = result.summary()
    keys = [f"{name}{end}" for name in ("score", "prior", "valid_rate", "accuracy") for end in ("", "_interval")]
    return {key: found[key] for key in [*keys, "unparseable", "tokens_mean", "invalid_reasons"]}
