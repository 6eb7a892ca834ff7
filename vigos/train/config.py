"""`ViGOSConfig`: every option of a training run, on top of `transformers.TrainingArguments`.

    config = ViGOSConfig(output_dir="runs/3b", preset="paper", max_steps=100)
    config = ViGOSConfig(output_dir="runs/3b", preset="released", normalize="tokens")   # a preset, one line changed

The defaults are the paper's. A preset fills the fields in `PRESETS` that were left at None; after construction none of
them is None, so what is printed and saved is what ran. The help texts are the command line's and the manual's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from vigos.method.objective import PRESETS, Objective, check_choices
from vigos.method.views import View
from vigos.rollout.engine import Sampling
from vigos.system.secrets import server_address


def _option(default: Any, help: str) -> Any:
    """Return a dataclass field with its line of help, which must not hold a per cent sign: argparse reads it."""
    return field(default=default, metadata={"help": help})


@dataclass(repr=False)  # the inherited one masks tokens
class ViGOSConfig(TrainingArguments):
    """Hold the options of `vigos.ViGOSTrainer`; those not named here are `transformers.TrainingArguments`'s.

    In all of them 0 turns a thing off (a limit, a record), and None leaves it to what the help text says.
    """

    # --- The loss ---
    # Which teacher supervises which tokens, in which direction, clipped and weighted how: `vigos.method.objective`.
    method: Literal["vigos", "opsd"] = _option(
        "vigos", "vigos: three teachers; opsd: one privileged teacher over every token, forward KL."
    )
    preset: Literal["paper", "released"] = _option(
        "paper", "Fills options left unset: as the paper states them, or as the published code runs."
    )
    lambda_perception: float = _option(1.0, "Weight of the perception term; 0 leaves it out.")
    lambda_reasoning: float = _option(1.0, "Weight of the reasoning term; 0 leaves it out.")
    lambda_reference: float = _option(2.0, "Weight of the reference term; 0 leaves it out. opsd has weight 1 always.")
    reasoning_prefix: Literal["student", "think"] | None = _option(
        None, "What precedes the reasoning for its teacher: the student's whole prefix, or <think> alone."
    )
    span_style: Literal["paper", "released"] | None = _option(
        None, "paper: the text between the tags is supervised; released: closing tags and the box as well."
    )
    validity: Literal["loose", "strict"] = _option(
        "loose", "strict: a rollout with text between its parts or after the box is invalid too."
    )
    invalid_rollouts: Literal["reference", "others"] = _option(
        "reference",
        "Who supervises invalid rollouts: the reference teacher, or (ablation) the perception and reasoning teachers.",
    )
    reference_kind: Literal["answer", "solution"] | None = _option(
        None, "What the privileged teachers read: the answer, or the example's worked solution (solution_column)."
    )
    reference_kl: Literal["reverse", "forward"] = _option(
        "reverse", "Direction of the reference term; reverse: KL(student || teacher), the method's."
    )
    divergence: Literal["kl", "jsd"] = _option(
        "kl", "kl: the method's directions; jsd: generalised Jensen-Shannon for every term."
    )
    jsd_beta: float = _option(0.5, "Weight of KL(teacher || mixture) when divergence is jsd; in (0, 1).")
    divergence_temperature: float = _option(1.0, "Temperature of both distributions in the divergence.")
    clip_mode: Literal["token", "entry", "none"] = _option(
        "token", "token: min(divergence, token_clip) a token; entry: each vocabulary entry's term before the sum."
    )
    token_clip: float = _option(0.05, "Nats a token may add to the loss (clip_mode token); it has no gradient above.")
    entry_clip: float = _option(0.05, "Nats a vocabulary entry may add to a token's divergence (clip_mode entry).")
    description_end_clip: float | None = _option(
        None, "token_clip of the last supervised description token; unset: the preset's, or token_clip."
    )
    reasoning_start_clip: float | None = _option(
        None, "token_clip of the first supervised reasoning token; unset: the preset's, or token_clip."
    )
    normalize: Literal["tokens", "sequence", "active"] | None = _option(
        None,
        "Divisor of each term: its tokens in the global batch; mean of per-rollout means; active: all supervised "
        "tokens of the micro-batch over all ranks.",
    )

    importance_clip: float = _option(
        0.0,
        "Multiply each token's loss by its probability now over that when it was sampled, at most this; 0: do not.",
    )

    # --- Own teachers ---
    # Who supervises what, in place of the method's teachers: docs/teachers.md.
    teachers: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Teachers of the run's own, each a mapping; unset: those of the method."}
    )
    images_columns: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Columns with the images of single roles, such as reasoning: crops; unset: images_column."},
    )
    student_view: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What the student sees of the images, such as blur or downscale: 4; unset: the images."},
    )

    # --- Teachers and scoring ---
    # Whose weights teach, and how hidden states are computed. None of it but `teacher` changes the loss.
    teacher: Literal["frozen", "ema", "live"] = _option(
        "frozen", "Whose weights teach: the initial ones, a moving average of the student's, or the student's own."
    )
    ema_decay: float = _option(0.999, "Share of the old average kept at each optimizer step (teacher ema).")
    teacher_scoring: Literal["tree", "separate"] = _option(
        "tree", "tree: every distinct prefix runs once; separate: padded batches of whole sequences."
    )
    teacher_verify: Literal["first", "never", "always"] = _option(
        "first",
        "When tree scores of teacher and student are compared with separate ones; a mismatch warns and switches both.",
    )
    student_scoring: Literal["tree", "separate"] = _option(
        "tree", "As teacher_scoring, for the student's forward and backward."
    )
    token_budget: int = _option(16_384, "Tokens of one scoring forward; a longer sequence gets one of its own.")
    impl: str = _option("auto", "Engine of the divergence: auto, reference, cpu, triton or cuda.")

    # --- Sampling ---
    # How the student's completions are drawn.
    temperature: float = _option(1.1, "Sampling temperature of rollouts; 0: greedy.")
    top_p: float = _option(0.95, "Nucleus of rollouts, in (0, 1].")
    top_k: int = _option(20, "Candidates of rollouts; 0: no limit.")
    max_completion_length: int = _option(4096, "Tokens a rollout may have; longer ones are cut and invalid.")
    num_generations: int = _option(1, "Rollouts of each example.")

    # --- Rollout engine ---
    # Who draws them. Names that begin with vllm_ are TRL's.
    rollout_batch_size: int | None = _option(None, "Sequences generated at once; unset: those of the optimizer step.")
    rollout_engine: Literal["transformers", "server", "vllm"] = _option(
        "transformers",
        "Who samples: the model's own generate, a server with vLLM's OpenAI-compatible API, or vLLM in this process.",
    )
    vllm_server_base_url: str | None = _option(None, "Address of the rollout server, up to and including /v1.")
    rollout_model: str | None = _option(
        None, "The base model: its name on the rollout server, or folder or hub name for vLLM in this process."
    )
    vllm_gpu_memory_utilization: float = _option(
        0.3, "Share of the GPU's memory that vLLM in this process takes, in (0, 1]."
    )
    vllm_sleep_level: int = _option(
        0,
        "While it does not sample, vLLM in this process keeps its weights (0), moves them to the CPU (1) or drops them "
        "(2, full fine-tuning).",
    )
    vllm_weight_transfer: Literal["files", "nccl"] = _option(
        "files", "How a server gets all weights: files of the run folder, or NCCL broadcasts to its GPUs (not yet run)."
    )
    rollout_concurrency: int = _option(32, "Requests in flight on the rollout server.")
    rollout_timeout: float = _option(600.0, "Seconds that a request to the rollout server may take.")
    rollout_retries: int = _option(4, "Further tries of a request that failed in passing.")
    async_rollout: bool = _option(
        False, "While a step trains, a server samples the next step's rollouts, from weights one step old."
    )

    # --- Data and prompts ---
    # Where an example's fields are, and what the roles are asked.
    max_prompt_length: int = _option(8192, "Examples with a longer student prompt are skipped; 0: no limit.")
    prompts_file: str | None = _option(None, "YAML with prompt templates; unset: the built-in wording.")
    chat_template_kwargs: dict[str, Any] | str | None = _option(  # noqa: RUF009
        None, 'JSON for the chat template, such as {"enable_thinking": false}; under a role\'s name, for it alone.'
    )
    problem_column: str = _option("problem", "Column with the question.")
    images_column: str | None = _option("images", "Column with the image or list of images.")
    answer_column: str = _option("answer", "Column with the reference answer.")
    id_column: str = _option("problem_id", "Column with the example's id.")
    solution_column: str = _option("solution", "Column with the worked solution (reference_kind solution).")

    # --- What is trained ---
    # An adapter, or the model in full.
    lora: bool = _option(True, "Train a LoRA adapter; false: full fine-tuning.")
    lora_r: int = _option(64, "Rank of the adapter.")
    lora_alpha: int = _option(128, "Scale of the adapter: alpha / r.")
    lora_dropout: float = _option(0.05, "Dropout in front of the adapter.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "Linear layers that get an adapter, by the last part of their name; auto: those that "
            "docs/models.md names for the model's family; all-linear: all of them."
        },
    )
    lora_target_parameters: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Experts of a mixture that get an adapter, by the end of their parameters' names; auto: those that "
            "docs/models.md names; needs lora_dropout 0."
        },
    )
    use_rslora: bool = _option(False, "Scale the adapter by alpha / sqrt(r) instead (rank-stabilised LoRA).")
    use_dora: bool = _option(False, "Train magnitudes of weights apart (DoRA); needs save_merged false.")
    router_aux_loss_coef: float = _option(
        0.0,
        "Weight of a mixture's load-balancing loss, over the student's tokens; above 0 full fine-tuning trains the "
        "routers too, which else stay frozen.",
    )
    train_vision: bool = _option(False, "Adapt or train the vision tower as well, not the language model alone.")
    train_head: bool = _option(False, "Train the language-model head in full; the teacher keeps the initial one.")

    # --- Records ---
    # What the run folder keeps beyond the metrics of every step.
    completion_steps: int = _option(1, "Write rollouts with spans and per-token divergence every N steps; 0: never.")
    completion_images: int = _option(
        256, "Longest side, in pixels, of the images kept with written rollouts; 0: keep none."
    )
    completion_top_k: int = _option(
        0, "Also write the most likely tokens of student and teacher at each supervised token; 0: none."
    )
    palr_steps: int = _option(
        0,
        "Measure PALR, the share of the supervision that the answer buys, every N steps; 0: never. See docs/method.md.",
    )
    palr_wrong_answers: int = _option(4, "Wrong answers an example that PALR compares with, taken from other examples.")
    grade_rollouts: bool = _option(True, "Compare the rollouts' answers with the reference and log the accuracy.")
    save_merged: bool = _option(True, "Also write the final adapter merged into a copy of the model.")

    # --- Faults and speed ---
    # When a run gives up, and where its time goes.
    max_dropped_steps: int = _option(
        3, "Stop after so many steps in a row whose loss or gradient was not finite; such a step changes no weight."
    )
    profile: bool = _option(False, "Write a trace and a table of where a step's time goes; takes four steps.")

    # --- TrainingArguments with other defaults ---
    # The paper's values, and what examples in place of tensors need.
    learning_rate: float = _option(5e-6, "Peak learning rate.")
    max_grad_norm: float = _option(0.1, "Gradients are clipped to this norm.")
    num_train_epochs: float = _option(1.0, "Passes over the data.")
    per_device_train_batch_size: int = _option(1, "Examples of a micro-batch on each device.")
    gradient_accumulation_steps: int = _option(32, "Micro-batches of an optimizer step.")
    logging_steps: float = _option(1, "Log every N optimizer steps.")
    remove_unused_columns: bool = _option(False, "Must stay false: examples are not model inputs.")
    dataloader_pin_memory: bool = _option(False, "Examples hold images, not tensors: nothing to pin.")

    def __post_init__(self) -> None:
        check_choices(self, unset=PRESETS["paper"])
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_numbers()
        self._check_combinations()
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight takes part in every forward
        # Examples are Python objects, which the dispatching loader of iterable datasets cannot slice.
        if self.accelerator_config.dispatch_batches is None:  # type: ignore[union-attr]
            self.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]

    @property
    def sampling(self) -> Sampling:
        """Return the options of sampling, checked."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_completion_length, self.num_generations)

    @property
    def objective(self) -> Objective:
        """Return the options of the loss alone, checked."""
        return Objective(**{f.name: getattr(self, f.name) for f in fields(Objective) if f.init})

    def _check_numbers(self) -> None:
        positive = ["token_budget", "lora_r", "lora_alpha", "palr_wrong_answers", "max_dropped_steps"]
        positive += ["num_generations", "max_completion_length"]
        positive += ["rollout_batch_size"] if self.rollout_batch_size is not None else []
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        _ = self.objective, self.sampling, View.read(self.student_view)  # which check their own fields
        for name in ("max_prompt_length", "palr_steps", "completion_steps", "completion_images", "completion_top_k"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {getattr(self, name)!r}")
        for name, kind in ViGOSConfig.__annotations__.items():
            if kind == "bool" and not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.importance_clip and (self.importance_clip < 1 or self.divergence_temperature != 1):
            raise ValueError(
                "importance_clip must be 0, or at least 1 with divergence_temperature 1, got "
                f"{self.importance_clip} with divergence_temperature {self.divergence_temperature}"
            )
        if not self.router_aux_loss_coef >= 0:
            raise ValueError(f"router_aux_loss_coef must be at least 0, got {self.router_aux_loss_coef}")
        for name in ("ema_decay", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(f"vllm_gpu_memory_utilization must be in (0, 1], got {self.vllm_gpu_memory_utilization}")

    def _check_combinations(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: examples are rendered into prompts by the trainer")
        if (engine := self.rollout_engine) != "transformers":
            for name in ("vllm_server_base_url", "rollout_model") if engine == "server" else ("rollout_model",):
                if not getattr(self, name):
                    raise ValueError(
                        f"{name} must be given with rollout_engine={engine!r}, got {getattr(self, name)!r}"
                    )
            if engine == "server":
                server_address(str(self.vllm_server_base_url), "vllm_server_base_url", "VIGOS_ROLLOUT_API_KEY")
        on_cpu = self.use_cpu or not torch.cuda.is_available()
        if self.vllm_weight_transfer == "nccl" and (engine != "server" or self.lora or on_cpu):
            raise ValueError(
                "vllm_weight_transfer must be 'files' unless all weights go from a GPU to a server (rollout_engine "
                f"server, lora false), got 'nccl' with {engine}, lora {self.lora} and {'no' if on_cpu else 'a'} GPU"
            )
        if self.vllm_sleep_level not in (0, 1, 2):
            raise ValueError(f"vllm_sleep_level must be 0, 1 or 2, got {self.vllm_sleep_level!r}")
        if self.vllm_sleep_level == 2 and self.lora:
            raise ValueError("vllm_sleep_level must be at most 1 with lora: nobody sends base weights again, got 2")
        if self.lora and self.train_head:
            raise ValueError(
                "train_head must be false unless lora=False: an adapter's file cannot hold the head, and the adapter "
                "alone would not be the trained model"
            )
        if isinstance(self.lora_target_parameters, str):
            self.lora_target_parameters = [self.lora_target_parameters]
        if self.lora and self.lora_target_parameters and (self.lora_dropout or self.use_dora):
            raise ValueError(
                "lora_target_parameters needs lora_dropout 0 and no DoRA: an expert's adapter is added to its weight, "
                f"got lora_dropout={self.lora_dropout} and use_dora={self.use_dora}"
            )
        if self.lora and self.use_dora and self.save_merged:
            raise ValueError("save_merged must be false with use_dora, got True: a merged copy is made of plain LoRA")
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]
        if self.lora and not self.lora_target_modules:
            raise ValueError(
                "lora_target_modules must name at least one layer, got none; for full training set lora=False"
            )
