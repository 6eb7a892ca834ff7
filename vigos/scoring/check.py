"""Check that the prefix tree reproduces separate forwards of the model at hand, for student and teacher alike.

A family of models in which a later token changes what an earlier one sees cannot share prefixes, and nothing but its
code says so. So the first states of each side are compared with those of sequences run alone; a mismatch takes both
sides to separate forwards, since a student trained on wrong states is no better for a teacher that is right.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vigos.method.encode import ScoredSequence
from vigos.models.families import layer_kinds
from vigos.models.parts import base_model, eval_mode, inner_model
from vigos.models.routers import LoadBalance
from vigos.models.vision_cache import VisionCache
from vigos.scoring.forwards import SCORINGS, Scoring
from vigos.scoring.hidden_states import DEFAULT_TOKEN_BUDGET, distributed, hidden_states

Verify = Literal["first", "never", "always"]
Side = Literal["student", "teacher"]

# How much of the model a comparison has seen: nothing, text, an image (which text comes with).
_NOTHING, _TEXT, _IMAGE = range(3)


class TreeCheck:
    """Decide for student and teacher together if they are scored by the tree.

    Args:
        verify: "first" compares each side once, and once more when the first image comes; "always" in each call;
            "never" trusts the tree.

    Attributes:
        failed: True once a comparison has failed; both sides are scored separately from then on.
        deviation: largest distance that the last comparison found, relative to the norm of a hidden state.
    """

    def __init__(self, verify: Verify = "first") -> None:
        if verify not in ("first", "never", "always"):
            raise ValueError(f"verify must be 'first', 'never' or 'always', got {verify!r}")
        self.verify, self.failed, self.deviation = verify, False, 0.0
        self._seen: dict[str, int] = {"student": _NOTHING, "teacher": _NOTHING}

    def scoring(self, wanted: Scoring) -> Scoring:
        """Return the scoring that is safe: `wanted`, or "separate" after a mismatch."""
        return "separate" if self.failed else wanted

    def hidden_states(
        self,
        model: nn.Module,
        sequences: Sequence[ScoredSequence],
        side: Side,
        *,
        scoring: Scoring = "tree",
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        backend: str = "auto",
        vision: VisionCache | None = None,
        dummy: ScoredSequence | None = None,
        balance: LoadBalance | None = None,
    ) -> Tensor:
        """Compute hidden states (M, D) as `vigos.scoring.hidden_states.hidden_states` does, once they are checked.

        The comparison runs in evaluation mode and without gradients: what it costs is two or three forwards, once.
        """
        if scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
        options: dict[str, Any] = {"token_budget": token_budget, "backend": backend, "vision": vision, "dummy": dummy}
        hidden = None
        if self.scoring(scoring) == "tree" and self._due(model, sequences, side):
            with torch.no_grad(), eval_mode(model):
                hidden = hidden_states(model, sequences, scoring="tree", **options)
                self._compare(model, sequences, hidden, side, token_budget, dummy)
        if hidden is None or balance is not None or self.failed or torch.is_grad_enabled() or model.training:
            hidden = hidden_states(model, sequences, scoring=self.scoring(scoring), balance=balance, **options)
        return hidden

    def _due(self, model: nn.Module, sequences: Sequence[ScoredSequence], side: Side) -> bool:
        """Return True if there is something to compare that was not, on any rank."""
        if self.verify == "never":
            return False
        seen = -1 if self.verify == "always" else self._seen[side]
        if seen >= (_IMAGE if hasattr(inner_model(base_model(model)), "get_image_features") else _TEXT):
            return False
        scored = [s for s in sequences if _telling(s)]
        available = max((_TEXT if s.prompt.images is None else _IMAGE for s in scored), default=_NOTHING)
        if distributed():
            most = torch.tensor(available, device=base_model(model).device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            available = int(most)
        return available > max(seen, _NOTHING)

    def _compare(
        self,
        model: nn.Module,
        sequences: Sequence[ScoredSequence],
        hidden: Tensor,
        side: Side,
        token_budget: int,
        dummy: ScoredSequence | None,
    ) -> None:
        """Compare one example's states with its sequences run alone; a mismatch warns and ends sharing.

        The yardstick is what padding does to the same sequences in the model's own forward: rounding in 16 bits moves
        a deep model's states by percents, and no fixed tolerance fits both that and a wrong mask.
        """
        scored = [(i, s) for i, s in enumerate(sequences) if _telling(s)]
        # An example with an image where there is one: wrong masks of images show nowhere else.
        first = next((s.owner[0] for _, s in scored if s.prompt.images is not None), None)
        first = first if first is not None else next((s.owner[0] for _, s in scored), None)
        ends = torch.tensor([len(s.scored) for s in sequences], dtype=torch.int64).cumsum(0)
        chosen = [(i, s) for i, s in scored if s.owner[0] == first]
        subset = [s for _, s in chosen]
        alone = hidden_states(model, subset, scoring="separate", token_budget=1, dummy=dummy)
        padded = hidden_states(model, subset, scoring="separate", token_budget=token_budget, dummy=dummy)
        seen, mismatch = _NOTHING, False
        if chosen:
            rows = torch.cat([hidden[int(ends[i]) - len(s.scored) : int(ends[i])] for i, s in chosen])
            self.deviation, usual = _deviation(rows, alone), _deviation(padded, alone)
            allowed = 4 * usual + (1e-4 if hidden.dtype in (torch.float32, torch.float64) else 1e-2)
            mismatch = not self.deviation <= allowed  # NaN is a mismatch
            seen = max(_TEXT if s.prompt.images is None else _IMAGE for s in subset)
        if distributed():  # every rank goes on the same way
            votes = torch.tensor([seen, mismatch], dtype=torch.int32, device=hidden.device)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            seen, mismatch = int(votes[0]), bool(votes[1])
        self._seen[side] = max(self._seen[side], seen)
        if mismatch:
            self.failed = True
            base = base_model(model)
            warnings.warn(
                f"prefix-tree scoring does not reproduce {type(base).__name__} ({layer_kinds(base.config)}): hidden "
                f"states of the {side} deviate by {self.deviation:.1e} of their norm (example {first}); student and "
                "teacher go on with scoring='separate'",
                stacklevel=3,
            )


def _telling(sequence: ScoredSequence) -> bool:
    """Return False for sequences that say nothing of the tree: not scored, or one token after one token."""
    return len(sequence.scored) > 0 and len(sequence.prompt.ids) > 1


def _deviation(a: Tensor, b: Tensor) -> float:
    """Return the largest relative distance ||a - b|| / ||b|| of a row."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).max())
