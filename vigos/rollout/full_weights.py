"""Full weights for vLLM, a named group at a time, through its own weight transfer.

    weights = FullWeights(InProcess(llm))           # or Server(session, url, folder)
    weights.check(model)                            # every tensor of the model arrives where vLLM has it
    weights.push(step, trained_groups(model))       # after an optimizer step

vLLM wants checkpoint names, and fuses some of their tensors; the model's own names are turned into those by the mapping
that transformers saves models with. vLLM must have loaded `vigos.rollout.vllm_worker`. What it holds has a version,
which every update sets last: between its start and its end, and after a restart, there is none that the trainer knows.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vigos.models.parts import base_model
from vigos.models.sharding import parameter_groups
from vigos.rollout.checks import RolloutError
from vigos.system.extras import install

BACKEND = "vigos"
WORKER = "vigos.rollout.vllm_worker.Extension"
GROUP_BYTES = 256 * 2**20


class Transport(Protocol):
    """Carry the five calls of vLLM's weight transfer, and its checksums."""

    def init(self, names: list[str]) -> None:
        """Name the tensors of every update."""

    def start(self) -> None:
        """Begin an update."""

    def send(self, group: dict[str, Tensor]) -> None:
        """Send tensors on the CPU."""

    def finish(self, version: str) -> None:
        """End the update and give the weights a version."""

    def version(self) -> str:
        """Return the version of the weights that vLLM holds."""
        ...

    def checksums(self) -> dict[str, str]:
        """Return a digest of each of vLLM's own parameters."""
        ...

    def reset(self) -> None:
        """Set all of vLLM's parameters to zero."""


class FullWeights:
    """Keep vLLM's weights those of the student.

    Attributes:
        version: what vLLM is known to hold: optimizer steps; None: nothing known.
    """

    def __init__(self, transport: Transport, run: str) -> None:
        self.transport, self.run = transport, run
        self.version: int | None = None
        self.names: list[str] = []

    def push(self, step: int, groups: Iterable[dict[str, Tensor]], names: list[str] | None = None) -> None:
        """Send the weights after `step` optimizer steps.

        Args:
            groups: of tensors by checkpoint name; each is dropped before the next is asked for.
            names: of all tensors, without which the update is refused; None: those of the one before.
        """
        self.version, self.names = None, self.names if names is None else names
        self.transport.init(self.names)  # to whoever answers now
        self.transport.start()
        for group in groups:
            self.transport.send(group)
        self.transport.finish(self._named(step))
        self.version = step

    def holds(self, step: int) -> bool:
        """Ask vLLM whether it has the weights after `step` steps, whole."""
        return self.version == step and self.transport.version() == self._named(step)

    def require(self, step: int | None) -> None:
        """Raise RolloutError unless vLLM has the weights after `step` steps, whole."""
        if step is None or not self.holds(step):
            raise StaleWeights(
                f"vLLM no longer has the weights after {step} steps: it holds {self.transport.version()!r}"
            )

    def check(self, model: nn.Module) -> None:
        """Zero vLLM's parameters, send all of the model's, and compare with what vLLM had read from its checkpoint.

        Equal digests show that every tensor, under whatever name, fused or tied, came to its place.

        Raises:
            RolloutError: a parameter of vLLM's differs.
        """
        wanted = self.transport.checksums()
        self.transport.reset()
        everything = checkpoint_names(model, trained=False)
        self.push(0, checkpoint_groups(model, trained=False), everything)
        found = self.transport.checksums()
        wrong = sorted(name for name in wanted if found.get(name) != wanted[name])
        if wrong:
            raise RolloutError(
                f"the model's weights are not those that vLLM read, or did not arrive: {len(wrong)} of its "
                f"{len(wanted)} parameters differ, {wrong[0]} among them; rollout_model must be the trained model"
            )
        self.names = checkpoint_names(model, trained=True)

    def _named(self, step: int) -> str:
        return f"{self.run}-{step}"


class StaleWeights(RolloutError):
    """Raised if an engine samples, or would, from other weights than it was sent: it was started again, perhaps."""


def checkpoint_groups(model: nn.Module, *, trained: bool = True) -> Iterator[dict[str, Tensor]]:
    """Yield the parameters in groups, gathered, on the CPU, under the names of a checkpoint. Every rank iterates.

    Args:
        trained: those that are trained, or all.
    """
    from transformers.core_model_loading import revert_weight_conversion

    base = base_model(model)
    for group in parameter_groups(base, GROUP_BYTES, trained=trained):
        converted = revert_weight_conversion(base, {name: x.to("cpu") for name, x in group.items()})
        yield {name: x.contiguous() for name, x in converted.items()}


def checkpoint_names(model: nn.Module, *, trained: bool = True) -> list[str]:
    """Return the names of `checkpoint_groups`, without gathering anything."""
    from transformers.core_model_loading import revert_weight_conversion

    base = base_model(model)
    shapes = {
        name: torch.empty(p.shape, dtype=p.dtype, device="meta")
        for name, p in base.named_parameters()
        if p.requires_grad or not trained
    }
    return sorted(revert_weight_conversion(base, shapes))


