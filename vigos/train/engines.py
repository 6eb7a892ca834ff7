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

    folder = Path(str(args.output_dir))
    sent: dict[str, Any] = {"adapters": folder / "rollout_adapters"}
    if not args.lora:
        sent = {"full_weights": folder / "rollout_weights"}
    engine = ServerEngine(
        str(args.vllm_server_base_url), str(args.rollout_model), tokenizer, concurrency=args.rollout_concurrency,
        timeout=args.rollout_timeout, retries=args.rollout_retries, **sent, **id_rules(base_model(model), tokenizer),
    )  # fmt: skip
    if not args.lora and args.vllm_weight_transfer == "nccl":
        engine.send_by_nccl()
    return engine


def vllm_engine(args: ViGOSConfig, model: nn.Module, tokenizer: Any, **options: Any) -> VLLMEngine:
    """Make vLLM in this process for a training run, one a rank: in its model's dtype, with room for what it writes.

    Args:
        options: of vLLM's `LLM`, which win over those that follow from `args`.
    """
    base = base_model(model)
    length = base.config.get_text_config().max_position_embeddings
    if args.max_prompt_length:
        length = min(length, args.max_prompt_length + args.max_completion_length)
    adapters = Path(str(args.output_dir)) / "rollout_adapters"
    if args.world_size > 1:  # each rank's engine reads its own
        adapters /= f"rank-{args.process_index}"
    defaults = {
        "dtype": str(base.dtype).removeprefix("torch."), "max_model_len": length,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization, "limit_mm_per_prompt": {"video": 0},
    }  # fmt: skip
    return VLLMEngine(
        str(args.rollout_model), tokenizer, adapters=adapters if args.lora else None, lora_r=args.lora_r,
        full_weights=not args.lora, sleep_level=args.vllm_sleep_level,
        gpu=args.local_process_index if args.world_size > 1 and not args.use_cpu else None,
        **id_rules(base, tokenizer), **(defaults | options),
    )  # fmt: skip
