"""Checks of the arguments of `linear_divergence` and `logits_divergence`, before anything is computed.

A `ValueError` names the argument, what was wanted and what came. Nothing here waits for a device: ranges of indices are
checked by the operators (`vigos.divergence.call`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.divergence.engines import IMPLS
from vigos.divergence.head import Head
from vigos.divergence.supervision import KINDS, Supervision

T = TypeVar("T")
SMALLEST_BETA = 1e-30  # a JSD is about beta times a KL, and float32 ends at 1e-38
REDUCTIONS = ("sum", "mean", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _described(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else repr(x)


def check_rows(x: object, name: str, sizes: str) -> None:
    """Refuse anything but a float tensor of rows, with one leading dimension or more."""
    if not isinstance(x, Tensor) or x.dim() < 2 or x.dtype not in FLOATS:
        raise ValueError(f"{name} must be a float tensor {sizes}, got {_described(x)}")


def check_like(x: Tensor, name: str, other: Tensor, other_name: str, *, dtype: bool = True) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")
    if dtype and x.dtype != other.dtype:
        raise ValueError(f"{name} must be {other.dtype} like {other_name}, got {x.dtype}")


def check_head(weight: object, name: str, hidden: Tensor, hidden_name: str) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in FLOATS:
        raise ValueError(f"{name} must be a float tensor (V, D), got {_described(weight)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name} must be (V, {hidden.shape[-1]}) to project {hidden_name} {tuple(hidden.shape)}, "
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


def head_of(head: object, name: str) -> Head:
    """Return the head, made of a bare weight if it is one, its scale and softcap checked."""
    if isinstance(head, Tensor):
        return Head(head)
    if not isinstance(head, Head):
        raise ValueError(f"{name} must be a vigos.Head or a weight (V, D), got {type(head).__name__}")
    _check_numbers(
        (f"{name}.scale", head.scale, lambda x: 0 < x < float("inf"), "a positive number"),
        (f"{name}.softcap", head.softcap, lambda x: x is None or 0 < x < float("inf"), "a positive number or None"),
    )
    return head


def local_head(head: Head, name: str, hidden: Tensor, hidden_name: str) -> Head:
    """Return the head as this rank holds it, cast as an autocast asks and checked to project `hidden` (..., D)."""
    weight, group = local(head.weight, f"{name}.weight", head.process_group)
    bias, group = local(head.bias, f"{name}.bias", group)
    weight, bias = autocast(weight, hidden.device), autocast(bias, hidden.device)
    check_head(weight, f"{name}.weight", hidden, hidden_name)
    check_bias(bias, f"{name}.bias", weight, f"{name}.weight")
    return replace(head, weight=weight, bias=bias, process_group=group)


def check_heads(head: Head, teacher: Head) -> None:
    """Refuse two heads whose vocabularies, or shards of it, differ."""
    v, v_t = head.weight.shape[0], teacher.weight.shape[0]
    names = [None if x.process_group is None else x.process_group.group_name for x in (head, teacher)]
    if names[0] != names[1]:
        raise ValueError(f"teacher_head must be sharded over the process group of head, {names[0]}, got {names[1]}")
    if v_t != v:
        longer = "teacher_head" if v_t > v else "head"
        raise ValueError(
            f"teacher_head must have the {v} vocabulary rows of head, got {v_t}; if the extra rows are padding, slice "
            f"{longer}'s weight and bias to [:{min(v, v_t)}]"
        )


def check_scalars(
    temperature: float, beta: float, entry_clip: float | None, impl: str, reduction: str, dtype: torch.dtype
) -> None:
    """Refuse numbers out of their range, and names that are none; `dtype` is that of the operands."""
    _check_numbers(
        ("temperature", temperature, lambda x: 0 < x < float("inf"), "a positive number"),
        ("beta", beta, lambda x: 0 < x < 1, "strictly between 0 and 1 (forward and reverse KL are kinds of their own)"),
        ("entry_clip", entry_clip, lambda x: x is None or x > 0, "a positive number or None"),
    )
    if dtype != torch.float64 and beta < SMALLEST_BETA:
        raise ValueError(
            f"beta must be at least {SMALLEST_BETA:g} with {dtype} operands, got {beta!r}: the divergence, about beta "
            'times a KL, would be lost; use kind "forward"'
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if impl != "auto" and impl not in IMPLS:
        raise ValueError(f'impl must be "auto" or one of {", ".join(map(repr, IMPLS))}, got {impl!r}')


def _check_numbers(*checks: tuple[str, Any, Callable[[Any], bool], str]) -> None:
    for name, value, fits, wanted in checks:
        if isinstance(value, bool | Tensor) or not (value is None or isinstance(value, int | float)) or not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_vocab_size(vocab_size: int | None, v: int, sharded: bool) -> int:
    """Return the size, or -1 for "all of it", which a rank that holds a shard cannot know yet."""
    if vocab_size is None:
        return -1
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"vocab_size must be a positive integer or None, got {vocab_size!r}")
    if not sharded and vocab_size > v:
        raise ValueError(f"vocab_size must be at most the heads' {v} vocabulary entries, got {vocab_size}")
    return vocab_size


_FIELDS = {
    "teacher_row": (torch.int64, "int64"), "kind": (torch.int8, "integers"), "weight": (torch.float32, "floats"),
    "clip": (torch.float32, "floats"),
}  # fmt: skip
_TARGET_FIELDS = {
    "control_row": (torch.int64, "int64"), "contrast": (torch.float32, "floats"),
    "plausibility": (torch.float32, "floats"),
}  # fmt: skip


def supervision_tensors(supervision: Supervision | None, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Return the fields as tensors (R,) of their own dtypes, where the caller left them.

    They are student_row, teacher_row, kind, weight and clip, and where any pair may have a target that is not the
    teacher itself, control_row, contrast and plausibility.

    Args:
        student, teacher: (..., D), whose leading dimensions the pairs index.
    """
    shapes = student.shape[:-1], teacher.shape[:-1]
    n, m = (shape.numel() for shape in shapes)
    if supervision is None:
        if n != m or (shapes[0] != shapes[1] and student.dim() == teacher.dim()):
            sizes = (n, m) if student.dim() == teacher.dim() == 2 else tuple(map(tuple, shapes))
            raise ValueError(
                f"supervision=None meets row i with row i and needs as many teacher rows as student rows, {sizes[0]}, "
                f"got {sizes[1]}; pass a Supervision that says which rows meet"
            )
        supervision = Supervision.aligned(n, device=student.device)
    if not isinstance(supervision, Supervision):
        raise ValueError(f"supervision must be a vigos.Supervision or None, got {type(supervision).__name__}")
    if supervision.shape is not None:
        wanted = torch.Size(supervision.shape)
        for side, shape in zip(("student", "teacher"), shapes, strict=True):
            if shape != wanted and (shape.numel() != wanted.numel() or 1 not in (len(shape), len(wanted))):
                raise ValueError(
                    f"supervision's mask is {tuple(wanted)} and must match the {side}'s leading dimensions, got "
                    f"{tuple(shape)}"
                )
    rows = supervision.student_row
    if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"supervision.student_row must be an int64 tensor (R,), got {_described(rows)}")
    r = rows.shape[0]
    fields = []
    wanted_types = _FIELDS
    numbers = (supervision.contrast, supervision.plausibility)
    if supervision.control_row is not None or any(isinstance(x, Tensor) or x != 0 for x in numbers):
        wanted_types = _FIELDS | _TARGET_FIELDS
    if supervision.control_row is None and (isinstance(numbers[0], Tensor) or numbers[0] != 0):
        raise ValueError(f"supervision.control_row must be given with contrast, got None and {_described(numbers[0])}")
    for name, (dtype, wanted_type) in wanted_types.items():
        value = getattr(supervision, name)
        if name == "control_row" and value is None:  # a cut teacher, without a contrast
            value = supervision.teacher_row
        if name == "kind" and isinstance(value, str):
            value = KINDS.get(value, value)
        if not isinstance(value, Tensor):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or (name == "kind" and value not in KINDS.values()):
                names = f", one of {', '.join(map(repr, KINDS))}" if name == "kind" else ""
                raise ValueError(f"supervision.{name} must be {wanted_type} (R,) or one number{names}, got {value!r}")
            value = torch.full((r,), value, dtype=dtype, device=rows.device)
        is_float = value.dtype.is_floating_point
        fits = value.dtype == torch.int64 if name.endswith("_row") else is_float == (wanted_type == "floats")
        if value.shape not in ((r,), ()) or not fits or value.dtype in (torch.bool, torch.complex64):
            raise ValueError(
                f"supervision.{name} must be {wanted_type} ({r},) like student_row, got {_described(value)}"
            )
        if name == "kind" and value.dtype != torch.int8:
            value = value.to(torch.int64).clamp(-1, len(KINDS))  # 256 would wrap to 0; out of range stays out of range
        fields.append(savable(value.detach().to(dtype).expand(r).contiguous()))
    for name, value in zip(("student_row", *wanted_types), (rows, *fields), strict=True):
        if value.device.type != "cpu" and value.device != student.device:
            raise ValueError(f"supervision.{name} must be on the CPU or on {student.device}, got {value.device}")
    return (savable(rows), *fields)


