"""Rollouts: what is sampled, from which stream, with which positions, and that the model is left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import FAMILIES, SIZES, prompt, tiny_model, words
from torch import Tensor, nn

from vigos.method.encode import EncodedPrompt
from vigos.rollout.engine import Sampling, eos_ids, placeholder_ids, stream_seed
from vigos.rollout.generate import TransformersEngine, _Sampler

EOS = 2
FAMILY = "qwen2_5_vl"


def prompts() -> list[EncodedPrompt]:
    """Images of three sizes, none, and questions of different lengths: left padding and positions all differ."""
    return [
        prompt(FAMILY, [(4, 6)], image_seed=0, question=words(3, 1)),
        prompt(FAMILY, [(8, 4)], image_seed=1, question=words(9, 2)),
        prompt(FAMILY, [], question=words(6, 3)),
        prompt(FAMILY, [(2, 2), (4, 6)], image_seed=2, question=words(1, 4)),
    ]


def engine(model: nn.Module | None = None, batch_size: int | None = None) -> TransformersEngine:
    model = tiny_model(FAMILY) if model is None else model
    return TransformersEngine(
        model,
        eos_token_ids=[EOS],
        pad_token_id=0,
        banned_token_ids=placeholder_ids(model.config),
        batch_size=batch_size,
    )


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def greedy_by_forward(model: nn.Module, one: EncodedPrompt, steps: int) -> Tensor:
    """The most likely token after a forward over everything so far, unpadded and without a cache."""
    ids = one.ids
    for _ in range(steps):
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        if one.images is not None and one.token_type_ids is not None:
            types = torch.cat([one.token_type_ids, torch.zeros(len(ids) - len(one.ids), dtype=torch.int64)])
            inputs |= {"mm_token_type_ids": types[None], **one.images.tensors}
        logits = model(**inputs).logits[0, -1]
        logits[list(placeholder_ids(model.config))] = -float("inf")
        ids = torch.cat([ids, logits.argmax()[None]])
        if ids[-1] == EOS:
            break
    return ids[len(one.ids) :]


@pytest.mark.parametrize("batch_size", [None, 1])
def test_greedy_equals_forwards_without_padding_or_cache(batch_size: int | None) -> None:
    model = tiny_model(FAMILY)
    got = engine(model, batch_size).generate(prompts(), Sampling(temperature=0, max_new_tokens=9), seed=0)
    assert same(got, [greedy_by_forward(model, p, 9) for p in prompts()])


def test_same_seed_same_samples_whatever_the_global_state() -> None:
    sampling = Sampling(max_new_tokens=12, n=3)
    made = engine()
    first = made.generate(prompts(), sampling, seed=7)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert same(first, made.generate(prompts(), sampling, seed=7))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(first, made.generate(prompts(), sampling, seed=8))
    assert len({tuple(c.tolist()) for c in first[:3]}) == 3, "samples of one prompt must differ"


def test_batching_changes_no_sample() -> None:
    sampling = Sampling(max_new_tokens=12, n=2)
    whole = engine().generate(prompts(), sampling, seed=7)
    assert same(whole, engine(batch_size=3).generate(prompts(), sampling, seed=7))
    seeds = [stream_seed(7, i) for i in range(4)]
    halves = [engine().generate(prompts()[i : i + 2], sampling, seeds[i : i + 2]) for i in (0, 2)]
    assert same(whole, [*halves[0], *halves[1]])


def test_seeds_must_match_prompts() -> None:
    with pytest.raises(ValueError, match=r"seed must be one integer or one for each of 4 prompts, got 2"):
        engine().generate(prompts(), Sampling(max_new_tokens=1), seed=[1, 2])


def test_no_prompts_no_completions() -> None:
    assert engine().generate([], Sampling(max_new_tokens=4), seed=0) == []


def test_placeholders_are_never_sampled() -> None:
    model = tiny_model(FAMILY)
    banned = placeholder_ids(model.config)
    assert banned == (90, 91)
    with torch.no_grad():  # a head that wants nothing else
        model.lm_head.weight[list(banned)] *= 50
    free = TransformersEngine(model, eos_token_ids=[EOS], pad_token_id=0)
    for sampling in (Sampling(temperature=0, max_new_tokens=6), Sampling(max_new_tokens=16)):
        kept = torch.cat(engine(model).generate(prompts(), sampling, seed=0))
        assert not torch.isin(kept, torch.tensor(banned)).any()
    wanted = torch.cat(free.generate(prompts()[2:3], Sampling(max_new_tokens=16), seed=0))
    assert torch.isin(wanted, torch.tensor(banned)).any(), "the head should want them, or the test shows nothing"


def test_completion_ends_with_its_first_eos() -> None:
    model = tiny_model(FAMILY)
    with torch.no_grad():
        model.lm_head.weight[EOS] += 0.8 * model.lm_head.weight[20:40].mean(0)
    out = engine(model).generate(prompts(), Sampling(max_new_tokens=40, n=8, top_k=0, temperature=2.0), seed=1)
    ended = [c for c in out if EOS in c.tolist()]
    assert len(ended) > 3
    assert len({len(c) for c in ended}) > 2
    for completion in out:
        at = completion.tolist().index(EOS) if EOS in completion.tolist() else 39
        assert len(completion) == at + 1
        assert completion.dtype == torch.int64
        assert completion.device.type == "cpu"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=1.0, top_k=0),
        Sampling(temperature=0.5, top_p=1.0, top_k=0),
        Sampling(temperature=1.0, top_p=1.0, top_k=3),
        Sampling(temperature=1.3, top_p=0.7, top_k=0),
        Sampling(temperature=1.1, top_p=0.8, top_k=5),
    ],
    ids=str,
)
def test_sampled_frequencies_are_those_of_transformers_filters(sampling: Sampling) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([2.0, 1.5, 1.4, 0.3, 0.0, -0.5, -2.0, -9.0])
    scores = (
        TemperatureLogitsWarper(sampling.temperature)(None, logits[None]) if sampling.temperature != 1 else logits[None]
    )
    scores = TopKLogitsWarper(sampling.top_k)(None, scores) if sampling.top_k else scores
    scores = TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores
    expected = scores.softmax(-1)[0]
    n = 20_000
    sampler = _Sampler(sampling, [stream_seed(3, i) for i in range(n)], banned=(), prompt_length=5)
    chosen = sampler(torch.zeros(n, 5, dtype=torch.int64), logits.expand(n, -1).clone())
    assert (torch.isfinite(chosen).sum(-1) == 1).all(), "one candidate a row"
    frequency = torch.bincount(chosen.argmax(-1), minlength=len(logits)) / n
    assert (frequency[expected == 0] == 0).all(), "filtered tokens must never come"
    sigma = (expected * (1 - expected) / n).sqrt()
    assert ((frequency - expected).abs() <= 4.5 * sigma + 1e-9).all()


def test_steps_and_rows_have_streams_of_their_own() -> None:
    sampler = _Sampler(Sampling(top_k=0, top_p=1.0), [1, 2], banned=(), prompt_length=0)
    draws = torch.stack([sampler._uniform(step) for step in range(200)])  # (200, 2), past three blocks
    assert draws.unique().numel() == 400
    again = _Sampler(Sampling(top_k=0, top_p=1.0), [2], banned=(), prompt_length=0)
    assert torch.equal(torch.stack([again._uniform(s) for s in range(200)])[:, 0], draws[:, 1])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model(FAMILY)
    model.train()
    model.lm_head.eval()  # a mode of its own must survive
    model.gradient_checkpointing_enable()
    model.generation_config.repetition_penalty = 3.0  # Qwen2.5-VL ships one; it must not reach the rollouts
    model.model.rope_deltas = torch.tensor([[5]])
    modes = {name: module.training for name, module in model.named_modules()}
    got = engine(model).generate(prompts(), Sampling(temperature=0, max_new_tokens=9), seed=0)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.is_gradient_checkpointing
    assert model.generation_config.repetition_penalty == 3.0
    assert model.model.rope_deltas.tolist() == [[5]]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    plain = engine(tiny_model(FAMILY)).generate(prompts(), Sampling(temperature=0, max_new_tokens=9), seed=0)
    assert same(got, plain)


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = tiny_model(FAMILY).train()
    broken = EncodedPrompt(prompts()[0].ids, prompts()[0].token_type_ids, None)  # placeholders without an image
    model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no head")))
    with pytest.raises(RuntimeError, match="no head"):
        engine(model).generate([broken], Sampling(max_new_tokens=2), seed=0)
    assert model.training


def test_adapter_takes_part() -> None:
    from peft import LoraConfig, get_peft_model

    sampling = Sampling(temperature=0, max_new_tokens=9)
    plain = engine().generate(prompts(), sampling, seed=0)
    adapted = get_peft_model(tiny_model(FAMILY), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    assert same(engine(adapted).generate(prompts(), sampling, seed=0), plain)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not same(engine(adapted).generate(prompts(), sampling, seed=0), plain)
    with adapted.disable_adapter():
        assert same(engine(adapted).generate(prompts(), sampling, seed=0), plain)


def test_ids_come_from_the_model_and_its_tokenizer() -> None:
    from helpers.training import processor, tiny_student

    model, tokenizer = tiny_student(), processor().tokenizer
    model.generation_config.eos_token_id = [5, tokenizer.eos_token_id]
    made = TransformersEngine.for_model(model, processor())
    assert made.eos_token_ids == tuple(sorted({5, tokenizer.eos_token_id})) == eos_ids(model, processor())
    assert made.pad_token_id == tokenizer.pad_token_id
    assert set(made.banned_token_ids) == set(tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"]))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}, {"n": 0}],
    ids=str,
)
def test_sampling_out_of_range(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_batch_size_out_of_range() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1 or None, got 0"):
        TransformersEngine(tiny_model(FAMILY), eos_token_ids=[EOS], pad_token_id=0, batch_size=0)


@pytest.mark.parametrize("family", ["smolvlm", "qwen3", "qwen3_vl"])
def test_other_families(family: str) -> None:
    model = tiny_model(family)
    sizes = {"smolvlm": [[2], [1], []], "qwen3": [[], [], []], "qwen3_vl": [[(4, 6)], [(2, 2)], []]}[family]
    batch = [prompt(family, s, image_seed=i, question=words(4 + i, i)) for i, s in enumerate(sizes)]
    sampling = Sampling(temperature=0, max_new_tokens=6)
    alone = [engine(model).generate([p], sampling, seed=0)[0] for p in batch]
    assert same(engine(model).generate(batch, sampling, seed=0), alone)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5", "qwen3_5_moe", "qwen3_next", "gemma3"])
def test_a_prompt_runs_once_for_all_its_rollouts(family: str) -> None:
    """Full, sliding and linear attention: samples are those of prompts that run alone, by the same streams."""
    model = tiny_model(family)
    sizes = SIZES.get(family, [])
    texts = [(sizes[:1], 4), (sizes[1:2], 9), ([], 6)]
    batch = [prompt(family, s, image_seed=i, question=words(n, i)) for i, (s, n) in enumerate(texts)]
    fed: list[torch.Size] = []  # shapes of ids
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].shape))
    for sampling in (Sampling(temperature=0, max_new_tokens=6, n=3), Sampling(max_new_tokens=6, n=3, top_k=0)):
        fed.clear()
        shared = engine(model).generate(batch, sampling, seed=3)
        assert sum(rows for rows, tokens in fed if tokens > 1) == len(batch)
        assert all(rows % 3 == 0 for rows, tokens in fed if tokens == 1)
        streams = [stream_seed(stream_seed(3, i), k) for i in range(len(batch)) for k in range(3)]
        alone = engine(model)._generate_in_memory([replace(p) for p in batch for _ in range(3)], sampling, streams)
        assert same(shared, [completion.ids for completion in alone])


def test_log_probabilities_are_the_models_own() -> None:
    """Before temperature, filters and the ban of placeholders; of shared prompts and of padded rows alike."""
    model = tiny_model(FAMILY)
    for completion, one in zip(
        engine(model).sample(prompts(), Sampling(temperature=0.7, top_k=5, max_new_tokens=7, n=2), seed=1),
        [p for p in prompts() for _ in range(2)],
        strict=True,
    ):
        ids = torch.cat([one.ids, completion.ids])
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        if one.images is not None and one.token_type_ids is not None:
            types = torch.cat([one.token_type_ids, torch.zeros_like(completion.ids)])
            inputs |= {"mm_token_type_ids": types[None], **one.images.tensors}
        with torch.no_grad():
            logits = model(**inputs).logits[0, len(one.ids) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, completion.ids[:, None])[:, 0]
        assert completion.logprobs is not None
        torch.testing.assert_close(completion.logprobs, wanted, rtol=0, atol=2e-5)
