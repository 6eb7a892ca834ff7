"""A language-model head as one argument: its weight, its bias, and what the model does to its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """One side's head: logits are softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    Attributes:
        weight: (V, D), in the dtype of the hidden states. A DTensor that is Shard(0) is a vocabulary-parallel head.
        bias: (V,) or None.
        scale: factor of the logits, positive (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: bound of the logits, positive (Gemma's `final_logit_softcapping`), or None.
        process_group: each rank's weight and bias are consecutive shards of the vocabulary over this group; None: they
            hold all of it.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    process_group: dist.ProcessGroup | None = None
