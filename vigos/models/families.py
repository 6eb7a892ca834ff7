"""Families of models: how their layers mix tokens, if prefixes can be shared, what LoRA adapts, where experts are.

    family_of(config)      # the row for a transformers configuration; None if there is none
    tree_refusal(config)   # why this model's prefixes cannot be shared; None if they can, or if nobody knows

A family without a row is not refused: `vigos.scoring.check.TreeCheck` compares its states with separate forwards
before the first update, for student and teacher. `python -m vigos.models.families` draws the table for docs/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_DELTA_NET = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
_LFM = ("q_proj", "k_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3")
_NEMOTRON = (*_ATTENTION, "in_proj", "up_proj", "down_proj")  # peft refuses Mamba's out_proj
_THINKING = "enable_thinking=False"


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: of the models, as their makers write it.
        model_types: `config.model_type` of the classes with a head, and of their text models.
        mixing: how its layers mix tokens.
        refusal: why prefixes cannot be shared; None if the tree is exact, which a test holds if `tested`.
        tested: True if the tests compare the tree with separate forwards on a small random model of the family.
        lora_targets: linear layers that a default adapter covers, at least one of them in every block; () for all.
        experts: 3-D parameters of a block's experts, which a default adapter leaves out; routers stay frozen.
        thinking: argument of the chat template that turns thinking off.
        image_token: the token that stands for image features.
    """

    name: str
    model_types: tuple[str, ...]
    mixing: str = "full attention"
    refusal: str | None = None
    tested: bool = False
    lora_targets: tuple[str, ...] = (*_ATTENTION, *_MLP)
    experts: tuple[str, ...] = ()
    thinking: str = ""
    image_token: str = ""


# peft 0.21 takes the names of _MLP for experts in families that once had them as linear layers (Qwen3-MoE, Qwen3-Next,
# GLM-4V-MoE) and then refuses dropout: their default adapters keep to the layers that mix tokens.
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_BLOCKS = "image tokens attend to each other"