def check_labels(
    labels: object, supervision: Supervision | None, student_row: Tensor, device: torch.device
) -> Tensor | None:
    """Return the labels as (R,): those of the pairs, if they have the shape of the supervision's mask."""
    if labels is None:
        return None
    r, shape = student_row.shape[0], None if supervision is None else supervision.shape
    spread = isinstance(labels, Tensor) and shape is not None and labels.shape == torch.Size(shape)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or not (spread or labels.shape == (r,)):
        raise ValueError(
            f"labels must be an int64 tensor ({r},), one id for each pair, or of the mask's shape, got "
            f"{_described(labels)}"
        )
    if labels.device.type != "cpu" and labels.device != device:
        raise ValueError(f"labels must be on the CPU or on {device}, got {labels.device}")
    return savable(labels.reshape(-1)[student_row.to(labels.device)] if spread else labels)


def local(x: Any, name: str, group: dist.ProcessGroup | None = None) -> tuple[Any, dist.ProcessGroup | None]:
    """Return a DTensor's shard and the group it is sharded over; anything else unchanged."""
    if x is None or type(x) in (Tensor, torch.nn.Parameter) or not hasattr(x, "to_local"):
        return x, group
    from torch.distributed.tensor import Replicate, Shard

    if all(isinstance(p, Replicate) for p in x.placements):
        return x.to_local(), group
    if x.device_mesh.ndim != 1 or tuple(x.placements) != (Shard(0),):
        raise ValueError(f"{name} must be replicated or Shard(0) over a one-dimensional mesh, got {x.placements}")
    mesh_group = x.device_mesh.get_group()
    if group is not None and group.group_name != mesh_group.group_name:
        raise ValueError(f"{name} is sharded over another process group than the head's process_group or its weight")
    return x.to_local(), mesh_group


def autocast(x: Any, device: torch.device) -> Any:
    """Cast an operand as `F.linear` does under an autocast of `device`; anything that is no such operand passes."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return x
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device.type))


def savable(x: T) -> T:
    """Return an ordinary tensor over the memory of one made under inference_mode, which autograd refuses to save."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return x
    if not x.is_inference():
        return x
    ordinary = torch.empty(0, dtype=x.dtype, device=x.device)
    return ordinary.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())  # type: ignore[return-value]


_warned: set[str] = set()


def warn_once(message: str, stacklevel: int = 3) -> None:
    """Warn the caller of the public function; the same words a second time say nothing."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=stacklevel)


def warn_of_missing_gradients(supervision: Supervision | None, tensors: dict[str, object]) -> None:
    """Warn, once a name, of tensors that ask for a gradient and will get none from this library."""
    if isinstance(supervision, Supervision):
        tensors |= {f"supervision.{name}": getattr(supervision, name) for name in ("weight", "clip", "contrast")}
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad:
            warn_once(
                f"{name} requires a gradient and gets none: divergences are differentiable in the student and its "
                "head alone. Detach it, or weigh `divergence`, which is differentiable, yourself",
                stacklevel=4,
            )
