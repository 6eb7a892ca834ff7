"""The commands of `vigos`. Each imports what it needs when it runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from typer.core import TyperCommand

from vigos.cli.folders import DEMO, earlier_run, is_leader, output_folder
from vigos.cli.options import Command, UsageError
from vigos.cli.recipes import names, path_of, summary
from vigos.system.files import RUN
from vigos.system.screen import make_console, per_cent, print_table, screen_width
from vigos.system.text import printable

if TYPE_CHECKING:
    from vigos.eval.results import EvaluationResult

app = typer.Typer(
    help="Visually grounded on-policy self-distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is plain text, which a pipe can hold
)


class _Raw(TyperCommand):
    """A command that takes every word itself; a shell completes the options that its dataclasses declare."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return the options that begin so."""
        from click.shell_completion import CompletionItem

        command = next(c for c in (TRAIN, PALR, EVAL, PROBE) if c.name == self.name)
        found = {o.flag: o.help for o in command.options().values() if o.flag.startswith(incomplete or "--")}
        return [CompletionItem(flag, help=text) for flag, text in found.items()]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"vigos {version_of('vigos')}")
        raise typer.Exit


world_app = typer.Typer(
    help="The built-in world: handwritten digits in inks.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(world_app, name="world")

# Commands whose options are fields of dataclasses take every word themselves, `--help` included.
_RAW = {"allow_extra_args": True, "ignore_unknown_options": True}
Config = Annotated[Path | None, typer.Option(help="YAML file with any of the options.")]
Recipe = Annotated[str | None, typer.Option(help="Configuration of a published method; `vigos recipes` lists them.")]
Help = Annotated[bool, typer.Option("--help", "-h", help="Print this and stop.")]
Force = Annotated[bool, typer.Option("--force", help="Put evaluations side by side that were asked otherwise.")]
Listing = Annotated[bool, typer.Option("--list-options", help="Print every option and stop.")]

TRAIN = Command(
    "train",
    "Train with ViGOS, and leave a run folder: options, metrics, rollouts and the weights. A stopped run goes on with "
    "--resume auto.",
    (
        ("vigos.launch", "Source"), ("vigos.train.config", "ViGOSConfig"),
        ("transformers.training_args", "TrainingArguments"),
    ),
    ("model", "data", "output_dir"),
    (
        "model", "data", "output_dir", "data_root", "problem_column", "images_column", "answer_column", "prompts_file",
        "preset", "method", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size",
        "gradient_accumulation_steps", "max_prompt_length", "max_completion_length", "lora", "rollout_engine",
        "save_steps", "report_to", "limit", "seed", "resume", "overwrite",
    ),
    "vigos train --model Qwen/Qwen2.5-VL-3B-Instruct --data data/train.jsonl --output-dir runs/3b --max-steps 100",
    {
        "output_dir": "Run folder.",
        "max_steps": "Optimizer steps; -1: those of num_train_epochs. A stream needs them.",
        "save_steps": "Write a checkpoint every N steps.",
        "report_to": "Trackers: tensorboard, wandb, trackio, …; none.",
        "seed": "Seed of data, rollouts and training.",
    },
)  # fmt: skip
PALR = Command(
    "palr",
    "Measure how much of the supervision the privileged answer buys, and not the image. Takes the options of train.",
    (("vigos.launch", "PalrSource"), *TRAIN.kinds[1:]),
    TRAIN.needed,
    (
        "model", "data", "output_dir", "limit", "adapter", "teacher_model", "data_root", "problem_column",
        "images_column", "answer_column", "prompts_file", "preset", "max_prompt_length", "max_completion_length",
        "seed",
    ),
    "vigos palr --model Qwen/Qwen2.5-VL-3B-Instruct --data data/train.jsonl --output-dir runs/palr --limit 64",
    {"output_dir": "Folder for palr.json.", "seed": "Seed of the rollouts."},
)  # fmt: skip
EVAL = Command(
    "eval",
    "Evaluate a model under the student's prompt: accuracy, format, Score and Prior, with 95 % intervals. Writes "
    "records.jsonl, one line an example, and summary.json; a stopped evaluation goes on.",
    (("vigos.launch", "EvalSource"), ("vigos.eval.config", "EvalConfig")),
    ("model", "data", "output_dir"),
    (
        "model", "data", "output_dir", "adapter", "prompts_file", "data_root", "benchmark", "k", "temperature",
        "max_new_tokens", "max_prompt_length", "batch_size", "seed", "limit", "problem_column", "images_column",
        "answer_column", "judge_url", "judge_model", "server_url", "server_model",
    ),
    "vigos eval --model runs/3b/merged --data data/test.jsonl --output-dir runs/3b/eval",
)  # fmt: skip
PROBE = dataclasses.replace(
    EVAL,
    name="probe",
    text="Measure whether a model looks: accuracy with the image removed, blurred, or swapped for another example's, "
    "against the intact one. Takes the options of eval.",
    example="vigos probe --model runs/3b/merged --data data/test.jsonl --output-dir runs/3b/probes",
)


def _stop_for_help(command: Command, show_help: bool, list_options: bool) -> None:
    if show_help or list_options:
        typer.echo(command.help(screen_width()) if show_help else command.listing())
        raise typer.Exit


# --- demo ------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where data, run folder and summary.json go.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter run, under 3 minutes on two cores.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, rollouts and training.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the earlier demo in the folder first.")
    ] = False,
) -> None:
    """Post-train the built-in model with the whole method; evaluate it before and after."""
    with output_folder(output_dir, "vigos demo", DEMO, overwrite=overwrite):
        import torch

        from vigos.study.demo import run_demo

        # A model this small gains nothing from a second core, and loses tenfold where another program wants that core.
        torch.set_num_threads(1)
        run_demo(output_dir, quick=quick, seed=seed, console=make_console())


