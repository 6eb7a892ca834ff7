"""Every command of `vigos`; those of a page, a study, the world and the machine are here. Each imports as it runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vigos.cli import train  # noqa: F401  registers its commands, in the order of the help

# isort: split
from vigos.cli import evaluate  # noqa: F401
from vigos.cli.app import Force, app, world_app
from vigos.cli.folders import check_exist, output_folder
from vigos.cli.options import UsageError
from vigos.system.screen import make_console, print_table
from vigos.system.text import printable

# --- report ----------------------------------------------------------------------------------------------------------


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, or the demo's folder around it.")],
    compare: Annotated[Path | None, typer.Option(help="A second run, shown side by side with the first.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for report.html; default: the run's.")] = None,
    before: Annotated[Path | None, typer.Option(help="Records of the untrained model.")] = None,
    after: Annotated[Path | None, typer.Option(help="Records of the trained model.")] = None,
    rollouts: Annotated[int, typer.Option(help="Rollouts shown at most, sampled evenly over the steps.")] = 400,
    force: Force = False,
) -> None:
    """Write one HTML file about a run. Headline numbers, rollouts token by token, curves, cost; it loads nothing."""
    check_exist(run, compare, before, after)
    from vigos.report.page import write_report

    page = (output_dir or run) / "report.html"
    path = write_report(run, page, compare=compare, before=before, after=after, rollouts=rollouts, force=force)
    typer.echo(f"written: {path} ({path.stat().st_size / 2**20:.1f} MB)")


# --- study -----------------------------------------------------------------------------------------------------------


@app.command()
def study(
    output_dir: Annotated[Path, typer.Option(help="Where cells, CSV files and figures go.")] = Path("runs/study"),
    quick: Annotated[bool, typer.Option("--quick", help="One seed of every arm on the base that ships.")] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="Teachers that are told another's answer, a wrong one, or none.")
    ] = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="Recipes of others on the same worlds, side by side.")
    ] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Worlds whose training scenes follow the habit, in small.")
    ] = False,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="The worlds that the search chose, on five other bases.")
    ] = False,
    bases: Annotated[int | None, typer.Option(help="How many bases; default: the plan's.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many training seeds of each.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of a cell.")] = None,
    axis: Annotated[list[str] | None, typer.Option(help="Turn this knob only; may be given again.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes side by side, one thread each.")] = 2,
    draw_only: Annotated[bool, typer.Option("--draw-only", help="Tables and figures from the CSV files.")] = False,
) -> None:
    """Compare the methods on the built-in world. Their parts too; a stopped study goes on where it stopped."""
    from vigos.study.plan import CONTROL, FROZEN, FULL, METHOD, QUICK, SEARCH, reduced
    from vigos.study.results import draw, print_results
    from vigos.study.run import run_study

    def tell(what: str, done: int, total: int) -> None:
        typer.echo(f"{done}/{total} {printable(what)}")

    results = output_dir / "results.csv"
    if not draw_only:
        chosen = ((quick, QUICK), (controls, CONTROL), (methods, METHOD), (search, SEARCH), (frozen, FROZEN))
        plan = next((plan for wanted, plan in chosen if wanted), FULL)
        plan = reduced(plan, bases=bases, seeds=seeds, steps=steps, axes=axis or None)
        with output_folder(output_dir, "vigos study"):
            run_study(plan, output_dir, jobs=jobs, progress=tell)
    elif not results.is_file():
        raise UsageError(f"--draw-only: no such file: {results}")
    print_results(results, make_console())
    for path in draw(results, output_dir / "preconditions.csv", output_dir):
        typer.echo(f"drawn: {path}")


# --- world -----------------------------------------------------------------------------------------------------------


@world_app.command("generate")
def world_generate(
    folder: Annotated[Path, typer.Argument(help="Where images and JSONL go.")],
    split: Annotated[str, typer.Option(help="train or test: apart in handwriting and wordings.")] = "train",
    n: Annotated[int, typer.Option(help="Rows (train) or triplets (test).")] = 1000,
    seed: Annotated[int, typer.Option()] = 0,
    noise: Annotated[float | None, typer.Option(help="Pixel noise.")] = None,
    conflict: Annotated[float | None, typer.Option(help="Share of scenes that contradict the prior.")] = None,
    label_bias: Annotated[float | None, typer.Option(help="Share of references that state the prior.")] = None,
) -> None:
    """Write images and JSONL in the format a user brings."""
    from vigos.world import write_world

    knobs: dict[str, Any] = {"noise": noise, "conflict": conflict, "label_bias": label_bias}
    path = write_world(folder, split=split, n=n, seed=seed, **{k: v for k, v in knobs.items() if v is not None})
    typer.echo(f"written: {path}")


@world_app.command("pretrain")
def world_pretrain(
    folder: Annotated[Path, typer.Argument(help="Where the model folder goes.")],
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make the built-in model from nothing: about 25 minutes on two cores."""
    from vigos.world.warmup import pretrain

    pretrain(folder, seed=seed)


@world_app.command("check")
def world_check(
    model: Annotated[Path | None, typer.Option(help="Model folder; default: the built-in model.")] = None,
    n: Annotated[int, typer.Option(help="Triplets to test on.")] = 100,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Print the preconditions P1 to P5 with intervals."""
    from vigos.study.preconditions import check

    check(model, n=n, seed=seed)


# --- doctor ----------------------------------------------------------------------------------------------------------


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Say what is known of this model's family instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what this machine can run. Each engine is checked against the oracle."""
    from vigos.cli.doctor import examine, examine_model

    if model is not None:
        found = examine_model(model)
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        else:
            print_table(make_console(), ("", model), list(found.items()))
        return
    findings = examine()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(f) for f in findings], indent=1))
    else:
        states = {True: "ok", False: "broken", None: "not here"}
        rows = [(f.section, f.name, states[f.ok], f.detail) for f in findings]
        print_table(make_console(), ("", "what", "state", "detail"), rows)
    if any(f.ok is False for f in findings):
        raise typer.Exit(1)
