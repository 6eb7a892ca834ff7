"""Tiny random models of the families that prefix-tree scoring supports, and prompts as their processors lay them out.

The processors of most families need torchvision, so prompts are put together by hand: placeholder ids where the
processor expands its images, and random pixels in the family's own layout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vigos.method.encode import EncodedPrompt, ImageInputs, ScoredSequence
from vigos.scoring.prefix_tree import PrefixPack, PrefixTree, model_input_ids

VOCAB, IMAGE = 96, 90  # ids from 90 on are never text: image, video and the vision markers
HIDDEN, LAYERS = 32, 2
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "llava_onevision", "qwen3")

_TEXT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **text: Any) -> Any:
    """A random model of `family` in eval mode; `text` overrides its text config."""
    torch.manual_seed(seed)
    model = _BUILD[family](_TEXT | text).eval()
    with torch.no_grad():  # the initial 0.02 would leave every attention flat and hide a wrong mask
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model.to(dtype)


_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}


def _qwen3(text: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**{"head_dim": 8} | text))


def _qwen2_5_vl(text: dict[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": text["hidden_size"],
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2,
    }  # fmt: skip
    text = text | {"rope_parameters": _ROPE}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(text: dict[str, Any], experts: bool = False) -> Any:
    import transformers

    vision = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": text["hidden_size"],
        "patch_size": 4, "spatial_merge_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = text | {"head_dim": 8, "rope_parameters": _ROPE} | (_EXPERTS if experts else {})
    name = "Qwen3VLMoe" if experts else "Qwen3VL"
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _glm4v(text: dict[str, Any], experts: bool = False) -> Any:
    import transformers

    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": text["hidden_size"],
        "patch_size": 4, "spatial_merge_size": 2, "image_size": 32,
    }  # fmt: skip
    text = text | {"rope_parameters": _ROPE | {"partial_rotary_factor": 1.0}}
    if experts:  # the first block is dense
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    name = "Glm4vMoe" if experts else "Glm4v"
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=91, image_start_token_id=92,
        image_end_token_id=93, video_start_token_id=94, video_end_token_id=95,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


# Two value heads a key head, a convolution of 3, chunks of 64 tokens.
_DELTA_NET = {
    "linear_conv_kernel_dim": 3, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 6, "head_dim": 8,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16
}  # fmt: skip


def _mixed(text: dict[str, Any]) -> dict[str, Any]:
    layers = text["num_hidden_layers"]
    return {"layer_types": ["linear_attention"] * (layers - 1) + ["full_attention"]}


def _qwen3_5(text: dict[str, Any], experts: bool = False) -> Any:
    import transformers

    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": text["hidden_size"],
        "patch_size": 4, "spatial_merge_size": 2, "num_position_embeddings": 64,
    }  # fmt: skip
    rope = _ROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
    name = "Qwen3_5Moe" if experts else "Qwen3_5"
    config = getattr(transformers, f"{name}Config")(
        text_config=text | _DELTA_NET | _mixed(text) | {"rope_parameters": rope} | (_EXPERTS if experts else {}),
        vision_config=vision, image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _qwen3_next(text: dict[str, Any]) -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(Qwen3NextConfig(**text | _DELTA_NET | _mixed(text) | _EXPERTS))


def _minicpmv4_6(text: dict[str, Any]) -> Any:
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "image_size": 32,
    }  # fmt: skip
    rope = _ROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
    text = text | _DELTA_NET | _mixed(text) | {"rope_parameters": rope, "model_type": "qwen3_5_text"}
    config = MiniCPMV4_6Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=91, insert_layer_id=0,
    )  # fmt: skip
    return MiniCPMV4_6ForConditionalGeneration(config)


def _lfm2_vl(text: dict[str, Any]) -> Any:
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    vision = {
        "model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": 4, "num_patches": 16, "vision_use_head": False,
    }  # fmt: skip
    kinds = ["conv"] * (text["num_hidden_layers"] - 1) + ["full_attention"]
    text = text | {"model_type": "lfm2", "layer_types": kinds, "conv_bias": True}
    config = Lfm2VlConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, projector_hidden_size=24,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Lfm2VlForConditionalGeneration(config)


def _lfm3_vl(text: dict[str, Any]) -> Any:
    from transformers import Lfm3VlConfig, Lfm3VlForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "patch_size": 4, "spatial_merge_size": 2,
    }  # fmt: skip
    text = text | {
        "model_type": "lfm3", "layer_types": ["conv", "sliding_attention", "conv", "full_attention"], "head_dim": 8,
        "num_hidden_layers": 4, "sliding_window": 8, "conv_L_cache": 7,
    }  # fmt: skip
    config = Lfm3VlConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92,
        vision_end_token_id=93, projector_hidden_size=24, tie_word_embeddings=False,
    )  # fmt: skip
    return Lfm3VlForConditionalGeneration(config)


def _nemotron_h(text: dict[str, Any]) -> Any:
    """A tiny Nemotron-H: Mamba-2 with chunks of 16 tokens, experts, attention, Mamba-2."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    state = {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"], "head_dim": 8,
        "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16,
        "conv_kernel": 3, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16, "num_hidden_layers": 4,
    }  # fmt: skip
    return NemotronHForCausalLM(NemotronHConfig(**text | state))


