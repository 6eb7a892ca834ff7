"""Training runs that two real processes and one process make alike. As a program: one rank, over the cases it is given.

Run by `test_distributed.py` with the variables that torchrun sets; results go to `<folder>/<case>/rank<r>.pt`.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from helpers.processes import TESTS
from helpers.training import (
    CUT_OFF,
    TAGLESS,
    VALID_A,
    VALID_B,
    CopyEngine,
    completion_ids,
    config,
    processor,
    rows,
    tiny_student,
    trainer,
)
from vigos.errors import end_process
from vigos.method.encode import EncodedPrompt
from vigos.models.compat import unsharded_init
from vigos.models.sharding import gather_trained, sharding_of
from vigos.rollout.engine import RolloutEngine, Sampling
from vigos.train.checkpoint import last_checkpoint
from vigos.train.trainer import ViGOSTrainer

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
    "ddp_everything": {"lora": False, "train_vision": True, "train_head": True, "normalize": "sequence"},
    "ddp_tied": {"lora": False, "train_head": True, "tied": True},
    "ddp_resumed": SAVED | {"teacher": "ema", "ema_decay": 0.5, "save_merged": True},
    "ddp_stopped": {"lr_scheduler_type": "linear"},
    "ddp_poisoned": {},
    "ddp_sampled": {"sampled": True, "normalize": "active"},
    "ddp_engines": {"sampled": True, "engines": True, "lora": False},
    "ddp_packs": {"token_budget": 64, "teacher_scoring": "separate"},
    "ddp_accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "ddp_palr": {"palr_steps": 1},
    "fsdp_lora": FSDP2,
    "fsdp_everything": FSDP2 | {"lora": False, "train_vision": True, "train_head": True},
    "fsdp_tied": FSDP2 | {"lora": False, "train_head": True, "tied": True},
    "fsdp_resumed": FSDP2 | SAVED | {"save_merged": True},
    "fsdp_resumed_full": FSDP2 | SAVED | {"lora": False, "teacher": "ema", "ema_decay": 0.5},
    "fsdp_stopped": FSDP2 | {"lora": False},
    "fsdp_poisoned": FSDP2 | {"lora": False},
    "fsdp_sampled": FSDP2 | {"sampled": True},
    "fsdp_engines": FSDP2 | {"sampled": True, "engines": True, "lora": False},
    "fsdp_packs": FSDP2 | {"token_budget": 64, "student_scoring": "separate"},
    "fsdp_palr": FSDP2 | {"palr_steps": 1, "lora": False, "train_head": True, "teacher": "ema", "ema_decay": 0.5},
    "fsdp_accumulated": FSDP2 | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
}

# The files we ship. ZeRO keeps its optimizer in float32 whatever the model is: both sides compute in float32, with an
# epsilon that keeps Adam from making noise of it where a gradient is next to nothing.
ZERO2: dict[str, Any] = {"deepspeed": str(TESTS.parent / "configs" / "zero2.json"), "adam_epsilon": 1e-3}
ZERO3 = ZERO2 | {"deepspeed": str(TESTS.parent / "configs" / "zero3.json")}
ZERO_CASES: dict[str, dict[str, Any]] = {
    "zero2_lora": ZERO2,
    "zero2_full": ZERO2 | {"lora": False},
    "zero2_everything": ZERO2 | {"lora": False, "train_vision": True, "train_head": True, "max_grad_norm": 0.05},
    "zero2_resumed": ZERO2 | SAVED | {"save_merged": True, "teacher": "ema", "ema_decay": 0.5},
    "zero2_accumulated": ZERO2 | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "zero2_packs": ZERO2 | {"token_budget": 64, "teacher_scoring": "separate"},
    "zero2_sampled": ZERO2 | {"sampled": True},
    "zero3_lora": ZERO3 | {"save_merged": True},
    "zero3_resumed": ZERO3 | SAVED,
    "zero3_accumulated": ZERO3 | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "zero3_packs": ZERO3 | {"token_budget": 64, "student_scoring": "separate"},
}


class ByRow(RolloutEngine):
    """A rollout engine that writes what `SCRIPT` says for the digit that a prompt asks about.

    Like one on a server it is given the adapter: `pushed` holds the last.
    """

    def __init__(self, owns_weights: bool = True) -> None:
        self.owns_weights = owns_weights
        self.pushed: dict[str, Tensor] = {}

    def update_weights(self, step: int, model: Any, weights: dict[str, Tensor] | None) -> None:
        self.pushed = weights or {}

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
    options = {"max_steps": 5, "clip_mode": "none", "learning_rate": 1e-2, "max_completion_length": 8}
    options |= (CASES | ZERO_CASES)[case]
    sampled, tied, engines = (options.pop(name, False) for name in ("sampled", "tied", "engines"))
    if ranks == 1:
        for name in ("fsdp", "fsdp_config", "deepspeed"):
            options.pop(name, None)
        options["per_device_train_batch_size"] = RANKS * options.get("per_device_train_batch_size", 2)
    else:
        options["ddp_backend"] = "gloo"
    with unsharded_init():  # an earlier case may have left a configuration for ZeRO-3
        model = tiny_student(torch.float32 if case in ZERO_CASES else torch.float64, tied=tied)
    args = config(folder, **options)
    if ranks > 1 and case.startswith("zero3"):  # as the command does it: options first, then the model, in pieces
        import deepspeed

        deepspeed.init_distributed("gloo")
        if os.environ["RANK"] == "0":
            with unsharded_init():
                model.save_pretrained(folder / "untrained")
        deepspeed.comm.barrier()
        model = type(model).from_pretrained(folder / "untrained")
    own = CopyEngine.for_model(copy.deepcopy(model), processor()) if engines else None
    engine = trainer(model, args, data(), rollout_engine=own)
    if not sampled:
        engine.rollouts.engine = ByRow()
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
    model = engine.accelerator.unwrap_model(engine.model)
    if sharding_of(model) == "zero3":
        return gather_trained(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
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
        expected = {"fsdp": "fsdp2", "zero3": "zero3"}.get(case.split("_")[0], "unsharded")
        assert sharding_of(engine.model_wrapped) == expected
        assert (type(engine.model_wrapped).__name__ == "DeepSpeedEngine") == case.startswith("zero")
        if "resumed" in case:  # its end again, from the middle, by a trainer that has seen nothing
            engine = build(case, folder, ranks)
            engine.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        if case in ("fsdp_resumed", "zero2_resumed"):
            check_refused(case, folder)
    logs = [log for log in engine.state.log_history if "loss" in log]
    with engine.teacher.weights():
        teacher = whole(engine)
    pushed = getattr(engine.rollouts.engine, "pushed", {})  # on rank 0 alone
    return {"logs": logs, "start": start, "parameters": whole(engine), "teacher": teacher, "pushed": pushed}


SHARDED = ("pytorch_model_fsdp.bin", "global_step*/mp_rank_00_model_states.pt")


def check_refused(case: str, folder: Path) -> None:
    """A checkpoint without a tensor of the adapter, which FSDP2 and DeepSpeed would load without a word."""
    cut = folder / "cut" / "checkpoint-3"
    if os.environ["RANK"] == "0":
        shutil.copytree(folder / "checkpoint-3", cut)
        file = next(file for name in SHARDED for file in cut.glob(name))
        content = torch.load(file, weights_only=False)
        tensors = content.get("module", content)
        tensors.pop(next(iter(tensors)))
        torch.save(content, file)
    torch.distributed.barrier()
    with pytest.raises(ValueError, match=r"1 missing|1 are others"):
        build(case, folder / "refused", RANKS).train(resume_from_checkpoint=str(cut))


def shard_on_cpus() -> None:
    """accelerate asks for an accelerator before it takes FSDP or DeepSpeed; what is behind that runs on CPUs too."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        deepspeed = kwargs.get("deepspeed_plugin") or self.__dict__.get("deepspeed_plugins")
        if deepspeed is not None:
            self.distributed_type = DistributedType.DEEPSPEED
            if self.__dict__.get("deepspeed_plugins") is None:
                self.deepspeed_plugins = deepspeed
                deepspeed.set_mixed_precision("no")
                deepspeed.select(_from_accelerator_state=True)

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
    end_process(0)
