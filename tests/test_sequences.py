"""Prompts of the same images: processed once, and the same as if each had been processed by itself."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.training import processor
from PIL import Image
from tokenizers.processors import TemplateProcessing

from vigos.method.encode import EncodedPrompt, encode_prompt
from vigos.world import world_prompts

# Picture in parts, as one line: these families bring no template that fits the world's tokenizer.
TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}"
    "{{ part.text if part.type == 'text' else '<|image_pad|>' }}{% endfor %}{% endfor %}"
)


def families() -> dict[str, Any]:
    tokenizer = deepcopy(processor().tokenizer)  # some add tokens of their own to it
    options: dict[str, Any] = {"chat_template": TEMPLATE, "image_token": "<|image_pad|>"}
    idefics = transformers.Idefics3Processor(transformers.Idefics3ImageProcessor(), tokenizer, chat_template=TEMPLATE)
    idefics.image_token, idefics.image_token_id = options["image_token"], tokenizer.vocab["<|image_pad|>"]
    llava = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        **options,
    )
    return {"qwen2_5_vl": processor(), "idefics3": idefics, "llava_next": llava}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (90, 200, 3), dtype=np.uint8))


def same(a: EncodedPrompt, b: EncodedPrompt) -> bool:
    assert a.images is not None
    assert b.images is not None
    return (
        torch.equal(a.ids, b.ids)
        and a.images.key == b.images.key
        and all(torch.equal(a.images.tensors[k], v) for k, v in b.images.tensors.items())
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "llava_next"])
def test_images_of_a_row_are_processed_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = families()[family]
    calls: list[Any] = []
    kind = type(own.image_processor)
    original = kind.preprocess
    monkeypatch.setattr(kind, "preprocess", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))

    def encoded(role: Any, seed: int = 0, like: EncodedPrompt | None = None) -> EncodedPrompt:
        images = [picture(seed), picture(seed + 1)]
        return encode_prompt(own, world_prompts(), role, "What is it?", "red", images, like=like)

    student = encoded("student")
    assert len(calls) == 1
    teacher = encoded("reference", like=student)
    assert len(calls) == 1
    assert teacher.images is student.images, "not even hashed again"
    assert same(teacher, encoded("reference"))
    assert not same(teacher, student), "another text"
    assert same(encoded("student", like=teacher), student), "what was taken over can be taken over"
    assert len(calls) == 2
    assert not same(encoded("student", seed=5), student)
    assert "preprocess" not in vars(own.image_processor), "left as it was"


def test_a_failing_processor_is_left_as_it_was() -> None:
    own = processor()
    with pytest.raises(ValueError, match="aspect ratio"):
        encode_prompt(own, world_prompts(), "student", "What?", "", [Image.new("RGB", (4000, 4))])
    assert "preprocess" not in vars(own.image_processor)


@pytest.mark.parametrize("images", [0, 1])
def test_a_template_that_writes_bos_gets_one(images):
    """Gemma's, Llama's and Mistral's templates write it, and their tokenizers add one to any text."""
    made = deepcopy(processor())
    tokenizer = made.tokenizer
    bos = next(token for token in tokenizer.all_special_tokens if "im" not in token and "vision" not in token)
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    for template, count in ((bos + TEMPLATE, 1), (TEMPLATE, 1)):
        made.chat_template = tokenizer.chat_template = template
        asked = [picture(seed) for seed in range(images)]
        ids = encode_prompt(made, world_prompts(), "student", "What?", images=asked).ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == count
        assert ids[0] == tokenizer.bos_token_id
