"""Rollouts from a server that speaks vLLM's OpenAI-compatible API: images, sampling, token ids, adapters by name.

    engine = ServerEngine("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-3B-Instruct", tokenizer, eos_token_ids=(151645,))
    completions = engine.generate(prompts, Sampling(n=4), seed=0)

A request is the chat that the prompt was rendered from, the assistant's turn opened with its prefill. The server must
return token ids (vLLM: `return_token_ids`): text that is tokenised again has other boundaries, and the loss would be
of tokens that nobody sampled. It must have rendered the same prompt: the ids it returns are compared with ours.

The student's adapter is saved as files and loaded by the server under a name of its own (`/load_lora_adapter`): nothing
is ever merged, here or there, so the base weights stay as they are. The server reads the files: same host, or a shared
file system. vLLM wants `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.

What a server fills in by itself must not reach the samples: vLLM takes what a request leaves out from the model's own
generation config (Qwen2.5-VL's has a repetition penalty), and finds cached prefixes by an adapter's name and path,
whatever its weights. So every sampling parameter is sent, and every engine has a cache of its own (`cache_salt`).

Failures: lost connections, statuses 408, 429 and 5xx, and answers that come too slowly, are too long or make no sense
are retried with growing pauses; what lasts, and every other status, ends in a `RolloutServerError` of one line.
"""

from __future__ import annotations

import base64
import hashlib
import io
import secrets
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor, nn

from vigos.method.encode import Chat, EncodedPrompt
from vigos.rollout.adapters import adapter_name, drop_adapters, save_adapter
from vigos.rollout.answers import read_completions, read_names
from vigos.rollout.checks import RolloutChecks, RolloutError, known_logprobs
from vigos.rollout.engine import Completion, CompletionEngine, Sampling, prompt_seeds
from vigos.rollout.full_weights import Broadcast, FullWeights, Server
from vigos.system.http import Client, ServerError, parsed_answer
from vigos.system.secrets import api_key, server_address

KEY_VARIABLE = "VIGOS_ROLLOUT_API_KEY"  # never an option: options are written to the run folder
_ADVICE = {
    ("chat/completions", 422): ". The server must take the fields of vLLM's API, return_token_ids above all: "
    "`transformers serve` does not, and returns text alone",
    ("weight_checker", 404): ". vLLM has it with VLLM_SERVER_DEV_MODE=1",
    ("init_weight_transfer_engine", 500): ". The server must be started with --worker-extension-cls "
    'vigos.rollout.vllm_worker.Extension and --weight-transfer-config \'{"backend": "vigos"}\'',
    ("load_lora_adapter", 404): ". vLLM has it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
}


class RolloutServerError(RolloutError):
    """Raised if the server is gone, refuses, or gives unusable answers."""


