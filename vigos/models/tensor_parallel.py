"""Students that transformers has loaded with tensor parallelism: a group of ranks holds one copy of the model.

    torchrun --nproc-per-node 8 -m vigos.cli train --tensor-parallel 8 …

Every layer's weights lie in slices on the ranks of a group (`from_pretrained(distributed_config=…)`), the head's over
the vocabulary; activations outside of attention and MLP are the same on all of them. So a group needs what one process
needs: the same rows, the same rollouts, one record of what happened. transformers deals the same rows to a group; the
rest is here. The head is used where it lies: `linear_divergence` projects onto a rank's slice of the vocabulary, and
the ranks exchange maxima, sums and the gradient of the hidden rows, never the head (V, D) nor logits (N, V).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vigos.errors import TrainingStopped
from vigos.models.parts import base_model
from vigos.models.sharding import local


@dataclass(frozen=True)
class Replicas:
    """The copies of the model that train on different rows: each on a rank, or on a tensor-parallel group of ranks."""

    count: int = 1
    index: int = 0  # of the copy that this rank belongs to
    group: dist.ProcessGroup | None = None  # the ranks that hold this copy in slices; None: this rank alone

    @classmethod
    def of(cls, model: nn.Module, rank: int, ranks: int) -> Replicas:
        """Of a loaded model, on rank `rank` of `ranks`. A model whose slices the trainer cannot follow is refused."""
        base = base_model(model)
        config = getattr(base.config, "distributed_config", None)
        sliced = [name for name, p in base.named_parameters() if isinstance(p, DTensor)]
        if config is None:
            if sliced:
                raise ValueError(
                    f"model must be sharded by transformers, from_pretrained(distributed_config=DistributedConfig("
                    f"tp_size=…)), or left whole; got DTensor parameters such as {sliced[0]} of another origin"
                )
            return cls(ranks, rank)
        for name in ("pp_size", "ep_size", "dp_replicate_size"):
            if getattr(config, name, 1) > 1:
                raise ValueError(f"model's distributed_config must have {name}=1, got {getattr(config, name)}")
        size = int(config.tp_size)
        if size == 1:
            return cls(ranks, rank)
        mesh = base._device_mesh
        return cls(ranks // size, rank // size, (mesh["tp"] if mesh.ndim > 1 else mesh).get_group())

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one that speaks for its copy: writes its records, is counted, asks a server."""
        return self.group is None or self.group.rank() == 0

    def once(self, values: Tensor) -> Tensor:
        """`values` on the rank that speaks, zeros on the others: what sums over all ranks then count once a copy."""
        return values if self.speaks else torch.zeros_like(values)

    def rollouts(self, sample: Callable[[], list[Tensor]], device: torch.device, *, together: bool) -> list[Tensor]:
        """What `sample()` returns on the rank that speaks, on every rank of its group.

        Args:
            sample: returns ids, (C,) int64 each.
            device: where the group's collectives want their tensors.
            together: the model samples, whose forwards are collectives, so that all have to call it; otherwise the
                rank that speaks calls it for all of them.
        """
        if self.group is None:
            return sample()
        found: list[Tensor] | None = None
        if together or self.speaks:
            try:
                found = sample()
            except Exception:
                if not together:  # the others wait for this rank's
                    self._broadcast(None, device)
                raise
        ids = self._broadcast(found, device)
        if ids is None:
            raise TrainingStopped(
                f"sampling failed on rank {dist.get_global_rank(self.group, 0)}, whose output says why"
            )
        return ids

    def _broadcast(self, ids: list[Tensor] | None, device: torch.device) -> list[Tensor] | None:
        """From the group's first rank: one tensor with their number (-1: none) and lengths, one with the ids."""
        assert self.group is not None
        source, first = dist.get_global_rank(self.group, 0), self.speaks
        head = torch.tensor([-1 if ids is None else len(ids)], device=device)
        dist.broadcast(head, source, group=self.group)
        count = int(head)
        if count < 1:
            return None if count < 0 else []
        lengths = torch.tensor([len(x) for x in ids or []] if first else [0] * count, dtype=torch.int64, device=device)
        dist.broadcast(lengths, source, group=self.group)
        total = int(lengths.sum())
        flat = torch.cat(ids or []).to(device) if first else torch.empty(total, dtype=torch.int64, device=device)
        if total:
            dist.broadcast(flat, source, group=self.group)
        return list(flat.cpu().split(lengths.tolist()))


@contextmanager
def whole_widths() -> Iterator[None]:
    """Adapters made inside are drawn whole, like those of a process alone, and sliced after.

    peft 0.21 makes them as wide as this rank's slice, which transformers 5.23 then takes for the whole layer's width:
    the forward of a layer with sliced inputs fails, and every rank would draw the same numbers for its slice.
    """
    from peft.tuners.lora.layer import LoraLayer

    original = LoraLayer._get_in_out_features

    def widths(self: Any, module: nn.Module) -> Any:
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            return module.in_features, module.out_features
        return original(self, module)

    LoraLayer._get_in_out_features = widths  # type: ignore[method-assign]
    try:
        yield
    finally:
        LoraLayer._get_in_out_features = original  # type: ignore[method-assign]