class InProcess:
    """Carry weights to `vllm.LLM`, as bytes between its processes."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def init(self, names: list[str]) -> None:
        """Name the tensors of every update."""
        self.llm.init_weight_transfer_engine({"init_info": {"names": names}})

    def start(self) -> None:
        """Begin an update; give up one that was cut off."""
        try:
            self.llm.start_weight_update()
        except Exception:  # one is under way: vLLM lets go of it when an update fails
            try:
                self.llm.update_weights({"update_info": {}})
            except Exception:
                self.llm.start_weight_update()

    def send(self, group: dict[str, Tensor]) -> None:
        """Send tensors on the CPU."""
        from safetensors.torch import save

        self.llm.update_weights({"update_info": {"data": save(group)}})

    def finish(self, version: str) -> None:
        """End the update, give the weights a version and forget what the old ones made of prompts and images."""
        self.llm.finish_weight_update(version)
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def version(self) -> str:
        """Return the version of the weights that vLLM holds."""
        return str(self.llm.get_weight_version())

    def checksums(self) -> dict[str, str]:
        """Return a digest of each of vLLM's own parameters."""
        return {name: x for each in self.llm.collective_rpc("compute_weight_checksums") for name, x in each.items()}

    def reset(self) -> None:
        """Set all of vLLM's parameters to zero."""
        self.llm.collective_rpc("reset_weights")


class Server:
    """Carry weights to a vLLM server: requests to it, and files in a folder that it reads.

    Args:
        request: sends a request to the server's root, as `request(path, body)`, a get without a body.
        folder: on the same host (/dev/shm) or a shared file system.
    """

    def __init__(self, request: Any, folder: Path) -> None:
        self.request, self.folder, self._sent = request, folder, 0

    def init(self, names: list[str]) -> None:
        """Name the tensors of every update."""
        self.request("init_weight_transfer_engine", {"init_info": {"names": names}})

    def start(self) -> None:
        """Begin an update; give up one that was cut off."""
        # Until the end nothing may be sampled, and what is being sampled is let finish.
        self.request("pause?mode=wait", {})
        try:
            self.request("start_weight_update", {})
        except RolloutError:
            try:
                self.request("update_weights", {"update_info": {}})
            except RolloutError:
                self.request("start_weight_update", {})

    def send(self, group: dict[str, Tensor]) -> None:
        """Send tensors on the CPU."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = (self.folder / "group.safetensors").resolve()
        save_file(group, path)
        try:
            self.request("update_weights", {"update_info": {"path": str(path)}})
        finally:
            path.unlink()

    def finish(self, version: str) -> None:
        """End the update, give the weights a version and forget what the old ones made of prompts and images."""
        self.request("finish_weight_update", {"weight_version": version})
        self.request("reset_prefix_cache", {})
        self.request("reset_encoder_cache", {})
        self.request("resume", {})

    def version(self) -> str:
        """Return the version of the weights that the server holds."""
        return str(self.request("weight_info")["weight_version"])

    def checksums(self) -> dict[str, str]:
        """Return a digest of each of the server's own parameters."""
        return dict(self.request("weight_checker", {"action": "checksum"})["checksums"])

    def reset(self) -> None:
        """Set all of the server's parameters to zero."""
        self.request("weight_checker", {"action": "reset"})


class Broadcast(Server):
    """Carry weights to a vLLM server on other GPUs by NCCL, through a group that vLLM's own helpers open.

    The trainer's leader is its rank 0, vLLM's workers are the others. Not run on a GPU yet.

    Args:
        request: as for `Server`.
        host: of the server: the group meets at this host's address on the way there.
    """

    def __init__(self, request: Any, host: str) -> None:
        super().__init__(request, Path())
        self.host, self._held = host, ""
        self._group: Any = None

    def init(self, names: list[str]) -> None:
        """Name the tensors of every update, and open a group unless the server is still in the last one."""
        if self._group is not None and self.version() == self._held:
            super().init(names)
            return
        try:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init
        except ImportError as error:
            raise ImportError(f"weights by NCCL need vLLM beside the trainer: {install('vllm')}") from error
        meeting = self.meeting()
        with ThreadPool(1) as pool:  # both sides meet in here
            joined = pool.apply_async(
                self.request, ("init_weight_transfer_engine", {"init_info": {"names": names, "nccl": meeting}})
            )
            self._group = trainer_init(meeting)
            joined.get()

    def meeting(self) -> dict[str, Any]:
        """Return where and with how many the group meets, as vLLM's `NCCLWeightTransferInitInfo` has it."""
        workers = int(self.request("get_world_size")["world_size"])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((self.host, 9))
            address = probe.getsockname()[0]
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        return {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": workers + 1}

    def send(self, group: dict[str, Tensor]) -> None:
        """Send tensors by a broadcast that a request announces."""
        announced = [(name, str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in group.items()]
        stream = torch.cuda.current_stream()
        opened, self._group = self._group, None  # of no use any more if this fails
        with ThreadPool(1) as pool:
            taken = pool.apply_async(self.request, ("update_weights", {"update_info": {"broadcast": announced}}))
            for x in group.values():
                opened.broadcast(x.to("cuda"), src=0, stream=stream)
            stream.synchronize()
            taken.get()
        self._group = opened

    def finish(self, version: str) -> None:
        """End the update, give the weights a version and forget what the old ones made of prompts and images."""
        super().finish(version)
        self._held = version