class ServerEngine(CompletionEngine):
    """Sample on a server. Completions are as exact as with the model at hand: ids, not text.

    Args:
        url: up to and including /v1.
        model: the base model's name on the server.
        tokenizer: the student's, for messages about prompts that differ.
        eos_token_ids: ids that end a completion.
        banned_token_ids: ids that are never sampled; a completion that holds one all the same is refused.
        vocab_size: ids must lie below it; None does not check.
        concurrency: requests in flight.
        timeout: seconds that one request may take, from connecting to the last byte of its answer.
        retries: further tries after a transient failure.
        pause: seconds before the third try, doubled for each further one; the second follows at once.
        adapters: folder in which adapters are saved for the server; None: none are.
        full_weights: folder through which the server gets all weights of the student, in place of an adapter.
    """

    owns_weights = True

    def __init__(
        self, url: str, model: str, tokenizer: Any, *, eos_token_ids: Sequence[int],
        banned_token_ids: Sequence[int] = (), vocab_size: int | None = None, concurrency: int = 32,
        timeout: float = 600.0, retries: int = 4, pause: float = 1.0, adapters: str | Path | None = None,
        full_weights: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.url = server_address(url, "vllm_server_base_url", KEY_VARIABLE)
        if not model:
            raise ValueError("rollout_model must be the model's name on the server, got an empty one")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise ValueError(
                "concurrency must be at least 1, timeout above 0 and retries at least 0, got "
                f"{concurrency}, {timeout}, {retries}"
            )
        self.base, self.model = model, model
        self.eos_token_ids = tuple(eos_token_ids)
        self.checks = RolloutChecks(tokenizer, self.eos_token_ids, tuple(banned_token_ids), vocab_size)
        self.concurrency = concurrency
        self.adapters = None if adapters is None else Path(adapters)
        self.takes_groups = full_weights is not None
        self.weights: FullWeights | None = None
        if full_weights is not None:
            run = hashlib.blake2b(str(Path(full_weights).resolve()).encode(), digest_size=4).hexdigest()
            self.weights = FullWeights(Server(self._root_request, Path(full_weights)), run)
        self._salt = secrets.token_hex(16)
        # Part of the adapters' names, the same on every rank: runs that share a server do not take each other's.
        self._run = hashlib.blake2b(str(self.adapters and self.adapters.resolve()).encode(), digest_size=4).hexdigest()
        key = api_key(KEY_VARIABLE)
        self._client, self._root = (
            Client(address, key=key, timeout=timeout, retries=retries, pause=pause, connections=concurrency)
            for address in (self.url, self.url.removesuffix("/v1"))
        )

    def __repr__(self) -> str:  # without the key
        return f"ServerEngine({self.url!r}, {self.model!r})"

    def _sample(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int], *, logprobs: bool
    ) -> list[Completion]:
        asked = sampling.without_copies()
        seeds = prompt_seeds(seed, len(prompts))
        wanted = {"logprobs": True, "top_logprobs": 0} if logprobs else {}  # of the sampled tokens alone
        jobs = [(p, self._body(p, asked, s) | wanted, asked) for p, s in zip(prompts, seeds, strict=True)]
        if not jobs:
            return []
        if self.weights is not None:
            self.weights.require(self.weights.version)
        # Daemon threads, unlike those of concurrent.futures: a run that fails elsewhere does not wait for them.
        with ThreadPool(min(self.concurrency, len(jobs))) as pool:
            found = list(pool.imap(lambda job: self._completions(*job), jobs))  # the first failure drops the rest
        if self.weights is not None:  # a server that was started again meanwhile has answered from others
            self.weights.require(self.weights.version)
        return [completion for completions in found for completion in completions * (sampling.n // asked.n)]

    # --- Adapters -----------------------------------------------------------------------------------------------------

    @property
    def served_name(self) -> str:  # type: ignore[override]
        """Return the name that requests ask for: the base model, or this run's adapter `self.model`."""
        return self._served_name(self.model)

    def _served_name(self, model: str) -> str:
        return model if model == self.base else f"{model}-{self._run}"

    def update_weights(
        self, step: int, model: nn.Module, weights: dict[str, Tensor] | Iterator[dict[str, Tensor]] | None
    ) -> None:
        """Save the student's adapter and have the server load it, and drop the one before; or send all weights.

        On the leader rank; other ranks ask for them by name from then on. See `RolloutEngine.update_weights`.
        """
        if self.weights is not None:
            if weights is None:
                self.weights.version = step
            else:
                self.weights.push(step, [weights] if isinstance(weights, dict) else weights)
            return
        name = adapter_name(step)
        if weights is not None and not isinstance(weights, dict):
            raise ValueError(f"weights must be a dict by name for an adapter, got {type(weights).__name__}")
        if weights is not None:
            folder = save_adapter(self.adapters, step, model, weights)
            self._load(name, folder)
            drop_adapters(folder.parent, keep=name)
        self.model = name

    def holds(self, step: int) -> bool:
        """Tell whether the full weights after `step` steps are there; an adapter is."""
        return self.weights is None or self.weights.holds(step)

    def check_weights(self, model: nn.Module) -> None:
        """Send all of the student's weights and compare what they made with what was read. See `FullWeights`."""
        if self.weights is not None:
            self.weights.check(model)

    def send_by_nccl(self) -> None:
        """Send full weights by NCCL, and no longer through files: the folder then only names the run."""
        assert self.weights is not None
        self.weights.transport = Broadcast(self._root_request, urlsplit(self.url).hostname or "")

    def _root_request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to the part of vLLM's API that is not OpenAI's, and return its answer, if it has one."""
        data = self._request(path, body, client=self._root)
        return parsed_answer(data) if data else None

    def _load(self, name: str, folder: Path) -> None:
        load = {"lora_name": self._served_name(name), "lora_path": str(folder)}
        try:
            self._request("load_lora_adapter", load)
        except RolloutServerError:
            if load["lora_name"] not in self._names():
                raise
            # From before this run was resumed, or from a try whose answer was lost: other weights, perhaps.
            self._request("unload_lora_adapter", {"lora_name": load["lora_name"]})
            self._request("load_lora_adapter", load)
        if self.model not in (self.base, name):
            self._unload(self._served_name(self.model))

    def _unload(self, name: str) -> None:
        try:
            self._request("unload_lora_adapter", {"lora_name": name})
        except RolloutServerError:
            if name in self._names():
                raise  # else it is gone already: a server that was started again

    def _names(self) -> list[str]:
        """Return the names of models and adapters that the server has."""

        return self._request("models", read=read_names)

    # --- One request --------------------------------------------------------------------------------------------------

    def _body(self, prompt: EncodedPrompt, sampling: Sampling, seed: int) -> dict[str, Any]:
        if prompt.chat is None:
            raise ValueError("prompts must come from encode_prompt, which keeps the chat that a server renders")
        prefilled = bool(prompt.chat.prefill)
        options = {"chat_template_kwargs": dict(prompt.chat.template_kwargs)} if prompt.chat.template_kwargs else {}
        return {
            "model": self.served_name, "messages": wire_messages(prompt.chat), "n": sampling.n, "seed": seed,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "max_tokens": sampling.max_new_tokens, "logit_bias": {str(i): -100 for i in self.checks.banned_token_ids},
            "add_generation_prompt": not prefilled, "continue_final_message": prefilled,
            "return_token_ids": True, "skip_special_tokens": False, "cache_salt": self._salt, **options,
        }  # fmt: skip

    def _completions(self, prompt: EncodedPrompt, body: dict[str, Any], sampling: Sampling) -> list[Completion]:
        def read(answer: Any) -> list[Completion]:
            found = read_completions(answer, sampling.n, sampling.max_new_tokens)
            if found is None:
                raise RolloutServerError(
                    f"{self.url} returned no token ids; vLLM does with return_token_ids (0.10.2 and later). Text that "
                    "is tokenised again is not what was sampled"
                )
            theirs, completions = found
            who = f"{self.url} ({self.model})"
            self.checks.same_prompt(prompt, theirs, who)
            checked = [self.checks.completion(ids, r, sampling.max_new_tokens, who) for ids, r, _ in completions]
            return [
                Completion(ids, known_logprobs(values, len(ids)) if values else None)
                for ids, values in zip(checked, (values for _, _, values in completions), strict=True)
            ]

        return self._request("chat/completions", body, read)

    def _request(
        self, path: str, body: dict[str, Any] | None = None, read: Any = None, client: Client | None = None
    ) -> Any:
        try:
            return (client or self._client).ask(path, body, read)
        except ServerError as error:
            advice = _ADVICE.get((path, error.status or 0), "")
            raise RolloutServerError(f"{error}{advice}") from error


def wire_messages(chat: Chat) -> list[dict[str, Any]]:
    """Return the chat as the API takes it: images as PNG data addresses, the prefill as an open assistant turn."""
    images = iter(chat.images)

    def part(content: dict[str, Any]) -> dict[str, Any]:
        if content["type"] != "image":
            return dict(content)
        buffer = io.BytesIO()
        next(images).save(buffer, format="PNG")  # lossless: the server must see the pixels that the teachers see
        address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": address}}

    wired = [{"role": m["role"], "content": [part(content) for content in m["content"]]} for m in chat.messages]
    return [*wired, {"role": "assistant", "content": chat.prefill}] if chat.prefill else wired