def share_gradients(model: nn.Module, due: Callable[[], bool]) -> None:
    """Averages gradients that nobody else does, of a model that transformers has loaded in pieces.

    FSDP2 reduces the gradients of what it holds. An adapter came later: where it is whole, it is the same on all ranks;
    where it is sliced like its layer, on the ranks with the same slice of other copies (which transformers 5.23, whose
    method of the trainer this replaces, leaves out).

    Args:
        due: whether the gradient under way is the optimizer step's last.
    """
    mesh = getattr(base_model(model), "_device_mesh", None)
    if mesh is None:
        return
    names = mesh.mesh_dim_names or ()
    others = mesh["fsdp"].get_group() if "fsdp" in names else None  # the same slice in the other copies
    for parameter in model.parameters():
        if not parameter.requires_grad or hasattr(parameter, "_vigos_shared"):
            continue
        group = dist.group.WORLD
        if isinstance(parameter, DTensor):
            group = None if "fsdp" in (parameter.device_mesh.mesh_dim_names or ()) else others
        if group is None or group.size() == 1:
            continue
        with torch.no_grad():  # equal already, by the same seed, unless somebody drew numbers on one rank alone
            dist.broadcast(local(parameter), dist.get_global_rank(group, 0), group=group)
        parameter.register_post_accumulate_grad_hook(_averaging(group, due))
        setattr(parameter, "_vigos_shared", True)  # noqa: B010 (a second `train()` finds its hook)


def _averaging(group: dist.ProcessGroup, due: Callable[[], bool]) -> Callable[[Tensor], None]:
    def average(parameter: Tensor) -> None:
        if due() and parameter.grad is not None:
            gradient = local(parameter.grad)
            dist.all_reduce(gradient, group=group)
            gradient /= group.size()

    return average


def check_dropout(model: nn.Module, dropout: float) -> None:
    """Refuses a dropout that the ranks of a group would draw differently: where slices of a layer differ in width."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if dropout and isinstance(weight, DTensor) and any(p.is_shard(1) for p in weight.placements):
            ranks = weight.device_mesh.size()
            if weight.shape[1] % ranks:
                raise ValueError(
                    f"lora_dropout must be 0 where {ranks} tensor-parallel ranks do not divide the {weight.shape[1]} "
                    f"inputs of {name}, got {dropout}: their random numbers would part"
                )


def check_head(model: nn.Module) -> None:
    """Refuses to train a head that is also the embedding where FSDP2 cuts the copies of a sliced model into pieces.

    As transformers 5.23 loads such a model, losses were not those of one process from the second step on.
    """
    base = base_model(model)
    config, head = getattr(base.config, "distributed_config", None), base.get_output_embeddings()
    if config is None or config.fsdp_size == 1 or head is None or not head.weight.requires_grad:
        return
    if base.config.get_text_config().tie_word_embeddings or getattr(base.config, "tie_word_embeddings", False):
        raise ValueError(
            "train_head must be false for a model whose head is its embedding, loaded with fsdp_size="
            f"{config.fsdp_size}: take tensor_parallel over all ranks, or accelerate's FSDP2 (configs/fsdp2.yaml)"
        )


def check_accumulation(model: nn.Module, steps: int) -> None:
    """Refuses gradient accumulation for norms inside of attention (Qwen3's), where they are trained.

    Each rank sees its own heads there; transformers 5.23 adds up what has been accumulated so far after every
    micro-batch, the sums of earlier ones included.
    """
    base = base_model(model)
    if steps == 1 or getattr(getattr(base.config, "distributed_config", None), "tp_size", 1) == 1:
        return
    plan = getattr(base, "tp_plan", None) or {}
    summed = [name for name, style in plan.items() if style == "replicated_with_grad_allreduce"]
    for name, parameter in base.named_parameters():
        layer = re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0]
        if parameter.requires_grad and layer in summed:
            raise ValueError(
                f"gradient_accumulation_steps must be 1 where {name} is trained tensor-parallel, got {steps}: raise "
                "per_device_train_batch_size instead, or train an adapter"
            )


def layout_of(tensor_parallel: int, ranks: int) -> Any:
    """transformers' `DistributedConfig` for groups of `tensor_parallel` of the run's `ranks`."""
    import transformers
    from transformers.distributed import DistributedConfig

    if tensor_parallel < 1 or ranks % tensor_parallel:
        raise ValueError(f"tensor_parallel must divide the number of processes, {ranks}, got {tensor_parallel}")
    if not hasattr(transformers.Trainer, "_sync_replicated_trainable_parameters"):
        raise ValueError(
            f"tensor_parallel must be 1 with transformers {transformers.__version__}, got {tensor_parallel}: its "
            "trainer does not take models that were loaded in slices (5.23 does)"
        )
    return DistributedConfig(tp_size=tensor_parallel, fsdp_size=ranks // tensor_parallel)
