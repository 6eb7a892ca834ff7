"""The records of rollouts that a run folder keeps: text, spans, and each teacher's divergence token by token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vigos.method.spans import token_bytes
from vigos.method.supervise import SEGMENTS, Rollout, SupervisedBatch

if TYPE_CHECKING:
    from vigos.divergence.api import DivergenceOutput

Top = tuple[Tensor, Tensor]  # ids and their probabilities, (R, k) each, most likely first
TopTokens = tuple[Top, Top]  # of the student, and of the teachers


def completion_records(
    step: int, batch: SupervisedBatch, output: DivergenceOutput, tokenizer: Any, images: Sequence[list[str]],
    top: TopTokens | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return one record for each rollout of a micro-batch.

    For each teacher it holds the tokens that the teacher supervised, with the divergence (nats) at each, both
    log-probabilities and whether it was clipped; `version` is how many optimizer steps lay behind the weights that
    sampled it.

    Args:
        images: for each rollout the paths of its images in the run folder.
        top: the likeliest tokens at each pair, if they are to be written.
    """
    values = {
        "divergence": output.divergence,
        "student_logprob": output.student_logprob,
        "teacher_logprob": output.teacher_logprob,
    }
    columns: dict[str, list[Any]] = {
        name: [round(v, 6) for v in x.detach().double().tolist()] for name, x in values.items() if x is not None
    }
    if top is not None:
        for name, (ids, probabilities) in zip(("student_top", "teacher_top"), top, strict=True):
            columns[name] = _top_column(ids, probabilities, tokenizer)
    clipped = output.clipped.tolist()
    pairs: dict[int, dict[str, list[int]]] = {}  # of each rollout, by term
    for r, (owner, term) in enumerate(zip(batch.owner.tolist(), batch.term.tolist(), strict=True)):
        pairs.setdefault(owner, {}).setdefault(batch.terms[term], []).append(r)
    segments, tokens = batch.segment.tolist(), batch.token.tolist()
    records = []
    for i, rollout in enumerate(batch.rollouts):
        spans = rollout.spans
        record = {
            "step": step,
            "problem_id": rollout.problem_id,
            "problem": rollout.problem,
            "answer": rollout.answer,
            "images": images[i],
            "tokens": token_texts(token_bytes(rollout.completion_ids.tolist(), tokenizer)),
            "valid": spans.valid,
            "reason": spans.reason,
            "finished": spans.finished,
            "description": list(spans.description),
            "reasoning": list(spans.reasoning),
            "boxed": list(spans.answer),
            "answer_text": spans.answer_text,
            "correct": rollout.correct,
            "version": rollout.version,
            "teachers": {
                term: {
                    "tokens": [tokens[r] for r in rows],
                    "segments": [SEGMENTS[segments[r]] for r in rows],
                    "clipped": [clipped[r] for r in rows],
                    **{key: [column[r] for r in rows] for key, column in columns.items()},
                }
                for term, rows in pairs.get(i, {}).items()
            },
        }
        records.append(record)
    return records


def fault_record(step: int, reason: str, rollout: Rollout) -> dict[str, Any]:
    """Return the record, ids included, of a rollout of a step whose gradients were thrown away."""
    return {
        "step": step,
        "reason": reason,
        "problem_id": rollout.problem_id,
        "problem": rollout.problem,
        "answer": rollout.answer,
        "valid": rollout.spans.valid,
        "prompt_ids": rollout.prompts["student"].ids.tolist(),
        "completion_ids": rollout.completion_ids.tolist(),
    }


def token_texts(pieces: list[bytes]) -> list[str]:
    """Return the tokens' texts, which joined are the completion's: a character split over tokens is the last one's."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(piece, final=i == len(pieces) - 1) for i, piece in enumerate(pieces)]


def _top_column(ids: Tensor, probabilities: Tensor, tokenizer: Any) -> list[list[list[Any]]]:
    """Return the [text, probability] pairs of each row."""
    unique = ids.unique().tolist()
    texts = {
        i: piece.decode("utf-8", "replace") for i, piece in zip(unique, token_bytes(unique, tokenizer), strict=True)
    }
    return [
        [[texts[i], round(p, 5)] for i, p in zip(row, ps, strict=True)]
        for row, ps in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]
