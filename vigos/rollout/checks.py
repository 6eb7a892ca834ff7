"""Check completions that another program sampled: the same prompt, known ids, none banned, none cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vigos.errors import TrainingStopped
from vigos.method.encode import EncodedPrompt
from vigos.system.http import UnusableAnswer


class RolloutError(TrainingStopped):
    """Raised for rollouts that cannot be had or used; says what to do about it."""


@dataclass(frozen=True)
class RolloutChecks:
    """Check prompts and completions of another program against the student's tokenizer.

    Attributes:
        tokenizer: the student's, for messages about prompts that differ.
        eos_token_ids: ids that end a completion.
        banned_token_ids: image, video and audio placeholders.
        vocab_size: ids must lie below it; None does not check.
    """

    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...] = ()
    vocab_size: int | None = None

    def same_prompt(self, prompt: EncodedPrompt, theirs: Sequence[int], who: str) -> None:
        """Refuse another prompt: ids must be ours, or have one placeholder in place of each image's.

        Args:
            theirs: ids of the prompt as the engine rendered it.
            who: names the engine in the message.

        Raises:
            RolloutError: they differ.
        """
        ours = prompt.ids.tolist()
        if list(theirs) in (ours, collapsed(ours, self.banned_token_ids)):
            return
        start = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        shown = [self.tokenizer.decode(list(ids[max(0, start - 4) : start + 8])) for ids in (ours, theirs)]
        raise RolloutError(
            f"{who} rendered another prompt: it differs from token {start} on, ours {shown[0]!r}, the other "
            f"{shown[1]!r}; give it the student's chat template (--chat-template) and image processor"
        )

    def completion(self, ids: Sequence[Any], reason: str | None, max_new_tokens: int, who: str) -> Tensor:
        """Return (C,) int64, cut after the first EOS, which it keeps. Raises UnusableAnswer or RolloutError."""
        limit = self.vocab_size if self.vocab_size is not None else 2**31
        ids = list(ids)
        if not all(isinstance(i, int) and 0 <= i < limit for i in ids):
            raise UnusableAnswer(f"token ids outside the vocabulary of {limit}")
        if banned := sorted(set(ids) & set(self.banned_token_ids)):
            raise UnusableAnswer(f"a completion holds the banned ids {banned}: it would take another image's features")
        ends = [i for i, token in enumerate(ids) if token in self.eos_token_ids]
        if ends:
            ids = ids[: ends[0] + 1]
        elif reason == "stop":
            if len(self.eos_token_ids) != 1:
                raise RolloutError(
                    f"{who} left out the token that ended a completion, and it may be any of {self.eos_token_ids}"
                )
            ids.append(self.eos_token_ids[0])
        elif len(ids) < max_new_tokens:
            cut = f"a completion cut after {len(ids)} of {max_new_tokens} tokens, finish_reason {reason!r}"
            if reason != "length":
                raise UnusableAnswer(cut)
            raise RolloutError(
                f"{who} answered {cut}: its context (vLLM: --max-model-len) is too short for prompt and "
                "max_completion_length, or it has a limit of its own"
            )
        return torch.tensor(ids, dtype=torch.int64)


def known_logprobs(values: Sequence[float | None], length: int) -> Tensor:
    """Return (length,) float32 from what an engine said of a completion's tokens; NaN where it said nothing."""
    known = [float("nan") if value is None else value for value in values][:length]
    return torch.tensor(known + [float("nan")] * (length - len(known)))


def collapsed(ids: Sequence[int], placeholders: Sequence[int]) -> list[int]:
    """Return `ids` with each run of one placeholder cut to a single one."""
    return [token for i, token in enumerate(ids) if i == 0 or token != ids[i - 1] or token not in placeholders]
