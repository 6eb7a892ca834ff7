"""Parameters that live in pieces on several ranks: FSDP2 (`fully_shard`), DeepSpeed ZeRO-3.

What the trainer does outside of an ordinary forward has to know about the pieces: it reads the language-model head,
puts a teacher's weights in place of the student's, and generates. Everything here is a no-op on whole parameters.
Calls that gather are collectives: every rank makes them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from vigos.models.parts import lm_head, replaced_forward, unwrap

Kind = Literal["whole", "fsdp2", "zero3"]
T = TypeVar("T")


def sharding_of(model: nn.Module) -> Kind:
    """How the parameters of a wrapped model lie over the ranks; refuses FSDP 1, whose flat parameters have no names."""
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ValueError("FSDP must be version 2 (fsdp_version: 2, as in configs/fsdp2.yaml), got version 1")
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        return "fsdp2"
    return "zero3" if any(hasattr(p, "ds_id") for p in model.parameters()) else "whole"


def local(x: Tensor) -> Tensor:
    """This rank's piece of a parameter: the same memory, written in place by optimizers."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(piece: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each rank has a `piece`, laid out as the parameter `like` is."""
    if not isinstance(like, DTensor):
        return piece
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(piece, mesh, placements, shape=like.shape, stride=like.stride()).full_tensor()


def piece_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of a whole tensor that every rank has."""
    if not isinstance(like, DTensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to_local()


def reshard(model: nn.Module) -> None:
    """Lets go of what FSDP2 still holds gathered, so that the next forward gathers what the pieces hold by then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters by name, whole on every rank."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _gathered([p for p in trained.values() if hasattr(p, "ds_id")]):
        return {name: full(local(p.detach()), p).clone() for name, p in trained.items()}


def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state dict of a model in pieces, whole and on the CPU; empty unless this rank keeps it.

    One tensor is gathered at a time.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        with _gathered([tensor] if hasattr(tensor, "ds_id") else []):
            whole = full(local(tensor.detach()), tensor)
            if keep:
                state[name] = whole.to("cpu", copy=True)
    return state


@contextmanager
def _gathered(parameters: list[Tensor]) -> Iterator[None]:
    """ZeRO-3's parameters are whole inside, on every rank."""
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def made_whole() -> Iterator[None]:
    """A model made inside by one rank alone is whole: transformers would have ZeRO-3 deal parts of it out."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


@contextmanager
def head_tensors(model: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight (V, D) and bias of the language-model head, whole on this rank.

    Under FSDP2 the gathered parameters stay until the backward pass, whose hooks then reduce their gradients.
    """
    head: Any = lm_head(model)
    kind = sharding_of(model)
    if kind == "fsdp2":
        _owner(model, head).unshard()
    elif kind == "zero3":
        with _gathered(list(head.parameters(recurse=False))):
            weight = head.weight.detach().clone()  # the engine may want it in the backward pass, when it is gone
            bias = None if head.bias is None else head.bias.detach().clone()
        yield weight, bias
        return
    yield head.weight, head.bias


def _owner(model: nn.Module, module: nn.Module) -> FSDPModule:
    """The innermost FSDP2 unit that holds `module`."""
    path = next(name for name, m in model.named_modules() if m is module).split(".")
    for n in range(len(path), -1, -1):
        parent = model.get_submodule(".".join(path[:n]))
        if isinstance(parent, FSDPModule):
            return parent
    raise AssertionError("a sharded model without a unit around its head")


def with_whole_weights(model: nn.Module, run: Callable[[], T]) -> T:
    """`run()`, during which every rank holds all weights, so that forwards in it wait for no other rank.

    Generation needs it: ranks take different numbers of steps, and would gather all weights anew for every token.
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    if not units and not isinstance(model, FSDPModule):
        return run()
    core, result = unwrap(model), []
    letting_go = [unit for unit in units if _reshards_after_forward(unit)]

    def gathered(*_: Any, **__: Any) -> None:
        for unit in letting_go:
            unit.set_reshard_after_forward(False, recurse=False)
        for unit in units:
            unit.unshard()
        try:
            result.append(run())
        finally:
            for unit in letting_go:
                unit.set_reshard_after_forward(True, recurse=False)
            reshard(model)

    original = core.forward

    def redirected(*_: Any, **__: Any) -> None:
        with replaced_forward(core, original):  # what runs inside calls the model as usual
            gathered()

    with torch.no_grad(), replaced_forward(core, redirected):
        model()  # the root's hooks: its own weights, and who is root
    return result[0]


def _reshards_after_forward(unit: FSDPModule) -> bool:
    """There is a public setter and no getter; the groups' name went from one to several in torch 2.13."""
    state: Any = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)
