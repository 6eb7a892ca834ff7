"""The parts of a model that is adapted, wrapped or both: what is inside, its head, and what its head is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vigos.models.compat import WRAPPED


def unwrap(model: nn.Module) -> nn.Module:
    """Return the transformers or PEFT model inside DDP, FSDP, DeepSpeed and torch.compile wrappers."""
    inner: nn.Module | None = model
    while inner is not None:
        model = inner
        inside = dict(model.named_children())
        inner = next((inside[name] for name in WRAPPED if name in inside), None)
    return model


def base_model(model: nn.Module) -> Any:
    """Return the transformers model inside wrappers and PEFT. Raises ValueError for other models."""
    core: Any = unwrap(model)
    base = core.get_base_model() if hasattr(core, "get_base_model") else core
    if not hasattr(base, "get_output_embeddings"):
        raise ValueError(f"model must be a transformers model with a language-model head, got {type(base).__name__}")
    return base


def lm_head(model: nn.Module) -> nn.Module:
    """Return the language-model head inside wrappers and PEFT. Raises ValueError without one."""
    base = base_model(model)
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have a language-model head, got {type(base).__name__}, which has none")
    return head


def inner_model(base: Any) -> Any:
    """Return the model under the head: for multimodal families the one that holds the vision tower."""
    return getattr(base, base.base_model_prefix, base)


def text_model(base: Any) -> Any:
    """Return the decoder under the head, without the vision tower."""
    inner = inner_model(base)
    for name in ("language_model", "text_model"):
        if isinstance(getattr(inner, name, None), nn.Module):
            return getattr(inner, name)
    return inner


def token_types_name(base: Any) -> str | None:
    """Return the name of the argument for token types of prompts with images; None if the model takes none."""
    accepted = {name for module in (base, inner_model(base)) for name in signature(type(module).forward).parameters}
    return next((name for name in ("mm_token_type_ids", "token_type_ids") if name in accepted), None)


def image_token_id_of(base: Any) -> int | None:
    """Return the id that stands for image features; None if the configuration names none."""
    token = getattr(base.config, "image_token_id", getattr(base.config, "image_token_index", None))
    return token if isinstance(token, int) else None


def head_rows(model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Run `model(**inputs)` and return rows of what its language-model head was given. No logits are computed.

    The innermost module's `forward` is redirected for the call, so that a wrapper's own forward, with its hooks, sees
    the returned tensor as the module's output.

    Args:
        positions: (m,) int64, which of the B * T positions are returned, as (m, D).
    """
    core, head = unwrap(model), lm_head(model)
    if isinstance(model, DistributedDataParallel) and not torch.is_grad_enabled():
        model = model.module  # DDP's forward broadcasts buffers, which ranks with other counts would wait for

    def redirected(*args: Any, **kwargs: Any) -> Tensor:
        with replaced_forward(core, original), ExitStack() as stack:
            caught: list[Tensor] = []

            def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
                caught.append(hidden)
                return hidden

            stack.enter_context(replaced_forward(head, keep))
            original(*args, **kwargs)
        if len(caught) != 1:
            raise ValueError(
                f"model must apply its language-model head once a forward, got {len(caught)} times "
                f"in {type(base_model(model)).__name__}"
            )
        return caught[0].flatten(0, 1).index_select(0, positions.to(caught[0].device))

    original = core.forward
    with replaced_forward(core, redirected):
        return model(**inputs)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put `forward` in place of the module's own, inside; its hooks and those of wrappers around it still run."""
    previous = module.__dict__.get("forward")  # accelerate's autocast and offload hooks live on the instance
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, inside; restore the mode that each had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
