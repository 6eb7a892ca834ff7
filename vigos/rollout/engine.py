"""Rollouts: completions sampled from the student, behind one small interface.

    engine = TransformersEngine.for_model(model, processor)
    completions = engine.generate(prompts, Sampling(temperature=1.1, top_p=0.95, top_k=20, n=2), seed=0)
    # [prompt 0 sample 0, prompt 0 sample 1, prompt 1 sample 0, …], each (C,) int64 on the CPU, its EOS included

Every sample draws from a random stream of its own, which follows from the seed and its place alone: the global random
state is neither read nor moved, and how prompts are batched or sharded over ranks changes no sample (up to the
rounding of the model's own arithmetic).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vigos.method.encode import EncodedPrompt
from vigos.scoring.teacher import base_model, concat_images

# Names under which model configurations keep the ids that stand for features of another modality.
_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id", "image_token_index", "video_token_index")


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: temperature first, then top-k, then top-p, as in transformers and vLLM.

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


class RolloutEngine(Protocol):
    """Anything that samples completions."""

    def generate(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]) -> list[Tensor]:
        """Samples `sampling.n` completions of every prompt, in order: those of a prompt stand together.

        Args:
            seed: one for the call (prompt i then has the stream (seed, i)), or one for each prompt.

        Returns:
            `len(prompts) * n` tensors (C,) int64 on the CPU, cut after the first EOS, which is included.
        """
        ...


def adapter_name(step: int | str) -> str:
    """What the student's adapter after `step` optimizer steps is called on a rollout server; "*": their pattern."""
    return f"vigos-{step}"


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """The ids that stand for image, video or audio features in `config`: a completion must never hold one."""
    ids = {getattr(config, name, None) for name in _PLACEHOLDERS}
    return tuple(sorted(i for i in ids if isinstance(i, int)))


def eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the generation config's and the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(own if isinstance(own, list | tuple) else [own])
    ids.add(getattr(tokenizer, "tokenizer", tokenizer).eos_token_id)
    return tuple(sorted(i for i in ids if i is not None))


class TransformersEngine:
    """Rollouts by `model.generate` of transformers: left-padded batches, images included.

    Args:
        model: a transformers model, or a peft model around one (its adapter is used as it stands).
        eos_token_ids: ids that end a completion.
        pad_token_id: what finished rows are filled with while others go on; never part of a result.
        banned_token_ids: ids that are never sampled, such as image placeholders.
        batch_size: sequences that run at once; None: all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        banned_token_ids: Sequence[int] = (),
        batch_size: int | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
        self.model = model
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.banned_token_ids = tuple(banned_token_ids)
        self.batch_size = batch_size

    @classmethod
    def for_model(cls, model: nn.Module, processor: Any, *, batch_size: int | None = None) -> TransformersEngine:
        """Takes EOS, padding and the banned ids from the model's configuration and its processor (or tokenizer)."""
        tokenizer = getattr(processor, "tokenizer", processor)
        inner = base_model(model)
        ends = eos_ids(inner, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
        return cls(
            model,
            eos_token_ids=ends,
            pad_token_id=pad,
            banned_token_ids=placeholder_ids(inner.config),
            batch_size=batch_size,
        )

    @torch.no_grad()
    def generate(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]) -> list[Tensor]:
        """See `RolloutEngine.generate`."""
        seeds = [stream_seed(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"seed must be one integer or one for each of {len(prompts)} prompts, got {len(seeds)}")
        jobs = [(i, prompts[i], stream_seed(seeds[i], k)) for i in range(len(prompts)) for k in range(sampling.n)]
        results: list[Tensor | None] = [None] * len(jobs)
        with _inference(self.model):
            for chunk in self._chunks([prompt for _, prompt, _ in jobs]):
                completions = self._generate([jobs[j][1] for j in chunk], sampling, [jobs[j][2] for j in chunk])
                for j, completion in zip(chunk, completions, strict=True):
                    results[j] = completion
        return [r for r in results if r is not None]

    def _chunks(self, prompts: list[EncodedPrompt]) -> Iterator[list[int]]:
        """Indices of prompts that run together: those whose image tensors can be concatenated."""
        groups: dict[Any, list[int]] = {}
        for j, prompt in enumerate(prompts):
            tensors = prompt.images.tensors if prompt.images else {}
            layout = tuple((name, t.ndim, tuple(t.shape[2:])) for name, t in tensors.items())
            groups.setdefault(layout, []).append(j)
        size = self.batch_size or max(len(prompts), 1)
        for members in groups.values():
            for start in range(0, len(members), size):
                yield members[start : start + size]

    def _generate(self, prompts: list[EncodedPrompt], sampling: Sampling, seeds: list[int]) -> list[Tensor]:
        from transformers import GenerationConfig, LogitsProcessorList

        model = base_model(self.model)
        device = model.device
        B, P = len(prompts), max(len(p.ids) for p in prompts)
        input_ids = torch.full((B, P), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(B, P, dtype=torch.int64)
        token_types = torch.zeros(B, P, dtype=torch.int64)
        for b, prompt in enumerate(prompts):
            start = P - len(prompt.ids)
            input_ids[b, start:], attention_mask[b, start:] = prompt.ids, 1
            if prompt.token_type_ids is not None:
                token_types[b, start:] = prompt.token_type_ids
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        # Without them Qwen2.5-VL silently counts image positions along one axis.
        types = _token_types_name(model)
        if types is not None and any(p.token_type_ids is not None for p in prompts):
            inputs[types] = token_types
        images = [p.images for p in prompts if p.images is not None]
        if images:
            inputs |= concat_images(images)
        sampler = _Sampler(sampling, seeds, self.banned_token_ids, prompt_length=P)
        output = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,  # the sampler leaves one candidate
                eos_token_id=list(self.eos_token_ids) or None,
                pad_token_id=self.pad_token_id,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([sampler]),
            synced_gpus=False,  # ranks take different numbers of steps; under FSDP2 the weights are gathered first
        )
        completions = output[:, P:].cpu()  # (B, C)
        ends = torch.isin(completions, torch.tensor(self.eos_token_ids, dtype=torch.int64))
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, completions.shape[1])
        return [row[:length].clone() for row, length in zip(completions, lengths.tolist(), strict=True)]


