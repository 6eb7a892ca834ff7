"""`TeacherWeights`: frozen, moving-average or live weights, in place of the student's while the teacher scores.

Under a fresh adapter the frozen teacher is the model with the adapter off. Weights that train in place (full
fine-tuning, a trained head, an adapter that was trained before) have an untouched copy, which takes their place while
the teacher scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vigos.divergence.head import Head
from vigos.models.parts import lm_head, unwrap
from vigos.models.sharding import gather, local_shard, reshard, shard_of, sharding_of


class TeacherWeights:
    """Put the teacher's weights in place while it scores, and keep them between steps.

    Args:
        model: the student, prepared (trainable weights marked) and not yet trained or wrapped.
        kind: "frozen": the weights of this moment, with a fresh adapter off; "ema": their moving average; "live": the
            student's own.
        decay: share of the average kept at each update.
        deferred: take the copies in `bind`, of each rank's shards, so that no rank ever holds all of them. The weights
            must not change in between.
        is_leader: True on the rank whose `state_dict` goes into checkpoints.

    A copy is kept of trained weights alone: none for a frozen teacher under a fresh adapter, the adapter for a moving
    average and for the frozen teacher of an adapter that was trained before.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["frozen", "ema", "live"],
        decay: float = 0.999,
        *,
        deferred: bool = False,
        is_leader: bool = True,
    ) -> None:
        self.kind, self.decay, self.is_leader = kind, decay, is_leader
        core = self._core = unwrap(model)
        self._adapted = hasattr(core, "peft_config")
        off = self._adapted and kind == "frozen" and _adds_nothing(core)
        self.adapter: Literal["off", "on"] = "off" if off else "on"
        self.copies: dict[str, Tensor] = {}  # this rank's shards
        self.parameters: dict[str, nn.Parameter] = {}
        self._sharded: nn.Module | None = None
        self._head: dict[str, str] = {}  # "weight", "bias" of a head that trains -> its parameter's name
        if kind != "live":
            self._find_trained()
            if not deferred:
                self._copy()

    def _find_trained(self) -> None:
        in_adapter, head = _adapter_parameters(self._core), dict(lm_head(self._core).named_parameters(recurse=False))
        for name, parameter in self._core.named_parameters():
            if parameter.requires_grad and not (self.adapter == "off" and id(parameter) in in_adapter):
                self.parameters[name] = parameter
                self._head |= {part: name for part, value in head.items() if value is parameter}

    @torch.no_grad()
    def _copy(self) -> None:
        for name, parameter in self.parameters.items():
            # The average moves by a thousandth of what the weights move by: bfloat16 would round that away.
            dtype = torch.promote_types(parameter.dtype, torch.float32) if self.kind == "ema" else parameter.dtype
            self.copies[name] = local_shard(parameter).to(dtype, copy=True)

    def bind(self, model: nn.Module) -> None:
        """Follow the parameters to where they lie once `model` is wrapped; call it before a checkpoint is loaded."""
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
        """Put the teacher's weights into the model inside, and the student's again after."""
        with self._exchanged_shards() if self._sharded is not None else self._exchanged():
            yield

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        students = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.copies[name].to(parameter)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = students[name]

    @contextmanager
    def _exchanged_shards(self) -> Iterator[None]:
        """Exchange values, not tensors, under FSDP2, which gathers from memory that it has allocated itself."""
        assert self._sharded is not None
        students: dict[str, Tensor] = {}
        reshard(self._sharded)
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    students[name] = local_shard(parameter).clone()
                    local_shard(parameter).copy_(self.copies[name])
            yield
        finally:
            reshard(self._sharded)
            with torch.no_grad():
                for name, values in students.items():
                    local_shard(self.parameters[name]).copy_(values)

    def head(self, student: Head) -> Head:
        """Return the teacher's gathered head, given the student's: a weight or bias that trains is replaced."""
        kept = {
            part: gather(self.copies[name].to(student.weight.dtype), self.parameters[name])
            for part, name in self._head.items()
        }
        return replace(student, weight=kept.get("weight", student.weight), bias=kept.get("bias", student.bias))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the student; call it after each optimizer step."""
        if self.kind == "ema":
            for name, parameter in self.parameters.items():
                self.copies[name].lerp_(local_shard(parameter).to(self.copies[name]), 1.0 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the moving average, or the adapter that a run began with, by parameter name.

        Tensors are gathered on the CPU of the leader rank. Copies of base weights are not kept: they are taken from the
        base model again. Under FSDP2 every rank has to call it together.
        """
        state: dict[str, Any] = {}
        if self.kind == "frozen" and self._adapted:
            state["adapter"] = self.adapter
        if self.kind == "ema" or "adapter" in state:
            for name, copy in self.copies.items():  # one by one, so that the gathered average is never on the device
                gathered = gather(copy, self.parameters[name])
                if self.is_leader:
                    state[name] = gathered.cpu().contiguous()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of the leader rank. Raises ValueError if it is of other weights."""
        state = dict(state)
        adapter = state.pop("adapter", None)
        if self.kind == "frozen" and adapter is not None and adapter != self.adapter:
            # This process was given another adapter than the run began with: the checkpoint's, or a fresh one.
            self.adapter = adapter
            self.copies, self.parameters, self._head = {}, {}, {}
            if adapter == "on":
                self._find_trained()
                self._copy()
        if self.kind != "ema" and not (self.kind == "frozen" and adapter == "on"):
            return
        if state.keys() != self.copies.keys():
            missing = sorted(self.copies.keys() - state.keys())
            raise ValueError(
                f"teacher={self.kind!r} must resume from a checkpoint that holds the "
                f"{'average' if self.kind == 'ema' else 'first values'} of this model's trained weights, "
                f"got {len(state)} tensors without {len(missing)} of its {len(self.copies)}"
                + (f", such as {missing[0]}" if missing else "")
            )
        with torch.no_grad():
            for name, copy in self.copies.items():
                copy.copy_(shard_of(state[name], self.parameters[name]))


def _adds_nothing(model: nn.Module) -> bool:
    """Return True if the model's adapters are LoRA whose second matrices are 0, as peft begins them."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not isinstance(layer, LoraLayer):
            return False
        for group in (layer.lora_B, layer.lora_embedding_B):
            parameters = (p for name, p in group.named_parameters() if name.split(".")[0] in layer.active_adapters)
            if any(p.detach().any() for p in parameters):
                return False
    return True


def _adapter_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that peft added."""
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
