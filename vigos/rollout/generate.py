"""Rollouts by the model's own `generate`, with a random stream for each sample.

The rollouts of one prompt share its prefix: the vision tower and the prompt run once, and the key-value cache (and the
states of layers that carry one) is repeated for the rows that go on from it.

Every sample draws from its own stream, which follows from the seed and its place alone: the global random state is
neither read nor moved, and how prompts are batched or sharded over ranks changes no sample (up to the rounding of the
model's own arithmetic).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from vigos.method.encode import EncodedPrompt
from vigos.models.inputs import padded_batch
from vigos.models.memory import free_memory
from vigos.models.parts import base_model, eval_mode, replaced_forward
from vigos.models.sharding import with_gathered_weights
from vigos.rollout.engine import (
    Completion,
    RolloutEngine,
    Sampling,
    eos_ids,
    placeholder_ids,
    prompt_seeds,
    stream_seed,
)

logger = logging.getLogger(__name__)


class TransformersEngine(RolloutEngine):
    """Sample by `model.generate` of transformers: left-padded batches of prompts of like length, images included.

    Args:
        model: a transformers model, or a peft model around one (its adapter is used as it stands).
        eos_token_ids: ids that end a completion.
        pad_token_id: what finished rows are filled with while others go on; never part of a result.
        banned_token_ids: ids that are never sampled, such as image placeholders.
        batch_size: sequences that run at once; None: all of them. Halved when memory runs out, which changes no sample.
    """

    collective = True

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
        """Take EOS, padding and the banned ids from the model's configuration and its processor (or tokenizer)."""
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

    def generate(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]) -> list[Tensor]:
        """Sample as `RolloutEngine.generate` says. Under FSDP2 the weights are gathered once, on all ranks."""
        return [completion.ids for completion in self.sample(prompts, sampling, seed)]

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Completion]:
        """Sample as `generate` does, with log-probabilities."""
        seeds = prompt_seeds(seed, len(prompts))
        repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
        streams = [stream_seed(s, k) for s in seeds for k in range(sampling.n)]
        with _inference(self.model):
            return with_gathered_weights(self.model, lambda: self._generate_in_memory(repeated, sampling, streams))

    def _generate_in_memory(
        self, prompts: list[EncodedPrompt], sampling: Sampling, seeds: list[int]
    ) -> list[Completion]:
        """Sample in chunks, in smaller ones when memory runs out."""
        results: dict[int, Completion] = {}
        while True:
            left = [j for j in range(len(prompts)) if j not in results]
            try:
                for chunk in self._chunks(prompts, left):
                    completions = self._generate([prompts[j] for j in chunk], sampling, [seeds[j] for j in chunk])
                    results.update(zip(chunk, completions, strict=True))
                return [results[j] for j in range(len(prompts))]
            except torch.OutOfMemoryError:
                size = self.batch_size or len(prompts)
                if size == 1:
                    raise
                self.batch_size = size // 2
                logger.warning(
                    "out of memory while sampling: going on with rollout_batch_size=%d instead of %d", size // 2, size
                )
            free_memory()  # here, where the error no longer holds the tensors of its frames

    def _chunks(self, prompts: list[EncodedPrompt], members: list[int]) -> Iterator[list[int]]:
        """Yield the members that run together: those whose image tensors can be concatenated, the longest first."""
        groups: dict[Any, list[int]] = {}
        for j in sorted(members, key=lambda j: -len(prompts[j].ids)):  # stable: those of a prompt stay together
            images = prompts[j].images
            tensors = images.tensors if images else {}
            layout = tuple((name, t.ndim, tuple(t.shape[2:])) for name, t in tensors.items())
            groups.setdefault(layout, []).append(j)
        size = self.batch_size or max(len(members), 1)
        for group in groups.values():
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _generate(self, prompts: list[EncodedPrompt], sampling: Sampling, seeds: list[int]) -> list[Completion]:
        from transformers import GenerationConfig, LogitsProcessorList

        model = base_model(self.model)
        P = max(len(prompt.ids) for prompt in prompts)
        sampler = _Sampler(sampling, seeds, self.banned_token_ids, prompt_length=P)
        with self._prefill(model, prompts) as inputs:
            output = model.generate(
                **inputs,
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
        logprobs = torch.stack(sampler.logprobs, 1).cpu()
        return [
            Completion(row[:length].clone(), values[:length].clone())
            for row, values, length in zip(completions, logprobs, lengths.tolist(), strict=True)
        ]

    @contextmanager
    def _prefill(self, model: Any, prompts: list[EncodedPrompt]) -> Iterator[dict[str, Tensor]]:
        """Yield the inputs of `generate` for a batch of `prompts`, each distinct one of which runs once inside.

        The first forward takes the distinct prompts; its logits and cache are then repeated for the rows of each. A
        model that is given what is not known here, or keeps no `Cache`, runs every row.
        """
        from transformers import Cache

        def batch(members: list[EncodedPrompt]) -> dict[str, Tensor]:
            rows = [(prompt.ids, prompt) for prompt in members]
            return padded_batch(model, rows, pad_token_id=self.pad_token_id, left=True)

        distinct = list({id(prompt): prompt for prompt in prompts}.values())
        if len(distinct) == len(prompts):
            yield batch(prompts)
            return
        places = [next(j for j, p in enumerate(distinct) if p is prompt) for prompt in prompts]
        first = torch.tensor([places.index(j) for j in range(len(distinct))], device=model.device)
        original, prefilled = model.forward, False

        @wraps(original)  # generate reads the signature
        def forward(*args: Any, **inputs: Any) -> Any:
            nonlocal prefilled
            if prefilled:
                return original(*args, **inputs)
            prefilled = True
            inputs.pop("mm_encoder_outputs", None)  # of no pixels
            known = batch(distinct)
            if (positions := inputs.get("position_ids")) is not None:  # (B, T) or (axes, B, T)
                known["position_ids"] = positions[..., first, :]
            kept = "cache" if "cache" in inputs else "past_key_values"  # transformers 5.24 and before
            if args or not isinstance(inputs.get(kept), Cache) or any(
                isinstance(value, Tensor) and name not in known for name, value in inputs.items()
            ):  # fmt: skip
                return original(*args, **inputs | batch(prompts))
            output = original(**inputs | known)
            rows = torch.tensor(places, device=model.device)
            output[kept].reorder_cache(rows)
            output["logits"] = output["logits"].index_select(0, rows)
            return output

        with replaced_forward(model, forward):
            # Without pixels, for which `generate` would run the vision tower itself, over every row.
            yield {name: x for name, x in batch(prompts).items() if not x.is_floating_point()}


class _Sampler:
    """Draw the next token and leave only that one, as a logits processor.

    scores (B, V) → temperature → top-k → top-p → inverse of the cumulative distribution at a uniform number, one for
    each row and step, from the row's own generator.
    """

    supports_continuous_batching = False  # asked by transformers of every processor

    def __init__(self, sampling: Sampling, seeds: list[int], banned: Sequence[int], prompt_length: int) -> None:
        self.sampling, self.prompt_length = sampling, prompt_length
        self.banned = torch.tensor(banned, dtype=torch.int64)
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.uniform = torch.empty(len(seeds), 0, dtype=torch.float64)
        self.logprobs: list[Tensor] = []  # (B,) of each step's tokens, under the scores as they came

    def _uniform(self, step: int) -> Tensor:
        if step >= self.uniform.shape[1]:  # in blocks: most completions end long before the limit
            block = [torch.rand(64, dtype=torch.float64, generator=g) for g in self.generators]
            self.uniform = torch.cat([self.uniform, torch.stack(block)], dim=1)
        return self.uniform[:, step]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        given = scores = scores.float()
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
        self.logprobs.append(given.gather(1, chosen)[:, 0] - given.logsumexp(1))
        return torch.full_like(scores, -float("inf")).scatter(1, chosen, 0.0)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, inside, and give it a clean generation config.

    Evaluation mode also turns gradient checkpointing off, which would drop the key-value cache. The model's own
    generation config would otherwise fill in what is not set here: Qwen2.5-VL's brings a repetition penalty.
    """
    from transformers import GenerationConfig

    inner = base_model(model)
    config = inner.generation_config
    # Models keep the position offset of the last generation, and would use it for whatever they are fed next.
    holders = [m for m in model.modules() if "rope_deltas" in vars(m)]
    deltas = [m.rope_deltas for m in holders]
    inner.generation_config = GenerationConfig()
    try:
        with eval_mode(model):
            yield
    finally:
        inner.generation_config = config
        for module, value in zip(holders, deltas, strict=True):
            module.rope_deltas = value