class _Sampler:
    """A logits processor that draws the next token itself and leaves only that one.

    scores (B, V) → temperature → top-k → top-p → inverse of the cumulative distribution at a uniform number, one for
    each row and step, from the row's own generator.
    """

    supports_continuous_batching = False  # asked by transformers of every processor

    def __init__(self, sampling: Sampling, seeds: list[int], banned: Sequence[int], prompt_length: int) -> None:
        self.sampling, self.prompt_length = sampling, prompt_length
        self.banned = torch.tensor(banned, dtype=torch.int64)
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.uniform = torch.empty(len(seeds), 0, dtype=torch.float64)

    def _uniform(self, step: int) -> Tensor:
        if step >= self.uniform.shape[1]:  # in blocks: most completions end long before the limit
            block = [torch.rand(64, dtype=torch.float64, generator=g) for g in self.generators]
            self.uniform = torch.cat([self.uniform, torch.stack(block)], dim=1)
        return self.uniform[:, step]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if len(self.banned):
            scores = scores.index_fill(1, self.banned.to(scores.device), -float("inf"))
        if self.sampling.temperature == 0:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            V, candidates = scores.shape[1], None
            k = min(self.sampling.top_k or V, V)
            top = scores / self.sampling.temperature
            if k < V or self.sampling.top_p < 1:
                top, candidates = top.topk(k, dim=-1)  # (B, k), most likely first
            probability = top.double().softmax(-1)
            if self.sampling.top_p < 1:
                before = probability.cumsum(-1) - probability
                probability = probability.masked_fill(before >= self.sampling.top_p, 0.0)
            cumulative = probability.cumsum(-1)
            u = self._uniform(input_ids.shape[1] - self.prompt_length).to(scores.device)[:, None]
            # The first candidate whose cumulative mass passes u; a token without mass can never be it.
            place = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp(max=k - 1)
            chosen = place if candidates is None else candidates.gather(1, place)
        return torch.full_like(scores, -float("inf")).scatter(1, chosen, 0.0)


def stream_seed(seed: int, *streams: int) -> int:
    """A 63-bit seed from a seed and stream numbers (splitmix64), so that neighbouring ones are unrelated."""
    mask = 2**64 - 1
    for stream in streams:
        x = (seed * 0x9E3779B97F4A7C15 + stream + 1) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        seed = (x ^ (x >> 31)) >> 1
    return seed


def _token_types_name(base: Any) -> str | None:
    """What the model calls the marks of image tokens, in its own forward or in that of the model under its head."""
    known = {name for module in (base, base.base_model) for name in signature(type(module).forward).parameters}
    return next((name for name in ("mm_token_type_ids", "token_type_ids") if name in known), None)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own mode restored after; a clean generation config in the meantime.

    Evaluation mode also turns gradient checkpointing off, which would drop the key-value cache. The model's own
    generation config would otherwise fill in what is not set here: Qwen2.5-VL's brings a repetition penalty.
    """
    from transformers import GenerationConfig

    inner = base_model(model)
    modes = [(module, module.training) for module in model.modules()]
    config = inner.generation_config
    # Models keep the position offset of the last generation, and would use it for whatever they are fed next.
    holders = [m for m in model.modules() if "rope_deltas" in vars(m)]
    deltas = [m.rope_deltas for m in holders]
    model.eval()
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = config
        for module, mode in modes:
            module.training = mode
        for module, value in zip(holders, deltas, strict=True):
            module.rope_deltas = value
