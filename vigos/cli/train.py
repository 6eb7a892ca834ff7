"""Commands that train, or ask what training would: demo, train, recipes, palr."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from vigos.cli.app import PALR, RAW, TRAIN, Config, Help, Listing, Raw, Recipe, app, stop_for_help
from vigos.cli.folders import DEMO, earlier_run, is_leader, output_folder
from vigos.cli.options import UsageError
from vigos.cli.recipes import names, path_of, summary
from vigos.system.files import RUN
from vigos.system.screen import make_console, print_table
from vigos.system.text import printable


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where data, run folder and summary.json go.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter run, under 3 minutes on two cores.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, rollouts and training.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the earlier demo in the folder first.")
    ] = False,
) -> None:
    """Post-train the built-in model. The whole method, with an evaluation before and after."""
    with output_folder(output_dir, "vigos demo", DEMO, overwrite=overwrite):
        import torch

        from vigos.study.demo import run_demo

        # A model this small gains nothing from a second core, and loses tenfold where another program wants that core.
        torch.set_num_threads(1)
        run_demo(output_dir, quick=quick, seed=seed, console=make_console())


@app.command(cls=Raw, context_settings=RAW, add_help_option=False)
def train(
    context: typer.Context, config: Config = None, recipe: Recipe = None, list_options: Listing = False,
    show_help: Help = False,
) -> None:  # fmt: skip
    """Train with ViGOS."""
    stop_for_help(TRAIN, show_help, list_options)
    reading = TRAIN.read(config, context.args, None if recipe is None else path_of(recipe))
    resume, overwrite = reading.is_set("resume"), reading.is_set("overwrite")
    folder = Path(reading.values["output_dir"])
    if is_leader() and not resume and not overwrite:
        earlier_run(folder, RUN)
    check_trackers(reading.values.get("report_to"))
    source, options = reading.fill()
    from vigos.launch import train_from_source

    with output_folder(folder, "vigos train", RUN, resume=resume, overwrite=overwrite):
        trainer = train_from_source(source, options, console=make_console())
    if trainer.interrupted:
        typer.echo("stopped by a signal after a checkpoint; go on with the same command and --resume auto")
        raise typer.Exit(trainer.stop_signal.exit_code)
    if is_leader():
        typer.echo("\n".join(after_training(folder)))


@app.command("recipes")
def recipes_command() -> None:
    """List the recipes. They are configurations of published methods, for `vigos train --recipe NAME`."""
    for name in names():
        typer.echo(
            "\n".join([name, *textwrap.wrap(summary(name), 116, initial_indent="    ", subsequent_indent="    ")])
        )


# Packages of the trackers that --report-to takes.
_TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",), "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",), "neptune": ("neptune",), "swanlab": ("swanlab",), "clearml": ("clearml",),
}  # fmt: skip


def check_trackers(report_to: Any) -> None:
    """Raise UsageError for a tracker that is asked for and not installed, before a model is loaded."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        packages = _TRACKERS.get(str(name), ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise UsageError(f"--report-to: {name} is not installed: pip install {packages[0]}")


def after_training(folder: Path) -> list[str]:
    """Return the last lines of a training: where the run is, what was skipped and why, what to do next."""
    from collections import Counter

    from vigos.system.files import read_json_lines

    weights = [name for name in ("adapter", "merged", "model") if (folder / name).is_dir()]
    lines = [
        f"the run is in {folder}: {', '.join([*(f'{name}/' for name in weights), 'metrics.jsonl', 'config.yaml'])}"
    ]
    if (folder / "skipped.jsonl").is_file():
        skipped = Counter(str(line.get("reason")) for line in read_json_lines(folder / "skipped.jsonl")[0])
        reasons = ", ".join(f"{n} {printable(reason)}" for reason, n in skipped.most_common())
        lines.append(f"skipped {skipped.total()} examples: {reasons}; see {folder / 'skipped.jsonl'}")
    model = next((folder / name for name in ("merged", "model") if name in weights), None)
    if model is not None:
        lines.append(f"next: vigos eval --model {model} --data TEST --output-dir {folder / 'eval'}")
    return [*lines, f"{'      ' if model else 'next: '}vigos report {folder}"]


@app.command(cls=Raw, context_settings=RAW, add_help_option=False)
def palr(context: typer.Context, config: Config = None, list_options: Listing = False, show_help: Help = False) -> None:
    """Measure how much supervision the answer buys."""
    stop_for_help(PALR, show_help, list_options)
    source, options = PALR.parse(config, context.args)
    from vigos.launch import palr_from_source

    found = palr_from_source(source, options)
    rows = []
    for name, group in found["groups"].items():
        low, high = group["palr_interval"]
        ratio = "–" if group["palr"] is None else f"{100 * group['palr']:.1f} %"
        rows.append((name, ratio, f"{100 * low:.1f} to {100 * high:.1f}", str(group["tokens"])))
    title = f"{options.method}, {found['rollouts']} rollouts"
    print_table(make_console(), ("tokens of", "PALR", "95 % interval", "tokens"), rows, title=title)
    for reason, n in found["left_out"].items():
        typer.echo(f"left out: {n} rollouts ({reason})")
    typer.echo(f"written: {options.output_dir}/palr.json")
