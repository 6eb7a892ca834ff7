"""From rows to rollouts: what the trainer asks of its rollout engine, when, and how it reads the answers.

`RolloutTrainer` stands between `vigos.train.recovery.RobustTrainer` and `vigos.ViGOSTrainer`. The rollouts of a
step are asked for in a `Request`, either when it begins or, with `async_rollout=1`, when the step before it does
(`vigos.rollout.prefetch`); they are counted and parsed by the step that trains on them, either way.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vigos.data.examples import BadExample, Example
from vigos.method.encode import EncodedPrompt, encode_prompt
from vigos.method.objective import Objective
from vigos.method.prompts import Prompts, Role
from vigos.method.spans import parse_rollout
from vigos.method.supervise import Rollout, assignments, teacher_prefill
from vigos.models.parts import base_model
from vigos.models.sharding import gather_trained
from vigos.rollout.engine import RolloutEngine, eos_ids, placeholder_ids, stream_seed
from vigos.rollout.generate import TransformersEngine
from vigos.rollout.prefetch import Request, RolloutsAhead, check_engine
from vigos.rollout.vllm import VLLMEngine
from vigos.train.config import ViGOSConfig
from vigos.train.recovery import RobustTrainer

logger = logging.getLogger(__name__)

UNUSABLE_ROWS = 64  # so many rows refused at the start, and none usable: the run stops with the reasons


def vllm_engine(args: ViGOSConfig, model: nn.Module, tokenizer: Any, **options: Any) -> VLLMEngine:
    """Make vLLM in this process for a training run: its model's dtype, as long as prompts and completions may be."""
    if args.world_size > 1:
        raise ValueError(
            f"rollout_engine must be 'server' with several processes, got 'vllm' with {args.world_size}: let vLLM "
            "serve from GPUs of its own"
        )
    base = base_model(model)
    text = base.config.get_text_config()
    length = text.max_position_embeddings
    if args.max_prompt_length:
        length = min(length, args.max_prompt_length + args.max_completion_length)
    defaults = {
        "dtype": str(base.dtype).removeprefix("torch."), "max_model_len": length,
        "gpu_memory_utilization": args.rollout_memory, "limit_mm_per_prompt": {"video": 0},
    }  # fmt: skip
    return VLLMEngine(
        str(args.rollout_model), tokenizer, eos_token_ids=eos_ids(base, tokenizer), vocab_size=text.vocab_size,
        banned_token_ids=placeholder_ids(base.config), adapters=Path(str(args.output_dir)) / "rollout_adapters",
        lora_r=args.lora_r, **(defaults | options),
    )  # fmt: skip


