"""A real HTTP server that speaks vLLM's chat API with the built-in model behind it; misbehaves on request.

    python tests/helpers/rollout_server_process.py          # prints its port; serves until it is killed

The path says how it behaves: /good/v1, /hang/v1, ... Each sample is drawn by `TransformersEngine`, so that a completion
from here equals one from the model at hand, given the same seed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

from vigos.method.encode import EncodedPrompt, ImageInputs
from vigos.rollout.engine import Sampling
from vigos.rollout.generate import TransformersEngine
from vigos.world import load_base

torch.set_num_threads(1)
MODEL, PROCESSOR = load_base()
LOCK = threading.Lock()  # one model, several requests in flight
ADAPTERS: dict[str, str] = {}
SEEN: dict[str, int] = {}  # requests by behaviour
IMAGE = MODEL.config.image_token_id
# What vLLM takes from the model's generation config where a request leaves it out.
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def sample(body: dict[str, Any]) -> tuple[list[int], list[list[int]], list[list[float]]]:
    """(ids of the prompt, ids of each completion, their log-probabilities)."""
    messages, images = [], []
    for message in body["messages"]:
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        shown = []
        for part in parts:
            if part["type"] == "image_url":
                data = part["image_url"]["url"].partition(";base64,")[2]
                images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
                part = {"type": "image"}
            shown.append(part)
        messages.append({"role": message["role"], "content": shown})
    prefill = ""
    if body["continue_final_message"]:
        prefill = messages.pop()["content"][0]["text"]
    text = PROCESSOR.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + prefill
    batch = PROCESSOR(text=[text], images=[images], return_tensors="pt", return_mm_token_type_ids=True)
    tensors = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    prompt = EncodedPrompt(
        batch["input_ids"][0], torch.as_tensor(batch["mm_token_type_ids"])[0], ImageInputs.from_tensors(tensors)
    )
    sampling = Sampling(body["temperature"], body["top_p"], max(body["top_k"], 0), body["max_tokens"], body["n"])
    with LOCK:
        model: Any = MODEL
        if body["model"] in ADAPTERS:
            from peft import PeftModel

            model = PeftModel.from_pretrained(MODEL, ADAPTERS[body["model"]])
        engine = TransformersEngine.for_model(model, PROCESSOR)
        completions = engine.sample([prompt], sampling, [body["seed"]])
        if model is not MODEL:
            model.unload()
    logprobs = [c.logprobs.tolist() for c in completions if c.logprobs is not None]
    return prompt.ids.tolist(), [c.ids.tolist() for c in completions], logprobs


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path.endswith("/v1/models"):
            return self.reply(200, {"object": "list", "data": [{"id": name} for name in ["base", *ADAPTERS]]})
        self.reply(200, {"seen": SEEN, "adapters": ADAPTERS})

    def do_POST(self) -> None:
        behaviour, _, path = self.path.strip("/").partition("/v1/")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        SEEN[behaviour] = count = SEEN.get(behaviour, 0) + 1
        if path == "load_lora_adapter":
            if body["lora_name"] in ADAPTERS:
                return self.reply(400, {"error": "has already been loaded"})
            ADAPTERS[body["lora_name"]] = body["lora_path"]
            return self.reply(200, b"Success")
        if path == "unload_lora_adapter":
            if body["lora_name"] not in ADAPTERS:
                return self.reply(404, {"error": "cannot be found"})
            del ADAPTERS[body["lora_name"]]
            return self.reply(200, b"Success")
        if behaviour == "dies":
            os._exit(1)
        if behaviour == "hangs":
            time.sleep(30)
        if behaviour == "busy" and count <= 2:
            return self.reply(429, {"error": "too many requests"})
        if behaviour == "refuses":
            return self.reply(400, {"error": "no such model"})
        if behaviour == "keyed" and self.headers["Authorization"] != "Bearer s3cr3t":
            return self.reply(401, {"error": "who are you"})
        if behaviour == "garbage" or (behaviour == "garbage-once" and count == 1):
            return self.reply(200, b"<html>a proxy's page</html>")
        if missing := [name for name in DEFAULTED if name not in body]:
            return self.reply(400, {"error": f"left to the server: {missing}"})
        if behaviour == "short":
            body["max_tokens"] = 5
        prompt, completions, logprobs = sample(body)
        if behaviour == "other-prompt":
            prompt = [*prompt[:4], 7, *prompt[5:]]
        if behaviour == "truncated":
            total = sum(map(len, completions))
            completions = [c[:-3] for c in completions]
        else:
            total = sum(map(len, completions))
        if behaviour == "placeholder":
            completions = [[*c[:2], IMAGE, *c[3:]] for c in completions]
        choices = [
            {
                "index": i, "token_ids": c, "message": {"role": "assistant", "content": PROCESSOR.decode(c)},
                "finish_reason": "stop" if c[-1] == PROCESSOR.tokenizer.eos_token_id else "length",
            }
            for i, c in enumerate(completions)
        ]  # fmt: skip
        if body.get("logprobs"):
            for choice, values in zip(choices, logprobs, strict=True):
                choice["logprobs"] = {"content": [{"token": "", "logprob": v} for v in values]}
        answer = {"choices": choices[::-1], "usage": {"completion_tokens": total}, "prompt_token_ids": prompt}
        if behaviour == "text-only":
            del answer["prompt_token_ids"]
            for choice in choices:
                del choice["token_ids"]
        self.reply(200, answer)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    sys.stdout.close()
    server.serve_forever()
