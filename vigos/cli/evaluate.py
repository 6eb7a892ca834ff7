"""Commands that ask a model: eval, probe, compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from vigos.cli.app import EVAL, PROBE, RAW, Config, Force, Help, Listing, Raw, app, stop_for_help
from vigos.cli.folders import check_exist, output_folder
from vigos.system.screen import make_console, per_cent, print_table
from vigos.system.text import printable

if TYPE_CHECKING:
    from vigos.eval.results import EvaluationResult


@app.command("eval", cls=Raw, context_settings=RAW, add_help_option=False)
def evaluate_command(
    context: typer.Context,
    config: Config = None,
    baseline: Annotated[Path | None, typer.Option(help="Evaluation of the untrained model.")] = None,
    force: Force = False,
    list_options: Listing = False,
    show_help: Help = False,
) -> None:
    """Evaluate a model under the student's prompt."""
    stop_for_help(EVAL, show_help, list_options)
    check_exist(baseline)
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


@app.command("probe", cls=Raw, context_settings=RAW, add_help_option=False)
def probe_command(
    context: typer.Context, config: Config = None, list_options: Listing = False, show_help: Help = False
) -> None:
    """Measure whether a model looks at the image."""
    stop_for_help(PROBE, show_help, list_options)
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
    """Compare two evaluations. Paired on the examples they share: b - a in points, 95 % interval, exact p.

    Five metrics are looked at, so one counts as different at p < 0.01: two runs of one model then differ in one of them
    at most once in twenty times.
    """
    check_exist(a, b)
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