def _smolvlm(text: dict[str, Any]) -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text | {"model_type": "llama"}, vision_config=vision, image_token_id=IMAGE, scale_factor=2
    )
    return SmolVLMForConditionalGeneration(config)


def _internvl(text: dict[str, Any]) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [32, 32], "patch_size": [8, 8],
    }  # fmt: skip
    config = InternVLConfig(
        text_config=text | {"model_type": "qwen2"}, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5,
        image_seq_length=4,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config)


def _llava_onevision(text: dict[str, Any]) -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config=text | {"model_type": "qwen2"}, vision_config=vision, image_token_id=IMAGE, video_token_id=91,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def _gemma3(text: dict[str, Any]) -> Any:
    """A tiny Gemma 3, whose image tokens see their whole image, with one sliding-window layer."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    text = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]} | text
    config = Gemma3Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, boi_token_index=92, eoi_token_index=93,
        mm_tokens_per_image=4,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def _gemma4(text: dict[str, Any]) -> Any:
    """A tiny Gemma 4, whose image tokens see their whole image in sliding layers alone."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4,
    }  # fmt: skip
    text = text | {
        "head_dim": 8, "global_head_dim": 8, "sliding_window": 8, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": text["vocab_size"], "layer_types": ["sliding_attention", "full_attention"],
        "use_bidirectional_attention": "vision",
    }  # fmt: skip
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None, image_token_id=IMAGE)
    return Gemma4ForConditionalGeneration(config)


_BUILD = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": partial(_qwen3_vl, experts=True),
    "glm4v": _glm4v,
    "glm4v_moe": partial(_glm4v, experts=True),
    "minicpmv4_6": _minicpmv4_6,
    "lfm2_vl": _lfm2_vl,
    "lfm3_vl": _lfm3_vl,
    "nemotron_h": _nemotron_h,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": partial(_qwen3_5, experts=True),
    "qwen3_next": _qwen3_next,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
}


# ---- images --------------------------------------------------------------------------------------------------------

# Their images are patches end to end, merged two by two, each with its grid.
GRIDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "lfm3_vl")
# What one "size" means: patches (rows, columns) before merging for those, MiniCPM-V and LFM2-VL, tiles for SmolVLM and
# InternVL, pixels for LLaVA-OneVision.
SIZES: dict[str, list[Any]] = {
    **{family: [(4, 6), (8, 4), (2, 2)] for family in GRIDS},
    "minicpmv4_6": [(4, 8), (8, 8), (4, 4)],
    "lfm2_vl": [(4, 6), (8, 4), (2, 2)],
    "smolvlm": [2, 1, 3],
    "internvl": [2, 1, 3],
    "gemma3": [1, 1, 1],
    "llava_onevision": [(16, 30), (32, 20), (16, 16)],
}


