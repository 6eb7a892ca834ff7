"""Rollouts from vLLM in this process: prompts go in as ids, completions come out as ids, adapters as files.

    engine = VLLMEngine("Qwen/Qwen2.5-VL-3B-Instruct", tokenizer, eos_token_ids=(151645,), adapters="runs/3b/adapters")
    completions = engine.generate(prompts, Sampling(n=4), seed=0)

The student's adapter is saved and given to vLLM by name with each request (`LoRARequest`): nothing is ever merged, here
or there. vLLM holds a copy of the base weights of its own. Needs the extra `vllm`; a script that makes an engine needs
`if __name__ == "__main__":`, since vLLM starts processes.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from vigos.method.encode import EncodedPrompt
from vigos.rollout.adapters import adapter_name, drop_adapters, save_adapter
from vigos.rollout.checks import RolloutChecks, RolloutError, collapsed, known_logprobs
from vigos.rollout.engine import Completion, CompletionEngine, Sampling, prompt_seeds
from vigos.rollout.full_weights import BACKEND, WORKER, FullWeights, InProcess
from vigos.system.extras import install
from vigos.system.http import UnusableAnswer


class VLLMEngine(CompletionEngine):
    """Sample with `vllm.LLM`.

    Args:
        model: folder or name of the base model.
        tokenizer: the student's, for messages about prompts that differ.
        eos_token_ids: ids that end a completion.
        banned_token_ids: ids that are never sampled; a completion that holds one all the same is refused.
        vocab_size: ids must lie below it; None does not check.
        adapters: folder in which adapters are saved for vLLM; None: none are, and LoRA is off.
        lora_r: the largest rank that an adapter has.
        full_weights: take all weights of the student instead of an adapter.
        sleep_level: what vLLM lets go of while it does not sample. 0: nothing; 1: its weights go to the CPU; 2: they
            are dropped, which needs `full_weights`. Not on CPUs.
        gpu: which of the GPUs that this process may see vLLM takes; None leaves that to vLLM (the first).
        options: further arguments of `vllm.LLM`, such as dtype, max_model_len and gpu_memory_utilization.
    """

    owns_weights = True
    one_a_rank = True

    def __init__(
        self, model: str, tokenizer: Any, *, eos_token_ids: Sequence[int], banned_token_ids: Sequence[int] = (),
        vocab_size: int | None = None, adapters: str | Path | None = None, lora_r: int = 64,
        full_weights: bool = False, sleep_level: int = 0, gpu: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(f"VLLMEngine needs vLLM: {install('vllm')}") from error
        self.eos_token_ids = tuple(eos_token_ids)
        self.checks = RolloutChecks(tokenizer, self.eos_token_ids, tuple(banned_token_ids), vocab_size)
        self.base = self.model = model
        self.adapters = None if adapters is None else Path(adapters)
        self._adapter: Any = None  # LoRARequest of self.model
        self._pushed = 0
        if full_weights:
            lora: dict[str, Any] = {"worker_extension_cls": WORKER, "weight_transfer_config": {"backend": BACKEND}}
        else:
            lora = {} if adapters is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": _max_rank(lora_r)}
        before = {child.pid for child in multiprocessing.active_children()}
        # Without the model's own generation config, whose repetition penalty and limits would join in.
        sleep = {"enable_sleep_mode": True} if sleep_level else {}
        with only_gpu(gpu):
            self.llm = LLM(model=model, generation_config="vllm", **(lora | sleep | options))
        self.takes_groups, self.sleep_level = full_weights, sleep_level
        self.weights = FullWeights(InProcess(self.llm), secrets.token_hex(4)) if full_weights else None
        self.processes = [c.pid for c in multiprocessing.active_children() if c.pid is not None and c.pid not in before]
        self._watcher = _end_with_this_process(self.processes)

    def __repr__(self) -> str:
        return f"VLLMEngine({self.model!r})"

    def _sample(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int], *, logprobs: bool
    ) -> list[Completion]:
        from vllm import SamplingParams

        if self.weights is not None:
            self.weights.require(self.weights.version)
        if self.sleep_level:
            self.llm.wake_up()
        asked = sampling.without_copies()
        parameters = [
            SamplingParams(
                n=asked.n, temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k,
                max_tokens=asked.max_new_tokens, seed=s, detokenize=False,
                logprobs=0 if logprobs else None,  # of the sampled tokens alone
                logit_bias=dict.fromkeys(self.checks.banned_token_ids, -100.0) or None,
            )
            for s in prompt_seeds(seed, len(prompts))
        ]  # fmt: skip
        inputs = [self._input(prompt) for prompt in prompts]
        outputs = self.llm.generate(inputs, parameters, lora_request=self._adapter, use_tqdm=False)
        if self.weights is not None:
            self.weights.require(self.weights.version)
        if self.sleep_level:
            self.llm.sleep(level=self.sleep_level)
            if self.sleep_level == 2 and self.weights is not None:
                self.weights.version = None
        completions: list[Completion] = []
        for prompt, output in zip(prompts, outputs, strict=True):
            self.checks.same_prompt(prompt, output.prompt_token_ids, str(self))
            found = [self._completion(c, asked) for c in sorted(output.outputs, key=lambda c: c.index)]
            completions += found * (sampling.n // asked.n)
        return completions

    @property
    def served_name(self) -> str:  # type: ignore[override]
        """Return the name of the base model or of the adapter in use."""
        return self.model

    def update_weights(
        self, step: int, model: nn.Module, weights: dict[str, Tensor] | Iterator[dict[str, Tensor]] | None
    ) -> None:
        """Save the student's adapter, sample with it, and drop the one before; or take all weights in groups.

        See `RolloutEngine.update_weights`.
        """
        from vllm.lora.request import LoRARequest

        if weights is None:
            raise ValueError("weights must be the trained parameters: every rank has an engine of its own, got None")
        if self.weights is not None:
            if self.sleep_level:
                self.llm.wake_up(tags=["weights"])
            try:
                self.weights.push(step, [weights] if isinstance(weights, dict) else weights)
            except RolloutError:
                raise
            except Exception as error:  # whatever vLLM raises: the update is not whole
                raise RolloutError(f"{self} did not take the weights of step {step}: {error}") from error
            self.model = adapter_name(step)
            return
        if not isinstance(weights, dict):
            raise ValueError(f"weights must be a dict by name for an adapter, got {type(weights).__name__}")
        name = adapter_name(step)
        folder = save_adapter(self.adapters, step, model, weights)
        # A number and a name that were never used: vLLM keeps adapters by the one and cached prefixes by the other.
        self._pushed += 1
        self._adapter = LoRARequest(f"{name}-{self._pushed}", self._pushed, str(folder))
        self.model = name
        drop_adapters(folder.parent, keep=name)

    def holds(self, step: int) -> bool:
        """Tell whether the full weights after `step` steps are there; an adapter is."""
        return self.weights is None or self.weights.holds(step)

    def check_weights(self, model: nn.Module) -> None:
        """Send all of the student's weights and compare what they made with what was read. See `FullWeights`."""
        if self.weights is not None:
            self.weights.check(model)

    def close(self) -> None:
        """End vLLM's processes and free their memory; without it they end with this process."""
        self.llm.llm_engine.engine_core.shutdown()
        self._watcher.communicate()

    def _input(self, prompt: EncodedPrompt) -> dict[str, Any]:
        """Build vLLM's input, with one placeholder an image: it expands them itself."""
        if prompt.images is None:
            return {"prompt_token_ids": prompt.ids.tolist()}
        if prompt.chat is None:
            raise ValueError("prompts with images must come from encode_prompt, which keeps the images as they were")
        ids = collapsed(prompt.ids.tolist(), self.checks.banned_token_ids)
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": list(prompt.chat.images)}}

    def _completion(self, output: Any, sampling: Sampling) -> Completion:
        try:
            ids = self.checks.completion(output.token_ids, output.finish_reason, sampling.max_new_tokens, str(self))
        except UnusableAnswer as error:
            raise RolloutError(f"{self} sampled {error}") from error
        if output.logprobs is None:
            return Completion(ids)
        values = [known[token].logprob for token, known in zip(output.token_ids, output.logprobs, strict=True)]
        return Completion(ids, known_logprobs(values, len(ids)))


@contextmanager
def only_gpu(gpu: int | None) -> Iterator[None]:
    """Let processes that are started inside see one GPU of those that this one may see; None changes nothing."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    if gpu is not None:
        os.environ[name] = before.split(",")[gpu].strip() if before else str(gpu)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif gpu is not None:
            del os.environ[name]


_WATCH = """
import contextlib, os, signal, sys
sys.stdin.read()
for pid in sys.argv[1:]:
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)
"""


def _end_with_this_process(pids: Sequence[int]) -> subprocess.Popen[bytes]:
    """Kill processes when this one ends, however it ends.

    vLLM's engine does not notice, and would keep its memory from the run that resumes.
    """
    command = [sys.executable, "-S", "-c", _WATCH, *map(str, pids)]
    # Its standard input ends when this process does, however that ends.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _max_rank(lora_r: int) -> int:
    """Return the least rank that vLLM offers for adapters of rank `lora_r`."""
    from vllm.config.lora import MaxLoRARanks

    offered = sorted(get_args(MaxLoRARanks))
    if lora_r > offered[-1]:
        raise ValueError(f"lora_r must be at most {offered[-1]} for vLLM, got {lora_r}")
    return next(rank for rank in offered if rank >= lora_r)
