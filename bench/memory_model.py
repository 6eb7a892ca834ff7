"""GPU memory of a training run, worked out from shapes: nothing here was measured.

python bench/memory_model.py            # rewrite the table of docs/scaling.md
python bench/memory_model.py --check    # exit status 1 if the page says something else

Bytes of a parameter: frozen weights 2 (bfloat16); trained ones 4 (weight) + 4 (gradient) + 8 (AdamW) in float32, which
is what peft makes of an adapter and FSDP2 with mixed precision of a whole model. Left out: CUDA's own (about 1 GiB),
the allocator's gaps (plan for 10 %), communication buffers, and what images' patches take while they are encoded.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
MARKED = re.compile(r"(<!-- memory -->\n).*?(<!-- end -->)", re.S)
GIB = 2**30


TEXT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
TEXT += ("intermediate_size", "head_dim")
TOWER = ("depth", "hidden_size", "intermediate_size")


def published(name: str, tied: bool, text: tuple[int, ...], tower: tuple[int, ...] = (), **vision: Any) -> Any:
    """A transformers configuration with the numbers of a published one, in the order of TEXT and TOWER."""
    from transformers import AutoConfig

    options = dict(zip(TEXT, text, strict=False)) | {"tie_word_embeddings": tied}
    vision |= dict(zip(TOWER, tower, strict=False)) | ({} if name == "gemma3" else {"out_hidden_size": text[1]})
    return AutoConfig.for_model(name, text_config=options, vision_config=vision, tie_word_embeddings=tied)


CONFIGS: dict[str, Callable[[], Any]] = {
    "3B": lambda: published("qwen2_5_vl", True, (151_936, 2048, 36, 16, 2, 11_008), (32, 1280, 3420)),
    "7B": lambda: published("qwen2_5_vl", False, (152_064, 3584, 28, 28, 4, 18_944), (32, 1280, 3420)),
    "32B": lambda: published("qwen2_5_vl", False, (152_064, 5120, 64, 40, 8, 27_648), (32, 1280, 3456)),
    "Qwen3-VL-4B": lambda: published(
        "qwen3_vl", True, (151_936, 2560, 36, 32, 8, 9728, 128), (24, 1024, 4096), deepstack_visual_indexes=[5, 11, 17]
    ),
    "Qwen3-VL-8B": lambda: published("qwen3_vl", False, (151_936, 4096, 36, 32, 8, 12_288, 128), (27, 1152, 4304)),
    "Qwen3.5-4B": lambda: published("qwen3_5", True, (248_320, 2560, 32, 16, 4, 9216, 256), (24, 1024, 4096)),
    "Qwen3.5-9B": lambda: published("qwen3_5", False, (248_320, 4096, 32, 16, 4, 12_288, 256), (27, 1152, 4304)),
    "Gemma 3 4B": lambda: published(
        "gemma3", True, (262_208, 2560, 34, 8, 4, 10_240, 256), hidden_size=1152, intermediate_size=4304,
        num_hidden_layers=27, num_attention_heads=16, image_size=896, patch_size=14,
    ),
}  # fmt: skip


class Shape:
    """Counts of a model that transformers builds without memory.

    Attributes:
        D: hidden size. layers: of the language model. layer: parameters of its largest.
        parameters: all. language: of the language model, its embedding included. embedding: of the embedding alone.
        tied: head and embedding are one matrix. inside: values a token inside one layer: what its linear layers return.
        cache: bytes a token of keys and values, in bfloat16. state: bytes a sequence of recurrent states, in float32.
    """

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        text, decoder = config.get_text_config(), model.get_decoder()
        self.D, self.layers, self.tied = text.hidden_size, text.num_hidden_layers, config.tie_word_embeddings
        self.parameters, self.language = (sum(p.numel() for p in part.parameters()) for part in (model, decoder))
        self.layer = max(sum(p.numel() for p in layer.parameters()) for layer in decoder.layers)
        self.embedding = text.vocab_size * text.hidden_size
        linear = [[m for m in layer.modules() if isinstance(m, torch.nn.Linear)] for layer in decoder.layers]
        self.inside = max(sum(m.out_features for m in each) + text.intermediate_size for each in linear)
        self._widths = sum(m.in_features + m.out_features for each in linear for m in each)
        attention = sum(kind != "linear_attention" for kind in getattr(text, "layer_types", None) or [""] * self.layers)
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cache = attention * 2 * text.num_key_value_heads * head * 2
        self.state = 0
        if attention < self.layers:
            values = text.linear_num_value_heads * text.linear_value_head_dim
            self.state = (self.layers - attention) * values * text.linear_key_head_dim * 4

    def lora(self, r: int) -> int:
        """Parameters of an adapter of rank r on the linear layers of all blocks."""
        return r * self._widths


@dataclass(frozen=True)
class Run:
    """A way to train. `gpus` share weights under FSDP2 (`sharded`); `pack` is token_budget."""

    lora: bool
    gpus: int
    sharded: bool
    pack: int = 16_384
    rows: int = 8192  # supervised tokens of a micro-batch
    rollouts: int = 8  # that run at once on a GPU
    length: int = 3072  # prompt and completion
    r: int = 64


def memory(shape: Shape, run: Run) -> dict[str, float]:
    """GiB on one GPU by purpose, gradient checkpointing on; `training` and `rollouts` are the two peaks."""
    share = run.gpus if run.sharded else 1
    # Full: the language model; the head, and an embedding tied to it, stay frozen (train_head=False).
    trained = shape.lora(run.r) if run.lora else shape.language - (shape.embedding if shape.tied else 0)
    frozen = shape.parameters - (0 if run.lora else trained)
    one_layer = 2 * shape.layer
    parts = {
        # In full without FSDP2 the whole model is loaded in float32: a bfloat16 weight does not feel a small step.
        "weights": (2 if run.lora or run.sharded else 4) * frozen / share + 4 * trained / share,
        "gradients, AdamW": 12 * trained / share,
        # Full fine-tuning: the frozen copy, and the student's own pieces while it stands in their place.
        "teacher's weights": 0.0 if run.lora else (4 + (4 if run.sharded else 0)) * trained / share,
        # Two layers at a time, and the head with the final norm; without sharding autocast's copy of a layer.
        "gathered": 2 * one_layer + 2 * shape.embedding if run.sharded else (0 if run.lora else one_layer),
        # The input of each layer, and one layer's insides, computed anew, with their gradients.
        "activations": run.pack * 2 * (shape.layers * shape.D + 2 * shape.inside),
        # Teachers run without gradients: one layer's insides, then their rows; they end before the student starts.
        "teacher's rows": 2 * run.rows * shape.D,
        # Hidden rows, their gradient in float32, and what impl="triton" allows its chunk (512 MiB).
        "divergence": run.rows * shape.D * (2 + 4) + (512 << 20),
    }  # fmt: skip
    whole = 2 * shape.parameters + (4 * trained if run.lora else 0)
    cache = run.rollouts * (run.length * shape.cache + shape.state)
    resident = parts["weights"] + parts["gradients, AdamW"] + parts["teacher's weights"]
    totals = {
        "training": sum(parts.values()),
        "rollouts": resident + (whole if run.sharded else 0) + cache,
    }
    return {name: value / GIB for name, value in (parts | totals).items()}


RUNS = {
    "LoRA, 1 GPU or DDP": Run(lora=True, gpus=1, sharded=False),
    "LoRA, FSDP2 on 8": Run(lora=True, gpus=8, sharded=True),
    "full, 1 GPU or DDP": Run(lora=False, gpus=1, sharded=False),
    "full, FSDP2 on 8": Run(lora=False, gpus=8, sharded=True),
    "full, FSDP2 on 32": Run(lora=False, gpus=32, sharded=True),
}


def page_table() -> str:
    """The table of docs/scaling.md, in Markdown."""
    head, lines = list[str](), list[str]()
    for size, make in CONFIGS.items():
        shape = Shape(make())
        for label, run in RUNS.items():
            if size[0].isdigit() or label in ("LoRA, 1 GPU or DDP", "full, FSDP2 on 8"):
                values = memory(shape, run)
                names = list(values)
                head = ["GiB on each GPU", *names[:-2], "**training**", "**rollouts**"]
                cells = [f"{values[n]:.1f}" for n in names[:-2]] + [f"**{values[n]:.0f}**" for n in names[-2:]]
                lines.append(f"| {size} {label} | " + " | ".join(cells) + " |")
    return "\n".join(["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1), *lines]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = MARKED.sub(lambda m: m.group(1) + page_table() + m.group(2), old)
    if check:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
