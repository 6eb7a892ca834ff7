"""Run `vigos train`, `palr`, `eval` and `probe`: from a model name and a dataset to a trained or measured model."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vigos.system.files import read_sections, replace_json
from vigos.system.secrets import server_address
from vigos.train.facts import data_facts, process_facts

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from vigos.data.examples import ExampleDataset, ExampleStream
    from vigos.eval.config import EvalConfig
    from vigos.eval.judge import Judge
    from vigos.method.asking import Asking
    from vigos.method.views import View
    from vigos.rollout.server import ServerEngine
    from vigos.train.config import ViGOSConfig
    from vigos.train.trainer import ViGOSTrainer

logger = logging.getLogger(__name__)


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class _ModelAndData:
    """Options of every command that loads a model and data."""

    model: str = _option("", "Model folder or hub name; 'builtin' for the built-in model.")
    data: str = _option("", "JSONL, JSON or Parquet file, folder, or name for `datasets`.")
    split: str = _option("train", "Split of a folder or of a dataset on the hub.")
    data_root: str | None = _option(None, "Folder that image paths are relative to; default: the folder of the data.")
    allow_outside_root: bool = _option(False, "Read images outside that folder, or behind links that lead out of it.")
    limit: int | None = _option(None, "Use the first examples of the data alone.")
    dtype: str = _option("bfloat16", "Dtype the model is loaded in.")

    def read(self, columns: Any, **options: Any) -> ExampleDataset | ExampleStream:
        """Open the data with the column names of an object that has them as `problem_column` and so on."""
        from vigos.data.examples import load_rows

        names = {f"{n}_column": getattr(columns, f"{n}_column") for n in ("problem", "images", "answer", "id")}
        rules: dict[str, Any] = {"data_root": self.data_root, "allow_outside_root": self.allow_outside_root}
        return self.head_of(load_rows(self.data, split=self.split, **names, **rules, **options))

    def head_of(self, examples: ExampleDataset | ExampleStream) -> ExampleDataset | ExampleStream:
        """Return the first `limit` examples."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        return examples if self.limit is None else examples.first(self.limit)


@dataclasses.dataclass
class Source(_ModelAndData):
    """Name what is trained on what; the rest of the configuration is `ViGOSConfig`."""

    streaming: bool = _option(False, "Read the data as a stream.")
    attn_implementation: str | None = _option(None, "As in transformers.")
    trust_remote_code: bool = _option(False, "Run code from the model's repository.")
    load_in_4bit: bool = _option(False, "Keep the language model under the adapter in 4 bits (bitsandbytes, NF4).")
    resume: str | None = _option(None, "Go on with an earlier run: from a checkpoint folder, or 'auto': the last one.")
    overwrite: bool = _option(False, "Delete the earlier run in the output folder first.")


@dataclasses.dataclass
class PalrSource(Source):
    """Name the student, its teacher and the examples that PALR is measured on."""

    limit: int | None = _option(64, "Measure on the first examples of the data, at least 2.")
    adapter: str | None = _option(None, "Folder of the student's LoRA adapter; without it the model is the teacher.")
    teacher_model: str | None = _option(None, "Teacher of a student that was trained in full.")


