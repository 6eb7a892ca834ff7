"""Make the world's tokenizer, processor and untrained model: an ordinary Qwen2.5-VL, only very small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from vigos.world.digits import CELL, INK_NAMES, draw_scene
from vigos.world.prompts import world_prompts
from vigos.world.tasks import KINDS, ask, completion, describe, draw_digits, reason

PATCH, MERGE = CELL // 4, 2  # a digit's square is 4 x 4 patches, merged to 2 x 2 tokens
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# The layout of Qwen2.5-VL's own template, without its default system turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def corpus(n: int = 4000, seed: int = 0) -> Iterator[str]:
    """Yield texts of the world for the tokenizer: prompts of all roles and completions, from training wordings only."""
    rng = np.random.default_rng([seed, 7])
    prompts = world_prompts()
    for index in range(n):
        digits = draw_digits(rng, int(rng.integers(2, 5)))
        inks = tuple(str(ink) for ink in rng.permutation(INK_NAMES)[: len(digits)])
        scene = draw_scene(rng, "train", digits=digits, inks=inks)
        kind = KINDS[index % len(KINDS)]
        question = ask(rng, scene, kind, "train", variant="F" if kind == "ink" and index % 2 else "P")
        text = completion(describe(scene), reason(scene, question, question.answer), question.answer)
        yield prompts.user_text("reference", question.problem, question.answer) + "\nassistant\nuser\nsystem\n"
        yield prompts.user_text("reasoning", question.problem, question.answer)
        yield f"{prompts.prefill}{text}"
        if index % 8 == 0:  # LaTeX around an answer: brings the merges `{\` and `}}` of real tokenizers
            yield text.replace(f"{{{question.answer}}}", f"{{\\text{{{question.answer}}}}}")


def build_tokenizer(vocab_size: int = 512) -> Any:
    """Train a byte-level BPE tokenizer with Qwen2.5-VL's special tokens.

    Tags and `\\boxed{` are ordinary text. Runs of punctuation are one pre-token, so merges such as `.</`, `><` and
    `>\\` cross the borders of the tags.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )


def build_processor(tokenizer: Any) -> Any:
    """Build a processor: Qwen2-VL's image processor (PIL back end, without torchvision) and the tokenizer.

    transformers' `Qwen2_5_VLProcessor` insists on a video processor, which insists on torchvision. The processor of
    PaddleOCR-VL expands the same placeholders from the same `image_grid_thw` and needs neither.
    """
    from transformers import PaddleOCRVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    side = PATCH * MERGE
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        size={"shortest_edge": side * side, "longest_edge": side * side * 64},
    )
    return PaddleOCRVLProcessor(image_processor=image_processor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: Any, seed: int = 0) -> Any:
    """Build an untrained Qwen2_5_VLForConditionalGeneration, fp32, about 1.5 million parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ends = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    hidden = 128
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 320, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True, **ends,
        },
        vision_config={
            "depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "patch_size": PATCH,
            "spatial_merge_size": MERGE, "temporal_patch_size": 2, "window_size": 8 * PATCH * MERGE,
            "out_hidden_size": hidden, "fullatt_block_indexes": [0, 1, 2],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ends["eos_token_id"]
    model.generation_config.pad_token_id = ends["pad_token_id"]
    return model
