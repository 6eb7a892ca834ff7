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
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
MARKED = re.compile(r"(<!-- memory -->\n).*?(<!-- end -->)", re.S)
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5-VL, from its published configuration."""

    name: str
    D: int  # hidden size
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    V: int
    tied: bool
    vision_intermediate: int = 3420
    head_dim: int = 128
    vision_layers: int = 32
    vision_hidden: int = 1280

    @property
    def kv(self) -> int:
        """Width of the keys of a layer."""
        return self.kv_heads * self.head_dim

    @property
    def layer(self) -> int:
        """Parameters of a layer of the language model."""
        q = self.heads * self.head_dim
        attention = self.D * q + q + 2 * (self.D * self.kv + self.kv) + q * self.D
        return attention + 3 * self.D * self.intermediate + 2 * self.D

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of a head that is not tied to it."""
        return self.V * self.D

    @property
    def vision(self) -> int:
        """Parameters of the vision tower and its merger."""
        H, F = self.vision_hidden, self.vision_intermediate
        block = 3 * H * H + 3 * H + H * H + H + 3 * H * F + 2 * F + H + 2 * H
        merger = H + 4 * H * 4 * H + 4 * H + 4 * H * self.D + self.D
        return 3 * 2 * 14 * 14 * H + self.vision_layers * block + merger

    @property
    def language(self) -> int:
        """Parameters of the language model without its head."""
        return self.layers * self.layer + self.embedding + self.D

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.vision + self.language + (0 if self.tied else self.embedding)

    def lora(self, r: int) -> int:
        """Parameters of an adapter of rank r on q, k, v, o, gate, up and down."""
        q = self.heads * self.head_dim
        widths = [(self.D, q), (self.D, self.kv), (self.D, self.kv), (q, self.D)]
        widths += [(self.D, self.intermediate)] * 2 + [(self.intermediate, self.D)]
        return self.layers * sum(r * (a + b) for a, b in widths)


SHAPES = {
    "3B": Shape("Qwen2.5-VL-3B", 2048, 36, 16, 2, 11_008, 151_936, True),
    "7B": Shape("Qwen2.5-VL-7B", 3584, 28, 28, 4, 18_944, 152_064, False),
    "32B": Shape("Qwen2.5-VL-32B", 5120, 64, 40, 8, 27_648, 152_064, False, vision_intermediate=3456),
}


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
    # The insides of one layer: queries, keys, values, attention's output, gate, up and their product.
    inside = 4 * shape.D + 2 * shape.kv + 3 * shape.intermediate
    parts = {
        # In full without FSDP2 the whole model is loaded in float32: a bfloat16 weight does not feel a small step.
        "weights": (2 if run.lora or run.sharded else 4) * frozen / share + 4 * trained / share,
        "gradients, AdamW": 12 * trained / share,
        # Full fine-tuning: the frozen copy, and the student's own pieces while it stands in their place.
        "teacher's weights": 0.0 if run.lora else (4 + (4 if run.sharded else 0)) * trained / share,
        # Two layers at a time, and the head with the final norm; without sharding autocast's copy of a layer.
        "gathered": 2 * one_layer + 2 * shape.embedding if run.sharded else (0 if run.lora else one_layer),
        # The input of each layer, and one layer's insides, computed anew, with their gradients.
        "activations": run.pack * 2 * (shape.layers * shape.D + 2 * inside),
        # Teachers run without gradients: one layer's insides, then their rows; they end before the student starts.
        "teacher's rows": 2 * run.rows * shape.D,
        # Hidden rows, their gradient in float32, and what impl="triton" allows its chunk (512 MiB).
        "divergence": run.rows * shape.D * (2 + 4) + (512 << 20),
    }  # fmt: skip
    whole = 2 * shape.parameters + (4 * trained if run.lora else 0)
    cache = run.rollouts * run.length * shape.layers * 2 * shape.kv * 2
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
    names = [n for n in memory(SHAPES["3B"], RUNS["LoRA, FSDP2 on 8"])]
    head = ["GiB on each GPU", *names[:-2], "**training**", "**rollouts**"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for size, shape in SHAPES.items():
        for label, run in RUNS.items():
            values = memory(shape, run)
            cells = [f"{values[n]:.1f}" for n in names[:-2]] + [f"**{values[n]:.0f}**" for n in names[-2:]]
            lines.append(f"| {size} {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