@dataclasses.dataclass
class EvalSource(_ModelAndData):
    """Name what is evaluated on what; the rest of the configuration is `EvalConfig`."""

    output_dir: str = _option("", "Folder for records and their summary; finished examples are kept.")
    adapter: str | None = _option(None, "Folder of a LoRA adapter that is put on the model.")
    prompts_file: str | None = _option(None, "YAML with prompt templates; unset: those saved with the weights.")
    chat_template_kwargs: str | None = _option(
        None, 'JSON for the chat template, such as {"enable_thinking": false}; adds to those saved with them.'
    )
    problem_column: str = _option("problem", "Column with the question.")
    images_column: str | None = _option("images", "Column with the image or list of images.")
    answer_column: str = _option("answer", "Column with the reference answer.")
    id_column: str = _option("problem_id", "Column with the example's id.")
    benchmark: str | None = _option(None, "Layout of a published benchmark that `data` is in: vilp, mmmu, …")
    judge_url: str | None = _option(None, "Server of a judge, up to and including /v1.")
    judge_model: str | None = _option(None, "The judge's name on that server.")
    server_url: str | None = _option(None, "Server with vLLM's API that answers, up to and including /v1.")
    server_model: str | None = _option(
        None, "The model's name there; `model` then names its configuration and processor."
    )

    def __post_init__(self) -> None:
        for first, second in (("judge_url", "judge_model"), ("server_url", "server_model")):
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise ValueError(
                    f"{first} and {second} go together, got {getattr(self, first)!r} and {getattr(self, second)!r}"
                )
        for name, variable in (("judge_url", "VIGOS_JUDGE_API_KEY"), ("server_url", "VIGOS_ROLLOUT_API_KEY")):
            if (address := getattr(self, name)) is not None:
                server_address(address, name, variable)
        if self.server_url is not None and self.adapter is not None:
            raise ValueError(f"adapter must be loaded by the server, and server_model its name; got {self.adapter!r}")

    def examples(self) -> ExampleDataset | ExampleStream:
        """Open the data: in the layout of `benchmark`, or any that `load_rows` reads."""
        from vigos.data.benchmarks import load_benchmark

        if self.benchmark is not None:
            return self.head_of(load_benchmark(self.benchmark, self.data, allow_outside_root=self.allow_outside_root))
        return self.read(self)

    def judge(self) -> Judge | None:
        """Return the judge, if one is named."""
        from vigos.eval.judge import Judge

        return None if self.judge_url is None else Judge(self.judge_url, self.judge_model or "")

    def asking(self) -> Asking:
        """Return how the model is asked: as a file says, as was saved with its weights, or by default."""
        asking = asking_of(self.model, self.prompts_file, adapter=self.adapter)
        return dataclasses.replace(asking, prompts=asking.prompts.with_template_kwargs(self.chat_template_kwargs))

    def student(self, *, concurrency: int = 16) -> tuple[Any, Any, ServerEngine | None]:
        """Load the model (with its adapter) and its processor; with `server_url` no model, but the server's engine.

        Args:
            concurrency: requests under way at the server.
        """
        if self.server_url is not None and self.server_model is not None:
            engine, processor = load_served(self.model, self.server_url, self.server_model, concurrency=concurrency)
            return None, processor, engine
        model: Any
        model, processor = load_model(self.model, dtype=self.dtype)
        if self.adapter:
            from vigos.models.load import load_adapter

            model = load_adapter(model, self.adapter)
        return model, processor, None


@dataclasses.dataclass
class ProbeSource(EvalSource):
    """Name what is probed on what."""

    views_of: str | None = _option(
        None, "Folder of a run: also ask with the images as its student and each of its teachers saw them."
    )

    def views(self) -> dict[str, View]:
        """Return the views of the run's roles by name, those of roles that have one.

        Raises:
            ValueError: no run, or one whose roles all see the images as they are.
        """
        from vigos.method.views import View

        if self.views_of is None:
            return {}
        options = read_sections(Path(self.views_of) / "config.yaml").get("vigos", {})
        columns = options.get("images_columns") or {}
        given: dict[str, Any] = {role: {"column": column} for role, column in columns.items()}
        given |= {teacher["name"]: teacher.get("view") for teacher in options.get("teachers") or ()}
        given |= {"student": options.get("student_view") or given.get("student")}
        found = {f"view-{name}": View.read(view) for name, view in given.items() if view is not None}
        if not found:
            raise ValueError(f"views_of must be a run whose roles have views, got {self.views_of!r}")
        return found  # type: ignore[return-value]


def load_model(name: str, **options: Any) -> tuple[PreTrainedModel, Any]:
    """Load a model and its processor (a tokenizer for text-only models) from a folder or hub name, or "builtin".

    See `vigos.models.load.load_model`, whose options these are: no code of the model's own unless `trust_remote_code`
    is set, no pickle. The built-in model has one dtype, and takes `load_in_4bit` alone.
    """
    from vigos.models import load
    from vigos.world import checkpoint_path, load_base

    if name != "builtin":
        return load.load_model(name, **options)
    if options.get("load_in_4bit"):
        return load.load_model(str(checkpoint_path()), dtype="float32", load_in_4bit=True)
    return load_base()


def train_from_source(source: Source, config: ViGOSConfig, *, console: Console | None = None) -> ViGOSTrainer:
    """Load model and data, train, and leave the run folder; return the trainer.

    Args:
        console: shows a line a step there, in place of what transformers prints.
    """
    from vigos.train.watch import Watch

    resume, finished = _restart(source.resume, config) if source.resume is not None else (None, False)
    changed = _changed_options(config) if resume or finished else []
    trainer = build_trainer(source, config)
    trainer.facts = run_facts(source)
    if console is not None:
        Watch.attach(trainer, console)
    for line in changed:
        logger.warning("changed since: %s (optimizer and schedule keep the state they were saved with)", line)
    if finished:
        logger.warning("the run is finished, and its final weights are whole; nothing was trained")
    else:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def run_facts(source: Source | EvalSource) -> dict[str, Any]:
    """Return what repeats a run beside its options: model, data and its digest, versions, the command line."""
    facts = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    facts = {k: v for k, v in facts.items() if k not in ("resume", "overwrite") and v is not None}
    return facts | data_facts(source.data) | process_facts()


