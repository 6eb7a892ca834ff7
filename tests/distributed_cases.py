"""Training runs that two real processes and one process make alike. As a program: one rank, over the cases it is given.

Run by `test_distributed.py` with the variables that torchrun sets; results go to `<folder>/<case>/rank<r>.pt`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training import CUT_OFF, TAGLESS, VALID_A, VALID_B, completion_ids, config, processor, rows, tiny_student, trainer
from transformers import TrainerCallback

from vigos.restart import last_checkpoint
from vigos.rollout import Sampling
from vigos.sequences import EncodedPrompt
from vigos.sharding import sharding_of
from vigos.trainer import ViGOSTrainer

RANKS = 2
STOLEN = "an image that is not there"  # a completion with a placeholder id, which nobody can supervise
BAD = None  # a row without an answer
# What the two rows of each rank write, a line a step: first rank 0's, then rank 1's.
SCRIPT: list[str | None] = [
    VALID_A, CUT_OFF, VALID_B, TAGLESS,
    VALID_A, VALID_B, BAD, BAD,  # rank 1 has no row
    CUT_OFF, CUT_OFF, STOLEN, STOLEN,  # rank 1 has rows and nothing to supervise
    BAD, BAD, VALID_A, TAGLESS,  # rank 0 has no row
    VALID_B, CUT_OFF, VALID_A, VALID_B,  # rank 0 has no image
]  # fmt: skip
NO_IMAGE = (16, 17)

SAVED = {"save_strategy": "steps", "save_steps": 3}
FSDP2: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
CASES: dict[str, dict[str, Any]] = {
    "ddp_lora": {},
    "ddp_full": {"lora": False},
    "ddp_everything": {"lora": False, "train_vision": True, "train_head": True, "normalize": "sequence"},
    "ddp_ema": {"teacher": "ema", "ema_decay": 0.5},
    "ddp_resumed": SAVED | {"teacher": "ema", "ema_decay": 0.5, "save_merged": True},
    "ddp_stopped": {"lr_scheduler_type": "linear"},
    "ddp_poisoned": {},
    "ddp_sampled": {"sampled": True, "normalize": "active"},
    "ddp_packs": {"token_budget": 64, "teacher_scoring": "separate"},
    "ddp_accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "ddp_palr": {"palr_steps": 1},
    "fsdp_lora": FSDP2,
    "fsdp_full": FSDP2 | {"lora": False},
    "fsdp_everything": FSDP2 | {"lora": False, "train_vision": True, "train_head": True},
    "fsdp_ema": FSDP2 | {"lora": False, "teacher": "ema", "ema_decay": 0.5},
    "fsdp_resumed": FSDP2 | SAVED | {"save_merged": True},
    "fsdp_resumed_full": FSDP2 | SAVED | {"lora": False, "teacher": "ema", "ema_decay": 0.5},
    "fsdp_stopped": FSDP2 | {"lora": False},
    "fsdp_poisoned": FSDP2 | {"lora": False},
    "fsdp_sampled": FSDP2 | {"sampled": True},
    "fsdp_packs": FSDP2 | {"token_budget": 64, "student_scoring": "separate"},
    "fsdp_palr": FSDP2 | {"palr_steps": 1, "lora": False, "train_head": True, "teacher": "ema", "ema_decay": 0.5},
    "fsdp_accumulated": FSDP2 | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
}


class ByRow:
    """A rollout engine that writes what `SCRIPT` says for the digit that a prompt asks about.

    Like one on a server it is given the adapter: `pushed` holds the last.
    """

    def __init__(self) -> None:
        self.pushed: dict[str, Tensor] = {}

    def push(self, model: Any, step: int, weights: dict[str, Tensor]) -> None:
        self.pushed = weights

    def generate(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]) -> list[Tensor]:
        return [self._written(prompt) for prompt in prompts]

    def _written(self, prompt: EncodedPrompt) -> Tensor:
        found = re.search(r"digit (\d+)\?", processor().tokenizer.decode(prompt.ids))
        assert found is not None
        text = SCRIPT[int(found.group(1))]
        if text == STOLEN:
            image = processor().tokenizer.convert_tokens_to_ids("<|image_pad|>")
            return torch.cat([completion_ids(VALID_A)[:5], torch.tensor([image])])
        assert text is not None
        return completion_ids(text)


def data() -> list[dict[str, Any]]:
    """A row for each line of `SCRIPT`."""
    made = rows(len(SCRIPT))
    for i, row in enumerate(made):
        if SCRIPT[i] is BAD:
            row["answer"] = ""
        if i in NO_IMAGE:
            row["images"] = []
    return made


def build(case: str, folder: Path, ranks: int) -> ViGOSTrainer:
    """The trainer of a case: on one of `RANKS` processes, or on one that takes all the rows of a step."""
    options = {"max_steps": 5, "clip_mode": "none", "learning_rate": 1e-2, "max_completion_length": 8} | CASES[case]
    sampled = options.pop("sampled", False)
    if ranks == 1:
        for name in ("fsdp", "fsdp_config"):
            options.pop(name, None)
        options["per_device_train_batch_size"] = RANKS * options.get("per_device_train_batch_size", 2)
    else:
        options["ddp_backend"] = "gloo"
    engine = trainer(tiny_student(torch.float64), config(folder, **options), data())
    if not sampled:
        engine.engine = ByRow()
    return engine


class Stop(TrainerCallback):
    """One rank is told to stop in the third step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def poison(engine: ViGOSTrainer, here: bool) -> None:
    """The first step's loss is not finite: on this process, or on another one."""

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        return output * float("nan") if here and engine.state.global_step == 0 and torch.is_grad_enabled() else None

    engine.scorer.model.get_submodule(NORM[hasattr(engine.model, "peft_config")]).register_forward_hook(spoil)


