"""What the tests of the trainer share: a tiny Qwen2.5-VL with the world's processor, rows, and scripted rollouts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback

from vigos.method.encode import EncodedPrompt
from vigos.method.prompts import Prompts
from vigos.rollout.engine import RolloutEngine, Sampling
from vigos.rollout.full_weights import checkpoint_groups
from vigos.rollout.generate import TransformersEngine
from vigos.train.config import ViGOSConfig
from vigos.train.trainer import ViGOSTrainer
from vigos.world import checkpoint_path

PROMPTS = Prompts(
    system="",
    format="Describe, think, answer.",
    student="{problem} {format}",
    perception="",
    reasoning="{problem} Key: {answer}. Explain.",
    reference="{problem} Key: {answer}. {format}",
)

# What a student may write after `<description>`; the second and the fourth are invalid.
VALID_A = "A red 7, a blue 3.</description>\n<think>The 7 is red.</think>\n\\boxed{red}"
CUT_OFF = "A green 4 and a green 4 and a"
VALID_B = "Two digits: 5 and 1.</description> <think>5 + 1 = 6, so 6.</think> \\boxed{6}"
TAGLESS = "The answer is 9."
TEXTS = [VALID_A, CUT_OFF, VALID_B, TAGLESS]


@cache
def processor() -> Any:
    """The built-in world's: byte-level BPE whose merges cross tags, and images of 16-pixel merged patches."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint_path())


def tiny_student(
    dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = False, width: int = 32, padding: int = 0
) -> Any:
    """A random two-layer Qwen2.5-VL for `processor()`, with weights large enough that contexts matter."""
    tokenizer = processor().tokenizer
    ids = {t: tokenizer.convert_tokens_to_ids(f"<|{t}|>") for t in ("image_pad", "video_pad", "vision_start", "im_end")}
    text = {
        "vocab_size": len(tokenizer) + padding, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": width // 8, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
        "eos_token_id": ids["im_end"], "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": tied,
    }  # fmt: skip
    image = processor().image_processor
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": width,
        "patch_size": image.patch_size, "spatial_merge_size": image.merge_size, "window_size": 8 * image.patch_size,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = ids["im_end"]
    return model.eval().to(dtype)


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Noise: every patch differs."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows(n: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Rows as `load_rows` takes them, with images of different sizes."""
    inks = ("red", "blue", "green")
    return [
        {
            "problem": f"Which ink is digit {i}?",
            "images": [picture(i, width=16 * (2 + i % 2))],
            "answer": inks[i % 3],
            "problem_id": f"row-{i}",
        }
        for i in range(start, start + n)
    ]


class ScriptedEngine(RolloutEngine):
    """A rollout engine that has its completions from a list, in turn, tokenised and (where finished) ended by EOS."""

    def __init__(self, texts: Sequence[str], unfinished: Sequence[str] = (CUT_OFF,)) -> None:
        self.texts, self.unfinished, self.served = list(texts), set(unfinished), 0

    def generate(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]) -> list[Tensor]:
        out = []
        for _ in range(len(prompts) * sampling.n):
            out.append(completion_ids(self.texts[self.served % len(self.texts)], self.unfinished))
            self.served += 1
        return out


class CopyEngine(TransformersEngine):
    """An engine with a model of its own, sent weights in groups under their names in a checkpoint, as vLLM is."""

    owns_weights = takes_groups = one_a_rank = True
    collective = False

    def check_weights(self, model: Any) -> None:
        self.original, self.state = copy.deepcopy(model), dict[str, Tensor]()
        self.update_weights(0, model, checkpoint_groups(model, trained=False))

    def update_weights(self, step: int, model: Any, weights: Any) -> None:
        self.version: int | None = None
        for group in weights:
            self.state |= {name: x.clone() for name, x in group.items()}
        made = type(self.original).from_pretrained(
            None, config=self.original.config, state_dict=dict(self.state), dtype=self.original.dtype
        )
        self.model, self.version = made.eval(), step

    def holds(self, step: int) -> bool:
        return self.version == step


def completion_ids(text: str, unfinished: Sequence[str] | set[str] = (CUT_OFF,)) -> Tensor:
    """(C,) ids of `text`, with EOS unless it is one of `unfinished`."""
    tokenizer = processor().tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids if text in unfinished else [*ids, tokenizer.eos_token_id])


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of every optimizer step, by parameter name, as the optimizer sees them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def config(folder: Path, **options: Any) -> ViGOSConfig:
    """A short run on the CPU that leaves nothing but its records."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0,
        "max_completion_length": 24, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "save_merged": False,
        "learning_rate": 1e-3, "impl": "reference", "completion_steps": 0, "grade_rollouts": False,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return ViGOSConfig(**(defaults | options))


def trainer(
    model: Any, args: ViGOSConfig, data: list[dict[str, Any]], *, texts: Sequence[str] | None = None, **options: Any
) -> ViGOSTrainer:
    """A trainer that takes rows in order; scripted rollouts if `texts` are given, else the model's own."""
    engine = None if texts is None else ScriptedEngine(texts)
    options = {"processing_class": processor(), "rollout_engine": engine} | options
    return _InOrder(model=model, args=args, train_dataset=data, prompts=PROMPTS, **options)


class _InOrder(ViGOSTrainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def move(engine: Any, scale: float = 0.1) -> None:
    """Take the student away from its teacher."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter.dtype))


def metrics_of(engine: Any) -> list[dict[str, Any]]:
    """Return what was logged at each step, without clocks and memory."""
    logs = [log for log in engine.state.log_history if "loss" in log]
    return [{k: v for k, v in log.items() if not k.startswith(("perf/", "train_", "epoch"))} for log in logs]


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of the trained ones, by name."""
    return {n: p.detach().clone() for n, p in engine.model.named_parameters() if p.requires_grad}


def chat(question: str, prefill: str = "") -> str:
    """The world's chat template, written out."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n{prefill}"


def full_log_probs(model: Any, text: str, image: Any, ids: Tensor) -> Tensor:
    """(C, V) float64: the distributions that predict each completion token, from a forward over everything."""
    prompt = processor()(text=[text], images=[[image]], return_tensors="pt", return_mm_token_type_ids=True)
    P = prompt["input_ids"].shape[1]
    out = model(
        input_ids=torch.cat([prompt["input_ids"], ids[None]], 1),
        attention_mask=torch.ones(1, P + len(ids), dtype=torch.int64),
        mm_token_type_ids=torch.cat([torch.as_tensor(prompt["mm_token_type_ids"]), torch.zeros_like(ids)[None]], 1),
        pixel_values=prompt["pixel_values"],
        image_grid_thw=prompt["image_grid_thw"],
    )
    return out.logits[0, P - 1 : P - 1 + len(ids)].double().log_softmax(-1)
