"""Targets of `logits_divergence`: the logits z* of pairs with a control, written out once before any engine runs."""

from __future__ import annotations

import torch
from torch import Tensor

from vigos.divergence import reference
from vigos.divergence.call import check_targets
from vigos.divergence.operator import operator

CHUNK = 2**22  # elements of the temporaries


@operator("vigos::target_logits")
def target_logits(teacher_logits: Tensor, supervision: list[Tensor], temperature: float, vocab_size: int) -> Tensor:
    """Return the targets' raw logits, (R, V) float32 (float64 for float64): those of softmax(z* / temperature).

    Args:
        teacher_logits: (M, V). supervision: its eight tensors (R,). vocab_size: ids from here on are padding; -1: none.
    """
    kind, device = supervision[2], teacher_logits.device
    check_targets(kind, supervision[5:], teacher_logits.shape[0])
    teacher_row, control_row, contrast, plausibility = (x.to(device) for x in (supervision[1], *supervision[5:]))
    dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
    r, v = teacher_row.shape[0], teacher_logits.shape[1]
    real = v if vocab_size < 0 else vocab_size
    out = torch.zeros(r, v, dtype=dtype, device=device)
    for rows in torch.arange(r, device=device).split(max(1, CHUNK // v)):
        z_t, z_c = (teacher_logits[index[rows], :real].to(dtype) for index in (teacher_row, control_row))
        alpha, gamma = contrast[rows].to(dtype), plausibility[rows].to(dtype)
        out[rows, :real] = reference.contrasted(z_t, z_c, alpha, gamma**temperature)
    return out


@torch.library.register_fake("vigos::target_logits")
def _target_logits_fake(teacher_logits, supervision, temperature, vocab_size):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if teacher_logits.dtype == torch.float64 else torch.float32
    return teacher_logits.new_empty((supervision[1].shape[0], teacher_logits.shape[1]), dtype=dtype)
