"""The protocol of engines that sample completions, and what they have in common: options, seeds, token ids.

engine: RolloutEngine = TransformersEngine.for_model(model, processor)  # or ServerEngine, VLLMEngine, your own
completions = engine.generate(prompts, Sampling(temperature=1.1, top_p=0.95, top_k=20, n=2), seed=0)
# [prompt 0 sample 0, prompt 0 sample 1, prompt 1 sample 0, …], each (C,) int64 on the CPU, its EOS included
# engine.sample(…) gives `Completion`s: the same ids with the log-probability of each
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from vigos.method.encode import EncodedPrompt

# Names under which model configurations keep the ids that stand for features of another modality.
_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id", "image_token_index", "video_token_index")


@dataclass(frozen=True)
class Sampling:
    """Options of sampling, applied as in transformers and vLLM: temperature first, then top-k, then top-p.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: in (0, 1]; the smallest set of tokens that holds this much probability.
        top_k: 0 keeps all.
        max_new_tokens: completions are cut there, without EOS.
        n: completions a prompt.
    """

    temperature: float = 1.1
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 4096
    n: int = 1

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "at least 0 (0: no limit)"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "n": (self.n >= 1, "at least 1"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")

    def without_copies(self) -> Sampling:
        """Return these options with n=1 if they are greedy: all `n` would be the same, and vLLM refuses n > 1."""
        return replace(self, n=1) if self.temperature == 0 else self


@dataclass(frozen=True)
class Completion:
    """Hold a completion and what its engine knows of it.

    Attributes:
        ids: (C,) int64 on the CPU, its EOS included.
        logprobs: (C,) float32, nats: of each token under the weights that sampled it, at temperature 1 and before
            top-k and top-p; NaN, or None for all, where the engine did not say.
        version: optimizer steps behind those weights; None: not known.
    """

    ids: Tensor
    logprobs: Tensor | None = None
    version: int | None = None


class RolloutEngine(Protocol):
    """Sample completions. Subclass it to get the defaults of everything but `generate`.

    Attributes:
        owns_weights: True if the engine samples from a copy of the weights, which `update_weights` moves on, and so may
            sample while the model trains. False if it samples from the model in training itself.
        collective: True if sampling runs forwards of the model in training, which every rank of a sharded model must
            enter together. False if each rank may call `generate` alone.
        takes_groups: True if `update_weights` takes all trained weights in groups. False if it takes an adapter.
        one_a_rank: True if every rank has an engine, and sends it weights. False if all share what the leader sends.
        eos_token_ids: ids that end a completion.
        served_name: name of the weights, for records; "" if they are those of a model at hand.
    """

    owns_weights: bool = False
    collective: bool = False
    takes_groups: bool = False
    one_a_rank: bool = False
    eos_token_ids: tuple[int, ...] = ()
    served_name: str = ""

    def generate(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]) -> list[Tensor]:
        """Sample `sampling.n` completions of every prompt, in order: those of a prompt stand together.

        Args:
            seed: one for the call (prompt i then has the stream (seed, i)), or one for each prompt.

        Returns:
            `len(prompts) * n` tensors (C,) int64 on the CPU, cut after the first EOS, which is included.
        """
        ...

    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Completion]:
        """Sample as `generate` does, with the tokens' log-probabilities where the engine has them."""
        return [Completion(ids) for ids in self.generate(prompts, sampling, seed)]

    def update_weights(
        self, step: int, model: nn.Module, weights: dict[str, Tensor] | Iterator[dict[str, Tensor]] | None
    ) -> None:
        """Sample from the student as it is after `step` optimizer steps from now on.

        The trainer calls it on the leader rank first, then on every other rank, and only if `owns_weights`.

        Args:
            model: the student; unless `takes_groups` a peft model, whose adapter is what changes.
            weights: on the leader rank (on every one, with `one_a_rank`) the trained parameters by name, gathered
                (`vigos.models.sharding.gather_trained`), or with `takes_groups` those of a checkpoint in groups
                (`vigos.rollout.full_weights.checkpoint_groups`); None on other ranks, which only take note.
        """

    def holds(self, step: int) -> bool:
        """Tell whether the weights that it was sent after `step` steps are still there, whole."""
        return True

    def check_weights(self, model: nn.Module) -> None:
        """Refuse a student whose weights would not arrive; called once, with the initial ones. Raises RolloutError."""


class CompletionEngine(RolloutEngine):
    """Serve `generate` and `sample` by one function, which is told whether log-probabilities are wanted."""

    def generate(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]) -> list[Tensor]:
        """Sample as `RolloutEngine.generate` says. Raises RolloutError."""
        return [completion.ids for completion in self._sample(prompts, sampling, seed, logprobs=False)]

    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Completion]:
        """Sample as `generate` does, with log-probabilities. Raises RolloutError."""
        return self._sample(prompts, sampling, seed, logprobs=True)

    def _sample(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int], *, logprobs: bool
    ) -> list[Completion]:
        raise NotImplementedError


def stream_seed(seed: int, *streams: int) -> int:
    """Return a 63-bit seed from a seed and stream numbers, so that neighbouring ones are unrelated (splitmix64).

    `numpy.random.SeedSequence` would do as well; published runs are repeatable because this stays as it is.
    """
    mask = 2**64 - 1
    for stream in streams:
        x = (seed * 0x9E3779B97F4A7C15 + stream + 1) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        seed = (x ^ (x >> 31)) >> 1
    return seed


def prompt_seeds(seed: int | Sequence[int], prompts: int) -> list[int]:
    """Return one seed for each of `prompts` prompts: their own, or streams of one. Raises ValueError."""
    seeds = [stream_seed(seed, i) for i in range(prompts)] if isinstance(seed, int) else list(seed)
    if len(seeds) != prompts:
        raise ValueError(f"seed must be one integer or one for each of {prompts} prompts, got {len(seeds)}")
    return seeds


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Return the ids that stand for image, video or audio features in `config`: a completion must never hold one."""
    ids = {getattr(config, name, None) for name in _PLACEHOLDERS}
    return tuple(sorted(i for i in ids if isinstance(i, int)))


def id_rules(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what an engine elsewhere must know of a model's ids: those that end, those it may not say, their bound.

    Args:
        model: or anything with its `config` and `generation_config`.
    """
    return {
        "eos_token_ids": eos_ids(model, tokenizer), "banned_token_ids": placeholder_ids(model.config),
        "vocab_size": model.config.get_text_config().vocab_size,
    }  # fmt: skip


def eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return every id that ends a completion: the generation config's and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(configured if isinstance(configured, list | tuple) else [configured])
    ids.add(getattr(tokenizer, "tokenizer", tokenizer).eos_token_id)
    return tuple(sorted(i for i in ids if i is not None))
