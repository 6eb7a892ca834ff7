"""Other models as teachers: local, frozen, of any width, each with its own head, processor and prompts.

    teachers:
      - {name: large, reads: reference, model: models/7b, offload: true}

They share the student's vocabulary, token by token, so that its completions are theirs. A head that is padded further
than the other is cut where the shorter one ends. Every rank holds a whole copy, and no gradient reaches one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vigos.divergence.head import Head
from vigos.method.supervise import SupervisedBatch
from vigos.method.teachers import Teacher
from vigos.models.load import load_model
from vigos.models.logits import logit_transform
from vigos.models.parts import base_model, lm_head
from vigos.models.sharding import gathered_head
from vigos.rollout.engine import placeholder_ids
from vigos.scoring.forwards import check_tree
from vigos.scoring.teacher import TeacherScorer
from vigos.train.config import ViGOSConfig

logger = logging.getLogger(__name__)

_LOADED_AS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class OtherModel:
    """Hold a frozen model of a folder, loaded in the student's dtype.

    Args:
        path: of the model and its processor. No code of its own is run.
        names: the teachers that it is the model of.
        student: whose head and dtype are met. tokenizer: the student's.
        device: where it scores.
        offload: rest on the CPU between optimizer steps.

    Attributes:
        entries: of the vocabulary that both heads have.

    Raises:
        ValueError: no such folder, no model in it, another vocabulary, or a head that is too short.
    """

    def __init__(
        self, path: str, names: list[str], *, student: nn.Module, tokenizer: Any, args: ViGOSConfig,
        device: torch.device, offload: bool,
    ) -> None:  # fmt: skip
        who = f"model of teacher {', '.join(map(repr, names))}"
        if not (Path(path).expanduser() / "config.json").is_file():
            raise ValueError(f"{who} must be a local folder with config.json, got {path!r}")
        dtype = lm_head(student).weight.dtype
        try:
            model, self.processor = load_model(
                str(Path(path).expanduser()),
                dtype=_LOADED_AS.get(dtype, "float32"),  # type: ignore[arg-type]
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{who} must be a model with its processor, got {path!r}: {error}") from error
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        needed = check_vocabulary(who, tokenizer, self.tokenizer)
        self.model: Any = model.to(dtype).requires_grad_(False).eval()
        logit_transform(model)  # refused here if no scale and softcap give its logits
        weights: list[Any] = [lm_head(each).weight for each in (student, model)]
        sizes = [getattr(w, "ds_shape", w.shape)[0] for w in weights]  # ZeRO-3 shards while it loads
        self.entries = min(sizes)
        if self.entries < needed:
            raise ValueError(f"{who} must have {needed} entries in its head, as its tokens need, got {self.entries}")
        if sizes[0] != sizes[1]:
            logger.warning(
                "the %s has %d entries in its head, the student %d: the padding that one side has more of is left out "
                "of its divergence", who, sizes[1], sizes[0],
            )  # fmt: skip
        self.has_vision = hasattr(self.processor, "image_processor") and placeholder_ids(model.config) != ()
        self.placeholders = placeholder_ids(model.config)
        self.parameters: int = model.num_parameters(exclude_embeddings=True)
        self.device, self.offload = device, offload
        if args.teacher_scoring == "tree":
            check_tree(model)
        self.scorer = TeacherScorer(self.model, scoring=args.teacher_scoring, verify=args.teacher_verify)
        if not offload:
            self.model.to(device)

    def score(self, batch: SupervisedBatch, token_budget: int) -> Tensor:
        """Return the hidden rows (M, D_t) of the batch's teacher sequences; on the device until `rest`."""
        self.model.to(self.device)
        self.scorer.token_budget = token_budget
        return self.scorer.score(batch)[0]

    @contextmanager
    def heads(self, student: Head) -> Iterator[tuple[Head, Head]]:
        """Return the student's head and this model's, cut to the entries that both have."""
        with gathered_head(self.model) as head:
            yield _cut(student, self.entries), _cut(head, self.entries)

    def rest(self) -> None:
        """Go to the CPU until the next call, with `offload`."""
        if self.offload:
            self.model.to("cpu")


@dataclass(frozen=True)
class Part:
    """The pairs of a micro-batch whose teachers are one model.

    Attributes:
        model: None: the student's own weights.
        places: (R',) int64, among the batch's pairs; batch: of these alone.
    """

    model: OtherModel | None
    places: Tensor
    batch: SupervisedBatch


@dataclass(frozen=True)
class OtherModels:
    """The models other than the student that teach in a run, each loaded once.

    Attributes:
        teachers: of the run, all of them.
        models: by folder; a teacher whose model is not here has the student's own weights.
    """

    teachers: Sequence[Teacher]
    models: dict[str, OtherModel] = field(default_factory=dict)

    @classmethod
    def load(cls, args: ViGOSConfig, *, student: nn.Module, processor: Any, device: torch.device) -> OtherModels:
        """Load those that `args.teachers` name.

        Args:
            student: not wrapped. processor: the student's.
        """
        loaded = cls(args.objective.roster)
        tokenizer = getattr(processor, "tokenizer", processor)
        sees = hasattr(processor, "image_processor") and placeholder_ids(base_model(student).config) != ()
        users: dict[str, list[Teacher]] = {}
        for teacher in loaded.teachers:
            if teacher.model is not None and teacher.weight > 0:
                users.setdefault(teacher.model, []).append(teacher)
        for path, members in users.items():
            found = loaded.models[path] = OtherModel(
                path, [t.name for t in members], student=student, tokenizer=tokenizer, args=args, device=device,
                offload=any(t.offload for t in members),
            )  # fmt: skip
            blind = next((t for t in members if t.view is None or t.view.kind != "none"), None)
            if sees and not found.has_vision and blind is not None:
                raise ValueError(f"teacher {blind.name!r} must have view: none, since {path!r} sees no images")

        return loaded

    def model_of(self, teacher: Teacher) -> OtherModel | None:
        """Return the model of a teacher; None for the student's own weights."""
        return self.models.get(teacher.model or "")

    def parts(self, batch: SupervisedBatch) -> list[Part]:
        """Return a batch by model, the student's own weights first; the same models on every rank."""
        if not self.models:
            return [Part(None, torch.arange(batch.n_pairs), batch)]
        sides = (None, *self.models.values())
        models = [self.model_of(teacher) for teacher in self.teachers]
        return [Part(side, *batch.part([i for i, model in enumerate(models) if model is side])) for side in sides]

    def rest(self) -> None:
        """Send those that are to be offloaded to the CPU."""
        for model in self.models.values():
            model.rest()


def check_vocabulary(who: str, student: Any, teacher: Any) -> int:
    """Return how many ids the tokens of two tokenizers need; raise ValueError unless each id is the same token."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    if differing:
        token = differing[0]
        raise ValueError(
            f"{who} must have the student's vocabulary, got a tokenizer that differs in {len(differing)} tokens of "
            f"{len(ours)}, such as {token!r}: id {ours.get(token)} for the student, {theirs.get(token)} there"
        )
    return max(ours.values()) + 1


def _cut(head: Head, n: int) -> Head:
    if head.weight.shape[0] == n:
        return head
    return replace(head, weight=head.weight[:n], bias=None if head.bias is None else head.bias[:n])