def _restart(resume: str, config: ViGOSConfig) -> tuple[str | None, bool]:
    """Return the checkpoint to go on from (None: `auto` finds none), and whether the run is finished already.

    Raises:
        ValueError: no such checkpoint, or a damaged one.
        CheckpointError: all that `auto` finds are damaged.
    """
    from vigos.train.checkpoint import last_checkpoint, whole_checkpoint
    from vigos.train.final import final_state
    from vigos.train.manifest import MANIFEST, damage, is_trained

    folder, checkpoint, step = str(config.output_dir), None, -1
    if resume == "auto":
        with config.main_process_first(local=False):  # the others look when the leader has set aside what is damaged
            checkpoint = whole_checkpoint(folder) if config.process_index == 0 else last_checkpoint(folder)
    else:
        checkpoint = Path(resume)
        if not (checkpoint / "trainer_state.json").is_file():
            raise ValueError(f"resume must be 'auto' or a checkpoint folder, got {resume!r}")
        if (checkpoint / MANIFEST).exists() and (reason := damage(checkpoint)):
            raise ValueError(f"resume must name a checkpoint that is whole; of {resume}, {reason}")
    if checkpoint is not None:
        step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    final = final_state(config)
    ahead = final["global_step"] - step if final else 0
    if final and is_trained(final, config) and (ahead == 0 or (resume == "auto" and ahead > 0)):
        return None, True
    if checkpoint is not None:
        logger.info("resuming from %s, after step %d", checkpoint, step)
        return str(checkpoint), False
    if final:
        raise ValueError(
            f"resume finds the final weights of step {final['global_step']} in {folder} and no checkpoint to train on "
            "from; begin anew with --overwrite, or in another folder from these weights"
        )
    logger.info("nothing to resume from in %s; starting anew", folder)
    return None, False


def _changed_options(config: ViGOSConfig) -> list[str]:
    """List the options that differ from those of the run's config.yaml, as `name old -> new`."""
    import yaml

    from vigos.train.run_folder import plain

    path = Path(str(config.output_dir)) / "config.yaml"
    sections = read_sections(path)
    if path.is_file() and not sections:
        logger.warning("%s is damaged: what has changed since it was written is not known", path)
    old = {**sections.get("transformers", {}), **sections.get("vigos", {})}
    now = yaml.safe_load(yaml.safe_dump({k: plain(v) for k, v in config.to_dict().items() if k in old}))
    places = ("output_dir", "logging_dir", "run_name", "local_rank", "resume_from_checkpoint")
    return [f"{k} {old[k]!r} -> {v!r}" for k, v in now.items() if v != old[k] and k not in places]


def build_trainer(source: Source, config: ViGOSConfig, *, adapter: str | None = None) -> ViGOSTrainer:
    """Build a trainer from model, data and prompts of `source`; `adapter` is put on the model and trained on."""
    from vigos.train.trainer import ViGOSTrainer

    model: Any
    model, processor = load_model(
        source.model,
        dtype=source.dtype,
        attn_implementation=source.attn_implementation,
        trust_remote_code=source.trust_remote_code,
        load_in_4bit=source.load_in_4bit,
    )
    if adapter is not None:
        from vigos.models.load import load_adapter

        model = load_adapter(model, adapter, trainable=True)
    return ViGOSTrainer(
        model=model,
        args=config,
        processing_class=processor,
        train_dataset=source.read(config, streaming=source.streaming),
        prompts=asking_of(source.model, config.prompts_file, adapter=adapter).prompts,
    )


