"""The routers of a mixture of experts, and the loss that keeps experts evenly used (Switch Transformer, eq. 4 to 6).

    share = one_hot(topk(softmax(logits), k)).sum(1).mean(0)     # (E,) of tokens that go to an expert, summing to k
    loss = E * (share * softmax(logits).mean(0)).sum()           # k where all experts are used alike

Means run over the tokens of all layers, as in transformers. Here they also run over all forwards of a call, and a token
of a shared prefix counts as often as sequences go through it, so that the tree gives the loss of separate forwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vigos.models.compat import router_recorder
from vigos.models.parts import text_model


def routers(base: Any) -> list[tuple[nn.Module, int]]:
    """Return the routers of a transformers model's decoder, each with the place of its logits in what it returns."""
    decoder = text_model(base)
    recorder = router_recorder(decoder)
    kind, index = getattr(recorder, "target_class", recorder), getattr(recorder, "index", 0)
    return [(module, index) for module in decoder.modules() if kind is not None and isinstance(module, kind)]


class LoadBalance:
    """Collect what routers say in a call's forwards, and return the load-balancing loss of all of them together.

    Raises ValueError for a model without experts.
    """

    def __init__(self, base: Any) -> None:
        self._routers = routers(base)
        if not self._routers:
            raise ValueError(f"router_aux_loss_coef must be 0 for {type(base).__name__}, which has no routers")
        self._sums: list[tuple[Tensor, Tensor, Tensor]] = []

    @contextmanager
    def recording(self, uses: Tensor) -> Iterator[None]:
        """Collect, inside; `uses` (B * T,) says how many sequences each token of the forward stands for."""
        hooks = [
            router.register_forward_hook(lambda module, _, out, index=index: self._add(module, out[index], uses))
            for router, index in self._routers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, router: Any, logits: Tensor, uses: Tensor) -> None:
        weight = uses.to(logits.device, torch.float32)
        probabilities = logits.flatten(0, -2).float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(router.top_k).indices, 1.0)
        self._sums.append((weight @ chosen, weight @ probabilities, weight.sum()))

    def loss(self) -> Tensor:
        """Return the loss, a differentiable scalar; 0 where no token was counted."""
        chosen, probabilities, tokens = (torch.stack(each).sum(0) for each in zip(*self._sums, strict=True))
        return len(chosen) * (chosen * probabilities).sum() / tokens.clamp_min(1.0) ** 2
