"""Make the rollout engine that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vigos.models.parts import base_model
from vigos.rollout.engine import RolloutEngine, id_rules
from vigos.rollout.generate import TransformersEngine
from vigos.rollout.vllm import VLLMEngine
from vigos.train.config import ViGOSConfig


def build_engine(args: ViGOSConfig, model: nn.Module, processor: Any) -> RolloutEngine:
    """Make the engine of `args.rollout_engine` for a student."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if args.rollout_engine == "transformers":
        return TransformersEngine.for_model(model, processor, batch_size=args.rollout_batch_size)
    if args.rollout_engine == "vllm":
        return vllm_engine(args, model, tokenizer)
    from vigos.rollout.server import ServerEngine

    return ServerEngine(
        str(args.vllm_server_base_url), str(args.rollout_model), tokenizer, concurrency=args.rollout_concurrency,
        timeout=args.rollout_timeout, retries=args.rollout_retries,
        adapters=Path(str(args.output_dir)) / "rollout_adapters", **id_rules(base_model(model), tokenizer),
    )  # fmt: skip


def vllm_engine(args: ViGOSConfig, model: nn.Module, tokenizer: Any, **options: Any) -> VLLMEngine:
    """Make vLLM in this process for a training run: in its model's dtype, with room for its prompts and completions.

    Args:
        options: of vLLM's `LLM`, which win over those that follow from `args`.
    """
    if args.world_size > 1:
        raise ValueError(
            f"rollout_engine must be 'server' with several processes, got 'vllm' with {args.world_size}: let vLLM "
            "serve from other GPUs"
        )
    base = base_model(model)
    length = base.config.get_text_config().max_position_embeddings
    if args.max_prompt_length:
        length = min(length, args.max_prompt_length + args.max_completion_length)
    defaults = {
        "dtype": str(base.dtype).removeprefix("torch."), "max_model_len": length,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization, "limit_mm_per_prompt": {"video": 0},
    }  # fmt: skip
    return VLLMEngine(
        str(args.rollout_model), tokenizer, adapters=Path(str(args.output_dir)) / "rollout_adapters",
        lora_r=args.lora_r, **id_rules(base, tokenizer), **(defaults | options),
    )  # fmt: skip
