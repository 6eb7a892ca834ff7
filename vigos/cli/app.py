"""The application: what its commands share, and those whose options are fields of dataclasses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vigos.cli.options import Command
from vigos.system.screen import screen_width

app = typer.Typer(
    help="Visually grounded on-policy self-distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is plain text, which a pipe can hold
)


class Raw(TyperCommand):
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


world_app = typer.Typer(help="Make and check the built-in world.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(world_app, name="world")

# Commands whose options are fields of dataclasses take every word themselves, `--help` included.
RAW = {"allow_extra_args": True, "ignore_unknown_options": True}
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
    "against the intact one. Takes the options of eval, and views_of.",
    kinds=(("vigos.launch", "ProbeSource"), ("vigos.eval.config", "EvalConfig")),
    shown=(*EVAL.shown, "views_of"),
    example="vigos probe --model runs/3b/merged --data data/test.jsonl --output-dir runs/3b/probes",
)


def stop_for_help(command: Command, show_help: bool, list_options: bool) -> None:
    """Print help or options, if they are asked for, and stop."""
    if show_help or list_options:
        typer.echo(command.help(screen_width()) if show_help else command.listing())
        raise typer.Exit
