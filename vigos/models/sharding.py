"""Sharded parameters: FSDP2 (`fully_shard`) and DeepSpeed ZeRO-3.

What the trainer does outside of an ordinary forward has to know about shards: it reads the language-model head, puts a
teacher's weights in place of the student's, and generates. Everything here is a no-op on unsharded parameters. Calls
that gather are collectives: every rank makes them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from vigos.divergence.head import Head
from vigos.models.compat import reshards_after_forward
from vigos.models.logits import logit_transform
from vigos.models.parts import lm_head, replaced_forward, unwrap

Kind = Literal["unsharded", "fsdp2", "zero3"]
T = TypeVar("T")


def sharding_of(model: nn.Module) -> Kind:
    """Return how a wrapped model is sharded; refuse FSDP 1, whose flat parameters have no names."""
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ValueError("FSDP must be version 2 (fsdp_version: 2, as in configs/fsdp2.yaml), got version 1")
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        return "fsdp2"
    return "zero3" if any(hasattr(p, "ds_id") for p in model.parameters()) else "unsharded"


def local_shard(x: Tensor) -> Tensor:
    """Return this rank's shard of a parameter: the same memory, written in place by optimizers."""
    return x.to_local() if isinstance(x, DTensor) else x


def gather(shard: Tensor, parameter: Tensor) -> Tensor:
    """Return the full tensor of which each rank has a `shard`, laid out as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return shard
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(shard, mesh, placements, shape=parameter.shape, stride=parameter.stride()).full_tensor()


def shard_of(full: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor that every rank has, laid out as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(full.to(parameter.device), mesh, placements, src_data_rank=None).to_local()


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 still holds gathered, so that the next forward gathers the shards as they are by then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained parameters by name, gathered on every rank."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _gathered([p for p in trained.values() if hasattr(p, "ds_id")]):
        return {name: gather(local_shard(p.detach()), p).clone() for name, p in trained.items()}


def parameter_groups(model: nn.Module, limit: int, *, trained: bool = True) -> Iterator[dict[str, Tensor]]:
    """Yield parameters by name, gathered on every rank, `limit` bytes (or one parameter) at a time.

    Unsharded ones are the model's own memory: read them before the next optimizer step.

    Args:
        trained: those that are trained, or all.
    """
    group: dict[str, Tensor] = {}
    size = 0
    for name, p in model.named_parameters():
        if trained and not p.requires_grad:
            continue
        if hasattr(p, "ds_id"):
            with _gathered([p]):
                full = p.detach().clone()
        else:
            full = gather(local_shard(p.detach()), p)
        if group and size + full.nbytes > limit:
            yield group
            group, size = {}, 0
        group[name] = full
        size += full.nbytes
    if group:
        yield group


def gather_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Gather the state dict of a sharded model on the CPU; empty unless this rank keeps it.

    One tensor is gathered at a time.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        with _gathered([tensor] if hasattr(tensor, "ds_id") else []):
            full = gather(local_shard(tensor.detach()), tensor)
            if keep:
                state[name] = full.to("cpu", copy=True)
    return state


@contextmanager
def _gathered(parameters: list[Tensor]) -> Iterator[None]:
    """Gather parameters of ZeRO-3, inside, on every rank."""
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def gathered_head(model: nn.Module) -> Iterator[Head]:
    """Gather the language-model head, with what the model does to its logits.

    Under FSDP2 the gathered parameters stay until the backward pass, whose hooks then reduce their gradients.
    """
    head: Any = lm_head(model)
    if hasattr(head, "base_layer"):
        raise ValueError("the adapter must not cover the language-model head: its weight alone gives other logits")
    settings = logit_transform(model)
    kind = sharding_of(model)
    if kind == "fsdp2":
        _owner(model, head).unshard()
    elif kind == "zero3":
        with _gathered(list(head.parameters(recurse=False))):
            weight = head.weight.detach().clone()  # the engine may want it in the backward pass, when it is gone
            bias = None if head.bias is None else head.bias.detach().clone()
        yield Head(weight, bias, **settings)
        return
    yield Head(head.weight, head.bias, **settings)


def _owner(model: nn.Module, module: nn.Module) -> FSDPModule:
    """Return the innermost FSDP2 unit that holds `module`."""
    path = next(name for name, m in model.named_modules() if m is module).split(".")
    for n in range(len(path), -1, -1):
        parent = model.get_submodule(".".join(path[:n]))
        if isinstance(parent, FSDPModule):
            return parent
    raise AssertionError("a sharded model without a unit around its head")


def with_gathered_weights(model: nn.Module, run: Callable[[], T]) -> T:
    """Call `run()` with all weights gathered on every rank, so that forwards in it wait for no other rank.

    Generation needs it: ranks take different numbers of steps, and would gather all weights anew for every token.
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    if not units and not isinstance(model, FSDPModule):
        return run()
    core, result = unwrap(model), []
    resharded = [unit for unit in units if reshards_after_forward(unit)]

    def gathered(*_: Any, **__: Any) -> None:
        for unit in resharded:
            unit.set_reshard_after_forward(False, recurse=False)
        for unit in units:
            unit.unshard()
        try:
            result.append(run())
        finally:
            for unit in resharded:
                unit.set_reshard_after_forward(True, recurse=False)
            reshard(model)

    original = core.forward

    def redirected(*_: Any, **__: Any) -> None:
        with replaced_forward(core, original):  # what runs inside calls the model as usual
            gathered()

    with torch.no_grad(), replaced_forward(core, redirected):
        model()  # the root's hooks: its own weights, and who is root
    return result[0]
