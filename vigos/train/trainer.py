"""`ViGOSTrainer`: visually grounded on-policy self-distillation on top of `transformers.Trainer`.

    from vigos import ViGOSConfig, ViGOSTrainer, load_rows
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
`examples/vigos_loop.py` is the same method in plain PyTorch. The trainer holds its parts, and a checkpoint is a loop
over their states. What it leaves out: evaluation (see `vigos.eval.evaluate`) and the rollout servers.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from vigos.data.examples import BadExample, Example, ExampleDataset, ExampleStream, check_usable
from vigos.errors import watching_ranks
from vigos.method.asking import Asking
from vigos.method.composed import RowWeights
from vigos.method.encode import ScoredSequence, encode_prompt
from vigos.method.objective import Objective
from vigos.method.prompts import Prompts
from vigos.method.supervise import (
    Rollout,
    SupervisedBatch,
    TermCounts,
    count_terms,
    divisors,
    supervise,
)
from vigos.models.compat import keep_checkpoint_names
from vigos.models.logits import logit_transform
from vigos.models.parts import base_model, unwrap
from vigos.models.routers import LoadBalance
from vigos.models.sharding import gather_state, gather_trained, gathered_head, sharding_of
from vigos.models.vision_cache import VisionCache
from vigos.rollout.engine import RolloutEngine
from vigos.scoring.forwards import check_tree
from vigos.scoring.teacher import TeacherScorer
from vigos.train.adapters import prepare_model
from vigos.train.checkpoint import (
    SAVING,
    LossSums,
    Stateful,
    StopSignal,
    publish,
    read_parts,
    remove,
    rotate,
    run_id,
    saving,
    whole_checkpoint,
    write_parts,
)
from vigos.train.compare import SavedCheck, fixed_sequence
from vigos.train.config import ViGOSConfig
from vigos.train.engines import build_engine
from vigos.train.facts import process_facts
from vigos.train.final import save_final
from vigos.train.health import Health
from vigos.train.inputs import as_examples, check_arguments, unchanged
from vigos.train.manifest import is_trained, read_manifest
from vigos.train.other_models import OtherModels, Part
from vigos.train.pair_weights import compared
from vigos.train.palr import PALR, measure_palr
from vigos.train.profiling import Phases, ProfileCallback
from vigos.train.ranks import count_over_ranks, sum_over_ranks
from vigos.train.recorder import Recorder
from vigos.train.recovery import StepGuard
from vigos.train.rollouts import UNUSABLE_EXAMPLES, RolloutLoader
from vigos.train.run_folder import RunFolder
from vigos.train.teacher_weights import TeacherWeights
from vigos.train.weights import check_loaded_adapter, check_saved_adapter, check_states, load_model

logger = logging.getLogger(__name__)


class ViGOSTrainer(Trainer, TrainerCallback):
    """Train a student against its own frozen (averaged, live) weights in three contexts.

    Args:
        model: a transformers model with a language-model head; adapted or frozen in place as `args` say. One that
            already carries a peft adapter trains that adapter, and its frozen teacher keeps the adapter as it came.
        args: every option, see `ViGOSConfig`.
        processing_class: the model's processor, or the tokenizer of a text-only model.
        train_dataset: from `vigos.load_rows`, or anything that it opens (a path, a list of dicts, a
            `datasets.Dataset`).
        prompts: templates of the four roles; None takes `args.prompts_file`, or the built-in wording.
        rollout_engine: samples the completions; None makes the one that `args` name.
        row_weights: called with a micro-batch and its `vigos.method.weights.Pairs`; returns a factor (R,) of each
            pair's part of the loss, on top of the teachers' own weights.
        callbacks, optimizers: as in `transformers.Trainer`.

    Attributes:
        rollouts: turns examples into a step's rollouts.
        teacher, scorer: whose weights teach, and how their hidden states are computed.
        other_models: those that teach beside them.
        guard: repeats or drops steps that go wrong.
        recorder: metrics and records.
        parts: those with a state, by their name in checkpoints.
        facts: what else `config.yaml` says of the run, in its section `run`: its data, for one.
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
        row_weights: RowWeights | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        check_arguments(model, args, processing_class)
        set_seed(args.seed)  # before the adapter is drawn
        model = prepare_model(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=unchanged,  # examples become prompts once the step is known
            train_dataset=as_examples(train_dataset, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # says the same to transformers that do not know `loss_is_scaled_for_ga`
        self.objective: Objective = args.objective
        self.row_weights = row_weights
        self.phases = Phases()
        self.prompts = prompts or (Prompts.from_file(args.prompts_file) if args.prompts_file else Prompts())
        self.prompts = self.prompts.with_template_kwargs(args.chat_template_kwargs)
        self.folder = RunFolder(str(args.output_dir), rank=args.process_index)
        self.recorder = Recorder(
            args, folder=self.folder, phases=self.phases, accelerator=self.accelerator,
            tokenizer=getattr(processing_class, "tokenizer", processing_class),
            parameters=base_model(model).num_parameters(exclude_embeddings=True),
        )  # fmt: skip
        self.teacher = TeacherWeights(
            model, args.teacher, args.ema_decay, deferred=self.is_fsdp_enabled, is_leader=args.process_index == 0
        )
        logit_transform(model)  # measured before anything shards it; refused if no scale and softcap give its logits
        if args.router_aux_loss_coef:
            LoadBalance(base_model(model))
        if "tree" in (args.student_scoring, args.teacher_scoring):  # before a rollout is paid for
            check_tree(base_model(model))
        self.scorer = TeacherScorer(
            self.model,
            scoring=args.teacher_scoring,
            verify=args.teacher_verify,
            token_budget=args.token_budget,
            adapter=self.teacher.adapter,
        )
        self.other_models = OtherModels.load(
            args, student=base_model(model), processor=processing_class, device=args.device
        )
        self.recorder.other_parameters = {
            t.name: other.parameters for t in self.objective.roster if (other := self.other_models.model_of(t))
        }
        self.rollouts = RolloutLoader(
            args, engine=rollout_engine or build_engine(args, self.model, processing_class), model=self.model,
            processor=processing_class, prompts=self.prompts, accelerator=self.accelerator, recorder=self.recorder,
            phases=self.phases, load_image=self.train_dataset.reader.images.load,  # type: ignore[union-attr]
            other_models=self.other_models,
        )  # fmt: skip
        if self.rollouts.engine.takes_groups:
            keep_checkpoint_names(base_model(model))
            self.rollouts.engine.check_weights(base_model(model))
        self.guard = StepGuard(args, scorer=self.scorer, recorder=self.recorder, accelerator=self.accelerator)
        self._loss_sums = LossSums(self)
        self.parts: dict[str, Stateful] = {
            "rollouts": self.rollouts, "teacher": self.teacher, "guard": self.guard, "recorder": self.recorder,
            "loop": self._loss_sums,
        }  # fmt: skip
        self.add_callback(self.recorder)
        self.add_callback(Health())
        self.add_callback(self)
        if args.profile:
            self.add_callback(ProfileCallback(self.phases, str(args.output_dir), args.process_index))
        self._dummy: ScoredSequence | None = None
        self._optimizer_phase = ExitStack()
        self._micro_batches = 1  # of the step under way
        self._saving = False  # a checkpoint is being written
        self.facts: dict[str, Any] = {}
        self._begin(None)

    # --- One optimizer step: rollouts, spans, counts --------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example | BadExample]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, SupervisedBatch]], Tensor | None]:
        """Return the rollouts of all micro-batches of an optimizer step, ready to be computed.

        Returns:
            one input of `compute_loss` for each micro-batch, and the number of supervised tokens of the step over all
            ranks, by which transformers knows that the loss is normalised already.
        """
        if self._trained:
            return [], None
        self.recorder.begin_step()
        with self.phases("prompts and spans"):
            groups = self.rollouts.next_step(epoch_iterator, num_batches, self.state)
        if not groups:
            return [], None
        local = [count_terms(group, self.objective) for group in groups]
        # (micro-batches, tokens or rollouts, terms), summed over ranks
        table = torch.stack([torch.stack([c.tokens, c.rollouts]) for c in local])
        counts = [TermCounts(*row) for row in sum_over_ranks(self.accelerator, table.to(device)).cpu()]
        step = sum(counts[1:], counts[0])
        ranks = float(self.accelerator.num_processes)  # gradients are averaged over them, and the loss is a sum
        batches = [
            supervise(group, self.objective, divisors(self.objective, step, count, len(counts)), scale=ranks)
            for group, count in zip(groups, counts, strict=True)
        ]
        rollouts = [rollout for group in groups for rollout in group]
        self.recorder.sampled(self.state.global_step, rollouts, self.rollouts.sampling_s)
        if self.args.palr_steps and (self.state.global_step + 1) % self.args.palr_steps == 0:
            self.recorder.palr(self.measure_palr(rollouts).sums())
        self.recorder.begin_micro_batches()
        self.guard.begin_step(batches)
        self._micro_batches = len(batches)
        return [{"batch": batch} for batch in batches], step.tokens.sum().to(device)

    def sample_rollouts(self, examples: Sequence[Example | BadExample]) -> list[Rollout]:
        """Return the student's rollouts of some examples, as the next step of training would draw them."""
        return self.rollouts.sample(examples, self.state.global_step)

    def measure_palr(self, rollouts: Sequence[Rollout]) -> PALR:
        """Measure PALR of rollouts under this trainer's teachers; wrong answers and images come from each other."""
        return measure_palr(
            rollouts, self.args, student=self.model, scorer=self.scorer, teacher=self.teacher, prompts=self.prompts,
            processor=self.processing_class, wrong_answers=self.args.palr_wrong_answers, seed=self.state.global_step,
            dummy=self._dummy_sequence(), other_models=self.other_models,
        )  # fmt: skip

    # --- One micro-batch: teachers, student, divergence -----------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the sum of the terms times their weights, this micro-batch's share of the whole step's loss.

        `num_items_in_batch` is part of transformers' signature and not needed: weights carry the divisor.
        """
        batch, step, dummy = inputs["batch"], self.state.global_step + 1, self._dummy_sequence()
        # With a frozen tower, teachers and student read the features of one run an image.
        vision = VisionCache.for_model(base_model(model)) if self.rollouts.has_vision else None
        parts = self.other_models.parts(batch)
        with self.phases("teachers"):
            hidden = [self._teacher_rows(part, vision, dummy) for part in parts]
        balance = LoadBalance(base_model(model)) if self.args.router_aux_loss_coef else None
        with self.phases("student forward"):
            student_hidden = self.scorer.score_student(
                model, batch.student_sequences, scoring=self.args.student_scoring, vision=vision, dummy=dummy,
                balance=balance,
            )  # fmt: skip
        with self.phases("divergence"), gathered_head(model) as head, self.accelerator.autocast():
            student_hidden = student_hidden.to(head.weight.dtype)
            out, losses, top = compared(
                batch, parts, student_hidden, head, hidden, teacher=self.teacher, recorder=self.recorder, step=step,
                args=self.args, row_weights=self.row_weights,
            )  # fmt: skip
        self.recorder.micro_batch(step, batch, out, top, losses)
        loss = out.loss if losses is None else losses.sum()
        loss = loss + 0.0 * student_hidden.sum()  # attached to the graph when there are no pairs
        if balance is not None:  # a mean over the step's micro-batches; gradients are averaged over ranks
            uneven = balance.loss()
            self.recorder.metrics.add("loss/router", uneven.item())
            loss = loss + self.args.router_aux_loss_coef / self._micro_batches * uneven
        return (loss, out) if return_outputs else loss

    def _teacher_rows(self, part: Part, vision: VisionCache | None, dummy: ScoredSequence | None) -> Tensor:
        """Return the hidden rows of a part's teachers."""
        if part.model is not None:
            with self.accelerator.autocast():
                return part.model.score(part.batch, self.scorer.token_budget)
        with self.teacher.weights():
            return self.scorer.score(part.batch, vision=vision, dummy=dummy)[0]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of a micro-batch, in smaller packs if memory runs out; return its loss."""
        step = super().training_step

        def compute(inputs: dict[str, Any]) -> Tensor:
            with self.phases("backward"):  # the nested phases apart
                return step(model, inputs, *args, **kwargs)

        return self.guard.run(compute, model, inputs)

    def _dummy_sequence(self) -> ScoredSequence | None:
        """Return an image for ranks without one in a forward in which others have one; None if there are no others."""
        if self.accelerator.num_processes == 1 or not self.rollouts.has_vision:
            return None
        if self._dummy is None:
            from PIL import Image

            blank = [Image.new("RGB", (64, 64))]
            prompt = encode_prompt(self.processing_class, self.prompts, "perception", "", images=blank)
            self._dummy = ScoredSequence(prompt, _ONE, _ONE)
        return self._dummy

    # --- The run --------------------------------------------------------------------------------------------------

    @property
    def interrupted(self) -> bool:
        """Tell whether SIGTERM or Ctrl-C ended the run; its last step is in a checkpoint."""
        return self.stop_signal.received

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run `transformers.Trainer.train`, then write the final adapter and the merged copy into the run folder.

        A checkpoint of the last step comes before them, so that nothing but their writing is ever to be done again; it
        is removed after them with `save_strategy="no"`. Of a run that is at its last step that is all this does.

        Args:
            resume_from_checkpoint: folder of the checkpoint to go on from; True: the newest whole one of `output_dir`.
        """
        output_dir = str(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(whole_checkpoint(output_dir) or "") or None
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint must find a checkpoint in {output_dir}, which has none")
        if isinstance(self.train_dataset, ExampleDataset | ExampleStream):
            check_usable(self.train_dataset, UNUSABLE_EXAMPLES)
        if isinstance(self.train_dataset, ExampleStream):
            self.train_dataset.repeat = True  # transformers counts a place in the first pass alone
        self._begin(resume_from_checkpoint or None)
        ranks, timeout = self.accelerator.num_processes, float(self.args.ddp_timeout)
        with self.stop_signal.listening(), watching_ranks(self.accelerator.process_index, ranks, timeout):
            result = super().train(resume_from_checkpoint or None, *args, **kwargs)
            self._agree_to_stop()
            if self.state.global_step not in (0, self._saved_step):
                self._save_checkpoint(self.model)
            if not self.interrupted:
                self.stop_signal.follows = "the final weights are written first"
                self._finish()
                self.stop_signal.received = False  # there is nothing to go on with
            return result._replace(training_loss=result.metrics["train_loss"])

    def _begin(self, resume: str | None) -> None:
        """Find out which run this is, and whether it is at its last step."""
        output_dir, self._resumed_from = str(self.args.output_dir), resume
        self._run: str | None = str(uuid.uuid4())
        self._trained, self._saved_step = False, -1
        self._loss_sums.complete, self.stop_signal = True, StopSignal()
        if resume is None:
            return
        check_states(resume, self.args)
        state = json.loads((Path(resume) / "trainer_state.json").read_text(encoding="utf-8"))
        self._trained = is_trained(state, self.args)
        if self._trained:
            logger.warning("all its steps are trained: the final weights are written, of step %d", state["global_step"])
        run, identity = read_manifest(resume).get("run"), run_id(output_dir)
        inside = Path(resume).resolve().parent == Path(output_dir).resolve()
        if run == identity if identity else inside:  # without one config.yaml is damaged, or of an older version
            self._run = run
            self._saved_step = state["global_step"] if inside else -1

    def _facts(self) -> dict[str, Any]:
        """Return what manifests say of the run."""
        return {"run": self._run, "global_step": self.state.global_step, "epoch": self.state.epoch}

    def _finish(self) -> None:
        self.rollouts.check_usable()
        valid = count_over_ranks(self.accelerator, self.rollouts.valid_rollouts)
        if not valid and self.is_world_process_zero():
            logger.warning(
                "no rollout of this run was valid: the model did not take up the format, and only the reference "
                "teacher had work. Look at completions/ for what it wrote"
            )
        weights = None  # or those of the leader rank, where the model's own are sharded
        if self.is_fsdp_enabled:
            weights = self.accelerator.get_state_dict(self.model)
        elif sharding_of(self.model) != "unsharded":  # ZeRO-3
            weights = gather_state(self.model, keep=self.is_world_process_zero())
        check = None  # ZeRO-3 scores nothing outside its engine
        if sharding_of(self.model_wrapped) != "zero3":
            sequence = fixed_sequence(self.processing_class, self.prompts, with_image=self.rollouts.has_vision)
            check = SavedCheck(self.model_wrapped, sequence, weights, mixed=self.args.bf16 or self.args.fp16)
        if self.is_world_process_zero():
            asking = Asking(self.prompts, self.objective.validity, self.objective.span_style)
            save_final(
                str(self.args.output_dir), self.model, self.processing_class, asking, merged=self.args.save_merged,
                facts=self._facts(), weights=weights, check=check,
            )  # fmt: skip
            last = Path(str(self.args.output_dir)) / f"checkpoint-{self._saved_step}"
            if self.args.save_strategy == "no" and last.is_dir():
                remove(last)
        self.accelerator.wait_for_everyone()  # no rank leaves while the leader writes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics to the logs of a step; correct the mean loss of a resumed run, which is of all its steps."""
        if "train_loss" in logs and (mean := self._loss_sums.mean()) is not None:
            logs["train_loss"] = mean
        super().log({**logs, **self.recorder.logs()} if "loss" in logs else logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return and record the floating-point operations of a micro-batch."""
        return self.recorder.operations(inputs["batch"])

    # --- The loop's events ----------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the parts the wrapped model and the states of the checkpoint that was loaded, and start the folder."""
        self.teacher.bind(self.model_wrapped)
        self.rollouts.bind(self.model_wrapped)
        if self._resumed_from is not None:
            read_parts(self._resumed_from, self.accelerator.process_index, self.parts)
            self.scorer.adapter = self.teacher.adapter  # of the weights that the run began with
            if self.is_deepspeed_enabled and hasattr(unwrap(self.model), "peft_config"):
                student = unwrap(self.model_wrapped)
                check_loaded_adapter(student, self._resumed_from, gather_trained(student))
        model = base_model(self.model).config.name_or_path
        facts = {"model": model, **process_facts(), **self.facts, "id": self._run}
        self.folder.begin(self.args, state.global_step, **facts)
        if state.is_world_process_zero:
            self.rollouts.show_prompts(self.train_dataset)
        if sharding_of(self.model_wrapped) == "zero3" and self.rollouts.engine.collective:
            raise ValueError(
                "rollout_engine must be a server's under ZeRO-3, which gathers all weights for every token of a "
                "rollout; or take FSDP2 (configs/fsdp2.yaml) or ZeRO-2, with rollouts in the training process"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the step if its numbers are not finite."""
        self.other_models.rest()
        # DeepSpeed has stepped by now and checks for itself (not in float32), as float16's loss scaler does.
        if not self.is_deepspeed_enabled and self.accelerator.scaler is None:
            self.guard.drop_if_not_finite(self.model, state.global_step + 1)
        self._optimizer_phase.enter_context(self.phases("optimizer"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move a moving-average teacher."""
        self.teacher.update()
        self._optimizer_phase.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save after the last step, and after one in which SIGTERM came on any rank, which is then the last."""
        self._agree_to_stop()
        control.should_training_stop |= self.interrupted
        control.should_save |= self.interrupted or state.global_step >= state.max_steps

    def _agree_to_stop(self) -> None:
        if self.accelerator.num_processes > 1:  # all stop after the same step
            self.stop_signal.received = bool(count_over_ranks(self.accelerator, int(self.interrupted)))

    # --- Checkpoints ----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return f"{folder}/{SAVING}" if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write transformers' checkpoint and the states of the parts, completely or not at all, once a step."""
        folder, name = str(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if self._saved_step == self.state.global_step:
            return
        with saving(folder, name):
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            write_parts(f"{folder}/{SAVING}/{name}", self.accelerator.process_index, self.parts)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(folder, name, **self._facts())
                rotate(folder, self.args.save_total_limit, self._run)
            self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.teacher.bind(self.model_wrapped)  # before the weights that it may take its copies from change
        adapted = hasattr(unwrap(self.model), "peft_config")
        if adapted:
            check_saved_adapter(self.model, resume_from_checkpoint)
        if self.is_fsdp_enabled or adapted:
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            except RuntimeError as error:  # tensors of another size
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"{resume_from_checkpoint} must fit this run's model, got: {reason}") from error
        else:
            load_model(self.model, resume_from_checkpoint)


_ONE = torch.zeros(1, dtype=torch.int64)
