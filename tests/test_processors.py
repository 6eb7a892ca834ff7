"""Families whose inputs need something of their own: token types, image sizes, the vision tower's hidden states."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.training import CUT_OFF, PROMPTS, VALID_A, ScriptedEngine, config, processor, rows

from vigos.method.encode import EncodedPrompt, ImageInputs, ScoredSequence, encode_prompt
from vigos.models.vision_cache import VisionCache
from vigos.scoring.hidden_states import hidden_states
from vigos.train.trainer import ViGOSTrainer

VOCAB, IMAGE = 96, 90
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def widened(model: Any) -> Any:
    """Give a random model weights large enough that contexts matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5)
    return model.eval()


def gemma3_processor() -> Any:
    """Gemma 3's own processor, with the world's tokenizer and a template in the shape of Gemma's."""
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = copy.deepcopy(processor().tokenizer)
    names = {"boi_token": "<begin_picture>", "eoi_token": "<end_picture>", "image_token": "<picture_soft>"}
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    template = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- for part in m.content -%}"
        "{%- if part.type == 'image' -%}<begin_picture>{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}<|im_end|>"
        "{%- endfor -%}{{ '<|im_start|>assistant\\n' }}"
    )
    image = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Gemma3Processor(image, tokenizer, chat_template=template, image_seq_length=4)


def gemma3(own: Any) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = own.tokenizer
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    text = TEXT | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "sliding_window": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": tokenizer.pad_token_id}
    ids = {"image_token_id": tokenizer.image_token_id, "boi_token_index": tokenizer.boi_token_id}
    return widened(
        Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text, vision_config=vision, eoi_token_index=tokenizer.eoi_token_id, mm_tokens_per_image=4,
                **ids,
            )
        )
    )  # fmt: skip


def test_gemma_3_trains_with_its_own_processor(tmp_path: Path) -> None:
    """Its `token_type_ids`, by which an image's tokens see each other, reach the model; a row without image as well."""
    own = gemma3_processor()
    data = rows(4)
    data[3]["images"] = []
    prompt = encode_prompt(own, PROMPTS, "student", "Which?", images=data[0]["images"])
    assert prompt.token_type_ids is not None
    assert prompt.token_type_ids.sum() == 4
    args = config(tmp_path, max_steps=2, student_scoring="separate", teacher_scoring="separate")
    engine = ScriptedEngine([VALID_A, CUT_OFF])
    run = ViGOSTrainer(gemma3(own), args, own, data, prompts=PROMPTS, rollout_engine=engine)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)


def by_hand(placeholders: int, seed: int, **tensors: torch.Tensor) -> ScoredSequence:
    """A prompt with an image's placeholders, and a completion of five tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.tensor([1]), torch.full((placeholders,), IMAGE), torch.randint(3, 80, (4,), generator=g)])
    types = (ids == IMAGE).long()
    prompt = EncodedPrompt(ids, types, ImageInputs.from_tensors(tensors))
    return ScoredSequence(prompt, torch.randint(3, 80, (5,), generator=g), torch.arange(5))


def mistral3() -> tuple[Any, list[ScoredSequence]]:
    """Mistral 3, and prompts with images of two sizes, laid out as its processor does."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 64, "patch_size": 8,
    }  # fmt: skip
    text = TEXT | {"model_type": "mistral"}
    model = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE, spatial_merge_size=2)
    )
    g = torch.Generator().manual_seed(1)
    sizes = [(32, 32), (16, 48), (32, 16)]
    return widened(model), [
        by_hand(
            height * width // 256, i, pixel_values=torch.randn(1, 3, height, width, generator=g),
            image_sizes=torch.tensor([[height, width]]),
        )
        for i, (height, width) in enumerate(sizes)
    ]  # fmt: skip


def llama4() -> tuple[Any, list[ScoredSequence]]:
    """Llama 4, whose features are the tower's last hidden state."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16,
        "pixel_shuffle_ratio": 0.5,
    }  # fmt: skip
    text = TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 64}
    model = Llama4ForConditionalGeneration(
        Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE)
    )
    try:
        model(input_ids=torch.tensor([[1, 3]]))
    except AttributeError as error:
        pytest.skip(f"the family's own forward fails in transformers {transformers.__version__}: {error}")
    g = torch.Generator().manual_seed(1)
    return widened(model), [by_hand(4, i, pixel_values=torch.randn(1, 3, 32, 32, generator=g)) for i in range(3)]


@pytest.mark.parametrize("family", [mistral3, llama4])
def test_a_batch_of_images_is_scored_as_each_alone(family: Any) -> None:
    """With and without kept features: the rows of a padded batch are those of single forwards."""
    model, sequences = family()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        alone = torch.cat([hidden_states(model, [each], scoring="separate") for each in sequences])
        together = hidden_states(model, sequences, scoring="separate")
        cache = VisionCache.for_model(model)
        assert cache is not None
        kept = [hidden_states(model, sequences, scoring="separate", vision=cache) for _ in range(2)]
    for rows_ in (together, *kept):
        torch.testing.assert_close(rows_, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[:5], alone[5:10])
