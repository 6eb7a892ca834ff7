"""Check what a trainer is given, and open its data."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from vigos.data.examples import ExampleDataset, ExampleStream, load_rows
from vigos.train.config import ViGOSConfig


def check_arguments(model: nn.Module, args: Any, processing_class: Any) -> None:
    """Raise ValueError for a model, options or a processor that no trainer can be made of."""
    if not isinstance(args, ViGOSConfig):
        raise ValueError(f"args must be a ViGOSConfig, got {type(args).__name__}")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start one process a GPU with `accelerate launch "
            "--num_processes ...`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if processing_class is None:
        raise ValueError("processing_class must be the model's processor or tokenizer, got None")
    if sharded := [name for name, p in model.named_parameters() if isinstance(p, DTensor)]:
        raise ValueError(f"model must be unsharded (args say how the trainer shards it), got the DTensor {sharded[0]}")


def unchanged(examples: list[Any]) -> Any:
    """Collate by returning the list: a function of a module, so that it can be sent to data loader workers."""
    return examples


def as_examples(dataset: Any, args: ViGOSConfig) -> ExampleDataset | ExampleStream:
    """Return examples, with a `BadExample` in place of one that cannot be used, so that it does not end the run."""
    if isinstance(dataset, ExampleDataset | ExampleStream):
        examples = copy.copy(dataset)
        examples.bad_examples = "return"
        return examples
    return load_rows(
        dataset,
        problem_column=args.problem_column,
        images_column=args.images_column,
        answer_column=args.answer_column,
        id_column=args.id_column,
        streaming=hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__"),
        bad_examples="return",
    )