FAMILIES: tuple[Family, ...] = (
    Family("Qwen2.5-VL", ("qwen2_5_vl",), tested=True, image_token="<|image_pad|>"),
    Family("Qwen2-VL", ("qwen2_vl",), image_token="<|image_pad|>"),
    Family("Qwen3-VL", ("qwen3_vl",), tested=True, image_token="<|image_pad|>"),
    Family(
        "Qwen3-VL-MoE", ("qwen3_vl_moe",), tested=True, lora_targets=_ATTENTION, experts=_EXPERTS,
        image_token="<|image_pad|>",
    ),
    Family(
        "Qwen3.5", ("qwen3_5", "qwen3_5_text"), "3 of 4 layers Gated DeltaNet, else full attention",
        tested=True, lora_targets=(*_ATTENTION, *_MLP, *_DELTA_NET), thinking=_THINKING, image_token="<|image_pad|>",
    ),
    Family(
        "Qwen3.5-MoE", ("qwen3_5_moe", "qwen3_5_moe_text"), "3 of 4 layers Gated DeltaNet, else full attention",
        tested=True, lora_targets=(*_ATTENTION, *_MLP, *_DELTA_NET), experts=_EXPERTS, thinking=_THINKING,
        image_token="<|image_pad|>",
    ),
    Family("Qwen3", ("qwen3",), tested=True, thinking=_THINKING),
    Family("Qwen3-MoE", ("qwen3_moe",), lora_targets=_ATTENTION, experts=_EXPERTS, thinking=_THINKING),
    Family(
        "Qwen3-Next", ("qwen3_next",), "3 of 4 layers Gated DeltaNet, else full attention",
        tested=True, lora_targets=(*_ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"), experts=_EXPERTS,
    ),
    Family(
        "MiniCPM-V 4.6", ("minicpmv4_6",), "3 of 4 layers Gated DeltaNet, else full attention",
        tested=True, lora_targets=(*_ATTENTION, *_MLP, *_DELTA_NET), thinking=_THINKING, image_token="<|image_pad|>",
    ),
    Family("InternVL", ("internvl",), tested=True, image_token="<IMG_CONTEXT>"),
    Family("SmolVLM", ("smolvlm",), tested=True, image_token="<image>"),
    Family("Idefics3", ("idefics3",), image_token="<image>"),
    Family("LLaVA-OneVision", ("llava_onevision",), tested=True, image_token="<image>"),
    Family(
        "GLM-4V", ("glm4v",), tested=True, lora_targets=(*_ATTENTION, "gate_up_proj", "down_proj"),
        image_token="<|image|>",
    ),
    Family(
        "GLM-4V-MoE", ("glm4v_moe",), tested=True, lora_targets=_ATTENTION, experts=_EXPERTS, image_token="<|image|>",
    ),
    Family(
        "Gemma 3", ("gemma3",), f"sliding and full attention; {_BLOCKS}", tested=True, image_token="<image_soft_token>",
    ),
    Family(
        "Gemma 4", ("gemma4", "gemma4_unified"), f"sliding and full attention; {_BLOCKS} in sliding layers",
        f"its {_BLOCKS} in sliding layers alone", lora_targets=(),
    ),
    Family("PaliGemma", ("paligemma",), "prefix-LM", "its prompt attends to itself in both directions"),
    Family(
        "Llama 3.2 Vision", ("mllama",), "full and cross-attention", "its images enter by cross-attention",
        lora_targets=(),
    ),
    Family("Molmo 2", ("molmo2",), f"full attention; {_BLOCKS}", f"its {_BLOCKS}", lora_targets=()),
    Family("GIT", ("git",), f"full attention; {_BLOCKS}", f"its {_BLOCKS}", lora_targets=()),
    Family(
        "LFM2-VL", ("lfm2_vl", "lfm2"), "short convolutions and full attention", tested=True,
        lora_targets=_LFM, image_token="<image>",
    ),
    Family(
        "LFM3-VL", ("lfm3_vl", "lfm3"), "short convolutions, sliding and full attention", tested=True,
        lora_targets=_LFM, image_token="<|image_pad|>",
    ),
    Family(
        "Nemotron-H", ("nemotron_h",), "Mamba-2 and full attention", tested=True, lora_targets=_NEMOTRON,
        experts=("mixer.experts.up_proj", "mixer.experts.down_proj"),
    ),
    Family(
        "Nemotron-H Omni", ("nemotron_h_omni",), "Mamba-2 and full attention", lora_targets=_NEMOTRON,
        experts=("mixer.experts.up_proj", "mixer.experts.down_proj"),
    ),
    Family("Llama 4", ("llama4",), "chunked and full attention", "its attention is in chunks", lora_targets=()),
)  # fmt: skip

# Families whose image tokens see their whole block in every layer. Prefixes cover whole images, so they share.
BLOCKWISE_IMAGES = ("gemma3",)
# Short convolutions, Gated DeltaNet, Mamba-2: `vigos.scoring.tree_state`.
STATE_LAYERS = frozenset({"linear_attention", "conv"})
_TOKENWISE = ("mlp", "moe")  # layers of their own in Nemotron-H
SHARED_LAYERS = ("full_attention", "sliding_attention", "attention", *STATE_LAYERS)


def family_of(config: Any) -> Family | None:
    """Return the table's row for a transformers configuration; None for a family that has none."""
    return next((family for family in FAMILIES if config.model_type in family.model_types), None)


def layer_kinds(config: Any) -> str:
    """Describe how the layers of a model mix tokens: the table's words, or else the configuration's."""
    family = family_of(config)
    if family is not None:
        return family.mixing
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["attention"]
    return ", ".join(f"{kinds.count(kind)} layers {kind}" for kind in dict.fromkeys(kinds))


def mixing_layers(config: Any) -> int:
    """Return how many layers of a model mix tokens, by attention or by state."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    return sum(kind not in _TOKENWISE for kind in kinds) if kinds else text.num_hidden_layers


def tree_refusal(config: Any) -> str | None:
    """Return why prefixes of a model cannot be shared; None if they can, or if only a comparison would tell."""
    if getattr(config, "is_encoder_decoder", False):
        return "it is no decoder-only model"
    text = config.get_text_config()
    family = family_of(config) or family_of(text)
    if family is not None and family.refusal is not None:
        return family.refusal
    if family is None or not family.tested:
        bidirectional = getattr(text, "use_bidirectional_attention", None)
        if bidirectional:
            return f"its attention looks ahead (use_bidirectional_attention={bidirectional!r})"
    known = family_of(config) is not None  # a wrapper that is not may give its text model other positions
    shared = set(SHARED_LAYERS) if known else set(SHARED_LAYERS) - STATE_LAYERS
    others = sorted(set(getattr(text, "layer_types", None) or ()) - shared - set(_TOKENWISE))
    return f"its layers of type {', '.join(others)} carry state that branches cannot share" if others else None


def describe(config: Any) -> dict[str, str]:
    """Return what is known of a model's family, as printed by `vigos doctor --model`."""
    family, refusal = family_of(config), tree_refusal(config)
    tree = (
        f"no: {refusal}; take scoring 'separate'"
        if refusal
        else "exact, by a test"
        if family and family.tested
        else ("compared with separate forwards before the first update")
    )
    row = family or Family(config.model_type, (config.model_type,), layer_kinds(config), lora_targets=())
    return {
        "family": row.name if family else f"{row.name} (not in the table)",
        "layers": row.mixing,
        "prefix tree": tree,
        "default LoRA targets": ", ".join(row.lora_targets) or "all linear layers of the language model",
        "experts": ", ".join(row.experts) or "none",
        "thinking off": row.thinking or "no switch",
        "image token": row.image_token or "as the processor says",
    }


def table() -> str:
    """Return the families as a Markdown table, the part of docs/models.md that this module owns."""
    head = ("family", "`model_type`", "layers", "prefix tree", "default LoRA targets", "experts")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for family in FAMILIES:
        tree = "exact" if family.tested else f"no: {family.refusal}" if family.refusal else "compared at the start"
        targets = " ".join(f"`{name}`" for name in family.lora_targets) or "all linear layers"
        experts = " ".join(f"`{name}`" for name in family.experts) or "-"
        types = " ".join(f"`{name}`" for name in family.model_types)
        lines.append("| " + " | ".join((family.name, types, family.mixing, tree, targets, experts)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