def palr_from_source(source: PalrSource, config: ViGOSConfig, *, group: int = 32) -> dict[str, Any]:
    """Measure PALR of the student's rollouts, and write `palr.json` to `config.output_dir`; see `vigos.train.palr`.

    Args:
        group: examples measured at once, which lend each other answers and images.
    """
    from itertools import islice

    from vigos.scoring.teacher import TeacherScorer
    from vigos.train.palr import PALR, measure_palr

    if source.limit is None or source.limit < 2:
        raise ValueError(f"limit must be at least 2: examples lend each other answers and images; got {source.limit}")
    trainer = build_trainer(source, config, adapter=source.adapter)
    scorer, teacher = trainer.scorer, None if source.teacher_model or source.adapter else trainer.teacher
    if source.adapter and not source.teacher_model:  # the teacher is what the adapter was trained from
        scorer = TeacherScorer(
            trainer.model, scoring=config.teacher_scoring, verify=config.teacher_verify,
            token_budget=config.token_budget,
        )  # fmt: skip
    if source.teacher_model:
        taught: Any = load_model(source.teacher_model, dtype=source.dtype, trust_remote_code=source.trust_remote_code)[
            0
        ]
        scorer = TeacherScorer(taught.to(trainer.model.device), token_budget=config.token_budget)
    dataset: Any = trainer.train_dataset
    examples, parts = iter(dataset), []
    while members := list(islice(examples, group)):
        rollouts = trainer.sample_rollouts(members)
        parts.append(
            measure_palr(
                rollouts, config, student=trainer.model, scorer=scorer, teacher=teacher, prompts=trainer.prompts,
                processor=trainer.processing_class, wrong_answers=config.palr_wrong_answers, seed=config.seed,
                other_models=trainer.other_models,
            )
        )  # fmt: skip
    found = PALR.joined(parts).summary()
    if not found["rollouts"]:
        reasons = ", ".join(f"{reason} {n}" for reason, n in found["left_out"].items()) or "no usable example"
        raise ValueError(f"data: PALR could be measured on none of {source.limit} examples ({reasons})")
    found = {"method": config.method, **found}
    folder = Path(str(config.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(folder / "palr.json", found)
    return found


def asking_of(model: str, prompts_file: str | None = None, *, adapter: str | None = None) -> Asking:
    """Return how a model is asked: as a file says, as was saved with the adapter or the model, or by default."""
    from vigos.method.asking import Asking
    from vigos.method.prompts import Prompts
    from vigos.world import checkpoint_path, world_prompts

    asking = Asking.load(adapter) or Asking.load(model)
    if asking is None and (model == "builtin" or Path(model).resolve() == checkpoint_path().resolve()):
        asking = Asking(world_prompts())  # it knows no other wording
    asking = asking or Asking()
    return dataclasses.replace(asking, prompts=Prompts.from_file(prompts_file)) if prompts_file else asking


def load_served(model: str, url: str, served: str, *, concurrency: int) -> tuple[ServerEngine, Any]:
    """Return an engine on a server that holds the model, and the model's processor; no weights are loaded.

    Args:
        model: folder or hub name that configuration and processor come from.
        url: up to and including /v1. served: the model's name there, or an adapter's.
    """
    from transformers import GenerationConfig

    from vigos.models.load import load_config, load_processor
    from vigos.rollout.engine import id_rules
    from vigos.rollout.server import ServerEngine

    if model == "builtin":
        from vigos.world import checkpoint_path

        model = str(checkpoint_path())
    config, processor = load_config(model), load_processor(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    try:
        generation: Any = GenerationConfig.from_pretrained(model)
    except OSError:  # not every model has one
        generation = None
    engine = ServerEngine(
        url, served, tokenizer, concurrency=concurrency,
        **id_rules(SimpleNamespace(config=config, generation_config=generation), tokenizer),
    )  # fmt: skip
    return engine, processor


def evaluate_from_source(
    source: EvalSource, config: EvalConfig, *, progress: Callable[[int, int | None], None] | None = None
) -> dict[str, Any]:
    """Evaluate, and write `records.jsonl` and `summary.json` to `source.output_dir`; finished examples are kept."""
    from vigos.eval.evaluate import evaluate

    examples = source.examples()  # before the model: what is wrong with the data is said at once
    judge = source.judge()
    asking = source.asking()
    config = dataclasses.replace(config, validity=config.validity or asking.validity)
    model, processor, engine = source.student(concurrency=config.batch_size)
    folder = Path(source.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = evaluate(
        model, processor, examples, config, prompts=asking.prompts, engine=engine, records=folder / "records.jsonl",
        judge=judge, progress=progress,
    )  # fmt: skip
    summary = result.summary()
    replace_json(folder / "summary.json", summary)
    root = source.data_root or (str(Path(source.data).resolve().parent) if Path(source.data).is_file() else source.data)
    replace_json(folder / "evaluation.json", {**run_facts(source), "data_root": root})  # read by `vigos report`
    return summary


def probe_from_source(source: ProbeSource, config: EvalConfig) -> dict[str, Any]:
    """Evaluate with each probe, and write their records and `probes.json` to `source.output_dir`."""
    from vigos.eval.probes import probe, summarise

    if source.server_url is not None:
        raise ValueError(f"server_url must not be set for probes, which load the model, got {source.server_url!r}")
    examples: Any = source.examples()
    views, asking = source.views(), source.asking()
    config = dataclasses.replace(config, validity=config.validity or asking.validity)
    model, processor, _ = source.student()
    folder = Path(source.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    judge = source.judge()
    results = probe(model, processor, examples, config, views=views, folder=folder, prompts=asking.prompts, judge=judge)
    summary = summarise(*results)
    replace_json(folder / "probes.json", summary)
    return summary