def images(family: str, sizes: list[Any], seed: int) -> tuple[ImageInputs, list[int]]:
    """Random images in the family's layout, and how many placeholders each of them takes."""
    g = torch.Generator().manual_seed(1000 + seed)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    if family in GRIDS:
        grid = torch.tensor([[1, h, w] for h, w in sizes])
        tensors = {
            "pixel_values": torch.cat([pixels(h * w, 3 * 2 * 4 * 4) for h, w in sizes]),
            "image_grid_thw": grid,
        }
        return ImageInputs.from_tensors(tensors), [h * w // 4 for h, w in sizes]
    if family == "minicpmv4_6":
        tensors = {
            "pixel_values": torch.cat([pixels(1, 3, 4, 4 * h * w) for h, w in sizes], -1),
            "target_sizes": torch.tensor(sizes, dtype=torch.int32),
        }
        return ImageInputs.from_tensors(tensors), [h * w // 16 for h, w in sizes]
    if family == "lfm2_vl":
        mask = torch.stack([(torch.arange(32) < h * w).long() for h, w in sizes])
        tensors = {
            "pixel_values": pixels(len(sizes), 32, 3 * 4 * 4), "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor(sizes),
        }  # fmt: skip
        return ImageInputs.from_tensors(tensors), [h * w // 4 for h, w in sizes]
    if family == "smolvlm":
        tiles = pixels(1, sum(sizes), 3, 32, 32)
        tensors = {"pixel_values": tiles, "pixel_attention_mask": torch.ones(1, sum(sizes), 32, 32, dtype=torch.int64)}
        return ImageInputs.from_tensors(tensors), [4 * n for n in sizes]
    if family == "gemma3":
        return ImageInputs.from_tensors({"pixel_values": pixels(len(sizes), 3, 32, 32)}), [4] * len(sizes)
    if family == "internvl":
        return ImageInputs.from_tensors({"pixel_values": pixels(sum(sizes), 3, 32, 32)}), [4 * n for n in sizes]
    # LLaVA-OneVision: one image is cut in tiles (the whole, then a grid); several images take one tile each.
    tiles, counts = [], []
    for height, width in sizes:
        if len(sizes) > 1:
            tiles.append(1)
            counts.append(2 * 2 + 1)
            continue
        rows, columns = -(-height // 16), -(-width // 16)
        tiles.append(1 + rows * columns)
        counts.append(2 * 2 + _unpadded(height, width, rows * 2, columns * 2))
    stack = torch.zeros(len(sizes), max(tiles), 3, 16, 16)
    for i, n in enumerate(tiles):
        stack[i, :n] = pixels(n, 3, 16, 16)
    tensors = {
        "pixel_values": stack,
        "image_sizes": torch.tensor(sizes),
        "batch_num_images": torch.tensor([len(sizes)]),
    }
    return ImageInputs.from_tensors(tensors), counts


def _unpadded(height: int, width: int, rows: int, columns: int) -> int:
    """Features left of a (rows, columns) grid once the padding to the tile grid is cut, plus a newline for each row."""
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        rows -= 2 * ((rows - kept) // 2)
    else:
        kept = int(round(width * (rows / height), 7))
        columns -= 2 * ((columns - kept) // 2)
    return rows * columns + rows


# ---- prompts and sequences -----------------------------------------------------------------------------------------


def words(n: int, seed: int) -> Tensor:
    """Random text ids (n,)."""
    return torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(seed))


def prompt(family: str, sizes: list[Any], *, image_seed: int = 0, question: Tensor, head: int = 5) -> EncodedPrompt:
    """System words, the images' placeholders between markers, then the question."""
    if family not in SIZES or not sizes:
        return EncodedPrompt(torch.cat([words(head, 7), question]), None, None)
    inputs, counts = images(family, sizes, image_seed)
    ids = [words(head, 7)]
    for count in counts:
        ids += [torch.tensor([92]), torch.full((count,), IMAGE), torch.tensor([93])]
    flat = torch.cat([*ids, question])
    return EncodedPrompt(flat, (flat == IMAGE).long(), inputs)


def mixed_rows(family: str) -> list[ScoredSequence]:
    """Four rows as a step of training makes them: different images, shared and unshared prompts, depth 1 to 3.

    Row 0 is valid (perception and reasoning), row 1 has two images and two rollouts of one prompt (depth 3), row 2 is
    invalid (every token scored), row 3 has no image. One sequence ends inside another's run, one repeats another.
    """
    sizes = SIZES.get(family, [])
    one, two, three = (sizes[:1], sizes[1:3], sizes[2:3]) if sizes else ([], [], [])
    out = []

    def add(row: int, role: str, encoded: EncodedPrompt, completion: Tensor, scored: list[int]) -> None:
        out.append(ScoredSequence(encoded, completion, torch.tensor(scored, dtype=torch.int64), (row, role)))

    a = words(14, 20)
    add(0, "reasoning", prompt(family, one, question=words(9, 11)), a, list(range(6, 14)))
    add(2, "reference", prompt(family, three, image_seed=2, question=words(6, 12)), words(10, 21), list(range(10)))
    add(0, "perception", prompt(family, one, question=words(2, 13)), a, [0, 1, 2, 3])
    b = prompt(family, two, image_seed=1, question=words(7, 14))
    first, second = words(12, 22), torch.cat([words(12, 22)[:4], words(5, 23)])
    add(1, "reasoning", b, first, [3, 5, 11])
    add(1, "reasoning", b, second, [2, 4, 5, 8])
    add(1, "perception", prompt(family, two, image_seed=1, question=words(3, 14)), second, [0, 1])
    add(3, "reference", prompt(family, [], question=words(5, 15)), words(6, 24), [0, 5])
    add(1, "again", b, first, [1, 2])
    add(1, "short", b, first, [1])
    add(4, "empty", b, first, [])
    return out


def visible_keys(pack: PrefixPack) -> Tensor:
    """(T, T) bool, True where the row's token sees the column's."""
    q = torch.arange(pack.tokens)
    return (q[None] <= q[:, None]) & (q[:, None] < pack.subtree_end[None])


def fed(tree: PrefixTree) -> int:
    """Tokens that a model reads through the tree."""
    return sum(pack.tokens for pack in tree.packs)


def fed_alone(sequences: list[ScoredSequence]) -> int:
    """Tokens that it reads without sharing and without padding."""
    return sum(len(model_input_ids(s)) for s in sequences)
