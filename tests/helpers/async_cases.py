"""Runs with rollouts one step ahead of training. As a program it kills, stops and fails them in real processes.

async_cases.py restarts FOLDER URL    # what happened is left in FOLDER/found.json
async_cases.py ranks FOLDER URL       # one of two ranks
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from helpers.restart_cases import At, child, resume, step_of, until, wait
from vigos.data.examples import load_rows
from vigos.errors import TrainingStopped, end_process
from vigos.rollout.engine import Completion
from vigos.rollout.generate import TransformersEngine
from vigos.rollout.prefetch import Request
from vigos.train.checkpoint import checkpoints, last_checkpoint
from vigos.train.config import ViGOSConfig
from vigos.train.trainer import ViGOSTrainer
from vigos.world import load_base, world_prompts, write_world

ROWS = 10  # five steps an epoch
STEPS = 8
KILLS = 4
# For runs that are compared although their sums are rounded in another order: short updates along the gradient, where
# Adam's follow its sign.
ROUNDED: dict[str, Any] = {
    "max_steps": 6, "lora_dropout": 0.0, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.05
}  # fmt: skip


@cache
def rows(folder: Path) -> list[dict[str, Any]]:
    """Of the built-in world; the fourth cannot be used."""
    made: list[dict[str, Any]] = [dict(row) for row in load_rows(write_world(folder, "train", n=ROWS, seed=3))]
    made[3]["answer"] = ""
    return made


class Watched(ViGOSTrainer):
    """Remembers what each step asked for and got, and the trained weights before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.requests: dict[int, Request] = {}
        self.written: dict[int, list[list[int]]] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}
        super().__init__(*args, **kwargs)
        parse = self.rollouts._rollouts

        def watched(request: Request, completions: Sequence[Completion]) -> Any:
            self.requests[request.step] = request
            self.written[request.step] = [completion.ids.tolist() for completion in completions]
            self.weights[request.step] = trained(self)
            return parse(request, completions)

        self.rollouts._rollouts = watched  # type: ignore[method-assign]


def trained(engine: ViGOSTrainer) -> dict[str, Tensor]:
    """Copies of the adapter's weights."""
    model = engine.accelerator.unwrap_model(engine.model)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def build(folder: Path, url: str, *callbacks: TrainerCallback, **options: Any) -> Watched:
    """A trainer on the built-in model whose every random stream matters: dropout, order of rows, sampling."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 0.1,
        "clip_mode": "none", "max_grad_norm": 0.0, "max_completion_length": 16, "temperature": 1.0, "top_k": 0,
        "top_p": 1.0, "lora_r": 2, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "v_proj"],
        "save_merged": False, "impl": "reference", "completion_steps": 0, "grade_rollouts": False, "teacher": "ema",
        "ema_decay": 0.5, "rollout_engine": "server", "vllm_server_base_url": url, "rollout_model": "base",
        "rollout_retries": 0, "async_rollout": True,
    }  # fmt: skip
    model, processor = load_base()
    args = ViGOSConfig(**(defaults | options))
    data = rows(folder.parent / "world")
    return Watched(model, args, processor, data, prompts=world_prompts(), callbacks=list(callbacks))


def sampled_here(engine: Watched, step: int, weights: dict[str, Tensor]) -> list[list[int]]:
    """What the model at hand writes from these weights, asked as `step` has asked the server."""
    named = dict(engine.model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)
    request, sampler = engine.requests[step], TransformersEngine.for_model(engine.model, engine.processing_class)
    return [ids.tolist() for ids in sampler.generate(request.prompts, engine.args.sampling, request.seeds)]


# --- Restarts, as a program -------------------------------------------------------------------------------------------

SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 2}


def kill_at_random(folder: Path, url: str) -> dict[str, Any]:
    """Kills a run `KILLS` times, each time going on from its last checkpoint, then lets it end."""
    chance = random.Random(1)
    run, log = folder / "killed", folder / "killed.log"
    kills, restarts_from, ahead = 0, [], 0
    while kills < KILLS:
        before = last_checkpoint(run) if run.is_dir() else None
        step = 0 if before is None else step_of(before)
        number = child(lambda: resume(build(run, url, **SAVED)), log)
        until(30, lambda step=step: (run / f"checkpoint-{step + 1}").is_dir())  # it has gone on by a step
        time.sleep(chance.uniform(0, 0.3))  # and is in the middle of another, or of waiting
        os.kill(number, signal.SIGKILL)
        code = wait(number)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
        after = last_checkpoint(run)
        assert after is not None
        restarts_from.append(step_of(after))
        ahead += json.loads((after / "vigos_state-0.json").read_text())["rollouts"]["completions"] is not None
    ended = wait(child(lambda: resume(build(run, url, **SAVED)), log))
    return {"kills": kills, "restarts_from": restarts_from, "with_rollouts": ahead, "exit_code": ended}


def stopped(folder: Path, url: str) -> dict[str, Any]:
    """SIGTERM in the middle of a step, whose successor's rollouts are under way; then the rest of the run."""
    run, log = folder / "stopped", folder / "stopped.log"
    late = {**SAVED, "save_steps": 100}
    here = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    first = wait(child(lambda: resume(build(run, url, here, **late)), log))
    found = {
        path.name: json.loads((path / "vigos_state-0.json").read_text())["rollouts"]["completions"]
        for path in checkpoints(run)
    }
    second = wait(child(lambda: resume(build(run, url, **late)), log))
    return {"exit_codes": [first, second], "checkpoints": found}


def leaves_at_once(folder: Path, url: str) -> dict[str, Any]:
    """A step fails while the next one's rollouts hang: in this process, which is to end by itself."""

    def fail() -> None:
        raise ValueError("no such luck")

    started, message = time.monotonic(), ""
    try:
        build(folder / "hangs", f"{url.removesuffix('/v1')},hangs-at-3/v1", At(1, fail)).train()
    except ValueError as error:
        message = str(error)
    return {"message": message, "seconds": time.monotonic() - started, "left_at": time.time()}


def restarts(folder: Path, url: str) -> None:
    """All of them, and the run that nothing happened to."""
    load_base()
    rows(folder / "world")

    def whole() -> None:
        resume(build(folder / "whole", url, **(SAVED | {"save_steps": 3})))

    found: dict[str, Any] = {"whole": wait(child(whole, folder / "whole.log"))}
    found |= {"killed": kill_at_random(folder, url), "stopped": stopped(folder, url)}
    found["hangs"] = leaves_at_once(folder, url)
    (folder / "found.json").write_text(json.dumps(found))


def ranks(folder: Path, url: str) -> None:
    """One rank of two, each with one row of a step: a whole run, then one in which the second rank's server fails."""
    rank, options = os.environ["RANK"], {"per_device_train_batch_size": 1, "ddp_backend": "gloo", **ROUNDED}
    engine = build(folder / "run", url, **options)
    engine.train()
    (folder / f"rollouts-{rank}.json").write_text(json.dumps(engine.written))
    save_file(trained(engine), folder / f"weights-{rank}.safetensors")
    if rank == "1":
        url = f"{url.removesuffix('/v1')},refuses-at-3/v1"
    try:
        build(folder / "fails", url, **options).train()
    except TrainingStopped as error:
        (folder / f"error-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"restarts": restarts, "ranks": ranks}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
    end_process(0)
