"""Compare what a run saved with what it trained, on one prompt: a folder that holds another model is an error."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vigos.divergence.api import linear_divergence
from vigos.method.encode import ScoredSequence, encode_prompt
from vigos.method.prompts import Prompts
from vigos.models.load import load_adapter
from vigos.models.parts import base_model, eval_mode, unwrap
from vigos.models.sharding import gathered_head
from vigos.scoring.hidden_states import hidden_states
from vigos.train.adapters import base_copy, plain_class

logger = logging.getLogger(__name__)

QUESTION = "What is the largest number that you can see, and which colour has it?"
COMPLETION = "A large 7, in red, above a small 3. It is seven."

# Mean distance of the log-probabilities in nats. In 16 bits merged weights are rounded once more, and another device
# may have computed them.
BOUND, BOUND_16_BIT = 1e-3, 0.1


class SavedModelError(ValueError):
    """A saved model is not the one that was trained."""


def fixed_sequence(processor: Any, prompts: Prompts, *, with_image: bool = True) -> ScoredSequence:
    """Return the student's prompt for a fixed question, and a fixed image, with a fixed completion."""
    from PIL import Image

    ramp = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3) * 7 % 256
    images = [Image.fromarray(ramp.astype(np.uint8))] if with_image else []
    prompt = encode_prompt(processor, prompts, "student", QUESTION, images=images)
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = torch.tensor(tokenizer(COMPLETION, add_special_tokens=False)["input_ids"][:24])
    return ScoredSequence(prompt, ids, torch.arange(len(ids)))


@torch.no_grad()
def logprobs_of(model: nn.Module, sequence: ScoredSequence) -> Tensor:
    """Return the log-probabilities (C,) of a completion on the CPU; every rank of a sharded model calls it together."""
    with eval_mode(model):
        hidden = hidden_states(model, [sequence], scoring="separate")
        with gathered_head(model) as head:
            labels = sequence.completion_ids.to(hidden.device)
            hidden = hidden.to(head.weight.dtype)
            out = linear_divergence(hidden, head, hidden, labels=labels)
    assert out.student_logprob is not None
    return out.student_logprob.float().cpu()


class SavedCheck:
    """Load each folder that a run saves and compare its log-probabilities with those of the trained model.

    Args:
        model: the trained model; every rank of a sharded one makes this together.
        sequence: what is compared on, as `fixed_sequence` makes it.
        mixed: the model computes in 16 bits, whatever its weights are.
        weights: as in `vigos.train.final.save_final`.
    """

    def __init__(
        self, model: nn.Module, sequence: ScoredSequence, weights: Mapping[str, Tensor] | None = None, *,
        mixed: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.sequence, self.weights, self.mixed = model, sequence, weights, mixed
        self.trained = logprobs_of(model, sequence)

    def __call__(self, name: str, folder: Path) -> None:
        """Raise SavedModelError, naming distance and bound, unless the folder holds the trained model.

        Args:
            name: what the folder holds: "adapter", "merged" or "model".
        """
        core: Any = unwrap(self.model)
        base = base_model(core)
        if name == "adapter":
            try:
                below = base_copy(core, self.weights)
            except RuntimeError as error:  # a model that somebody changed by hand
                kind, reason = type(base).__name__, " ".join(str(error).split())[:200]
                logger.warning("adapter/ is not compared: %s does not make the model under it (%s)", kind, reason)
                return
            loaded = load_adapter(below, folder)
        else:
            loaded = plain_class(base).from_pretrained(folder, dtype=base.dtype, use_safetensors=True)
        distance = (logprobs_of(loaded, self.sequence) - self.trained).abs().mean().item()
        bound = BOUND if base.dtype in (torch.float32, torch.float64) and not self.mixed else BOUND_16_BIT
        if not distance <= bound:
            raise SavedModelError(
                f"{name}/ was not written, for it was not the model that was trained: log-probabilities of "
                f"{len(self.trained)} tokens were {distance:.3g} nats away on average, where {bound:g} is rounding; "
                "the last checkpoint holds the trained weights"
            )
