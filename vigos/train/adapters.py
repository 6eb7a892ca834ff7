"""Adapters: put a fresh one on the model, and merge a trained one into a copy.

Nothing is ever merged into, or subtracted from, the base weights in place: in bfloat16 that drifts, a little with every
step.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vigos.models.compat import experts_are_swapped, unsharded_init
from vigos.models.families import family_of
from vigos.models.parts import base_model, lm_head, unwrap
from vigos.models.routers import routers
from vigos.scoring.teacher import check_adapter

if TYPE_CHECKING:
    from vigos.train.config import ViGOSConfig

logger = logging.getLogger(__name__)

_TOKENS = ".token_adapter"  # where peft puts trained rows of an embedding, a level below the layer that it replaces


def prepare_model(model: nn.Module, config: ViGOSConfig) -> nn.Module:
    """Return the model with exactly the weights trainable that `config` asks for: adapted by LoRA, or in full.

    A model that already carries a peft adapter is taken as it is, after a check that its adapter can be switched off.
    """
    if hasattr(model, "peft_config"):
        check_adapter(model)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model's adapter must be trainable; load it with is_trainable=True")
        if config.save_merged:
            check_mergeable(model)
        return model
    if config.lora:
        model = build_lora(model, config)
        if config.save_merged:
            check_mergeable(model)
        return model
    base = base_model(model)
    if getattr(base, "is_quantized", False):
        raise ValueError("lora must be true for a model in 4 bits, whose weights cannot be trained; got False")
    base.requires_grad_(True)
    if not config.train_vision:
        inside = {id(p) for p in _language_model(base)[1].parameters()} | {id(p) for p in lm_head(base).parameters()}
        for parameter in base.parameters():
            parameter.requires_grad_(id(parameter) in inside)
    if not config.router_aux_loss_coef:  # nothing would keep the experts evenly used
        for router, _ in routers(base):
            router.requires_grad_(False)
    if not config.train_head:  # and the embedding with it, where they are one matrix
        lm_head(base).requires_grad_(False)
    return model


def build_lora(model: nn.Module, config: ViGOSConfig) -> nn.Module:
    """Return a peft model whose adapter covers the target layers of the language model (and vision tower, if asked).

    The bare names (`gate_proj`, …) also match the vision tower's layers in Qwen2.5-VL, so the adapter is given the
    language model's path as well. The head is refused: student and teacher read it once for both.
    """
    from peft import LoraConfig, get_peft_model

    base = base_model(model)
    head_name = next((name for name, module in base.named_modules() if module is lm_head(base)), "lm_head")
    for target in config.lora_target_modules:
        if target in (head_name, head_name.split(".")[-1]):
            raise ValueError(
                f"lora_target_modules must not name the language-model head {target!r}: with the adapter off the "
                "teacher would need a head of its own, and its logits cost more than the rest of the loss. Leave it "
                "out, or train in full: lora=False, train_head=True"
            )
    prefix, _ = _language_model(base)
    inside = "" if config.train_vision else prefix
    layers = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside) and module is not lm_head(base)
    ]
    last = {name.split(".")[-1] for name in layers}
    targets = list(config.lora_target_modules)
    if targets == ["auto"]:  # names that a smaller member of the family lacks are left out
        family = family_of(base.config)
        targets = [name for name in family.lora_targets if name in last] if family else []
    if targets in ([], ["all-linear"]):
        targets = sorted(last)
    for target in targets:
        if target not in last:
            part = "model" if config.train_vision else "language model"
            raise ValueError(
                f"lora_target_modules must name linear layers of the {part}, got {target!r}; "
                f"it has {', '.join(sorted(last))}"
            )
    parameters = _expert_parameters(base, config.lora_target_parameters, inside)
    names = "|".join(re.escape(t) for t in targets)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=rf"{re.escape(inside)}(?:.*\.)?(?:{names})",  # peft matches the whole path
        target_parameters=parameters or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
    )
    experts = set(_expert_paths(base, inside))
    left = (last - set(targets)) | {n.split(".layers.")[-1].split(".", 1)[-1] for n in experts - set(parameters)}
    if left:
        logger.info("LoRA leaves as they are: %s, and all routers", ", ".join(sorted(left)))
    return get_peft_model(base, lora)  # type: ignore[arg-type]


def _expert_parameters(base: Any, targets: Sequence[str], inside: str) -> list[str]:
    """Return the paths of the 3-D parameters whose names end as `targets` say; "auto": the family's experts."""
    if list(targets) == ["auto"]:
        family = family_of(base.config)
        targets = family.experts if family else ()
        if not targets:
            raise ValueError(f"lora_target_parameters must name parameters: none are known of {type(base).__name__}")
    paths = _expert_paths(base, inside)
    for target in targets:
        if not any(path.endswith(f".{target}") for path in paths):
            found = sorted({".".join(path.split(".")[-3:]) for path in paths})
            raise ValueError(
                f"lora_target_parameters must name 3-D parameters of {type(base).__name__}, got {target!r}; it has "
                f"{', '.join(found) or 'none'}"
            )
    return [path for path in paths if path.endswith(tuple(f".{target}" for target in targets))]


def _expert_paths(base: Any, inside: str) -> list[str]:
    return [n for n, p in base.named_parameters() if n.startswith(inside) and p.ndim == 3 and "expert" in n]


