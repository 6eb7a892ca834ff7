"""`ViGOSTrainer`: visually grounded on-policy self-distillation on top of `transformers.Trainer`.

    from vigos.train.config import ViGOSConfig
    from vigos.data.examples import load_rows
    from vigos.train.trainer import ViGOSTrainer
    from vigos.world import load_base, world_prompts

    model, processor = load_base()  # or any transformers image-text model and its processor
    config = ViGOSConfig(output_dir="runs/first", max_steps=50, learning_rate=3e-4, per_device_train_batch_size=16,
                         gradient_accumulation_steps=1, max_completion_length=96)
    trainer = ViGOSTrainer(model=model, args=config, processing_class=processor,
                           train_dataset=load_rows("data/train.jsonl"), prompts=world_prompts())
    trainer.train()  # metrics.jsonl, completions/, checkpoint-*/, adapter/ and merged/ in the run folder

One optimizer step, in the order of the code below: all its rollouts, parsed (`get_batch_samples`); the supervised
tokens of each term counted over micro-batches and ranks, so that the divisor is known before the first backward; then
for each micro-batch the teachers' hidden states, the student's, their divergence, backward (`compute_loss`).
What it leaves out: evaluation (see `vigos.eval.evaluate`) and the rollout servers, which bring their own engine.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from vigos.data.examples import BadExample, Example, ExampleDataset, ExampleStream, check_usable, load_rows
from vigos.divergence.api import linear_divergence
from vigos.errors import watching_ranks
from vigos.method.encode import EncodedPrompt, ScoredSequence, encode_prompt
from vigos.method.prompts import Prompts
from vigos.method.supervise import (
    Rollout,
    RoutedBatch,
    TermCounts,
    count_terms,
    divisors,
    route,
)
from vigos.models.parts import base_model, lm_head
from vigos.models.sharding import gather_state, gathered_head, sharding_of
from vigos.models.vision_cache import VisionCache
from vigos.rollout.engine import RolloutEngine
from vigos.scoring.hidden_states import hidden_states
from vigos.scoring.teacher import TeacherScorer
from vigos.train.checkpoint import last_checkpoint
from vigos.train.config import ViGOSConfig
from vigos.train.metrics import Metrics, peak_gib, peak_tflops
from vigos.train.palr import PALR, measure_palr
from vigos.train.profiling import Phases, ProfileCallback
from vigos.train.rollouts import UNUSABLE_ROWS, RolloutTrainer
from vigos.train.run_folder import RunLog
from vigos.train.teacher_weights import TeacherPolicy, prepare_model
from vigos.train.top_tokens import top_tokens

logger = logging.getLogger(__name__)


class ViGOSTrainer(RolloutTrainer):
    """Trains a student against its own frozen (averaged, live) weights in three contexts.

    Args:
        model: a transformers model with a language-model head; adapted or frozen in place as `args` say. One that
            already carries a peft adapter trains that adapter.
        args: every option, see `ViGOSConfig`.
        processing_class: the model's processor, or the tokenizer of a text-only model.
        train_dataset: from `vigos.data.examples.load_rows`, or anything that it opens (a path, a list of dicts, a
            `datasets.Dataset`).
        prompts: templates of the four roles; None takes `args.prompts_file`, or the built-in wording.
        rollout_engine: samples the completions; None uses the model's own `generate`.
        callbacks, optimizers: as in `transformers.Trainer`.
    """

    args: ViGOSConfig
    model: Any
    loss_is_scaled_for_ga = True  # the divisor is the whole step's already

    def __init__(
        self,
        model: nn.Module,
        args: ViGOSConfig,
        processing_class: Any,
        train_dataset: Any,
        *,
        prompts: Prompts | None = None,
        rollout_engine: RolloutEngine | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, ViGOSConfig):
            raise ValueError(f"args must be a ViGOSConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process: start one process a GPU with `accelerate launch "
                "--num_processes ...`, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        if processing_class is None:
            raise ValueError("processing_class must be the model's processor or tokenizer, got None")
        set_seed(args.seed)  # before the adapter is drawn
        if sharded := [name for name, p in model.named_parameters() if isinstance(p, DTensor)]:
            raise ValueError(
                f"model must be unsharded (args say how the trainer shards it), got the DTensor {sharded[0]}"
            )
        model = prepare_model(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=_rows,  # rows stay rows; they become prompts once the step is known
            train_dataset=_as_rows(train_dataset, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            prompts=prompts,
            rollout_engine=rollout_engine,
        )
        self.model_accepts_loss_kwargs = True  # says the same to transformers that do not know `loss_is_scaled_for_ga`
        base = base_model(model)
        self.policy = TeacherPolicy(model, args.teacher, args.ema_decay, deferred=self.is_fsdp_enabled)
        self.scorer = TeacherScorer(
            self.model,
            scoring=args.teacher_scoring,
            verify=args.teacher_verify,
            token_budget=args.token_budget,
            adapter=self.policy.adapter,
        )
        self.metrics = Metrics()
        self.runlog = RunLog(str(args.output_dir), rank=args.process_index)
        self.add_callback(self.runlog)
        self.add_callback(_StepCallback(self))
        self.phases = Phases()
        if args.profile:
            self.add_callback(ProfileCallback(self.phases, str(args.output_dir), args.process_index))
        self.token_budget = args.token_budget  # halved when memory runs out
        self._peak_tflops = peak_tflops(args.device)
        self.skipped: Counter[str] = Counter()  # reasons for which rows were left out, over the run
        self._step_started = 0.0
        self._dummy_sequence: ScoredSequence | None = None
        self._parameters = base.num_parameters(exclude_embeddings=True)

    # --- One optimizer step: rollouts, spans, counts --------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example | BadExample]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, RoutedBatch]], Tensor | None]:
        """The rollouts of all micro-batches of an optimizer step, made ready to be computed.

        Returns:
            one input of `compute_loss` for each micro-batch, and the number of supervised tokens of the step over all
            ranks, by which transformers knows that the loss is normalised already.
        """
        self._step_started = time.perf_counter()
        with self.phases("prompts and spans"):
            rollouts = self.step_rollouts(epoch_iterator, num_batches)
        if not rollouts:
            return [], None
        local = [count_terms(group, self.objective) for group in rollouts]
        # (micro-batches, tokens or rows, terms), summed over ranks
        table = torch.stack([torch.stack([c.tokens, c.rows]) for c in local])
        counts = [TermCounts(*row) for row in self._over_world(table.to(device)).cpu()]
        step = sum(counts[1:], counts[0])
        ranks = self.accelerator.num_processes  # gradients are averaged over them, and the loss is a sum over them
        routed = [
            route(group, self.objective, divisors(self.objective, step, count, len(counts)), scale=float(ranks))
            for group, count in zip(rollouts, counts, strict=True)
        ]
        self.begin_step(routed)
        self.metrics.add_step(1.0 / ranks)
        seconds = time.perf_counter() - self._step_started
        if self.args.async_rollout:  # waited for, apart from the sampling, most of which was beside the last step
            self.metrics.add("perf/rollout_wait_s", seconds / ranks, 1.0 / ranks)
            seconds = self.sampling_s
        self.metrics.add("perf/rollout_s", seconds / ranks, 0.0)
        if self.args.palr_steps and (self.state.global_step + 1) % self.args.palr_steps == 0:
            found = self.measure_palr([rollout for group in rollouts for rollout in group])
            for name, (answer, image) in found.sums().items():
                self.metrics.add(f"palr/{name}", answer, answer + image)
        return [{"batch": batch} for batch in routed], step.tokens.sum().to(device)

    def measure_palr(self, rollouts: Sequence[Rollout]) -> PALR:
        """PALR of rollouts under this trainer's teachers; wrong answers and other images come from each other."""
        return measure_palr(
            rollouts, self.args, student=self.model, scorer=self.scorer, policy=self.policy, prompts=self.prompts,
            processor=self.processing_class, wrong_answers=self.args.palr_wrong_answers, seed=self.state.global_step,
            dummy=self._dummy() if self.accelerator.num_processes > 1 else None,
        )  # fmt: skip

    # --- One micro-batch: teachers, student, divergence -----------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """lambda_p L_p + lambda_r L_r + lambda_f L_f, this micro-batch's share of the whole step's loss.

        `num_items_in_batch` is part of transformers' signature and not needed: weights carry the divisor.
        """
        args = self.args
        batch: RoutedBatch = inputs["batch"]
        started = time.perf_counter()
        # With a frozen tower, teachers and student read the features of one run an image.
        vision = VisionCache.for_model(base_model(model)) if self.has_vision else None
        dummy = self._dummy() if self.accelerator.num_processes > 1 else None
        with self.phases("teachers"), self.policy.weights():
            teacher_hidden, supervision = self.scorer.score(batch, vision=vision, dummy=dummy)
        scored = time.perf_counter()
        # A batch without supervised tokens still goes through the model: wrappers wait for every rank's forward.
        sequences = batch.student_sequences or [_DUMMY]
        with self.phases("student forward"):
            student_hidden = hidden_states(
                model,
                sequences,
                scoring=args.student_scoring,
                token_budget=self.token_budget,
                vision=vision,
                dummy=dummy,
            )
        student_hidden = student_hidden[: len(student_hidden) if batch.student_sequences else 0]
        with self.phases("divergence"), gathered_head(model) as head, self.accelerator.autocast():
            kept = self.policy.head_weight(lm_head(model))
            teacher_head = head if kept is None else replace(head, weight=kept)
            student_hidden, teacher_hidden = (x.to(head.weight.dtype) for x in (student_hidden, teacher_hidden))
            out = linear_divergence(
                student_hidden, head, teacher_hidden, teacher_head, supervision=supervision, labels=batch.labels,
                impl=args.impl, **self.objective.divergence_options,
            )  # fmt: skip
        loss = out.loss + 0.0 * student_hidden.sum()  # attached to the graph when there are no rows
        correct = self._record(batch, out, scored - started, time.perf_counter() - scored)
        if self._writes_completions() and self.first_attempt(batch):
            top = None
            if args.completion_top_k:
                top = tuple(
                    top_tokens(hidden, side, rows, args.completion_top_k, temperature=args.divergence_temperature)
                    for hidden, side, rows in (
                        (student_hidden, head, supervision.student_row),
                        (teacher_hidden, teacher_head, supervision.teacher_row),
                    )
                )
            self.runlog.write_completions(
                self.state.global_step + 1, batch, out, correct, self.tokenizer, image_side=args.completion_images,
                top=top,
            )  # fmt: skip
        return (loss, out) if return_outputs else loss

    def _dummy(self) -> ScoredSequence | None:
        """What a rank is shown that has no image in a forward in which others have one."""
        if not self.has_vision:
            return None
        if self._dummy_sequence is None:
            from PIL import Image

            blank = [Image.new("RGB", (64, 64))]
            prompt = encode_prompt(self.processing_class, self.prompts, "perception", "", images=blank)
            self._dummy_sequence = ScoredSequence(prompt, _ONE, _ONE)
        return self._dummy_sequence

    def _writes_completions(self) -> bool:
        step, every = self.state.global_step + 1, self.args.completion_steps
        return bool(every) and (step % every == 0 or step == 1)

    @torch.no_grad()
    def _record(self, batch: RoutedBatch, out: Any, teacher_s: float, student_s: float) -> list[bool | None]:
        """Adds to the metrics; returns whether each rollout's answer is right (None: not graded)."""
        args, ranks = self.args, self.accelerator.num_processes
        correct = _grade(batch.rollouts, args.grade_rollouts)
        self.metrics.add_rollouts(batch.rollouts, correct)
        self.metrics.add_terms(batch, out, self.objective.lambdas, scale=float(ranks))
        self.metrics.add("perf/teacher_s", teacher_s / ranks, 0.0)
        self.metrics.add("perf/student_s", student_s / ranks, 0.0)
        self.metrics.add("perf/tokens_per_s", sum(r.spans.length for r in batch.rollouts), 0.0)
        return correct

    # --- The rest of transformers' loop ---------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer.train`, then the final adapter and the merged copy in the run folder."""
        rows = self.train_dataset
        if isinstance(rows, ExampleDataset | ExampleStream):
            check_usable(rows, UNUSABLE_ROWS)
        self.runlog.write_config(self.args, model=base_model(self.model).config.name_or_path)
        if last_checkpoint(str(self.args.output_dir)) and not (args or kwargs.get("resume_from_checkpoint")):
            logger.warning("%s holds checkpoints of an earlier run, which this one does not read", self.args.output_dir)
        ranks, timeout = self.accelerator.num_processes, float(self.args.ddp_timeout)
        with self.stop_signal.listening(), watching_ranks(self.accelerator.process_index, ranks, timeout):
            return self._train(*args, **kwargs)

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        if self.interrupted:
            return result
        if not self._over_ranks(self.rows_used):
            raise ValueError(self._nothing_usable())
        if not self._over_ranks(self.valid_rollouts) and self.is_world_process_zero():
            logger.warning(
                "no rollout of this run was valid: the model did not take up the format, and only the reference "
                "teacher had work. Look at completions/ for what it wrote"
            )
        weights = None  # or those of rank 0, where the model's own are in pieces
        if self.is_fsdp_enabled:
            weights = self.accelerator.get_state_dict(self.model)
        elif sharding_of(self.model) != "unsharded":  # ZeRO-3, or loaded in pieces by transformers
            weights = gather_state(self.model, keep=self.is_world_process_zero())
        self.runlog.save_final(self.model, self.processing_class, merged=self.args.save_merged, weights=weights)
        self.accelerator.wait_for_everyone()  # nobody leaves while rank 0 writes
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds our metrics to what is logged during training."""
        if "loss" in logs:
            logs = {**logs, **self.metrics.collect(self._over_world), "perf/peak_gib": peak_gib(self.args.device)}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """About 6 operations a student token and parameter, 2 a teacher token."""
        batch = inputs["batch"]
        student, teacher = (
            sum(len(s.prompt.ids) + len(s.completion_ids) for s in sequences)
            for sequences in (batch.student_sequences, batch.teacher_sequences)
        )
        operations = (6 * student + 2 * teacher) * self._parameters
        self.metrics.add("perf/tflops", operations / 1e12, 0.0)
        if self._peak_tflops:
            self.metrics.add("perf/mfu", operations / 1e12 / self._peak_tflops, 0.0)
        return operations


class _StepCallback(TrainerCallback):
    """After each optimizer step: moves a moving-average teacher, which checkpoints then hold, and stops the clock."""

    def __init__(self, trainer: ViGOSTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.policy.bind(trainer.model_wrapped)
        trainer.restore_own_state()
        if sharding_of(trainer.model_wrapped) == "zero3" and trainer.engine.collective:
            raise ValueError(
                "rollout_engine must be a server's under ZeRO-3, which gathers all weights for every token of a "
                "rollout; or take FSDP2 (configs/fsdp2.yaml) or ZeRO-2, with rollouts in the training process"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.drop_if_not_finite()
        self._optimizer = ExitStack()
        self._optimizer.enter_context(self.trainer.phases("optimizer"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.policy.update()
        self._optimizer.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ranks = self.trainer.accelerator.num_processes
        seconds = (time.perf_counter() - self.trainer._step_started) / ranks
        self.trainer.metrics.add("perf/step_s", seconds, 0.0)
        self.trainer.metrics.add("perf/tokens_per_s", 0.0, seconds)
        for name in ("perf/tflops", "perf/mfu") if self.trainer._peak_tflops else ("perf/tflops",):
            self.trainer.metrics.add(name, 0.0, seconds * ranks)  # of one device
        if ranks > 1:  # all stop after the same step
            self.trainer.stop_signal.received = bool(self.trainer._over_ranks(int(self.trainer.interrupted)))
        if self.trainer.interrupted:
            control.should_save = control.should_training_stop = True


_ONE = torch.zeros(1, dtype=torch.int64)
# One token after one token: what a rank without supervised tokens runs.
_DUMMY = ScoredSequence(EncodedPrompt(_ONE, None, None), _ONE, _ONE)


def _rows(rows: list[Any]) -> Any:
    """The collator: rows as they are. A function of a module, so that data loader workers can be sent it."""
    return rows


def _as_rows(dataset: Any, args: ViGOSConfig) -> ExampleDataset | ExampleStream:
    """Rows that come back as `BadExample` where they cannot be used, so that one bad image does not end a run."""
    if isinstance(dataset, ExampleDataset | ExampleStream):
        rows = copy.copy(dataset)
        rows.bad_rows = "return"
        return rows
    return load_rows(
        dataset,
        problem_column=args.problem_column,
        images_column=args.images_column,
        answer_column=args.answer_column,
        id_column=args.id_column,
        streaming=hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__"),
        bad_rows="return",
    )


def _grade(rollouts: Sequence[Rollout], wanted: bool) -> list[bool | None]:
    """Whether each rollout's boxed answer is the reference answer; None for all if that is not wanted."""
    if not wanted:
        return [None] * len(rollouts)
    from vigos.eval.grading import grade

    return [
        rollout.spans.answer_text is not None and grade(rollout.spans.answer_text, rollout.answer)
        for rollout in rollouts
    ]
