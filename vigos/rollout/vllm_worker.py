"""The side of vLLM's worker of full weights in named groups: a back end of its weight transfer. Loaded by vLLM alone.

    vllm serve … --worker-extension-cls vigos.rollout.vllm_worker.Extension \\
      --weight-transfer-config '{"backend": "vigos"}'

Groups come as bytes, as files, or through an NCCL group that vLLM's own helpers open (not run on a GPU yet).

An update is vLLM's own: init (once, with the names that every update brings), start, groups, finish. A layer's fused
weights are put together, and processed, when the last of them has come, so no second model is ever whole. An update
that lacks a name is refused at its end; one that was cut off is closed by the start of the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "vigos"


@dataclass
class Names(WeightTransferInitInfo):  # type: ignore[misc]
    """Name what every update brings, as in a checkpoint; and the NCCL group to join, as vLLM's own back end does."""

    names: list[str] = field(default_factory=list)
    nccl: dict[str, Any] | None = None


@dataclass
class Group(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Carry a group of tensors as safetensors: the bytes, or the path of a file; with neither, end the update.

    Or announce what is broadcast next: (name, dtype, shape) of each tensor.
    """

    data: bytes | None = None
    path: str | None = None
    broadcast: list[tuple[str, str, list[int]]] | None = None


class GroupTransfer(WeightTransferEngine):  # type: ignore[misc]
    """Load groups of tensors into the worker's model."""

    init_info_cls = Names
    update_info_cls = Group
    names: frozenset[str] = frozenset()
    missing: set[str] | None = None  # of the update under way
    nccl: Any = None  # communicator, rank 0 of which is the trainer's leader

    def init_transfer_engine(self, init_info: Names) -> None:
        """Take the names that every update brings, and join the trainer's NCCL group."""
        self.names = frozenset(init_info.names)
        if init_info.nccl is not None:
            from vllm.distributed.weight_transfer.nccl_common import (
                NCCLWeightTransferInitInfo,
                worker_init_process_group,
            )

            self.shutdown()
            self.nccl = worker_init_process_group(NCCLWeightTransferInitInfo(**init_info.nccl), self.parallel_config)

    def start_weight_update(self) -> None:
        """Begin an update, and close one that was cut off: what it has loaded must not count in this one."""
        if self.missing is not None:
            finalize_layerwise_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)
        self.missing = set(self.names)

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Load a group."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Group) -> None:
        """Load a group."""
        if update_info.path is not None:
            tensors = load_file(update_info.path)
        elif update_info.data is not None:
            tensors = load(bytes(update_info.data))
        elif update_info.broadcast is not None:
            tensors = {}
            for name, dtype, shape in update_info.broadcast:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                self.nccl.broadcast(tensors[name], src=0, stream=torch.cuda.current_stream())
            torch.cuda.current_stream().synchronize()
        else:
            raise ValueError("the update was given up")
        self.model.load_weights(iter(tensors.items()))
        self.missing = (self.missing or set()) - tensors.keys()

    def finish_weight_update(self) -> None:
        """End the update. Raises ValueError if tensors are missing."""
        if self.missing:
            raise ValueError(f"{len(self.missing)} tensors did not arrive, {min(self.missing)} among them")
        finalize_layerwise_reload(self.model, self.model_config)
        self.missing = None

    def shutdown(self) -> None:
        """Leave the NCCL group."""
        if self.nccl is not None:
            self.nccl.destroy()
            self.nccl = None


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, GroupTransfer)


class Extension:
    """Make vLLM's worker load this module."""