class RolloutTrainer(RobustTrainer):
    """A trainer that has its student's rollouts.

    Args:
        prompts: templates of the four roles; None takes `args.prompts_file`, or the built-in wording.
        rollout_engine: samples the completions; None takes the one that `args` name.
        args, kwargs: of `transformers.Trainer`.
    """

    processing_class: Any

    def __init__(
        self, *args: Any, prompts: Prompts | None, rollout_engine: RolloutEngine | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        options, base = self.args, base_model(self.model)
        self.objective: Objective = options.objective
        self.tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.has_vision = hasattr(self.processing_class, "image_processor") and placeholder_ids(base.config) != ()
        self.prompts = prompts or (Prompts.from_file(options.prompts_file) if options.prompts_file else Prompts())
        self.engine: RolloutEngine = rollout_engine or self._engine()
        if options.async_rollout:
            check_engine(self.engine)
        self.ahead = RolloutsAhead()
        self.rows_used = 0
        self.valid_rollouts = 0
        self.sampling_s = 0.0  # that the rollouts of the step under way took
        self._epoch: Iterator[Any] | None = None
        self._pushed_step = 0  # the adapter that the rollout server has; a fresh one changes nothing
        self._eos = eos_ids(base, self.tokenizer)
        self._placeholders = placeholder_ids(base.config)

    def _engine(self) -> RolloutEngine:
        """What `args.rollout_engine` names."""
        args = self.args
        if args.rollout_engine == "transformers":
            return TransformersEngine.for_model(self.model, self.processing_class, batch_size=args.rollout_batch_size)
        if args.rollout_engine == "vllm":
            return vllm_engine(args, self.model, self.tokenizer)
        from vigos.rollout.server import ServerEngine

        base = base_model(self.model)
        return ServerEngine(
            str(args.rollout_url), str(args.rollout_model), self.tokenizer, eos_token_ids=eos_ids(base, self.tokenizer),
            banned_token_ids=placeholder_ids(base.config), vocab_size=base.config.get_text_config().vocab_size,
            concurrency=args.rollout_concurrency, timeout=args.rollout_timeout, retries=args.rollout_retries,
            adapters=Path(str(args.output_dir)) / "rollout_adapters",
        )  # fmt: skip

    # --- The rollouts of a step -----------------------------------------------------------------------------------

    def step_rollouts(
        self, epoch_iterator: Iterator[list[Example | BadExample]], num_batches: int
    ) -> list[list[Rollout]]:
        """Those of each micro-batch of the next optimizer step; none at the end of an epoch.

        With `async_rollout`, sampling those of the step after it has begun when this returns.
        """
        args, step = self.args, self.state.global_step
        if epoch_iterator is not self._epoch:  # one that a callback broke off has left its next step's request
            self.ahead.drop()
            self._epoch = epoch_iterator
        request, following = self.ahead.request, None
        if request is None:
            request = self._request(list(itertools.islice(epoch_iterator, num_batches)), step)
            if not request.micro_batches:
                return []
            if args.async_rollout:
                self._take_up(request)
        if args.async_rollout and step + 1 < self.state.max_steps:
            # While this step's rollouts may still be under way. The last step of an epoch may get fewer batches.
            micro_batches = list(itertools.islice(epoch_iterator, args.gradient_accumulation_steps))
            following = self._request(micro_batches, step + 1) if micro_batches else None
        completions = self._completions(request)
        if following is not None:
            self._begin(following)
        return self._rollouts(request, completions)

    def sample_rollouts(self, rows: Sequence[Example | BadExample]) -> list[Rollout]:
        """The student's rollouts of some rows, as a step of training would draw them."""
        request = self._request([list(rows)], self.state.global_step)
        return self._rollouts(request, self._completions(request))[0]

    def _request(self, micro_batches: Sequence[list[Example | BadExample]], step: int) -> Request:
        args, ranks, rank = self.args, self.accelerator.num_processes, self.accelerator.process_index
        rows: list[tuple[int, Example, EncodedPrompt]] = []
        seeds: list[int] = []
        unusable: list[BadExample] = []
        for k, members in enumerate(micro_batches):
            for j, row in enumerate(members):
                try:
                    prompt = self._student_prompt(row)
                except BadExample as bad:
                    unusable.append(bad)
                    continue
                rows.append((k, row, prompt))  # type: ignore[arg-type]
                # Its place in the global step: the same however the step is cut into micro-batches and ranks.
                place = (k * ranks + rank) * args.per_device_train_batch_size + j
                seeds.append(stream_seed(args.seed, step, place))
        return Request(step, len(micro_batches), rows, seeds, unusable)

    def _completions(self, request: Request) -> list[Tensor]:
        """Of the request under way, or sampled now; bad rows are counted, logged and left out."""
        for bad in request.bad:
            self._skip(bad)
        with self.phases("rollouts"):
            if request is self.ahead.request:
                completions = self.ahead.result()
                self.sampling_s = self.ahead.seconds
                self.phases.beside("rollouts", self.sampling_s)
                return completions
            started = time.perf_counter()
            self._push_adapter()
            completions = self._generate(request)
            self.sampling_s = time.perf_counter() - started
            return completions

    def _begin(self, request: Request) -> None:
        """Has `request` sampled on another thread, from the weights that the step under way is about to change."""
        check_engine(self.engine)
        with self.phases("rollouts"):
            self._push_adapter()
            engine, prompts, sampling = self.engine, request.prompts, self.args.sampling
            self.ahead.start(request, lambda: engine.generate(prompts, sampling, request.seeds))

    def _take_up(self, request: Request) -> None:
        """The first step after a restart goes on with the completions in the checkpoint, if every rank has its own."""
        saved = self.ahead.saved(request, self.args.sampling)
        if self._over_ranks(int(saved is not None)) == self.accelerator.num_processes and saved is not None:
            self.ahead.start(request, lambda: saved)

    def _rollouts(self, request: Request, completions: Sequence[Tensor]) -> list[list[Rollout]]:
        """Parsed, those of each micro-batch."""
        groups: list[list[Rollout]] = [[] for _ in range(request.micro_batches)]
        n = self.args.num_generations
        for i, (k, row, prompt) in enumerate(request.rows):
            try:
                rollouts = self._parse(row, prompt, completions[i * n : (i + 1) * n])
            except BadExample as bad:
                self._skip(bad)
                continue
            groups[k] += rollouts
            self.rows_used += 1
            self.valid_rollouts += sum(r.spans.valid for r in rollouts)
        if not self.rows_used and self.skipped.total() >= UNUSABLE_ROWS:
            raise ValueError(self._nothing_usable())
        return groups

    # --- Checkpoints ----------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        """Also the rollouts under way: this waits for them."""
        state = self.ahead.state(self.args.sampling)
        if state is None and self.interrupted and (failure := self.ahead.wait()) is not None:
            logger.warning("the checkpoint is without the next step's rollouts, whose sampling failed: %s", failure)
        return super().own_state() | {
            "rows_used": self.rows_used, "valid_rollouts": self.valid_rollouts, "rollouts": state
        }  # fmt: skip

    def take_own_state(self, state: dict[str, Any] | None) -> None:
        """See `RobustTrainer.take_own_state`."""
        super().take_own_state(state)
        self.ahead.restore(state and state.get("rollouts"))
        if state is not None:
            self.rows_used, self.valid_rollouts = state["rows_used"], state["valid_rollouts"]

    # --- Sampling -------------------------------------------------------------------------------------------------

    def _push_adapter(self) -> None:
        """The rollout server samples from the student as it stands: its adapter goes there once a step."""
        step = self.state.global_step
        if step == self._pushed_step or not self.engine.owns_weights:
            return
        if self.args.async_rollout:  # until no rank samples from the adapter that the server now drops
            self.ahead.wait()
            self.accelerator.wait_for_everyone()
        student = self.accelerator.unwrap_model(self.model_wrapped)
        weights = gather_trained(student)
        if self.is_world_process_zero():
            self.engine.update_weights(step, student, weights)
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            self.engine.update_weights(step, student, None)
        self._pushed_step = step

    def _generate(self, request: Request) -> list[Tensor]:
        with self.accelerator.autocast():
            return self.engine.generate(request.prompts, self.args.sampling, request.seeds)

    # --- Rows, prompts, spans -------------------------------------------------------------------------------------

    def _student_prompt(self, row: Example | BadExample) -> EncodedPrompt:
        if isinstance(row, BadExample):
            raise row
        row_id, limit = row["problem_id"], self.args.max_prompt_length
        if row["images"] and not self.has_vision:
            raise ValueError(
                f"row {row_id} has {len(row['images'])} image(s), but {type(base_model(self.model)).__name__} with a "
                f"{type(self.processing_class).__name__} has no vision tower; train on rows without images "
                "(images_column=None), or take an image-text model and its processor"
            )
        prompt = self._encode("student", row)
        if limit and len(prompt.ids) > limit:
            detail = f"the student's prompt has {len(prompt.ids)} tokens, max_prompt_length is {limit}"
            raise BadExample(row_id, "prompt_too_long", detail)
        return prompt

    def _encode(
        self, role: Role, row: Example, prefill: str | None = None, like: EncodedPrompt | None = None
    ) -> EncodedPrompt:
        try:
            return encode_prompt(
                self.processing_class, self.prompts, role, row["problem"], self._reference(row), row["images"], prefill,
                like,
            )  # fmt: skip
        except ValueError as error:  # the image processor's own limits
            raise BadExample(row["problem_id"], "not_encodable", str(error)) from error

    def _reference(self, row: Example) -> str:
        """What the privileged teachers read."""
        if self.objective.reference_kind == "solution":
            return str(row["extra"].get(self.args.solution_column) or row["answer"])
        return row["answer"]

    def _parse(self, row: Example, prompt: EncodedPrompt, completions: Sequence[Tensor]) -> list[Rollout]:
        """The rollouts of a row, with the prompts of the teachers that they meet: encoded once, and only if needed."""
        objective = self.objective
        prompts: dict[Role, EncodedPrompt] = {"student": prompt}
        rollouts = []
        for ids in completions:
            spans = parse_rollout(
                ids,
                self.tokenizer,
                style=objective.span_style,
                validity=objective.validity,
                eos_token_ids=self._eos,
                image_token_ids=self._placeholders,
            )
            for a in assignments(spans, objective, has_images=bool(row["images"])):
                if a.term not in prompts:
                    prefill = teacher_prefill(a.term, objective, self.prompts)
                    prompts[a.term] = self._encode(a.term, row, prefill, like=prompt)
            rollouts.append(
                Rollout(
                    problem_id=row["problem_id"],
                    problem=row["problem"],
                    answer=row["answer"],
                    images=tuple(row["images"]),
                    prompts=prompts,
                    completion_ids=ids,
                    spans=spans,
                    reference=self._reference(row),
                )
            )
        return rollouts

    def _skip(self, bad: BadExample) -> None:
        self.skipped[bad.reason] += 1
        self.metrics.add("rows/skipped", 1.0, 0.0)  # a count for each step
        logger.warning("skipped %s", bad)
        self.runlog.write_skipped(self.state.global_step, bad)

    def _nothing_usable(self) -> str:
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.skipped.most_common())
        return f"none of the {self.skipped.total()} rows of train_dataset read is usable ({reasons}); see skipped.jsonl"