# --- train, palr -----------------------------------------------------------------------------------------------------


@app.command(cls=_Raw, context_settings=_RAW, add_help_option=False)
def train(
    context: typer.Context, config: Config = None, recipe: Recipe = None, list_options: Listing = False,
    show_help: Help = False,
) -> None:  # fmt: skip
    """Train with ViGOS."""
    _stop_for_help(TRAIN, show_help, list_options)
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
    """List the recipes: configurations of published methods, for `vigos train --recipe NAME`."""
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


@app.command(cls=_Raw, context_settings=_RAW, add_help_option=False)
def palr(context: typer.Context, config: Config = None, list_options: Listing = False, show_help: Help = False) -> None:
    """Measure how much of the supervision the answer buys."""
    _stop_for_help(PALR, show_help, list_options)
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


# --- eval, probe, compare --------------------------------------------------------------------------------------------


@app.command("eval", cls=_Raw, context_settings=_RAW, add_help_option=False)
def evaluate_command(
    context: typer.Context,
    config: Config = None,
    baseline: Annotated[Path | None, typer.Option(help="Evaluation of the untrained model.")] = None,
    force: Force = False,
    list_options: Listing = False,
    show_help: Help = False,
) -> None:
    """Evaluate a model under the student's prompt."""
    _stop_for_help(EVAL, show_help, list_options)
    console = make_console()
    source, options = EVAL.parse(config, context.args)
    with output_folder(source.output_dir, "vigos eval"):
        from vigos.eval.results import EvaluationResult
        from vigos.launch import evaluate_from_source

        untrained = EvaluationResult.load(baseline) if baseline is not None else None
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("examples", total=None)
            result = evaluate_from_source(
                source, options, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
    summaries = [result]
    if untrained is not None:
        check_comparable(untrained, EvaluationResult.load(source.output_dir), force)
        summaries.append(untrained.summary())
    shown = [name for name, value in result.items() if isinstance(value, int | float)]
    rows = [(name, *(_shown(summary, name) for summary in summaries)) for name in shown]
    print_table(console, ("metric", "value", "baseline")[: 1 + len(summaries)], rows)
    typer.echo(f"records and summary: {source.output_dir}")


def check_comparable(first: EvaluationResult, second: EvaluationResult, force: bool) -> None:
    """Refuse to put evaluations side by side that do not measure the same thing; with `force` warn.

    Raises:
        ValueError: what differs.
    """
    if found := first.mismatches(second):
        text = f"the two evaluations do not measure the same thing: {'; '.join(found)}"
        if not force:
            raise ValueError(f"{text}. --force shows them all the same")
        typer.echo(f"warning: {printable(text)}", err=True)


def _shown(summary: dict[str, Any], name: str) -> str:
    """Return a metric as text: a share as per cent with its interval, anything else as a number."""
    value, interval = summary.get(name, math.nan), summary.get(f"{name}_interval")
    if isinstance(value, int):
        return str(value)
    if name == "tokens_mean" or math.isnan(value):
        return f"{value:.1f}"
    return per_cent(value, interval)


@app.command("probe", cls=_Raw, context_settings=_RAW, add_help_option=False)
def probe_command(
    context: typer.Context, config: Config = None, list_options: Listing = False, show_help: Help = False
) -> None:
    """Measure whether a model looks at the image."""
    _stop_for_help(PROBE, show_help, list_options)
    source, options = PROBE.parse(config, context.args)
    from vigos.launch import probe_from_source

    with output_folder(source.output_dir, "vigos probe"):
        found = probe_from_source(source, options)
    rows = []
    for name, values in found.items():
        cells = [name, per_cent(values["accuracy"], values["accuracy_interval"]), "", "", ""]
        if "difference" in values:
            low, high = values["difference_interval"]
            cells[2:] = [
                f"{100 * values['difference']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}",
                f"{values['p_value']:.2g}",
            ]  # fmt: skip
        rows.append(cells)
    columns = ("images", "accuracy (95 % interval)", "against intact", "95 % interval", "p")
    print_table(make_console(), columns, rows)
    typer.echo(f"records and probes.json: {source.output_dir}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder or records.jsonl of one evaluation.")],
    b: Annotated[Path, typer.Argument(help="Those of the other.")],
    force: Force = False,
) -> None:
    """Compare two evaluations, paired on the examples they share: b - a in points, 95 % interval, exact p.

    Five metrics are looked at, so one counts as different at p < 0.01: two runs of one model then differ in one of them
    at most once in twenty times.
    """
    from vigos.eval.results import EvaluationResult
    from vigos.eval.results import compare as paired

    first, second = EvaluationResult.load(a), EvaluationResult.load(b)
    check_comparable(first, second, force)
    rows = []
    for metric in ("accuracy", "score", "prior", "valid_rate", "unparseable"):
        if not (first.values(metric) and second.values(metric)):  # type: ignore[arg-type]
            continue
        c = paired(first, second, metric=metric)  # type: ignore[arg-type]
        low, high = c.interval
        rows.append(
            (
                metric, str(c.examples), per_cent(c.a), per_cent(c.b), f"{100 * c.difference:+.1f}",
                f"{100 * low:+.1f} to {100 * high:+.1f}", f"{c.better} / {c.worse}", f"{c.p_value:.2g}",
                "yes" if c.differs else "no",
            )
        )  # fmt: skip
    columns = ("metric", "examples", "a", "b", "b - a", "95 % interval", "better / worse", "p", "differs")
    print_table(make_console(), columns, rows)
    for name, result, other in (("a", first, second), ("b", second, first)):
        missing = len({r["key"] for r in result.answered} - {r["key"] for r in other.answered})
        if missing:
            typer.echo(f"left out: {missing} examples that only {name} has")
        if result.damaged:
            typer.echo(f"left out: {result.damaged} damaged lines of {name}")


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
    """Write one HTML file about a run: headline numbers, rollouts token by token, curves, cost. It loads nothing."""
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
    bases: Annotated[int | None, typer.Option(help="How many bases; default: the plan's.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many training seeds of each.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of a cell.")] = None,
    axis: Annotated[list[str] | None, typer.Option(help="Turn this knob only; may be given again.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes side by side, one thread each.")] = 2,
    draw_only: Annotated[bool, typer.Option("--draw-only", help="Tables and figures from the CSV files.")] = False,
) -> None:
    """Compare the methods and their parts on the built-in world. A stopped study goes on where it stopped."""
    from vigos.study.plan import CONTROL, FULL, QUICK, reduced
    from vigos.study.results import draw, print_results
    from vigos.study.run import run_study

    def tell(what: str, done: int, total: int) -> None:
        typer.echo(f"{done}/{total} {printable(what)}")

    results = output_dir / "results.csv"
    if not draw_only:
        plan = QUICK if quick else CONTROL if controls else FULL
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
    """Say what this machine can run, and check each engine against the oracle."""
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
