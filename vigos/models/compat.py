"""Private names of other libraries that models, scoring and training depend on, each with the version it was read in.

A new version of one of them is checked here first. Four stand elsewhere (tests/test_architecture.py holds the list):
`torch.distributed.distributed_c10d._resolve_process_group` (vigos/divergence/call.py, torch 2.13.0) and
`atexit._run_exitfuncs` (vigos/errors.py, Python 3.11), which come before this module; the methods of transformers'
`Trainer` that vigos/train/trainer.py overrides (5.23.0); `WeightTransferEngineFactory._registry` of vLLM
(vigos/rollout/vllm_worker.py, 0.32.0), in whose process no trainer is. vigos/integrations patches others' code by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

# --- torch 2.13.0 -----------------------------------------------------------------------------------------------------


def reshards_after_forward(unit: FSDPModule) -> bool:
    """Read an FSDP2 unit's setting, which has a public setter and no getter.

    `_fsdp_param_group` became `_fsdp_param_groups` in torch 2.13.
    """
    state: Any = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


# The attribute in which a wrapper keeps the module inside it: DDP and DeepSpeed, FSDP, torch.compile, checkpointing.
WRAPPED = ("module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


def norms(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the 2-norm of each tensor, by one launch for all of a dtype on a GPU."""
    return tuple(torch._foreach_norm(tensors))


# --- transformers 5.23.0 ----------------------------------------------------------------------------------------------


@contextmanager
def unsharded_init() -> Iterator[None]:
    """Disable ZeRO-3's sharding of models that transformers builds inside: one rank may build one alone."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def attention_name(config: Any) -> str:
    """Return the attention implementation that a model's (sub-)configuration names."""
    return config._attn_implementation_internal


def set_attention_name(config: Any, name: str) -> None:
    """Name another attention implementation; the public property also checks it and changes sub-configurations."""
    config._attn_implementation_internal = name


def checkpoint_functions(decoder: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """Return the modules that recompute activations, with the function each runs its layer by."""
    name = "_gradient_checkpointing_func"
    return {
        module: module.__dict__[name]
        for module in decoder.modules()
        if getattr(module, "gradient_checkpointing", False) and name in module.__dict__
    }


def set_checkpoint_function(module: nn.Module, function: Callable[..., Any]) -> None:
    """Replace what `checkpoint_functions` returned for a module."""
    module._gradient_checkpointing_func = function  # type: ignore[assignment]


# Functions of a modeling file in layers that carry state: a convolution, Gated DeltaNet, Mamba-2, and Mamba-2's fused
# layer, which a kernel has and the fallback leaves to the others. Keywords of the model's call reach all of them.
STATE_FUNCTIONS = (
    "causal_conv1d_fn", "torch_chunk_gated_delta_rule", "mamba2_chunk_scan", "mamba2_split_conv1d_scan_combined"
)  # fmt: skip


def state_functions(decoder: nn.Module) -> list[tuple[Any, str]]:
    """Return the modeling files of a decoder's layers that have such functions, each with their names."""
    files = {sys.modules[type(module).__module__] for module in decoder.modules()}
    return [(file, name) for file in files for name in STATE_FUNCTIONS if hasattr(file, name)]


def is_stateful(model: Any) -> bool:
    """Return True for models that carry recurrent state along the sequence."""
    return bool(getattr(model, "_is_stateful", False))


def router_recorder(decoder: nn.Module) -> Any:
    """Return what a decoder declares its router logits by: a class, a recorder with class and index, or None."""
    return (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits")


def keep_checkpoint_names(base: Any) -> None:
    """Keep, with a transformers model that is not sharded yet, the mapping of its names to a checkpoint's.

    A loaded model has it. For one made from its configuration transformers looks it up by its class, which has another
    name under FSDP2: nothing would be found any more, and nothing renamed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if getattr(base, "_weight_conversions", None) is None:
        mapping = get_model_conversion_mapping(base, add_legacy=False)
        # A change of prefix is that of a checkpoint that was read, and none was: `revert_weight_conversion` has none.
        base._weight_conversions = [x for x in mapping if not isinstance(x, PrefixChange)] or None


def has_own_adapter(model: Any) -> bool:
    """Return True if transformers (`model.add_adapter`), and not peft, put the adapter on."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def experts_are_swapped(layer: Any) -> bool:
    """Return whether a peft adapter of experts has exchanged in and out; peft 0.18 never does (seen: 0.18, 0.21)."""
    return bool(getattr(layer, "_did_swap_in_out_features", False))


def loss_totals(trainer: Any) -> list[float] | None:
    """Read what a trainer's next log averages over: it is no part of transformers' checkpoints.

    None for versions before `train` kept its loss in an attribute.
    """
    if not hasattr(trainer, "_tr_loss"):
        return None
    return [trainer._tr_loss.item(), trainer._total_loss_scalar, trainer._globalstep_last_logged]


def set_loss_totals(trainer: Any, totals: list[float] | None) -> None:
    """Put back what `loss_totals` returned, once the loop has set up its counters."""
    if totals is not None:
        loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = totals
        trainer._tr_loss = torch.full_like(trainer._tr_loss, loss)
