"""Small random models of transformers' families, from their own default configurations with every size reduced."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

# The image-text families that `small_model` can make; the others hold sizes against each other, cannot do without an
# image, or need a package that is not there. Those that matter most have small models of their own in tiny_models.py.
SMALL = (
    "aria", "aya_vision", "cohere2_vision", "cosmos3_edge", "cosmos3_omni", "deepseek_vl", "deepseek_vl_hybrid",
    "exaone4_5", "fuyu", "gemma3", "gemma4", "gemma4_unified", "git", "glm5_next", "got_ocr2", "granite_docling",
    "hyperclovax_vision_v2", "idefics2", "idefics3", "inkling2", "inkling_mm_model", "internvl", "kimi_k25",
    "kosmos-2.5", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision",
    "minicpm_ocr",
    "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "mistral3", "mistral_large4", "mllama", "muse_glimmer", "ovis2",
    "paligemma", "pp_chart2table", "qianfan_ocr", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe",
    "shieldgemma2", "smolvlm", "unlimited_ocr", "video_llama_3", "video_llava", "vipllava",
)  # fmt: skip
LARGEST = 30_000_000  # parameters
SIZES = {
    "hidden_size": 32, "d_model": 32, "embed_dim": 32, "out_hidden_size": 32, "projection_dim": 32, "dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "mlp_dim": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_layers": 2, "depth": 2, "n_layers": 2, "layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "num_heads": 4, "attention_heads": 4, "encoder_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16,
    "projector_hidden_size": 32, "vision_hidden_size": 32, "text_hidden_size": 32, "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 512, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "num_kv_shared_layers": 0,
}  # fmt: skip
PER_LAYER = ("layer_types", "mlp_layer_types", "intermediate_size", "activation_sparsity_pattern")
DERIVED = ("per_layer_config", "kv_source_layers")  # made anew where they are left out


def reduced(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with small sizes; of layer types, the first two kinds."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if name in DERIVED:
            continue
        if isinstance(value, dict):
            rotary = {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0} if "mrope_section" in value else {}
            out[name] = reduced(value) | rotary
        elif name in PER_LAYER and isinstance(value, list):
            out[name] = (list(dict.fromkeys(value)) * 2)[:2]
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            out[name] = min(value, SIZES[name])
        else:
            out[name] = value
    return out


def small_model(model_type: str) -> Any:
    """A model of one of SMALL, in eval mode."""
    kind = CONFIG_MAPPING[model_type]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(kind.from_dict(reduced(kind().to_dict()))).eval()
    assert model.num_parameters() < LARGEST
    with torch.no_grad():  # the initial 0.02 would leave every attention flat and hide a wrong mask
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
    return model
