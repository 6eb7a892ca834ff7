"""From a model name and a dataset to a trained or evaluated model: what `vigos train` and `vigos eval` run."""

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


@dataclasses.dataclass
class Source:
    """What is trained on what; the rest of the configuration is `ViGOSConfig`."""

    model: str = dataclasses.field(default="", metadata={"help": "Model folder or hub name."})
    data: str = dataclasses.field(default="", metadata={"help": "JSONL, Parquet, folder or `datasets` name."})
    data_root: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder that image paths are relative to."}
    )
    allow_outside_root: bool = dataclasses.field(
        default=False, metadata={"help": "Read images outside that folder, or behind links that lead out of it."}
    )
    streaming: bool = dataclasses.field(default=False, metadata={"help": "Read the data as a stream."})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"help": "Dtype the model is loaded in."})
    attn_implementation: str | None = dataclasses.field(default=None, metadata={"help": "As in transformers."})
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Run code from the model's repository."}
    )
    resume: str | None = dataclasses.field(default=None, metadata={"help": "'auto' or a checkpoint folder."})


@dataclasses.dataclass
class EvalSource:
    """Name what is evaluated on what; the rest of the configuration is `EvalConfig`."""

    model: str = dataclasses.field(
        default="", metadata={"help": "Model folder or hub name; 'builtin' for the built-in model."}
    )
    data: str = dataclasses.field(default="", metadata={"help": "JSONL, Parquet, folder or `datasets` name."})
    output_dir: str = dataclasses.field(
        default="",
        metadata={
            "help": "Folder for records and their summary; finished examples are kept.",
            "aliases": ["--output-dir", "--output"],
        },
    )
    adapter: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder of a LoRA adapter that is put on the model."}
    )
    prompts_file: str | None = dataclasses.field(default=None, metadata={"help": "YAML file with prompt templates."})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"help": "Dtype the model is loaded in."})
    data_root: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder that image paths are relative to."}
    )
    allow_outside_root: bool = dataclasses.field(
        default=False, metadata={"help": "Read images outside that folder, or behind links that lead out of it."}
    )
    benchmark: str | None = dataclasses.field(
        default=None, metadata={"help": "Layout of a published benchmark that `data` is in: vilp, mmmu, …"}
    )
    judge_url: str | None = dataclasses.field(
        default=None, metadata={"help": "Server of a judge, up to and including /v1."}
    )
    judge_model: str | None = dataclasses.field(default=None, metadata={"help": "The judge's name on that server."})
    server_url: str | None = dataclasses.field(
        default=None, metadata={"help": "Server with vLLM's API that answers, up to and including /v1."}
    )
    server_model: str | None = dataclasses.field(
        default=None, metadata={"help": "The model's name there; `model` then names its configuration and processor."}
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
        from vigos.method.prompts import Prompts

        prompts = Prompts.from_file(self.prompts_file) if self.prompts_file else Prompts()
        if self.model == "builtin" and not self.prompts_file:  # it knows no other wording
            from vigos.world import world_prompts

            prompts = world_prompts()
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
    """A model and its processor (a tokenizer for text-only models), from a folder or hub name; "builtin" is our own.

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
    """Loads model and data, trains, and leaves the run folder; returns the trainer."""
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
    """Model, processor, rows and prompts of `source` in a trainer; `adapter` is put on the model and trained on."""
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
    prompts = None
    if source.model == "builtin" and not config.prompts_file:  # it knows no other wording
        from vigos.world import world_prompts

        prompts = world_prompts()
    return ViGOSTrainer(model=model, args=config, processing_class=processor, train_dataset=rows, prompts=prompts)


def palr_from_source(
    source: Source, config: ViGOSConfig, *, rows: int, adapter: str | None = None, teacher_model: str | None = None,
    group: int = 32,
) -> dict[str, Any]:  # fmt: skip
    """PALR of the student's rollouts of the first `rows` rows; see `vigos.train.palr`.

    Args:
        adapter: LoRA adapter of the student; its teacher is the model with the adapter off.
        teacher_model: folder or hub name of the teacher where the student was trained in full.
        group: rows measured at once, which lend each other answers and images.
    """
    from itertools import islice

    from vigos.scoring.teacher import TeacherScorer
    from vigos.train.palr import PALR, measure_palr

    if rows < 2:
        raise ValueError(f"rows must be at least 2, which lend each other answers and images, got {rows}")
    trainer = build_trainer(source, config, adapter=adapter)
    scorer, policy = trainer.scorer, None if teacher_model else trainer.policy
    if teacher_model:
        taught: Any = load_model(teacher_model, dtype=source.dtype, trust_remote_code=source.trust_remote_code)[0]
        scorer = TeacherScorer(taught.to(trainer.model.device), token_budget=config.token_budget)
    dataset: Any = trainer.train_dataset
    source_rows, parts = islice(iter(dataset), rows), []
    while members := list(islice(source_rows, group)):
        rollouts = trainer.sample_rollouts(members)
        parts.append(
            measure_palr(
                rollouts, config, student=trainer.model, scorer=scorer, policy=policy, prompts=trainer.prompts,
                processor=trainer.processing_class, wrong_answers=config.palr_wrong_answers, seed=config.seed,
            )
        )  # fmt: skip
    found = PALR.joined(parts).summary()
    if not found["rollouts"]:
        reasons = ", ".join(f"{reason} {n}" for reason, n in found["left_out"].items()) or "no usable row"
        raise ValueError(f"data: PALR could be measured on none of {rows} rows ({reasons})")
    return {"method": config.method, **found}


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