def check_mergeable(model: Any) -> None:
    """Raise before the run, not after its last step, for adapters that `merged_copy` cannot merge."""
    for name, adapter in model.peft_config.items():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind != "LORA" or getattr(adapter, "use_dora", False):
            raise ValueError(
                f"save_merged must be false for adapter {name!r}: a merged copy is made of plain LoRA, got "
                f"{'DoRA' if kind == 'LORA' else kind}"
            )
        for option in ("lora_bias", "trainable_token_indices"):
            if getattr(adapter, option, None):
                raise ValueError(
                    f"save_merged must be false for adapter {name!r} with {option}, which a merged copy would leave out"
                )
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in base_model(model).named_modules():
        if (
            isinstance(module, LoraLayer)
            and not isinstance(module, ParamWrapper)
            and not isinstance(module.get_base_layer(), nn.Linear)
        ):
            raise ValueError(
                f"save_merged must be false for an adapter on {name}, a {type(module.get_base_layer()).__name__}: a "
                "merged copy is made of adapters on linear layers"
            )


def _language_model(base: Any) -> tuple[str, nn.Module]:
    """Return path (with a trailing dot, or empty) and module of the language model under the head."""
    decoder = base.get_decoder()
    if decoder is None or decoder is base:
        return "", base
    return next(f"{name}." for name, module in base.named_modules() if module is decoder), decoder


@torch.no_grad()
def merged_copy(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Any:
    """Return a plain transformers model with W + s·BA in place of W, on the CPU; `model` is only read.

    The sum is taken in float32 and rounded once to the base's dtype.

    Args:
        weights: the state dict of the adapted model where its parameters are sharded; None: read them from the model.
    """
    state = _plain_state(model, weights, merge=True)
    return plain_copy(base_model(model), {name: tensor.cpu() for name, tensor in state.items()})


@torch.no_grad()
def base_copy(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Any:
    """Return a plain transformers model over the very tensors under the adapter, in evaluation mode.

    Args:
        weights: as in `merged_copy`.
    """
    base = base_model(model)
    state = _plain_state(model, weights, merge=False)
    copy, device = plain_copy(base, state), next(iter(state.values())).device
    buffers = dict(base.named_buffers())
    for name, buffer in list(copy.named_buffers()):
        if buffer.is_meta:  # no state dict holds it
            owner, _, last = name.rpartition(".")
            setattr(copy.get_submodule(owner), last, buffers[name].to(device))
    return copy.eval()


def _plain_state(model: nn.Module, weights: Mapping[str, Tensor] | None, *, merge: bool) -> dict[str, Tensor]:
    """Return the state dict of the model under the adapter, with or without what the adapter adds."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    core: Any = unwrap(model)
    base = base_model(model)
    layers: dict[str, Any] = {name: m for name, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    tensors = dict(core.state_dict() if weights is None else weights)
    above = next(f"{name}." if name else "" for name, module in core.named_modules() if module is base)
    for name, parameter in core.named_parameters():
        if hasattr(parameter, "quant_state"):
            tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
            tensors[name] = dequantised(parameter)
    adapted: dict[str, list[tuple[str, Any]]] = {}  # path of a parameter in the plain model -> what is added to it
    for name, layer in layers.items() if merge else ():  # adapters of several parameters of one module are nested
        path = f"{name}.{getattr(layer, 'parameter_name', 'weight')}".replace(".base_layer", "")
        adapted.setdefault(path, []).append((name, layer))
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        key = key.removeprefix(above)
        owner = max((name for name in layers if key.startswith(f"{name}.")), key=len, default=None)
        if owner is not None and not key.startswith(f"{owner}.base_layer."):
            continue  # the adapter's own
        path = key.replace(".base_layer", "")
        total = tensor.float() if path in adapted else tensor
        for name, layer in adapted.get(path, ()):
            for adapter in layer.active_adapters:
                if adapter in getattr(layer, "lora_A", ()):
                    down, up = (
                        tensors[f"{above}{name}.{part}.{adapter}.weight"].float() for part in ("lora_A", "lora_B")
                    )
                    total = total + layer.scaling[adapter] * _product(layer, down, up)
        state[path.replace(_TOKENS, "")] = total.to(tensor.dtype)
    return state


def dequantised(parameter: Any) -> Tensor:
    """Return the weight that a 4-bit parameter stands for, in the dtype it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def _product(layer: Any, down: Tensor, up: Tensor) -> Tensor:
    """Return BA; of experts (E, out, in), or (E, in, out) where their family stores them so, one for each."""
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        return up @ down
    a, b = down.view(experts, -1, down.shape[-1]), up.view(len(up), -1, experts)
    order = "oi" if experts_are_swapped(layer) else "io"
    return torch.einsum(f"ore,eri->e{order}", b, a)


def plain_class(model: Any) -> Any:
    """Return the transformers class of a model; FSDP2 puts another one in front."""
    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def plain_copy(model: Any, state: Mapping[str, Tensor]) -> Any:
    """Return an unwrapped transformers model of the same class and configuration with the tensors of `state`."""
    kind = plain_class(model)
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # `state` is not quantised
        del config.quantization_config
    if hasattr(config, "distributed_config"):  # an unsharded copy must not wait for other ranks when it is saved
        del config.distributed_config
    with unsharded_init(), torch.device("meta"):
        copy = kind(config)
    copy.load_state_dict(state, strict=True, assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy
