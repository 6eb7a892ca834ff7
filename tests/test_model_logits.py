"""Compare our reading of what a model does to its logits after the head with its own forward, for families that do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vigos import reference
from vigos.models.logits import logit_settings, logit_transform
from vigos.models.parts import head_rows, lm_head
from vigos.models.sharding import gathered_head

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def causal(name: str, **settings: Any) -> Any:
    """A tiny model of a family: `name`Config, `name`ForCausalLM."""
    config = getattr(transformers, f"{name}Config")(**(TEXT | settings))
    return getattr(transformers, f"{name}ForCausalLM")(config)


def llava_next(text: str, **settings: Any) -> Any:
    """Granite Vision's layout: LLaVA-NeXT around a text model that scales its logits when it stands alone."""
    config = transformers.LlavaNextConfig(
        text_config=getattr(transformers, f"{text}Config")(**(TEXT | settings)),
        vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=59, image_grid_pinpoints=[[8, 8]],
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config)


def vision(name: str, text: str, **settings: Any) -> Any:
    """Aya Vision's and Cohere2 Vision's layout: a wrapper around Cohere2."""
    config = getattr(transformers, f"{name}Config")(
        text_config=getattr(transformers, f"{text}Config")(**(TEXT | settings)),
        vision_config=transformers.SiglipVisionConfig(**VISION), image_token_id=59,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


MODELS = {
    "qwen2": lambda: causal("Qwen2"),
    "granite": lambda: causal("Granite", logits_scaling=4.0),
    "hyperclovax": lambda: causal("HyperCLOVAX", logits_scaling=0.25),
    "cohere": lambda: causal("Cohere", logit_scale=0.0625),
    "cohere2": lambda: causal("Cohere2", logit_scale=0.25),
    "gemma2": lambda: causal("Gemma2", final_logit_softcapping=3.0),
    "falcon_h1": lambda: causal(
        "FalconH1", lm_head_multiplier=0.3, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4,
        mamba_chunk_size=4,
    ),
    "recurrent_gemma": lambda: causal("RecurrentGemma", logits_soft_cap=3.0, lru_width=16, num_hidden_layers=3),
    "xlstm": lambda: causal("xLSTM", output_logit_soft_cap=3.0, num_heads=2, num_blocks=1, hidden_size=128),
    "granite in llava-next": lambda: llava_next("Granite", logits_scaling=4.0),
    "aya vision": lambda: vision("AyaVision", "Cohere2", logit_scale=0.25),
    "cohere2 vision": lambda: vision("Cohere2Vision", "Cohere2", logit_scale=0.25),
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():  # logits large enough that a softcap shows
        lm_head(model).weight.normal_(std=2.0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_our_logits_are_the_models_own(name: str) -> None:
    model = build(name)
    ids = torch.randint(3, 50, (1, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), gathered_head(model) as head:
        exact = model(input_ids=ids).logits[0]
        hidden = head_rows(model, {"input_ids": ids}, torch.arange(8))
        ours = reference.logits(hidden, head)
    assert exact.std() > 0.3
    torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if "vision" not in name and "llava" not in name])
def test_the_list_of_names_agrees_with_the_measurement(name: str) -> None:
    """A model that is sharded before it can be measured is taken at its configuration's word."""
    model = build(name)
    listed, measured = logit_settings(model.config.get_text_config()), logit_transform(model)
    assert listed["scale"] == pytest.approx(measured["scale"], rel=1e-4)
    assert listed["softcap"] == (measured["softcap"] and pytest.approx(measured["softcap"], rel=1e-4))


def wrapped(model: Any, change: Any) -> Any:
    """The model with a forward that does something else to its logits."""
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("change", "expected"),
    [(lambda z: z * 1.7, (1.7, None)), (lambda z: 5 * torch.tanh(z * 0.6 / 5), (0.6, 5.0)), (lambda z: z, (1.0, None))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_family_that_no_list_knows(change: Any, expected: tuple[float, float | None], dtype: torch.dtype) -> None:
    settings = logit_transform(wrapped(build("qwen2").to(dtype), change))
    assert settings["scale"] == pytest.approx(expected[0], rel=1e-5)
    assert settings["softcap"] == (None if expected[1] is None else pytest.approx(expected[1], rel=1e-5))


def test_what_no_scale_and_softcap_give_is_refused() -> None:
    def banned(z: Tensor) -> Tensor:
        return z.masked_fill(torch.arange(z.shape[-1]) > 50, -torch.inf)

    for change in (torch.relu, lambda z: -z, banned, lambda z: z + 1):
        with pytest.raises(ValueError, match=r"Qwen2ForCausalLM must turn its head's output .* turns .* into"):
            logit_transform(wrapped(build("qwen2"), change))


def test_a_head_that_is_more_than_its_weight_is_refused() -> None:
    model = build("qwen2")
    head = lm_head(model)
    plain = head.forward
    head.forward = lambda hidden: plain(torch.nn.functional.normalize(hidden, dim=-1))
    with pytest.raises(ValueError, match=r"head of Qwen2ForCausalLM must return hidden @ weight.T \+ bias, .*% off"):
        logit_transform(model)


def test_an_adapter_on_the_head_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("qwen2"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="must not cover the language-model head"), gathered_head(model):
        pass


def test_measuring_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """Training mode, forwards and random numbers are as before; one measurement a model."""
    model = build("qwen2").train()
    model.model.eval()
    state = torch.get_rng_state()
    logit_transform(model)
    assert model.training
    assert not model.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(lm_head(model))
    model.forward = None  # type: ignore[method-assign]
    assert logit_transform(model) == {"softcap": None, "scale": 1.0}


def test_a_model_that_reads_no_bare_token_is_taken_at_its_word(caplog: pytest.LogCaptureFixture) -> None:
    def fails(**_: Any) -> None:
        raise RuntimeError("pixel_values is missing")

    model = build("granite")
    model.forward = fails
    with caplog.at_level("WARNING", logger="vigos"):
        assert logit_transform(model) == {"softcap": None, "scale": 0.25}
    assert "pixel_values is missing" in caplog.text
