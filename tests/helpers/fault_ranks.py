"""One of two ranks, the second of which fails in its second step: `fault_ranks.py killed|stopped|memory FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from helpers.training import CUT_OFF, VALID_A, config, rows, tiny_student, trainer
from vigos.errors import TrainingStopped, end_process

SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
FAULTS = (*SIGNALS, "memory")
TIMEOUT_S = 12  # also what two ranks may be apart on a busy machine


class GoesAway(TrainerCallback):
    """Sends the second rank a signal before its second step."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), self.number)


def main(how: str, folder: Path) -> None:
    """Trains until somebody is missed."""
    torch.set_num_threads(1)
    # transformers gives ddp_timeout to GPUs' groups alone; one that exists is taken as it is.
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    args = config(folder, max_steps=50, ddp_backend="gloo", ddp_timeout=TIMEOUT_S, per_device_train_batch_size=1)
    gone = [GoesAway(SIGNALS[how])] if how in SIGNALS else []
    engine = trainer(tiny_student(), args, rows(8), texts=[VALID_A, CUT_OFF], callbacks=gone)

    def no_memory(*_: Any) -> None:
        if how == "memory" and os.environ["RANK"] == "1" and engine.state.global_step == 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    engine.model.get_base_model().model.language_model.layers[0].mlp.register_forward_pre_hook(no_memory)
    try:
        engine.train()
    except TrainingStopped as error:
        print(f"error: {error}", flush=True)
        end_process(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
