"""The run folder: what ran, what it measured, what the student said, and what it became.

    config.yaml                       every option as it ran, the library's own first
    metrics.jsonl                     one line for each log: the step and every metric
    completions/step-000012.jsonl     rollouts: text, spans, validity and its reason, per-token divergence by teacher
    completions/images/               what they were shown, made small
    skipped.jsonl                     rows that could not be used: id, reason, detail
    faults/step-000012.jsonl          rollouts of steps with a loss or gradient that was not finite
    profile/                          a trace and a table of where time went (`profile`)
    checkpoint-12/                    transformers' checkpoints, whole or not there (vigos.train.checkpoint)
    adapter/, merged/                 the final adapter, and the model with the adapter added (a copy)
    model/                            the final model, after full fine-tuning

Lines are written whole and flushed, so that a killed run leaves readable files. A resumed run cuts off what the
checkpoint it starts from has not seen.
"""

from __future__ import annotations

import codecs
import enum
import hashlib
import json
import math
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback

from vigos.method.spans import token_bytes
from vigos.method.supervise import SEGMENTS, TERMS, Rollout, RoutedBatch
from vigos.train.checkpoint import SAVING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from vigos.data.examples import BadExample
    from vigos.divergence.api import DivergenceOutput
    from vigos.train.config import ViGOSConfig


