"""What is trained (an adapter, or the model in full) and whose weights teach (frozen, moving average, live).

The frozen teacher stays frozen. With an adapter it is the model with the adapter off; weights that train in place
(full fine-tuning, a trained head) have an untouched copy, which takes their place while the teacher scores. Nothing is
ever merged into, or subtracted from, the base weights: in bfloat16 that drifts, a little with every step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vigos.models.compat import unsharded_init
from vigos.models.parts import base_model, lm_head, unwrap
from vigos.models.sharding import gather, local_shard, reshard, shard_of, sharding_of
from vigos.scoring.teacher import check_adapter

if TYPE_CHECKING:
    from vigos.train.config import ViGOSConfig

TEACHER_FILE = "vigos_teacher.safetensors"


# --- What is trained -------------------------------------------------------------------------------------------------


def prepare_model(model: nn.Module, config: ViGOSConfig) -> nn.Module:
    """The model with exactly the weights trainable that `config` asks for: adapted by LoRA, or in full.

    A model that already carries a peft adapter is taken as it is, after a check that its adapter can be switched off.
    """
    if hasattr(model, "peft_config"):
        check_adapter(model)
        if config.save_merged:
            _check_mergeable(model)
        return model
    if config.lora:
        return build_lora(model, config)
    base = base_model(model)
    base.requires_grad_(True)
    if not config.train_vision:
        inside = {id(p) for p in _language_model(base)[1].parameters()} | {id(p) for p in lm_head(base).parameters()}
        for parameter in base.parameters():
            parameter.requires_grad_(id(parameter) in inside)
    if not config.train_head:  # and the embedding with it, where they are one matrix
        lm_head(base).requires_grad_(False)
    return model


def build_lora(model: nn.Module, config: ViGOSConfig) -> nn.Module:
    """A peft model whose adapter covers the target layers of the language model (and vision tower, if asked).

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
    targets = sorted(last) if config.lora_target_modules == ["all-linear"] else config.lora_target_modules
    for target in targets:
        if target not in last:
            part = "model" if config.train_vision else "language model"
            raise ValueError(
                f"lora_target_modules must name linear layers of the {part}, got {target!r}; "
                f"it has {', '.join(sorted(last))}"
            )
    names = "|".join(re.escape(t) for t in targets)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=rf"{re.escape(inside)}(?:.*\.)?(?:{names})",  # peft matches the whole path
        bias="none",
    )
    return get_peft_model(base, lora)  # type: ignore[arg-type]


def _check_mergeable(model: Any) -> None:
    """Now, and not after the last step: `merged_copy` knows W + s·BA."""
    for name, adapter in model.peft_config.items():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind != "LORA" or getattr(adapter, "use_dora", False):
            raise ValueError(
                f"save_merged must be false for adapter {name!r}: a merged copy is made of plain LoRA, got "
                f"{'DoRA' if kind == 'LORA' else kind}"
            )


def _language_model(base: Any) -> tuple[str, nn.Module]:
    """Path (with a trailing dot, empty for the whole model) and module of the language model under the head."""
    decoder = base.get_decoder()
    if decoder is None or decoder is base:
        return "", base
    return next(f"{name}." for name, module in base.named_modules() if module is decoder), decoder


# --- Whose weights teach ---------------------------------------------------------------------------------------------