NORM = {False: "model.language_model.norm", True: "base_model.model.model.language_model.norm"}


def whole(engine: ViGOSTrainer) -> dict[str, Tensor]:
    """Every trained parameter, whole."""
    trained = {n: p for n, p in engine.accelerator.unwrap_model(engine.model).named_parameters() if p.requires_grad}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in trained.items()}


def run(case: str, folder: Path, ranks: int) -> dict[str, Any]:
    """Trains; returns what was logged and what came out."""
    engine = build(case, folder, ranks)
    start = whole(engine)
    if "poisoned" in case:
        poison(engine, here=ranks == 1 or os.environ["RANK"] == "1")
    if "stopped" in case and ranks > 1:
        engine.add_callback(Stop())
        engine.train()
        assert engine.interrupted
        found = last_checkpoint(folder)
        assert found == folder / "checkpoint-3", found
        engine = build(case, folder, ranks)
        engine.train(resume_from_checkpoint=str(found))
    else:
        engine.train()
    if ranks > 1:
        assert sharding_of(engine.model_wrapped) == ("fsdp2" if case.startswith("fsdp") else "whole")
        if "resumed" in case:  # its end again, from the middle, by a trainer that has seen nothing
            engine = build(case, folder, ranks)
            engine.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    logs = [log for log in engine.state.log_history if "loss" in log]
    with engine.policy.weights():
        teacher = whole(engine)
    pushed = getattr(engine.engine, "pushed", {})  # on rank 0 alone
    return {"logs": logs, "start": start, "parameters": whole(engine), "teacher": teacher, "pushed": pushed}


def shard_on_cpus() -> None:
    """accelerate asks for an accelerator before it takes FSDP; everything behind that question runs on CPUs as well."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def main(folder: Path, cases: Sequence[str]) -> None:
    """One rank."""
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    shard_on_cpus()
    rank = os.environ["RANK"]
    for case in cases:
        AcceleratorState._reset_state(reset_partial_state=False)  # the next case is wrapped differently
        found = run(case, folder / case, RANKS)
        torch.save(found, folder / case / f"rank{rank}.pt")
        print("done", case, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
