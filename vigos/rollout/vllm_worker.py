"""The side of vLLM's worker of full weights in named groups: a back end of its weight transfer. Loaded by vLLM alone.

    vllm serve … --worker-extension-cls vigos.rollout.vllm_worker.Extension \\
      --weight-transfer-config '{"backend": "vigos"}'

An update is vLLM's own: init (once, with the names that every update brings), start, groups, finish. A layer's fused
weights are put together, and processed, when the last of them has come, so no second model is ever whole. An update
that lacks a name is refused at its end; one that was cut off is closed by the start of the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """Name what every update brings, as in a checkpoint."""

    names: list[str] = field(default_factory=list)


@dataclass
class Group(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Carry a group of tensors as safetensors: the bytes, or the path of a file; with neither, end the update."""

    data: bytes | None = None
    path: str | None = None


class GroupTransfer(WeightTransferEngine):  # type: ignore[misc]
    """Load groups of tensors into the worker's model."""

    init_info_cls = Names
    update_info_cls = Group
    names: frozenset[str] = frozenset()
    missing: set[str] | None = None  # of the update under way

    def init_transfer_engine(self, init_info: Names) -> None:
        """Take the names that every update brings."""
        self.names = frozenset(init_info.names)

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
        """Hold nothing."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, GroupTransfer)


class Extension:
    """Make vLLM's worker load this module."""
