"""A step with its rollouts sampled one step ahead (`async_rollout`) and without, as the rollout server gets slower.

    python bench/async_rollout.py

The built-in model trains on this machine. The server is another process that answers each request after a fixed time
and with the same completion, so that it takes next to nothing of the machine: what is measured is the schedule alone.
Without, a step is the rollouts and then the training, whose time is read off there; with it a step cannot be shorter
than the longer of the two.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from measure import Table, machine, results_file
from PIL import Image

from vigos.data.examples import load_rows
from vigos.train.config import ViGOSConfig
from vigos.train.trainer import ViGOSTrainer
from vigos.world import checkpoint_path, load_base, world_prompts, write_world

NAMES = ("rollout_s", "step_s", "rollout_wait_s")
COMPLETION = "A red 7, a blue 3.</description>\n<think>The 7 is red.</think>\n\\boxed{red}"


def serve(delay_s: float) -> None:
    """Prints a port and answers there as vLLM does, for as long as the process lives."""
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(checkpoint_path())
    tokenizer = processor.tokenizer
    completion = [*tokenizer(COMPLETION, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    @cache
    def prompt_ids(chat: str) -> list[int]:  # the same rows come again and again
        *messages, opened = json.loads(chat)
        images = []
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image_url":
                    data = base64.b64decode(part.pop("image_url")["url"].partition(";base64,")[2])
                    images.append(Image.open(io.BytesIO(data)).convert("RGB"))
                    part["type"] = "image"
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + opened["content"]
        return processor(text=[text], images=[images])["input_ids"][0]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body, answer = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), {}
            if self.path.endswith("chat/completions"):
                time.sleep(delay_s)
                answer = {
                    "choices": [{"index": 0, "token_ids": completion, "finish_reason": "stop"}],
                    "usage": {"completion_tokens": len(completion)},
                    "prompt_token_ids": prompt_ids(json.dumps(body["messages"])),
                }
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def train(folder: Path, port: int, steps: int, rows: int, ahead: int) -> list[dict[str, float]]:
    """What each step logged, less the first two, which warm up."""
    model, processor = load_base()
    config = ViGOSConfig(
        output_dir=str(folder / f"{port}-{ahead}"), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        max_steps=steps + 2, per_device_train_batch_size=rows, gradient_accumulation_steps=1, lora_dropout=0.0,
        max_completion_length=64, save_merged=False, completion_steps=0, teacher_verify="never",
        async_rollout=bool(ahead),
        rollout_engine="server", vllm_server_base_url=f"http://127.0.0.1:{port}/v1", rollout_model="base",
    )  # fmt: skip
    data = list(load_rows(write_world(folder / "world", "train", n=rows, seed=0))) * (steps + 2)
    trainer = ViGOSTrainer(model, config, processor, data, prompts=world_prompts())
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log][2:]


def main() -> None:
    """Every delay, with and without in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0], help="of the server, seconds")
    parser.add_argument("--steps", type=int, default=5, help="timed ones of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs with and without, in turn")
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--out", type=Path, default=results_file("cpu", "async_rollout"), help="CSV")
    parser.add_argument("--serve", type=float, default=None, metavar="DELAY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
    table = Table(args.out, machine("cpu", "transformers", "peft"))
    with tempfile.TemporaryDirectory() as folder:
        for delay_s in args.delays:
            command = [sys.executable, __file__, "--serve", str(delay_s)]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                assert server.stdout is not None
                port = int(server.stdout.readline())
                logs: dict[int, list[dict[str, float]]] = {0: [], 1: []}
                for k in range(args.rounds):
                    for ahead in logs:
                        logs[ahead] += train(Path(folder) / str(k), port, args.steps, args.rows, ahead)
            finally:
                server.kill()
                server.wait()
            times = {
                f"{prefix}{name}": median(log[f"perf/{name}"] for log in logs[ahead])
                for ahead, prefix, names in ((0, "", NAMES[:2]), (1, "ahead_", NAMES))
                for name in names
            }
            training = median(log["perf/step_s"] - log["perf/rollout_s"] for log in logs[0])
            row: dict[str, object] = {"delay_s": delay_s, "rows": args.rows, "train_s": training} | times
            print({name: round(value, 3) for name, value in row.items() if isinstance(value, float)}, flush=True)
            table.add([row])


if __name__ == "__main__":
    main()
