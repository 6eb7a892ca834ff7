"""The command line: `vigos demo | train | eval | compare | palr | probe | report | study | world | doctor`.

Exit codes: 0 all is well; 1 the run failed, with one line that says why; 2 the command line or the configuration is
wrong; 143 `train` was told to stop by SIGTERM, and wrote a checkpoint first: the same command with `--resume auto` goes
on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress
    from rich.table import Table
except ImportError:  # the base install has torch and triton alone
    sys.exit("the vigos command needs a few packages more: pip install 'vigos[demo]'")

if TYPE_CHECKING:
    from vigos.eval.config import EvalConfig
    from vigos.launch import EvalSource, Source
    from vigos.train.config import ViGOSConfig

app = typer.Typer(
    help="Visually grounded on-policy self-distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
world_app = typer.Typer(help="The built-in world: handwritten digits in inks.", no_args_is_help=True)
app.add_typer(world_app, name="world")
console = Console()


class UsageError(ValueError):
    """A command line or configuration that cannot be run."""


# --- demo ------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where data, run folder and summary.json go.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter run, under 3 minutes on two cores.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, rollouts and training.")] = 0,
) -> None:
    """Post-train the built-in model with the whole method; evaluate it before and after."""
    import torch

    from vigos.study.demo import run_demo

    # A model this small gains nothing from a second core, and loses tenfold where another program wants that core.
    torch.set_num_threads(1)
    run_demo(output_dir, quick=quick, seed=seed, console=console)


# --- train -----------------------------------------------------------------------------------------------------------


def unknown_key(key: str, known: list[str], where: str) -> UsageError:
    """An error that names the nearest known key."""
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return UsageError(f"{where}: unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def parse_run(config: Path | None, flags: list[str]) -> tuple[Source, ViGOSConfig]:
    """Read the options of `train`: defaults, then the YAML file, then flags."""
    from vigos.launch import Source
    from vigos.train.config import ViGOSConfig

    return parse_options(Source, ViGOSConfig, ("model", "data"), config, flags)


def parse_evaluation(config: Path | None, flags: list[str]) -> tuple[EvalSource, EvalConfig]:
    """Read the options of `eval` and `probe`: defaults, then the YAML file, then flags."""
    from vigos.eval.config import EvalConfig
    from vigos.launch import EvalSource

    return parse_options(EvalSource, EvalConfig, ("model", "data", "output_dir"), config, flags)


def parse_options(
    source_kind: type, config_kind: type, needed: tuple[str, ...], config: Path | None, flags: list[str]
) -> tuple[Any, Any]:
    """Fill two dataclasses from defaults, then the YAML file, then flags; every key must be a field of one of them."""
    import yaml
    from transformers import HfArgumentParser

    known = [f.name for kind in (source_kind, config_kind) for f in dataclasses.fields(kind) if f.init]
    parser = HfArgumentParser([source_kind, config_kind], add_help=False, allow_abbrev=False)  # type: ignore[list-item]
    if config is not None:
        if not config.is_file():
            raise UsageError(f"--config: no such file: {config}")
        loaded = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        if not isinstance(loaded, dict):
            raise UsageError(f"--config: {config} must hold a mapping of options, got {type(loaded).__name__}")
        for key in loaded:
            if key not in known:
                raise unknown_key(str(key), known, str(config))
        for action in parser._actions:  # a value from the file satisfies a required flag
            action.required = action.required and action.dest not in loaded
        parser.set_defaults(**loaded)
    try:
        source, run, rest = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except SystemExit as error:  # argparse has printed what was wrong
        raise typer.Exit(2) from error
    for extra in rest:
        if extra.startswith("--"):
            raise unknown_key(extra.removeprefix("--").split("=")[0], known, "command line")
        raise UsageError(f"command line: unexpected argument {extra!r}")
    for name in needed:
        if not getattr(source, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is needed: a flag, or a line `{name}: …` in the --config file"
            )
    return source, run


def print_options(*kinds: type) -> None:
    """Print every option that the dataclasses declare themselves, without those of TrainingArguments."""
    table = Table("option", "default", "what it does")
    for kind in kinds:
        for f in dataclasses.fields(kind):
            if f.init and f.name in inspect.get_annotations(kind):
                table.add_row("--" + f.name, repr(f.default), str(f.metadata.get("help", "")))
    console.print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the options.")] = None,
    list_options: Annotated[bool, typer.Option("--list-options", help="Print every option and stop.")] = False,
) -> None:
    """Train with ViGOS. Every field of the configuration is a flag: --learning-rate 5e-6, --preset released, …"""
    from vigos.launch import Source
    from vigos.train.config import ViGOSConfig

    if list_options:
        print_options(Source, ViGOSConfig)
        console.print("and every field of transformers.TrainingArguments")
        return
    source, run = parse_run(config, context.args)
    from vigos.launch import train_from_source

    if train_from_source(source, run).interrupted:
        from vigos.train.checkpoint import EXIT_CODE

        console.print("stopped by SIGTERM after a checkpoint; go on with --resume auto")
        raise typer.Exit(EXIT_CODE)


# --- eval, compare ---------------------------------------------------------------------------------------------------


@app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate_command(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the options.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="records.jsonl of the untrained model, shown beside.")] = None,
    list_options: Annotated[bool, typer.Option("--list-options", help="Print every option and stop.")] = False,
) -> None:
    """Evaluate a model under the student's prompt: --model, --data, --output-dir, and whatever --list-options prints.

    Writes records.jsonl (one line an example; a stopped evaluation goes on) and summary.json: accuracy, format, Score
    and Prior, with intervals.
    """
    from vigos.eval.config import EvalConfig
    from vigos.eval.results import EvaluationResult
    from vigos.launch import EvalSource, evaluate_from_source

    if list_options:
        print_options(EvalSource, EvalConfig)
        return
    source, options = parse_evaluation(config, context.args)
    untrained = EvaluationResult.load(baseline) if baseline is not None else None
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("examples", total=None)
        result = evaluate_from_source(
            source, options, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    baseline_summary = {}
    if untrained is not None:
        untrained.check_same_prompt(EvaluationResult.load(Path(source.output_dir) / "records.jsonl"))
        baseline_summary = untrained.summary()
    table = Table("metric", "value", *(["baseline"] if baseline_summary else []))
    for name, value in result.items():
        if isinstance(value, int | float):
            shown = [value, baseline_summary.get(name, math.nan)] if baseline_summary else [value]
            table.add_row(name, *(f"{v:.4f}" if isinstance(v, float) else str(v) for v in shown))
    console.print(table)
    console.print(f"records and summary: {source.output_dir}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="records.jsonl of one run.")],
    b: Annotated[Path, typer.Argument(help="records.jsonl of the other.")],
) -> None:
    """Paired comparison of two evaluations on the rows they share: b - a, 95 % interval, exact p.

    Five metrics are looked at, so one counts as different at p < 0.01: two runs of one model then differ in one of them
    at most once in twenty times.
    """
    from vigos.eval.results import EvaluationResult
    from vigos.eval.results import compare as paired

    first, second = EvaluationResult.load(a), EvaluationResult.load(b)
    table = Table("metric", "rows", "a", "b", "b - a", "95 % interval", "better / worse", "p", "differs")
    table.columns[0].no_wrap = True
    for metric in ("accuracy", "score", "prior", "valid_rate", "unparseable"):
        if not (first.values(metric) and second.values(metric)):  # type: ignore[arg-type]
            continue
        c = paired(first, second, metric=metric)  # type: ignore[arg-type]
        low, high = c.interval
        table.add_row(
            metric, str(c.rows), f"{100 * c.a:.1f}", f"{100 * c.b:.1f}", f"{100 * c.difference:+.1f}",
            f"{100 * low:+.1f} … {100 * high:+.1f}", f"{c.better} / {c.worse}", f"{c.p_value:.2g}",
            "yes" if c.differs else "no",
        )  # fmt: skip
    console.print(table)


# --- report ----------------------------------------------------------------------------------------------------------


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, or the demo's folder around it.")],
    compare: Annotated[Path | None, typer.Option(help="A second run, shown beside the first.")] = None,
    output: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the run folder.")] = None,
    before: Annotated[Path | None, typer.Option(help="Records of the untrained model.")] = None,
    after: Annotated[Path | None, typer.Option(help="Records of the trained model.")] = None,
    rollouts: Annotated[int, typer.Option(help="Rollouts shown at most, sampled evenly over the steps.")] = 400,
) -> None:
    """Write one HTML file about a run: headline numbers, rollouts token by token, curves, cost. It loads nothing."""
    from vigos.report.page import write_report

    path = write_report(
        run, output or run / "report.html", compare=compare, before=before, after=after, rollouts=rollouts
    )
    console.print(f"written: {path} ({path.stat().st_size / 2**20:.1f} MB)", soft_wrap=True)


# --- study -----------------------------------------------------------------------------------------------------------


@app.command()
def study(
    output_dir: Annotated[Path, typer.Option(help="Where cells, CSV files and figures go.")] = Path("runs/study"),
    quick: Annotated[bool, typer.Option("--quick", help="One seed of every arm on the base that ships.")] = False,
    bases: Annotated[int | None, typer.Option(help="How many bases; default: the plan's.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many training seeds of each.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of a cell.")] = None,
    axis: Annotated[list[str] | None, typer.Option(help="Turn this knob only; may be given again.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes side by side, one thread each.")] = 2,
    draw_only: Annotated[bool, typer.Option("--draw-only", help="Tables and figures from the CSV files.")] = False,
) -> None:
    """Compare the methods and their parts on the built-in world. A stopped study goes on where it stopped."""
    from vigos.study.plan import FULL, QUICK, reduced
    from vigos.study.results import draw, print_results
    from vigos.study.run import run_study

    def tell(what: str, done: int, total: int) -> None:
        console.print(f"[dim]{done}/{total}[/] {escape(what)}", soft_wrap=True)

    results = output_dir / "results.csv"
    if not draw_only:
        plan = reduced(QUICK if quick else FULL, bases=bases, seeds=seeds, steps=steps, axes=axis or None)
        run_study(plan, output_dir, jobs=jobs, progress=tell)
    elif not results.is_file():
        raise UsageError(f"--draw-only: no such file: {results}")
    print_results(results, console)
    for path in draw(results, output_dir / "preconditions.csv", output_dir):
        console.print(f"drawn: {path}", soft_wrap=True)


# --- palr ------------------------------------------------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def palr(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the options of `train`.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of the data to measure on.")] = 64,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter of the student; off, it is the teacher.")] = None,
    teacher_model: Annotated[str | None, typer.Option(help="Teacher of a student that was trained in full.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """How much of the supervision the privileged answer buys, and not the image. Takes the options of `train`."""
    source, run = parse_run(config, ["--output-dir", "runs/palr", *context.args])
    from vigos.launch import palr_from_source

    found = palr_from_source(source, run, rows=rows, adapter=adapter, teacher_model=teacher_model)
    table = Table("tokens of", "PALR", "95 % interval", "tokens", title=f"{run.method}, {found['rollouts']} rollouts")
    for name, group in found["groups"].items():
        low, high = group["palr_interval"]
        ratio = "–" if group["palr"] is None else f"{100 * group['palr']:.1f} %"
        table.add_row(name, ratio, f"{100 * low:.1f} … {100 * high:.1f}", str(group["tokens"]))
    console.print(table)
    for reason, n in found["left_out"].items():
        console.print(f"left out: {n} rollouts ({reason})")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1), encoding="utf-8")
        console.print(f"written: {output}")


@app.command("probe", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def probe_command(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the options of `eval`.")] = None,
) -> None:
    """Does it look? Accuracy with the image removed, blurred, or swapped. Takes the options of `eval`."""
    from vigos.launch import probe_from_source

    source, options = parse_evaluation(config, context.args)
    summary = probe_from_source(source, options)
    table = Table("images", "accuracy", "95 % interval", "against intact", "95 % interval", "p")
    for name, values in summary.items():
        low, high = values["accuracy_interval"]
        cells = [name, f"{100 * values['accuracy']:.1f} %", f"{100 * low:.1f} … {100 * high:.1f}"]
        if "difference" in values:
            low, high = values["difference_interval"]
            cells += [f"{100 * values['difference']:+.1f}", f"{100 * low:+.1f} … {100 * high:+.1f}"]
            cells += [f"{values['p_value']:.2g}"]
        table.add_row(*cells)
    console.print(table)
    console.print(f"records and probes.json: {source.output_dir}")


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
    console.print(f"wrote {path}")


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
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Say what this machine can run, and check each engine against the oracle."""
    from vigos.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(f) for f in findings], indent=1))
    else:
        table = Table("", "what", "state", "detail")
        for f in findings:
            state = {True: "[green]ok", False: "[red]broken", None: "[dim]not here"}[f.ok]
            table.add_row(f.section, f.name, state, escape(f.detail))
        console.print(table)
    if any(f.ok is False for f in findings):
        raise typer.Exit(1)


def _quiet_libraries() -> None:
    """Leaves the screen to us: no bars of transformers where nobody watches, no notes meant for its developers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def main(argv: list[str] | None = None) -> Any:
    """Runs the command line; a mistake of the user's ends in one line and a code, not in a traceback."""
    _quiet_libraries()
    from vigos.errors import TrainingStopped, end_process

    try:
        return app(argv)
    except UsageError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
    except (ValueError, OSError, TrainingStopped) as error:  # our own checks; files and models that are not there
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        end_process(1)
