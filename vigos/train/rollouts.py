"""`RolloutLoader`: turn the examples of an optimizer step into parsed, graded rollouts.

A step's completions are asked for in a `Request`, either when the step begins or, with `async_rollout`, when the step
before it does (`vigos.rollout.prefetch`). Either way they are parsed and graded by the step that trains on them.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vigos.data.examples import BadExample, Example
from vigos.data.images import BadImage
from vigos.method.encode import EncodedPrompt, ScoredSequence, encode_prompt
from vigos.method.prompts import Prompts, Role
from vigos.method.spans import Spans, parse_rollout
from vigos.method.supervise import CONTROL, Rollout, assign, teacher_prefill
from vigos.method.teachers import Teacher
from vigos.method.views import BadView, View
from vigos.models.parts import base_model, image_token_id_of, unwrap
from vigos.models.sharding import gather_trained
from vigos.rollout.checks import RolloutError
from vigos.rollout.engine import Completion, RolloutEngine, eos_ids, placeholder_ids, stream_seed
from vigos.rollout.full_weights import StaleWeights, checkpoint_groups
from vigos.rollout.prefetch import Request, RolloutsAhead, check_engine
from vigos.scoring.prefix_tree import PrefixTree
from vigos.train.ranks import count_over_ranks

if TYPE_CHECKING:
    from transformers import TrainerState

    from vigos.train.config import ViGOSConfig
    from vigos.train.other_models import OtherModel, OtherModels
    from vigos.train.profiling import Phases
    from vigos.train.recorder import Recorder

logger = logging.getLogger(__name__)

TRIES = 3  # of sending the weights
UNUSABLE_EXAMPLES = 64  # if so many are refused at the start, and none usable, the run stops with the reasons

Batches = Iterator[list[Example | BadExample]]


class RolloutLoader:
    """Sample, parse and grade the rollouts of each step; examples that cannot be used are recorded and left out.

    Args:
        engine: samples the completions; one with weights of its own is sent the adapter once a step.
        model: the student, not wrapped.
        processor: the model's, or the tokenizer of a text-only model.
        accelerator: of the run, for autocast and collectives.
        recorder: told of the examples that were skipped.
        load_image: opens an entry of an image column for the view `column`.
        other_models: whose processors encode the prompts of their teachers; None: the student's all.

    Attributes:
        examples_used, valid_rollouts: counted over the run, on this rank.
        skipped: number of examples left out, by reason.
        sampling_s: seconds that sampling the last step's completions took.
    """

    def __init__(
        self, args: ViGOSConfig, *, engine: RolloutEngine, model: nn.Module, processor: Any, prompts: Prompts,
        accelerator: Any, recorder: Recorder, phases: Phases, load_image: Callable[[Any], Any] | None = None,
        other_models: OtherModels | None = None,
    ) -> None:  # fmt: skip
        if args.async_rollout:
            check_engine(engine)
        base = base_model(model)
        self.args, self.objective, self.sampling = args, args.objective, args.sampling
        self.engine, self.model, self.processor, self.prompts = engine, model, processor, prompts
        self.accelerator, self.recorder, self.phases = accelerator, recorder, phases
        self.load_image, self.other_models = load_image, other_models
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.has_vision = hasattr(processor, "image_processor") and placeholder_ids(base.config) != ()
        columns = args.images_columns or {}
        fallback = View("column", columns["student"]) if "student" in columns else None
        self.student_view = View.read(args.student_view) or fallback
        if self.student_view is not None and self.student_view.kind == "other":
            raise ValueError("student_view must not be 'other': its rollouts would be about another example's image")
        self.ahead = RolloutsAhead()
        self.examples_used = self.valid_rollouts = 0
        self.skipped: Counter[str] = Counter()
        self.sampling_s = 0.0
        self._epoch: Batches | None = None
        self._engine_step = 0  # the step whose adapter the engine has; a fresh adapter changes nothing
        self._eos = eos_ids(base, self.tokenizer)
        others = other_models.models.values() if other_models else ()
        self._placeholders = tuple(
            {*placeholder_ids(base.config), *(i for other in others for i in other.placeholders)}
        )

    def bind(self, model: nn.Module) -> None:
        """Take the wrapped student, before the first step, and forget the requests of an earlier run."""
        if self.args.async_rollout:
            check_engine(self.engine)  # which may have been put in place of another one
        self.model = model
        self.ahead.drop()

    # --- The rollouts of a step -----------------------------------------------------------------------------------

    def next_step(self, batches: Batches, count: int, state: TrainerState) -> list[list[Rollout]]:
        """Return the rollouts of each of the next step's `count` micro-batches; [] at the end of an epoch.

        With `async_rollout` the engine has begun on the step after it when this returns.

        Args:
            batches: the epoch's, of which this takes those that it needs.
        """
        args, step = self.args, state.global_step
        if batches is not self._epoch:  # one that a callback broke off has left its next step's request
            self.ahead.drop()
            self._epoch = batches
        request, following = self.ahead.request, None
        if request is None:
            request = self._request(list(itertools.islice(batches, count)), step)
            if not request.micro_batches:
                return []
            if args.async_rollout:
                self._resume(request)
        if args.async_rollout and step + 1 < state.max_steps:
            # While this step's rollouts may still be under way. The last step of an epoch may get fewer batches.
            micro_batches = list(itertools.islice(batches, args.gradient_accumulation_steps))
            following = self._request(micro_batches, step + 1) if micro_batches else None
        completions = self._completions(request)
        if following is not None:
            self._start(following)
        return self._rollouts(request, completions)

    def sample(self, examples: Sequence[Example | BadExample], step: int = 0) -> list[Rollout]:
        """Return rollouts of some examples, drawn as the step after `step` optimizer steps would draw them."""
        request = self._request([list(examples)], step)
        return self._rollouts(request, self._completions(request))[0]

    def check_usable(self) -> None:
        """Raise a ValueError with the reasons if no rank has used an example in the whole run."""
        if not count_over_ranks(self.accelerator, self.examples_used):
            raise ValueError(self._nothing_usable())

    def _request(self, micro_batches: Sequence[list[Example | BadExample]], step: int) -> Request:
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        usable: list[tuple[int, Example, EncodedPrompt]] = []
        seeds: list[int] = []
        bad: list[BadExample] = []
        for k, members in enumerate(micro_batches):
            for j, example in enumerate(members):
                if isinstance(example, BadExample):
                    bad.append(example)
                    continue
                try:
                    prompt = self._student_prompt(example)
                except BadExample as error:
                    bad.append(error)
                    continue
                usable.append((k, example, prompt))
                # Its place in the global step: the same however the step is cut into micro-batches and ranks.
                place = (k * ranks + rank) * self.args.per_device_train_batch_size + j
                seeds.append(stream_seed(self.args.seed, step, place))
        return Request(step, len(micro_batches), usable, seeds, bad)

    def _completions(self, request: Request) -> list[Completion]:
        """Return the request's completions, under way on the other thread or sampled now; record its bad examples."""
        for bad in request.bad:
            self._skip(bad, request.step)
        with self.phases("rollouts"):
            if request is self.ahead.request:
                completions = self.ahead.result()
                self.sampling_s = self.ahead.seconds
                self.phases.overlapped("rollouts", self.sampling_s)
                return completions
            for attempt in itertools.count(1):
                started = time.perf_counter()
                self._update_engine(request.step)
                try:
                    with self.accelerator.autocast():
                        completions = self._sample(request, request.step)
                    break
                except StaleWeights as error:  # a server that was started again while it sampled
                    if self.accelerator.num_processes > 1 or attempt == TRIES:
                        raise
                    logger.warning("%s; sending them and sampling step %d again", error, request.step + 1)
            self.sampling_s = time.perf_counter() - started
            return completions

    def _start(self, request: Request) -> None:
        """Start to sample the next step's `request` on another thread, from the weights before the step under way."""
        with self.phases("rollouts"):
            self._update_engine(request.step - 1)
            self.ahead.start(request, lambda: self._sample(request, request.step - 1))

    def _sample(self, request: Request, version: int) -> list[Completion]:
        """Sample a request's completions from the weights after `version` steps."""
        found = self.engine.sample(request.prompts, self.sampling, request.seeds)
        return [replace(completion, version=version) for completion in found]

    def _resume(self, request: Request) -> None:
        """Take the completions of the first step after a restart from the checkpoint, if every rank has them."""
        saved = self.ahead.saved(request, self.sampling)
        everywhere = count_over_ranks(self.accelerator, int(saved is not None)) == self.accelerator.num_processes
        if saved is not None and everywhere:
            self.ahead.start(request, lambda: saved)

    def _update_engine(self, step: int) -> None:
        """Send an engine with weights of its own those after `step` steps, unless it has them."""
        engine = self.engine
        if not engine.owns_weights:
            return
        if step == self._engine_step:
            if not engine.takes_groups or not count_over_ranks(self.accelerator, int(not engine.holds(step))):
                return
            logger.warning("the engine has lost the weights after %d steps, and is sent them again", step)
        if self.args.async_rollout:  # until no rank samples from the adapter that the engine now drops
            self.ahead.wait()
            self.accelerator.wait_for_everyone()
        student = unwrap(self.model)
        with self.phases("sync"):
            if engine.takes_groups:
                self._send_groups(step, student)
            else:
                weights = gather_trained(student)
                if self.accelerator.is_main_process or engine.one_a_rank:
                    engine.update_weights(step, student, weights)
            self.accelerator.wait_for_everyone()
            if not self.accelerator.is_main_process and not engine.one_a_rank:
                engine.update_weights(step, student, None)
        self._engine_step = step

    def _send_groups(self, step: int, student: nn.Module) -> None:
        """Send all trained weights in groups; an update that did not end on every rank is repeated."""
        for attempt in range(1, TRIES + 1):
            groups, failure = checkpoint_groups(student), None
            if self.accelerator.is_main_process or self.engine.one_a_rank:
                try:
                    self.engine.update_weights(step, student, groups)
                except RolloutError as error:
                    failure = error
            for _ in groups:  # gathered by all ranks together, whatever became of those before
                pass
            if not count_over_ranks(self.accelerator, int(failure is not None)):
                return
            if attempt == TRIES:
                raise failure or RolloutError(f"another rank's engine did not take the weights after {step} steps")
            logger.warning("the weights after %d steps did not arrive whole, and are sent again: %s", step, failure)

    # --- Parsing and grading --------------------------------------------------------------------------------------

    def _rollouts(self, request: Request, completions: Sequence[Completion]) -> list[list[Rollout]]:
        """Parse the completions; return the rollouts of each micro-batch."""
        groups: list[list[Rollout]] = [[] for _ in range(request.micro_batches)]
        n = self.sampling.n
        for i, (k, example, prompt) in enumerate(request.examples):
            try:
                others = [other for _, other, _ in request.examples if other is not example]
                rollouts = self._parse(example, prompt, completions[i * n : (i + 1) * n], others)
            except BadExample as bad:
                self._skip(bad, request.step)
                continue
            groups[k] += rollouts
            self.examples_used += 1
            self.valid_rollouts += sum(r.spans.valid for r in rollouts)
        if not self.examples_used and self.skipped.total() >= UNUSABLE_EXAMPLES:
            raise ValueError(self._nothing_usable())
        return groups

    def _parse(
        self, example: Example, prompt: EncodedPrompt, completions: Sequence[Completion], others: Sequence[Example]
    ) -> list[Rollout]:
        """Return an example's rollouts, with the prompts of the teachers that they meet: encoded once, if needed.

        Args:
            others: the step's examples, one of which lends its images to the view `other`.
        """
        objective = self.objective
        prompts: dict[str, EncodedPrompt] = {"student": prompt}
        views: dict[str, tuple[Any, ...]] = {}
        if self.student_view is not None:
            views["student"] = tuple(self._seen(self.student_view, example, others))
        named = sorted(set().union(*(teacher.columns for teacher in objective.roster)))
        rollouts = []
        for completion in completions:
            spans = parse_rollout(
                completion.ids,
                self.tokenizer,
                style=objective.span_style,
                validity=objective.validity,
                eos_token_ids=self._eos,
                image_token_ids=self._placeholders,
            )
            for a in assign(spans, objective, has_images=bool(example["images"])):
                if a.term not in prompts:
                    prompts |= self._taught(objective.teacher(a.term), example, prompt, others, views)
            rollouts.append(
                Rollout(
                    problem_id=example["problem_id"],
                    problem=example["problem"],
                    answer=example["answer"],
                    images=tuple(example["images"]),
                    prompts=prompts,
                    completion_ids=completion.ids,
                    spans=spans,
                    logprobs=completion.logprobs,
                    version=completion.version,
                    reference=self._reference(example),
                    correct=_is_correct(spans, example) if self.args.grade_rollouts else None,
                    views=views,
                    texts={name: str(example["extra"][name]) for name in named if example["extra"].get(name)},
                )
            )
        return rollouts

    # --- Prompts --------------------------------------------------------------------------------------------------

    def show_prompts(self, dataset: Any) -> None:
        """Log as text what each role reads of the first usable example of the data."""
        for example in itertools.islice(dataset, 16):
            if isinstance(example, BadExample):
                continue
            try:
                prompt = self._student_prompt(example)
                shown: dict[str, EncodedPrompt] = {"student": prompt}
                for teacher in self.objective.roster:
                    if teacher.weight and (teacher.reads not in ("perception", "") or example["images"]):
                        read = self._taught(teacher, example, prompt, (), {})
                        shown |= {f"{name} teacher": each for name, each in read.items()}
            except BadExample:
                continue
            plan = PrefixTree(
                [ScoredSequence(each, _NEXT, _NEXT) for each in shown.values()],
                image_token_id=image_token_id_of(base_model(self.model)),
            )
            logger.info("the prompts of an example as a prefix tree: %s", plan.summary())
            for name, each in shown.items():
                logger.info("the %s's prompt, example %s:\n%s", name, example["problem_id"], each.text)
            return

    def _taught(
        self, teacher: Teacher, example: Example, prompt: EncodedPrompt, others: Sequence[Example],
        views: dict[str, tuple[Any, ...]],
    ) -> dict[str, EncodedPrompt]:  # fmt: skip
        """Return the prompts of a teacher and of its control, by name; adds what they see to `views`."""
        wanted = {teacher.name: teacher.view}
        if teacher.has_control_rows:
            wanted[teacher.name + CONTROL] = teacher.control
        prefill, texts, found = teacher_prefill(teacher.name, self.objective, self.prompts), None, {}
        if teacher.columns:
            texts = _texts(example, teacher.columns)
        other = self.other_models.model_of(teacher) if self.other_models else None
        for name, view in wanted.items():
            if view is not None:
                views[name] = tuple(self._seen(view, example, others))
            like = prompt if view is None and self.student_view is None and other is None else None
            found[name] = self._encode(teacher.reads, example, prefill, like, views.get(name), texts, other)
        return found

    def _student_prompt(self, example: Example) -> EncodedPrompt:
        example_id, limit = example["problem_id"], self.args.max_prompt_length
        if example["images"] and not self.has_vision:
            raise ValueError(
                f"example {example_id} has {len(example['images'])} image(s), but "
                f"{type(base_model(self.model)).__name__} with a {type(self.processor).__name__} has no vision tower; "
                "train on examples without images (images_column=None), or take an image-text model and its processor"
            )
        view = self.student_view
        images = None if view is None else tuple(self._seen(view, example, ()))
        prompt = self._encode("student", example, images=images)
        if limit and len(prompt.ids) > limit:
            detail = f"the student's prompt has {len(prompt.ids)} tokens, max_prompt_length is {limit}"
            raise BadExample(example_id, "prompt_too_long", detail)
        return prompt

    def _encode(
        self, role: Role, example: Example, prefill: str | None = None, like: EncodedPrompt | None = None,
        images: Sequence[Any] | None = None, columns: Mapping[str, str] | None = None, other: OtherModel | None = None,
    ) -> EncodedPrompt:  # fmt: skip
        images = example["images"] if images is None else images
        processor = self.processor if other is None else other.processor
        try:
            return encode_prompt(
                processor, self.prompts, role, example["problem"], self._reference(example), images, prefill, like,
                columns,
            )  # fmt: skip
        except ValueError as error:  # the image processor's own limits
            raise BadExample(example["problem_id"], "not_encodable", str(error)) from error

    def _seen(self, view: View, example: Example, others: Sequence[Example]) -> list[Any]:
        """Return the images of a view; what is drawn follows from the example's id, so a repeated step draws alike."""
        seed, count = f"{self.args.seed}/{example['problem_id']}", len(example["images"])
        fits = [o["images"] for o in others if len(o["images"]) == count and o["problem_id"] != example["problem_id"]]
        lent = random.Random(f"{seed}/other").choice(fits) if fits and view.kind == "other" else None
        try:
            return view(example["images"], example["extra"], seed=seed, others=lent, load=self.load_image)
        except BadView as error:
            raise BadExample(example["problem_id"], error.reason, str(error)) from error
        except BadImage as error:
            raise BadExample(example["problem_id"], error.reason, error.detail) from error

    def _reference(self, example: Example) -> str:
        """Return the text that privileged teachers read."""
        if self.objective.reference_kind == "solution":
            return str(example["extra"].get(self.args.solution_column) or example["answer"])
        return example["answer"]

    # --- Skipped examples, checkpoints ----------------------------------------------------------------------------

    def _skip(self, bad: BadExample, step: int) -> None:
        self.skipped[bad.reason] += 1
        logger.warning("skipped %s", bad)
        self.recorder.skipped(bad, step)

    def _nothing_usable(self) -> str:
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.skipped.most_common())
        return (
            f"none of the {self.skipped.total()} examples of train_dataset read is usable ({reasons}); see "
            "skipped.jsonl"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the completions under way, for which this waits."""
        completions = self.ahead.state(self.sampling)
        if completions is None and self.ahead.request is not None:
            failure = self.ahead.wait()
            logger.warning("the checkpoint is without the next step's rollouts, whose sampling failed: %s", failure)
        return {
            "examples_used": self.examples_used, "valid_rollouts": self.valid_rollouts, "skipped": dict(self.skipped),
            "completions": completions,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.ahead.restore(state.get("completions"))
        self.examples_used = state.get("examples_used", 0)
        self.valid_rollouts = state.get("valid_rollouts", 0)
        self.skipped = Counter(state.get("skipped", {}))


_NEXT = torch.zeros(1, dtype=torch.int64)  # one token after a prompt


def _texts(example: Example, columns: Collection[str]) -> dict[str, str]:
    """Return the texts of the columns that a template names."""
    for name in columns:
        if example["extra"].get(name) in (None, ""):
            raise BadExample(
                example["problem_id"], "missing_field", f"no field {name!r}, which a teacher's prompt names"
            )
    return {name: str(example["extra"][name]) for name in columns}


def _is_correct(spans: Spans, example: Example) -> bool:
    """Tell whether the boxed answer is the reference answer, by the evaluation's rules."""
    from vigos.eval.grading import grade, hints

    return grade(spans.answer_text, example["answer"], **hints(example["problem"], example["extra"]))
