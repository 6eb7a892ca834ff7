"""Hidden states at the scored positions of many sequences, through the model's own forward.

`hidden_states` runs a transformers model and returns what its language-model head is applied to, without the head:

    out = model(**batch, output_hidden_states=True).hidden_states[-1]     # after the final norm
    rows = torch.cat([out[b, len(prompt) + scored - 1] for b, (prompt, scored) in enumerate(...)])

The head is switched off rather than bypassed: the model's own `forward` runs, so that mixed precision, adapters and
the hooks of DDP, FSDP and DeepSpeed wrappers work as in an ordinary step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vigos.method.encode import ScoredSequence
from vigos.models.families import mixing_layers
from vigos.models.parts import base_model, head_rows, inner_model, text_model
from vigos.models.routers import LoadBalance
from vigos.models.sharding import sharding_of
from vigos.models.vision_cache import VisionCache
from vigos.scoring.forwards import SCORINGS, Forward, Scoring, dummy_forward, plan_forwards
from vigos.scoring.tree_attention import installed

DEFAULT_TOKEN_BUDGET = 16_384  # tokens of one forward; a longer sequence gets a forward of its own


def hidden_states(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    *,
    scoring: Scoring = "tree",
    token_budget: int = DEFAULT_TOKEN_BUDGET,
    backend: str = "auto",
    pad_token_id: int | None = None,
    vision: VisionCache | None = None,
    dummy: ScoredSequence | None = None,
    balance: LoadBalance | None = None,
) -> Tensor:
    """Compute hidden states (M, D) that predict the scored tokens, in the order of `sequences` and of their `scored`.

    Differentiable when gradients are enabled. D is the width of the language-model head's input; M the sum of the
    lengths of `scored`; the dtype is what the model computes in. With a wrapped model every rank has to call this
    together: ranks that need fewer forwards run dummy forwards that give no rows.

    Args:
        model: a transformers model with a language-model head, bare, adapted by PEFT, or wrapped (DDP, FSDP, …).
        scoring: "tree" runs every distinct prefix once (see `vigos.PrefixTree`); "separate" runs right-padded batches.
        token_budget: tokens of one forward, padding included. A single longer sequence still gets its forward.
        backend: the attention of "tree", see `vigos.scoring.tree_attention`; "separate" uses the model's own.
        pad_token_id: fills padding, which no result depends on; None takes the model's, or 0.
        vision: where the features of images come from if the vision tower is frozen. "tree" encodes an image once
            anyway within a call; a cache carries that over to later calls, as from the teachers to the student.
        dummy: a sequence with an image. Where the vision tower is sharded or trained by several ranks, all of them have
            to run it in the same forwards: a rank without an image runs this one there, which gives no rows.
        balance: collects what the routers of a mixture say.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")

    def plan(members: Sequence[ScoredSequence], budget: int) -> list[Forward]:
        return plan_forwards(model, members, scoring, budget, backend, pad_token_id)

    forwards = _balance(model, sequences, plan(sequences, token_budget), plan, dummy)
    return _run(model, forwards, sum(len(s.scored) for s in sequences), vision, balance)


def _run(
    model: nn.Module,
    forwards: Sequence[Forward],
    num_rows: int,
    vision: VisionCache | None,
    balance: LoadBalance | None,
) -> Tensor:
    base = base_model(model)
    shown = [image.key for each in forwards if each.packed for image in each.images]
    if vision is None and len(set(shown)) < len(shown) and VisionCache.obstacle(base) is None:
        vision = VisionCache(max_images=len(shown))  # prompts that share an image but no prefix
    parts = []
    for each in forwards:
        inputs = each.build()
        plan = inputs.get("tree_plan")
        with ExitStack() as stack:
            if plan is not None:
                stack.enter_context(installed(base))
            if vision is not None and each.images:
                stack.enter_context(vision.serving(base, each.images))
            if balance is not None:
                stack.enter_context(balance.recording(each.uses))
            parts.append(head_rows(model, inputs, each.positions))
        if plan is not None:
            layers = mixing_layers(base.config)
            if plan.calls != layers:
                raise ValueError(
                    f"scoring='tree' needs {layers} layers whose attention or state takes the plan, got {plan.calls} "
                    f"of {type(base).__name__}; use scoring='separate'"
                )
    if parts:
        rows = torch.cat([each.rows for each in forwards])
        order = torch.empty_like(rows)
        order[rows] = torch.arange(len(rows))
        # Dummy forwards give no rows but stay in the graph, so that their backward hooks run on this rank too.
        out = torch.cat(parts).index_select(0, order.to(parts[0].device))
    else:
        weight = base.get_input_embeddings().weight
        out = torch.zeros(0, base.config.get_text_config().hidden_size, dtype=weight.dtype, device=weight.device)
    assert len(out) == num_rows
    return out


def _balance(
    model: nn.Module,
    sequences: Sequence[ScoredSequence],
    forwards: list[Forward],
    plan: Callable[[Sequence[ScoredSequence], int], list[Forward]],
    dummy: ScoredSequence | None,
) -> list[Forward]:
    """Add dummy forwards, which give no rows, if forwards are collective.

    Every rank then runs as many, with the vision tower in the same ones.
    """
    replicated = _reduces_gradients(model) and torch.is_grad_enabled()  # else without the wrapper
    sharded = sharding_of(model) != "unsharded"
    if not distributed() or not (replicated or sharded):
        return forwards
    base = base_model(model)
    most = torch.tensor(len(forwards), device=base.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    forwards = forwards + [dummy_forward(base)] * (int(most) - len(forwards))
    trained = replicated and _trains_vision(base)
    if not forwards or not (trained or (sharded and hasattr(inner_model(base), "get_image_features"))):
        return forwards
    # Units of a sharded tower are gathered by its forward; wrappers wait for the gradients of a trained one.
    shows = torch.tensor([trained or bool(each.images) for each in forwards], dtype=torch.int32, device=base.device)
    dist.all_reduce(shows, op=dist.ReduceOp.MAX)
    first_row = torch.tensor([0, *(len(s.scored) for s in sequences)]).cumsum(0).tolist()
    for k, needed in enumerate(shows.tolist()):
        if needed and not forwards[k].images:
            shown = dummy or next((s for s in sequences if s.prompt.images is not None), None)
            if shown is None:
                raise ValueError(
                    "dummy must be a sequence with an image: other ranks run the vision tower, and this has none"
                )
            members = forwards[k].members
            (joined,) = plan([*(sequences[i] for i in members), shown], sys.maxsize)
            rows = torch.tensor([r for i in members for r in range(first_row[i], first_row[i + 1])], dtype=torch.int64)
            mine = joined.rows < len(rows)
            forwards[k] = replace(
                joined, positions=joined.positions[mine], rows=rows[joined.rows[mine]], members=members
            )
    return forwards


def _reduces_gradients(model: nn.Module) -> bool:
    """Return True under DDP and DeepSpeed: every rank has to have the same gradients, in the same buckets."""
    return isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine"


def _trains_vision(base: Any) -> bool:
    """Return True if anything but the language model and its head is trained."""
    language = {id(p) for module in (text_model(base), base.get_output_embeddings()) for p in module.parameters()}
    return any(p.requires_grad and id(p) not in language for p in base.parameters())


def distributed() -> bool:
    """Return True if there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
