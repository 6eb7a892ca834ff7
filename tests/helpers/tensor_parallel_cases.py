"""Training runs that a tensor-parallel group and one process make alike. As a program: one rank, over the cases it is
given.

Run by `test_tensor_parallel.py` with the variables that torchrun sets; results go to `<folder>/<case>/rank<r>.pt`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM, TrainerCallback

from helpers.distributed_cases import ByRow, data, whole
from helpers.tiny_models import tiny_model
from helpers.training import config, processor, tiny_student, trainer
from vigos.errors import TrainingStopped, end_process
from vigos.models.sharding import sharding_of
from vigos.models.tensor_parallel import Replicas, check_dropout, layout_of
from vigos.scoring.teacher import lm_head
from vigos.train.trainer import ViGOSTrainer

RANKS = 2
CASES: dict[str, dict[str, Any]] = {
    "lora": {"max_grad_norm": 0.05, "completion_steps": 1, "completion_top_k": 3, "grade_rollouts": True},
    "full": {"lora": False, "max_grad_norm": 0.05},
    "everything": {"lora": False, "train_vision": True, "train_head": True, "normalize": "sequence"},
    "ema": {"lora": False, "train_head": True, "teacher": "ema", "ema_decay": 0.5, "gradient_accumulation_steps": 2},
    "sampled": {"sampled": True, "save_merged": True},
    "tied": {"tied": True, "lora": False, "train_head": True},
    "text": {"text": True, "lora": False},  # Qwen3, whose norms inside attention see a rank's own heads
    "saved": {"save_strategy": "steps", "save_steps": 3, "save_only_model": True},
}


def save_students(folder: Path) -> None:
    """The untrained models, as folders that every process loads."""
    for tied in (False, True):
        tiny_student(torch.float64, tied=tied).save_pretrained(folder / ("tied" if tied else "untied"))
    tokenizer = processor().tokenizer
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    tiny_model("qwen3", dtype=torch.float64, **sizes).save_pretrained(folder / "text")


def build(case: str, models: Path, folder: Path, tensor_parallel: int, ranks: int) -> ViGOSTrainer:
    """The trainer of a case: on a process alone, or on one of `ranks` in groups of `tensor_parallel`."""
    options = {"max_steps": 5, "clip_mode": "none", "learning_rate": 1e-2, "max_completion_length": 8} | CASES[case]
    sampled, tied, text = (options.pop(name, False) for name in ("sampled", "tied", "text"))
    copies = ranks // tensor_parallel
    options["per_device_train_batch_size"] = 4 // copies // options.get("gradient_accumulation_steps", 1)
    loading: dict[str, Any] = {}
    if ranks > 1:
        options["ddp_backend"] = "gloo"
        loading["distributed_config"] = layout_of(tensor_parallel, ranks)
    family: Any = Qwen3ForCausalLM if text else Qwen2_5_VLForConditionalGeneration
    name = "text" if text else "tied" if tied else "untied"
    model = family.from_pretrained(models / name, dtype=torch.float64, **loading)
    rows = [row | {"images": []} for row in data()] if text else data()
    engine = trainer(model, config(folder, **options), rows)
    if not sampled:  # an adapter goes to the engine at every step, as to a server
        engine.engine = ByRow(owns_weights=engine.args.lora)
    return engine


def run(case: str, models: Path, folder: Path, tensor_parallel: int = 1, ranks: int = 1) -> dict[str, Any]:
    """Trains; returns what was logged and what came out."""
    engine = build(case, models, folder, tensor_parallel, ranks)
    start = whole(engine)
    engine.add_callback(when := WhileTraining())
    with widest_traffic(when) as traffic:
        engine.train()
    head: Any = lm_head(engine.model).weight
    if ranks > 1:
        assert sharding_of(engine.model_wrapped) == ("tensor" if ranks == tensor_parallel else "fsdp2")
        assert isinstance(head, DTensor)
    with engine.policy.weights():
        teacher = whole(engine)
    return {
        "logs": [log for log in engine.state.log_history if "loss" in log],
        "start": start,
        "parameters": whole(engine),
        "teacher": teacher,
        "traffic": traffic,
        "head": head.shape.numel(),
        "local_head": (head.to_local() if isinstance(head, DTensor) else head).numel(),
    }


class WhileTraining(TrainerCallback):
    """Rollouts and steps; not what gathers weights to be saved."""

    def __init__(self) -> None:
        self.on = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on = not control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on = False


@contextmanager
def widest_traffic(when: WhileTraining) -> Iterator[list[int]]:
    """Elements of every tensor that this rank hands to a collective inside, or gets from it, largest first."""
    found: list[int] = []

    class Traffic(TorchDispatchMode):
        """DTensor's collectives, and those of whoever calls `torch.distributed` outside of an operator of his own."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if DTensor in types:
                return NotImplemented  # it comes back with the pieces
            out = func(*args, **kwargs or {})
            if "c10d" in func.namespace and when.on:
                found.extend(elements((args, kwargs, out)))
            return out

    def recorded(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if when.on:
                found.extend(elements((args, kwargs)))
            return original(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast")
    own = {name: getattr(dist, name) for name in names}  # inside an operator no mode sees them
    for name, original in own.items():
        setattr(dist, name, recorded(original))
    try:
        with Traffic():
            yield found
    finally:
        for name, original in own.items():
            setattr(dist, name, original)
        found.sort(reverse=True)


def elements(tree: Any) -> list[int]:
    """Of each tensor in a tree of arguments."""
    return [leaf.numel() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def shard_on_cpus() -> None:
    """accelerate wants an accelerator before it takes a layout of ranks; what is behind that runs on CPUs as well."""
    from accelerate import ParallelismConfig

    ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # type: ignore[method-assign]


def refused_dropout(ranks: int) -> str:
    """What is said of a layer whose slices are not of one width."""
    layer = torch.nn.Linear(16 * ranks + 1, 4)
    layer.weight = torch.nn.Parameter(
        distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (ranks,)), [Shard(1)])
    )
    check_dropout(layer, 0.0)
    try:
        check_dropout(layer, 0.1)
    except ValueError as error:
        return str(error)
    return ""


def shared_rollouts() -> list[Any]:
    """What a group gets from an engine that only its first rank asks: ids, none, and a failure."""
    replicas = Replicas(group=dist.group.WORLD)

    def ask(ids: list[Tensor]) -> list[Tensor]:
        def sample() -> list[Tensor]:
            assert dist.get_rank() == 0, "another rank asked the engine as well"
            return ids

        return replicas.rollouts(sample, cpu, together=False)

    def fail() -> list[Tensor]:
        raise OSError("the server is gone")

    cpu = torch.device("cpu")
    given = [torch.tensor([3, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([2])]
    found: list[Any] = [ask(given), ask([])]
    try:
        replicas.rollouts(fail, cpu, together=False)
    except (OSError, TrainingStopped) as error:
        found.append(str(error))
    return found


def main(models: Path, folder: Path, tensor_parallel: int, cases: Sequence[str]) -> None:
    """One rank."""
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    shard_on_cpus()
    rank, ranks = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    for case in cases:
        AcceleratorState._reset_state(reset_partial_state=False)
        found = run(case, models, folder / case, tensor_parallel, ranks)
        with widest_traffic(
            WhileTraining()
        ) as gathered:  # what the test of `traffic` would see if somebody did gather a head
            distribute_tensor(torch.zeros(found["head"]), init_device_mesh("cpu", (ranks,)), [Shard(0)]).full_tensor()
        found |= {"gathered": gathered, "refused": refused_dropout(ranks), "shared": shared_rollouts()}
        torch.save(found, folder / case / f"rank{rank}.pt")
        print("done", case, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    end_process(0)