class RunLog(TrainerCallback):
    """Writes a run folder; as a callback it records what the trainer logs.

    Args:
        folder: the run's `output_dir`.
        rank: of this process; rank 0 writes what all ranks share.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder, self.rank = Path(folder), rank

    def write_config(self, config: ViGOSConfig, **facts: Any) -> None:
        """`config.yaml`: the options of ViGOS, then those inherited from transformers, then `facts` about the run."""
        if self.rank != 0:
            return
        import yaml

        values = config.to_dict()  # secrets are masked in it
        own = [f.name for f in fields(config) if f.name in type(config).__annotations__ and f.name in values]
        document = {
            "vigos": {name: _plain(values[name]) for name in own},
            "transformers": {name: _plain(v) for name, v in values.items() if name not in own},
            "run": {name: _plain(v) for name, v in facts.items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        (self.folder / "config.yaml").write_text(text, encoding="utf-8")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets what lies after the step this run starts from."""
        if self.rank == 0:
            metrics = self.folder / "metrics.jsonl"
            if metrics.is_file():
                kept = [line for line in _lines(metrics) if _step_of(line) <= state.global_step > 0]
                metrics.write_text("".join(kept), encoding="utf-8")
            shutil.rmtree(self.folder / SAVING, ignore_errors=True)  # of a process that was killed while it saved
            skipped = self.folder / "skipped.jsonl"
            if skipped.is_file():  # steps count from 0 there: the one under way
                kept = [line for line in _lines(skipped) if _step_of(line) < state.global_step]
                skipped.write_text("".join(kept), encoding="utf-8") if kept else skipped.unlink()
            for path in sorted((self.folder / "completions").glob("step-*.jsonl")):
                if int(path.stem.split("-")[1]) > state.global_step:
                    path.unlink()
            if state.global_step == 0:
                shutil.rmtree(self.folder / "faults", ignore_errors=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends to `metrics.jsonl`."""
        if self.rank == 0 and logs:
            self._append("metrics.jsonl", {"step": state.global_step, **logs})

    def write_skipped(self, step: int, row: BadExample) -> None:
        """One row that was left out, to `skipped.jsonl`."""
        self._append("skipped.jsonl", {"step": step, "row": row.row_id, "reason": row.reason, "detail": row.detail})

    def write_completions(
        self, step: int, batch: RoutedBatch, output: DivergenceOutput, correct: list[bool | None], tokenizer: Any,
        *, image_side: int = 0, top: Any = None,
    ) -> None:  # fmt: skip
        """The micro-batch's rollouts; for each teacher the tokens it supervised, with the divergence (nats) at each,
        both log-probabilities and whether it was clipped.

        Args:
            image_side: the longest side, in pixels, of the images that are kept; 0: none.
            top: the most likely ids and their probabilities, (R, k) each, first the student's, then the teachers'.
        """
        values = {
            "divergence": output.divergence,
            "student_logprob": output.student_logprob,
            "teacher_logprob": output.teacher_logprob,
        }
        columns: dict[str, list[Any]] = {
            name: [round(v, 6) for v in _floats(x)] for name, x in values.items() if x is not None
        }
        if top is not None:
            for name, (ids, probabilities) in zip(("student_top", "teacher_top"), top, strict=True):
                columns[name] = _top_column(ids, probabilities, tokenizer)
        clipped = output.clipped.tolist()
        by_rollout: dict[int, dict[str, list[int]]] = {}
        for r, (owner, term) in enumerate(zip(batch.owner.tolist(), batch.term.tolist(), strict=True)):
            by_rollout.setdefault(owner, {}).setdefault(TERMS[term], []).append(r)
        name = f"completions/step-{step:06d}" + (f"-rank{self.rank}" if self.rank else "") + ".jsonl"
        segments, tokens = batch.segment.tolist(), batch.token.tolist()
        records = []
        for i, rollout in enumerate(batch.rollouts):
            spans = rollout.spans
            pieces = _texts(token_bytes(rollout.completion_ids.tolist(), tokenizer))
            record = {
                "step": step,
                "problem_id": rollout.problem_id,
                "problem": rollout.problem,
                "answer": rollout.answer,
                "images": [self._image(image, image_side) for image in rollout.images] if image_side else [],
                "tokens": pieces,
                "valid": spans.valid,
                "reason": spans.reason,
                "finished": spans.finished,
                "description": list(spans.description),
                "reasoning": list(spans.reasoning),
                "boxed": list(spans.answer),
                "answer_text": spans.answer_text,
                "correct": correct[i],
                "teachers": {
                    term: {
                        "tokens": [tokens[r] for r in rows],
                        "segments": [SEGMENTS[segments[r]] for r in rows],
                        "clipped": [clipped[r] for r in rows],
                        **{key: [column[r] for r in rows] for key, column in columns.items()},
                    }
                    for term, rows in by_rollout.get(i, {}).items()
                },
            }
            records.append(record)
        self._append(name, *records)

    def write_fault(self, step: int, reason: str, rollouts: Sequence[Rollout]) -> Path:
        """The rollouts of a step whose gradients were thrown away, with their ids, to `faults/`."""
        name = f"faults/step-{step:06d}" + (f"-rank{self.rank}" if self.rank else "") + ".jsonl"
        records = [
            {
                "step": step,
                "reason": reason,
                "problem_id": rollout.problem_id,
                "problem": rollout.problem,
                "answer": rollout.answer,
                "valid": rollout.spans.valid,
                "prompt_ids": rollout.prompts["student"].ids.tolist(),
                "completion_ids": rollout.completion_ids.tolist(),
            }
            for rollout in rollouts
        ]
        self._append(name, *records)
        return self.folder / name

    def _image(self, image: Any, side: int) -> str:
        """Writes an image once, small, under a name that follows from its pixels; returns its path from completions/.

        One that is small already is kept exactly.
        """
        exact = max(image.size) <= side
        if not exact:
            image = image.copy()
            image.thumbnail((side, side))
        key = hashlib.blake2b(f"{image.mode}{image.size}".encode() + image.tobytes(), digest_size=12).hexdigest()
        name = f"images/{key}.{'png' if exact else 'webp'}"
        path = self.folder / "completions" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{self.rank}.part")  # ranks may meet the same image
            image.save(part, format="PNG" if exact else "WEBP", quality=80)
            part.replace(path)
        return name

    def save_final(
        self, model: nn.Module, processor: Any, *, merged: bool, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, str]:
        """Writes the trained weights; returns which folder holds what. Call it on every rank: rank 0 writes.

        Args:
            weights: the whole state dict where the model's own parameters are in pieces; None: its own.
        """
        from vigos.models.parts import unwrap
        from vigos.train.teacher_weights import merged_copy, plain_class, plain_copy

        core: Any = unwrap(model)
        if self.rank != 0:
            return {}
        if not hasattr(core, "peft_config"):
            whole = core if weights is None else plain_copy(core, weights)
            whole.save_pretrained(self.folder / "model")
            processor.save_pretrained(self.folder / "model")
            return {"model": str(self.folder / "model")}
        core.save_pretrained(self.folder / "adapter", state_dict=weights)
        _name_base(self.folder / "adapter" / "adapter_config.json", plain_class(core.get_base_model()))
        saved = {"adapter": str(self.folder / "adapter")}
        if merged:
            merged_copy(core, weights).save_pretrained(self.folder / "merged")
            processor.save_pretrained(self.folder / "merged")
            saved["merged"] = str(self.folder / "merged")
        return saved

    def _append(self, name: str, *records: dict[str, Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_plain(record), ensure_ascii=False) + "\n" for record in records)


def _texts(pieces: list[bytes]) -> list[str]:
    """The tokens' texts, which joined are the completion's: a character split over tokens stands with its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(piece, final=i == len(pieces) - 1) for i, piece in enumerate(pieces)]


def _top_column(ids: Tensor, probabilities: Tensor, tokenizer: Any) -> list[list[list[Any]]]:
    """For each row its [text, probability] pairs."""
    unique = ids.unique().tolist()
    texts = {
        i: piece.decode("utf-8", "replace") for i, piece in zip(unique, token_bytes(unique, tokenizer), strict=True)
    }
    return [
        [[texts[i], round(p, 5)] for i, p in zip(row, ps, strict=True)]
        for row, ps in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]


def _name_base(path: Path, kind: type) -> None:
    """peft writes down the class of the model it was on, which under FSDP2 nobody could load the adapter for."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("auto_mapping"):
        config["auto_mapping"] |= {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _floats(x: Tensor) -> list[float]:
    return x.detach().double().tolist()


def _lines(path: Path) -> list[str]:
    """Whole lines: what a killed process left half-written is not one."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"metrics.jsonl must hold one JSON object with a step a line, got {line[:80]!r}") from error


def _plain(value: Any) -> Any:
    """JSON and YAML know no tensors, enums, paths or infinities."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return _plain(value.item())
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
