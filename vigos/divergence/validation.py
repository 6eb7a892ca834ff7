"""What `linear_divergence` and `logits_divergence` are given, checked before anything is computed.

A `ValueError` names the argument, what was wanted and what came. Nothing here waits for a device: ranges of indices are
checked by the operators (`vigos.divergence.ops`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.divergence.engines import IMPLS
from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL, Supervision

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _described(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else repr(x)


def check_matrix(x: object, name: str, of: str) -> None:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in FLOATS:
        hint = "; flatten batch and time first" if isinstance(x, Tensor) and x.dim() > 2 else ""
        raise ValueError(f"{name} must be a float tensor {of}, got {_described(x)}{hint}")


def check_like(x: Tensor, name: str, other: Tensor, other_name: str, *, dtype: bool = True) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")
    if dtype and x.dtype != other.dtype:
        raise ValueError(f"{name} must be {other.dtype} like {other_name}, got {x.dtype}")


def check_head(weight: object, name: str, hidden: Tensor, hidden_name: str) -> None:
    check_matrix(weight, name, "(V, D)")
    assert isinstance(weight, Tensor)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name} must be (V, {hidden.shape[1]}) to project {hidden_name} {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{name} must have at least one vocabulary row, got {tuple(weight.shape)}")
    check_like(weight, name, hidden, hidden_name)


def check_bias(bias: object, name: str, weight: Tensor, weight_name: str) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1] or bias.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be a float tensor ({weight.shape[0]},) like {weight_name}, got {_described(bias)}"
        )
    check_like(bias, name, weight, weight_name)


def check_scalars(
    temperature: float, beta: float, entry_clip: float | None, softcap: float | None, scale: float, impl: str
) -> None:
    for name, value, fits, wanted in (
        ("temperature", temperature, lambda x: 0 < x < float("inf"), "a positive number"),
        ("beta", beta, lambda x: 0 < x < 1, "strictly between 0 and 1 (forward and reverse KL are kinds of their own)"),
        ("entry_clip", entry_clip, lambda x: x is None or x > 0, "a positive number or None"),
        ("logit_softcap", softcap, lambda x: x is None or 0 < x < float("inf"), "a positive number or None"),
        ("logit_scale", scale, lambda x: 0 < x < float("inf"), "a positive number"),
    ):
        if isinstance(value, bool | Tensor) or not (value is None or isinstance(value, int | float)) or not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if impl != "auto" and impl not in IMPLS:
        raise ValueError(f'impl must be "auto" or one of {", ".join(map(repr, IMPLS))}, got {impl!r}')


def check_vocab_size(vocab_size: int | None, v: int, sharded: bool) -> int:
    """-1 stands for "all of it", which a rank that holds a shard cannot know yet."""
    if vocab_size is None:
        return -1
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"vocab_size must be a positive integer or None, got {vocab_size!r}")
    if not sharded and vocab_size > v:
        raise ValueError(f"vocab_size must be at most the heads' {v} vocabulary entries, got {vocab_size}")
    return vocab_size


def supervision_tensors(supervision: Supervision | None, n: int, m: int, device: torch.device) -> tuple[Tensor, ...]:
    """The five fields as tensors (R,) of their own dtypes, where the caller left them."""
    if supervision is None:
        if n != m:
            raise ValueError(
                f"supervision=None meets row i with row i and needs as many teacher rows as student rows ({n}), "
                f"got {m}; pass a Supervision that says which rows meet"
            )
        supervision = Supervision.aligned(n, device=device)
    if not isinstance(supervision, Supervision):
        raise ValueError(f"supervision must be a vigos.Supervision or None, got {type(supervision).__name__}")
    rows = supervision.student_row
    if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"supervision.student_row must be an int64 tensor (R,), got {_described(rows)}")
    r = rows.shape[0]
    fields = []
    for name, dtype, wanted in (
        ("teacher_row", torch.int64, "int64"),
        ("kind", torch.int8, "integers"),
        ("weight", torch.float32, "floats"),
        ("clip", torch.float32, "floats"),
    ):
        value = getattr(supervision, name)
        if not isinstance(value, Tensor):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or (name == "kind" and value not in (FORWARD_KL, REVERSE_KL, JSD)):
                raise ValueError(f"supervision.{name} must be {wanted} (R,) or one number, got {value!r}")
            value = torch.full((r,), value, dtype=dtype, device=rows.device)
        is_float = value.dtype.is_floating_point
        fits = value.dtype == torch.int64 if name == "teacher_row" else is_float == (wanted == "floats")
        if value.shape not in ((r,), ()) or not fits or value.dtype in (torch.bool, torch.complex64):
            raise ValueError(f"supervision.{name} must be {wanted} ({r},) like student_row, got {_described(value)}")
        fields.append(value.detach().to(dtype).expand(r).contiguous())
    for name, value in zip(("student_row", "teacher_row", "kind", "weight", "clip"), (rows, *fields), strict=True):
        if value.device.type != "cpu" and value.device != device:
            raise ValueError(f"supervision.{name} must be on the CPU or on {device}, got {value.device}")
    return (rows, *fields)


def check_labels(labels: object, r: int, device: torch.device) -> None:
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != (r,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be an int64 tensor ({r},), one id for each supervised row, got {_described(labels)}"
        )
    if labels.device.type != "cpu" and labels.device != device:
        raise ValueError(f"labels must be on the CPU or on {device}, got {labels.device}")


def local(x: Any, name: str, group: dist.ProcessGroup | None) -> tuple[Any, dist.ProcessGroup | None]:
    """A DTensor's shard and the group it is sharded over; anything else unchanged."""
    if x is None or type(x) in (Tensor, torch.nn.Parameter) or not hasattr(x, "to_local"):
        return x, group
    from torch.distributed.tensor import Replicate, Shard

    if all(isinstance(p, Replicate) for p in x.placements):
        return x.to_local(), group
    if x.device_mesh.ndim != 1 or tuple(x.placements) != (Shard(0),):
        raise ValueError(f"{name} must be replicated or Shard(0) over a one-dimensional mesh, got {x.placements}")
    own = x.device_mesh.get_group()
    if group is not None and group.group_name != own.group_name:
        raise ValueError(f"{name} is sharded over another process group than process_group or the other head")
    return x.to_local(), own
