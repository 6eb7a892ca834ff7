"""Rollouts one step ahead of training (`async_rollout=True`): while a step trains, a server samples those of the next.

    y_k: the rollouts that step k trains on; w_k: the weights after k steps
    async_rollout=False   y_1 from w_0, train 1, y_2 from w_1, train 2, y_3 from w_2, train 3, …
    async_rollout=True    y_1 from w_0, then train 1 beside y_2 from w_0, train 2 beside y_3 from w_1, …

What this is, exactly. The loss of step k on its rollouts y is, either way,

    sum over supervised tokens t of  weight_t · D( teacher(· | x, y_<t), student_{w_(k-1)}(· | x, y_<t) )

with both distributions over the whole vocabulary and by the weights of step k. It is a supervised loss of each token
given the prefix before it: no gradient goes through the sampling, on-policy or not. Who sampled y decides which
prefixes the sum visits (and with them which rollouts are valid, hence which teacher reads them), never what the student
is to say after one: the minimum at each prefix is the teacher's distribution, whoever wrote it. Importance weights, the
product over the tokens before t of their probability under w_(k-1) over that under w_(k-2), would change how often a
prefix counts; there are none without `importance_clip`, which takes the token's own ratio for them. So one step off-
policy shifts the mixture of prefixes, by what one optimizer step changes, and moves no token's target. Metrics of the
rollouts (valid, accuracy, lengths) speak of the student of one step before.

Exactly one step: except in the first step of an epoch, whose examples nobody knows before it begins. Its rollouts are
its own, as in the first step of a run.

The engine must own its weights (`update_weights` moves them on): server and vLLM do. One that samples from the model
that the optimizer is stepping would mix weights of two steps within a completion, and is refused.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

import torch

from vigos.data.examples import BadExample, Example
from vigos.method.encode import EncodedPrompt
from vigos.rollout.engine import Completion, RolloutEngine, Sampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """Hold what an optimizer step asks of the rollout engine on this rank.

    Attributes:
        step: optimizer steps before it.
        micro_batches: their number; 0: there is no such step.
        examples: those that can be used: micro-batch, example, the student's prompt.
        seeds: one for each of `examples`.
        bad: those that cannot.
    """

    step: int
    micro_batches: int
    examples: Sequence[tuple[int, Example, EncodedPrompt]]
    seeds: Sequence[int]
    bad: Sequence[BadExample]

    @property
    def prompts(self) -> list[EncodedPrompt]:
        """Return the prompts of `examples`."""
        return [prompt for _, _, prompt in self.examples]

    def identity(self, sampling: Sampling) -> str:
        """Return a digest, equal where the same prompts and images are asked for with the same seeds and options."""
        digest = hashlib.blake2b(repr((self.step, list(self.seeds), sampling)).encode(), digest_size=16)
        for prompt in self.prompts:
            digest.update(prompt.ids.numpy().tobytes())
            digest.update(prompt.images.key.encode() if prompt.images else b"-")
        return digest.hexdigest()


def check_engine(engine: RolloutEngine) -> None:
    """Refuse an engine that does not own its weights."""
    if not engine.owns_weights:
        raise ValueError(
            "async_rollout must be false with an engine that samples from the model in training, whose weights the "
            f"optimizer would change under it, got true with {type(engine).__name__}; take rollout_engine='server' (or "
            "'vllm'), which is sent the adapter"
        )


class RolloutsAhead:
    """Hold the request of the next step, once it is under way, and the completions it brings."""

    def __init__(self) -> None:
        self.request: Request | None = None
        self._sampling: AsyncResult[tuple[list[Completion], float]] | None = None  # the last one, over or not
        self._saved: dict[str, Any] | None = None  # from a checkpoint

    def start(self, request: Request, sample: Callable[[], list[Completion]]) -> None:
        """Call `sample` on another thread."""
        assert self.request is None
        self.wait()
        self.request = request

        def timed() -> tuple[list[Completion], float]:
            started = time.perf_counter()
            return sample(), time.perf_counter() - started

        # A daemon thread, unlike those of concurrent.futures: a run that fails elsewhere does not wait for it.
        self._sampling = ThreadPool(1).apply_async(timed)

    def result(self) -> list[Completion]:
        """Clear `request` and block for its completions; re-raises sampling errors."""
        assert self._sampling is not None
        self.request = None
        return self._sampling.get()[0]

    def wait(self) -> BaseException | None:
        """Block until no sampling is under way; return, and do not raise, the error it ended in."""
        try:
            if self._sampling is not None:
                self._sampling.get()
        except Exception as error:
            return error
        return None

    def drop(self) -> None:
        """Forget the request, once its sampling is over."""
        self.wait()
        self.request = self._sampling = None

    @property
    def seconds(self) -> float:
        """Duration of the last sampling in seconds; 0 if there was none, or it failed. Blocks."""
        return 0.0 if self._sampling is None or self.wait() is not None else self._sampling.get()[1]

    # --- Checkpoints keep the completions: no server promises to sample them alike once more --------------------------

    def state(self, sampling: Sampling) -> dict[str, Any] | None:
        """Return the completions for a checkpoint, blocking for them; None without a request, or if it failed."""
        if self.request is None or self._sampling is None or self.wait() is not None:
            return None
        completions = self._sampling.get()[0]
        return {
            "identity": self.request.identity(sampling),
            "completions": [c.ids.tolist() for c in completions],
            "logprobs": [None if c.logprobs is None else c.logprobs.tolist() for c in completions],
            "versions": [c.version for c in completions],
        }

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Drop the request and take the `state` of a checkpoint, or nothing, in its place."""
        self.drop()
        self._saved = saved

    def saved(self, request: Request, sampling: Sampling) -> list[Completion] | None:
        """Return the completions of `request` if the checkpoint had them; the first call clears them."""
        saved, self._saved = self._saved, None
        if saved is None:
            return None
        if saved["identity"] != request.identity(sampling):
            logger.warning(
                "step %d samples its rollouts now: those in the checkpoint are of other examples, prompts or options",
                request.step + 1,
            )
            return None
        return [
            Completion(torch.tensor(ids, dtype=torch.int64), None if values is None else torch.tensor(values), version)
            for ids, values, version in zip(saved["completions"], saved["logprobs"], saved["versions"], strict=True)
        ]