class TeacherPolicy:
    """Puts the teacher's weights in place while it scores, and keeps them between steps.

    Args:
        model: the student, prepared (trainable weights marked) and not yet trained or wrapped.
        kind: "frozen": the weights of this moment, with a fresh adapter off; "ema": their moving average; "live": the
            student's own.
        decay: share of the average kept at each update.
        deferred: take the copies in `bind`, of each rank's pieces; a whole model's worth for each rank is then never
            held. Between here and there the weights must not change.

    A copy is kept of trained weights alone: none for a frozen teacher under LoRA, the adapter for a moving average.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["frozen", "ema", "live"],
        decay: float = 0.999,
        *,
        deferred: bool = False,
    ) -> None:
        self.kind, self.decay = kind, decay
        core = unwrap(model)
        self.adapter: Literal["off", "on"] = "off" if hasattr(core, "peft_config") and kind == "frozen" else "on"
        self.copies: dict[str, Tensor] = {}  # this rank's pieces
        self.parameters: dict[str, nn.Parameter] = {}
        self._sharded: nn.Module | None = None
        self._head: str | None = None
        if kind == "live":
            return
        in_adapter, head = _adapter_parameters(core), lm_head(core).weight
        for name, parameter in core.named_parameters():
            if parameter.requires_grad and not (self.adapter == "off" and id(parameter) in in_adapter):
                self.parameters[name] = parameter
                if parameter is head:
                    self._head = name
        if not deferred:
            self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        for name, parameter in self.parameters.items():
            # The average moves by a thousandth of what the weights move by: bfloat16 would round that away.
            dtype = torch.promote_types(parameter.dtype, torch.float32) if self.kind == "ema" else parameter.dtype
            self.copies[name] = local_shard(parameter).to(dtype, copy=True)

    def bind(self, model: nn.Module) -> None:
        """After the model was wrapped, before a checkpoint is loaded: follows its parameters to where they lie now."""
        if not self.parameters or sharding_of(model) == "unsharded":
            if self.parameters and not self.copies:
                self._copy()
            for name, copy in self.copies.items():
                self.copies[name] = copy.to(self.parameters[name].device)
            return
        if sharding_of(model) == "zero3":
            raise ValueError(
                f"teacher={self.kind!r} keeps a copy of the trained weights, which ZeRO-3 cannot exchange: train an "
                "adapter with teacher='frozen', or take FSDP2 (configs/fsdp2.yaml)"
            )
        self._sharded = model
        reshard(model)
        found = dict(unwrap(model).named_parameters())
        self.parameters = {name: found[name] for name in self.parameters}
        if not self.copies:
            self._copy()

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The teacher's weights, inside; the student's own again after."""
        with self._exchanged_pieces() if self._sharded is not None else self._exchanged():
            yield

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.copies[name].to(parameter)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]

    @contextmanager
    def _exchanged_pieces(self) -> Iterator[None]:
        """FSDP2 gathers from memory of its own, so values change places and tensors do not."""
        assert self._sharded is not None
        own: dict[str, Tensor] = {}
        reshard(self._sharded)
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    own[name] = local_shard(parameter).clone()
                    local_shard(parameter).copy_(self.copies[name])
            yield
        finally:
            reshard(self._sharded)
            with torch.no_grad():
                for name, values in own.items():
                    local_shard(self.parameters[name]).copy_(values)

    def head_weight(self, head: Any) -> Tensor | None:
        """Return the gathered head (V, D) of the teacher's hidden states; None: it is the student's."""
        if self._head is None:
            return None
        return gather(self.copies[self._head].to(head.weight.dtype), self.parameters[self._head])

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: moves the average towards the student."""
        if self.kind == "ema":
            for name, parameter in self.parameters.items():
                self.copies[name].lerp_(local_shard(parameter).to(self.copies[name]), 1.0 - self.decay)

    def save(self, folder: str | Path, *, writes: bool = True) -> None:
        """Writes the copies that cannot be had again into a checkpoint: those of a moving average.

        Args:
            writes: whether this rank does; the others give their pieces.
        """
        if self.kind != "ema":
            return
        from safetensors.torch import save_file

        # One by one to the CPU: the whole average need not fit beside the model.
        whole = {}
        for name, piece in self.copies.items():
            tensor = gather(piece, self.parameters[name])
            if writes:
                whole[name] = tensor.cpu().contiguous()
        if writes:
            save_file(whole, Path(folder) / TEACHER_FILE)

    def load(self, folder: str | Path) -> None:
        """Reads what `save` wrote."""
        if self.kind != "ema":
            return
        from safetensors.torch import load_file

        path = Path(folder) / TEACHER_FILE
        if not path.is_file():
            raise ValueError(
                f"teacher='ema' must resume from a checkpoint with {TEACHER_FILE}, got {folder} without it"
            )
        loaded = load_file(path)
        if loaded.keys() != self.copies.keys():
            raise ValueError(f"{path} must hold the average of this model's trained weights, got other names")
        for name, copy in self.copies.items():
            copy.copy_(shard_of(loaded[name], self.parameters[name]))


def _adapter_parameters(model: nn.Module) -> set[int]:
    if not hasattr(model, "peft_config"):
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.adapter_layer_names
        for parameter in getattr(layer, name).parameters()
    }


# --- A merged copy ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def merged_copy(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Any:
    """A plain transformers model with W + s·BA in place of W, on the CPU; `model` is only read.

    The sum is taken in float32 and rounded once to the base's dtype.

    Args:
        weights: the state dict of the adapted model where its own parameters are in pieces; None: its own.
    """
    from peft.tuners.lora import LoraLayer

    core: Any = unwrap(model)
    base = base_model(model)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    held = core.state_dict() if weights is None else weights
    above = next(f"{name}." if name else "" for name, module in core.named_modules() if module is base)
    state: dict[str, Tensor] = {}
    for key, tensor in held.items():
        key = key.removeprefix(above)
        owner, _, parameter = key.partition(".base_layer.")
        if owner in layers:
            layer: Any = layers[owner]
            if parameter == "weight":
                total = tensor.float()
                for adapter in layer.active_adapters:
                    if adapter in layer.lora_A:
                        down, up = (
                            held[f"{above}{owner}.{part}.{adapter}.weight"].float() for part in ("lora_A", "lora_B")
                        )
                        total = total + layer.scaling[adapter] * (up @ down)
                tensor = total.to(tensor.dtype)
            state[f"{owner}.{parameter}"] = tensor.cpu()
        elif not any(key.startswith(f"{name}.") for name in layers):
            state[key] = tensor.cpu()
    return plain_copy(base, state)


def plain_class(model: Any) -> Any:
    """The transformers class of a model: FSDP2 puts one of its own in front."""
    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def plain_copy(model: Any, state: Mapping[str, Tensor]) -> Any:
    """A transformers model of the same class and configuration, never wrapped, that holds the tensors of `state`."""
    kind = plain_class(model)
    config = deepcopy(model.config)
    if hasattr(config, "distributed_config"):  # a copy that is whole must not wait for other ranks when it is saved
        del config.distributed_config
    with unsharded_init(), torch.device("meta"):
        copy = kind(config)
    copy.load_state_dict(state, strict=True, assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy
