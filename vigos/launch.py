"""Run `vigos train`, `palr`, `eval` and `probe`: from a model name and a dataset to a trained or measured model."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vigos.data.examples import ExampleDataset, ExampleStream
    from vigos.eval.config import EvalConfig
    from vigos.eval.judge import Judge
    from vigos.method.prompts import Prompts
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
    data_root: str | None = _option(None, "Folder that image paths are relative to; default: the folder of the data.")
    allow_outside_root: bool = _option(False, "Read images outside that folder, or behind links that lead out of it.")
    dtype: str = _option("bfloat16", "Dtype the model is loaded in.")


@dataclasses.dataclass
class Source(_ModelAndData):
    """Name what is trained on what; the rest of the configuration is `ViGOSConfig`."""

    streaming: bool = _option(False, "Read the data as a stream.")
    attn_implementation: str | None = _option(None, "As in transformers.")
    trust_remote_code: bool = _option(False, "Run code from the model's repository.")
    resume: str | None = _option(None, "'auto' or a checkpoint folder.")


@dataclasses.dataclass
class PalrSource(Source):
    """Name the student, its teacher and the examples that PALR is measured on."""

    limit: int = _option(64, "First examples of the data that are measured, at least 2.")
    adapter: str | None = _option(None, "Folder of the student's LoRA adapter; without it the model is the teacher.")
    teacher_model: str | None = _option(None, "Teacher of a student that was trained in full.")


@dataclasses.dataclass
class EvalSource(_ModelAndData):
    """Name what is evaluated on what; the rest of the configuration is `EvalConfig`."""

    output_dir: str = _option("", "Folder for records and their summary; finished examples are kept.")
    adapter: str | None = _option(None, "Folder of a LoRA adapter that is put on the model.")
    prompts_file: str | None = _option(None, "YAML file with prompt templates.")
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
        if self.server_url is not None and self.adapter is not None:
            raise ValueError(f"adapter must be loaded by the server, and server_model its name; got {self.adapter!r}")

    def examples(self) -> ExampleDataset | ExampleStream:
        """Open the data: in the layout of `benchmark`, or any that `load_rows` reads."""
        from vigos.data.benchmarks import load_benchmark
        from vigos.data.examples import load_rows

        if self.benchmark is not None:
            return load_benchmark(self.benchmark, self.data, allow_outside_root=self.allow_outside_root)
        return load_rows(self.data, data_root=self.data_root, allow_outside_root=self.allow_outside_root)

    def judge(self) -> Judge | None:
        """Return the judge, if one is named."""
        from vigos.eval.judge import Judge

        return None if self.judge_url is None else Judge(self.judge_url, self.judge_model or "")

    def student(self, *, concurrency: int = 16) -> tuple[Any, Any, Prompts, ServerEngine | None]:
        """Load model (with its adapter), processor and prompts; with `server_url` no model, but the server's engine.

        Args:
            concurrency: requests under way at the server.
        """
        prompts = prompts_of(self.model, self.prompts_file)
        if self.server_url is not None and self.server_model is not None:
            engine, processor = load_served(self.model, self.server_url, self.server_model, concurrency=concurrency)
            return None, processor, prompts, engine
        model: Any
        model, processor = load_model(self.model, dtype=self.dtype)
        if self.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self.adapter)
        return model, processor, prompts, None


def load_model(
    name: str, *, dtype: str = "bfloat16", attn_implementation: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its processor (a tokenizer for text-only models) from a folder or hub name, or "builtin".

    Weights come from safetensors alone: a pickle is never loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    if name == "builtin":
        from vigos.world import load_base

        return load_base()
    if dtype not in ("float32", "float16", "bfloat16", "auto"):
        raise ValueError(f"dtype must be float32, float16, bfloat16 or auto, got {dtype!r}")
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    has_vision = getattr(config, "vision_config", None) is not None
    family = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    model = family.from_pretrained(
        name,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
    )
    return model, AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)


def train_from_source(source: Source, config: ViGOSConfig) -> ViGOSTrainer:
    """Load model and data, train, and leave the run folder; return the trainer."""
    trainer = build_trainer(source, config)
    resume = source.resume
    if resume == "auto":
        from vigos.train.checkpoint import last_checkpoint

        found = last_checkpoint(str(config.output_dir))
        resume = None if found is None else str(found)
        logger.info("resuming from %s", resume) if resume else logger.info("nothing to resume from; starting anew")
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def build_trainer(source: Source, config: ViGOSConfig, *, adapter: str | None = None) -> ViGOSTrainer:
    """Build a trainer from model, data and prompts of `source`; `adapter` is put on the model and trained on."""
    from vigos.data.examples import load_rows
    from vigos.train.trainer import ViGOSTrainer

    model: Any
    model, processor = load_model(
        source.model,
        dtype=source.dtype,
        attn_implementation=source.attn_implementation,
        trust_remote_code=source.trust_remote_code,
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    rows = load_rows(
        source.data,
        problem_column=config.problem_column,
        images_column=config.images_column,
        answer_column=config.answer_column,
        id_column=config.id_column,
        data_root=source.data_root,
        allow_outside_root=source.allow_outside_root,
        streaming=source.streaming,
    )
    prompts = prompts_of(source.model, config.prompts_file)
    return ViGOSTrainer(model=model, args=config, processing_class=processor, train_dataset=rows, prompts=prompts)


def palr_from_source(source: PalrSource, config: ViGOSConfig, *, group: int = 32) -> dict[str, Any]:
    """Measure PALR of the student's rollouts, and write `palr.json` to `config.output_dir`; see `vigos.train.palr`.

    Args:
        group: examples measured at once, which lend each other answers and images.
    """
    from itertools import islice

    from vigos.scoring.teacher import TeacherScorer
    from vigos.train.palr import PALR, measure_palr

    if source.limit < 2:
        raise ValueError(f"limit must be at least 2: examples lend each other answers and images; got {source.limit}")
    trainer = build_trainer(source, config, adapter=source.adapter)
    scorer, teacher = trainer.scorer, None if source.teacher_model else trainer.teacher
    if source.teacher_model:
        taught: Any = load_model(source.teacher_model, dtype=source.dtype, trust_remote_code=source.trust_remote_code)[
            0
        ]
        scorer = TeacherScorer(taught.to(trainer.model.device), token_budget=config.token_budget)
    dataset: Any = trainer.train_dataset
    source_rows, parts = islice(iter(dataset), source.limit), []
    while members := list(islice(source_rows, group)):
        rollouts = trainer.sample_rollouts(members)
        parts.append(
            measure_palr(
                rollouts, config, student=trainer.model, scorer=scorer, teacher=teacher, prompts=trainer.prompts,
                processor=trainer.processing_class, wrong_answers=config.palr_wrong_answers, seed=config.seed,
            )
        )  # fmt: skip
    found = PALR.joined(parts).summary()
    if not found["rollouts"]:
        reasons = ", ".join(f"{reason} {n}" for reason, n in found["left_out"].items()) or "no usable example"
        raise ValueError(f"data: PALR could be measured on none of {source.limit} examples ({reasons})")
    found = {"method": config.method, **found}
    folder = Path(str(config.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "palr.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def prompts_of(model: str, prompts_file: str | None) -> Prompts:
    """Return the prompts that a model is asked with: those of a file, the built-in model's, or the defaults."""
    from vigos.method.prompts import Prompts

    if prompts_file:
        return Prompts.from_file(prompts_file)
    if model == "builtin":  # it knows no other wording
        from vigos.world import world_prompts

        return world_prompts()
    return Prompts()


def load_served(model: str, url: str, served: str, *, concurrency: int) -> tuple[ServerEngine, Any]:
    """Return an engine on a server that holds the model, and the model's processor; no weights are loaded.

    Args:
        model: folder or hub name that configuration and processor come from.
        url: up to and including /v1. served: the model's name there, or an adapter's.
    """
    from transformers import AutoConfig, AutoProcessor, GenerationConfig

    from vigos.rollout.engine import eos_ids, placeholder_ids
    from vigos.rollout.server import ServerEngine

    if model == "builtin":
        from vigos.world import checkpoint_path

        model = str(checkpoint_path())
    config, processor = AutoConfig.from_pretrained(model), AutoProcessor.from_pretrained(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    try:
        generation: Any = GenerationConfig.from_pretrained(model)
    except OSError:  # not every model has one
        generation = None
    engine = ServerEngine(
        url, served, tokenizer, eos_token_ids=eos_ids(SimpleNamespace(generation_config=generation), tokenizer),
        banned_token_ids=placeholder_ids(config), vocab_size=config.get_text_config().vocab_size,
        concurrency=concurrency,
    )  # fmt: skip
    return engine, processor


def evaluate_from_source(
    source: EvalSource, config: EvalConfig, *, progress: Callable[[int, int | None], None] | None = None
) -> dict[str, Any]:
    """Evaluate, and write `records.jsonl` and `summary.json` to `source.output_dir`; finished examples are kept."""
    from vigos.eval.evaluate import evaluate

    examples = source.examples()  # before the model: what is wrong with the data is said at once
    judge = source.judge()
    model, processor, prompts, engine = source.student(concurrency=config.batch_size)
    folder = Path(source.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = evaluate(
        model, processor, examples, config, prompts=prompts, engine=engine, records=folder / "records.jsonl",
        eos_token_ids=None if engine is None else engine.checks.eos_token_ids, judge=judge, progress=progress,
    )  # fmt: skip
    summary = result.summary()
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


def probe_from_source(source: EvalSource, config: EvalConfig) -> dict[str, Any]:
    """Evaluate with each probe, and write their records and `probes.json` to `source.output_dir`."""
    from vigos.eval.probes import probe, summarise

    if source.server_url is not None:
        raise ValueError(f"server_url must not be set for probes, which load the model, got {source.server_url!r}")
    examples: Any = source.examples()
    model, processor, prompts, _ = source.student()
    folder = Path(source.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(
        *probe(model, processor, examples, config, folder=folder, prompts=prompts, judge=source.judge())
    )
    (folder / "probes.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary
