"""Divergences between a student's and its teachers' next-token distributions, without the logits of a batch.

`linear_divergence` starts from hidden states, `logits_divergence` from logits that exist. Both check their arguments
(`vigos.divergence.validation`) and call a registered operator (`linear_op`, `logits_op`), which passes them as one
frozen dataclass to the engine that `impl` names (`vigos.divergence.engines`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.divergence.betas import by_beta
from vigos.divergence.call import Call
from vigos.divergence.engines.problem import LogitTransform
from vigos.divergence.head import Head
from vigos.divergence.linear_op import linear
from vigos.divergence.logits_op import logits
from vigos.divergence.output import DivergenceOutput, reduced
from vigos.divergence.strided import as_matrix, merged, overlaps, strided_logits
from vigos.divergence.supervision import Supervision
from vigos.divergence.targets import target_logits
from vigos.divergence.validation import (
    autocast,
    check_heads,
    check_labels,
    check_like,
    check_rows,
    check_scalars,
    check_vocab_size,
    head_of,
    local,
    local_head,
    savable,
    supervision_tensors,
    warn_of_missing_gradients,
    warn_once,
)


def linear_divergence(
    student_hidden: Tensor, head: Head | Tensor, teacher_hidden: Tensor, teacher_head: Head | Tensor | None = None, *,
    supervision: Supervision | None = None, temperature: float = 1.0, beta: float = 0.5,
    entry_clip: float | None = None, labels: Tensor | None = None, vocab_size: int | None = None,
    reduction: str = "sum", impl: str = "auto",
) -> DivergenceOutput:  # fmt: skip
    """Compute token-level divergences over the whole vocabulary, and their gradient, from hidden states.

    For forward KL(teacher || student) of row i against row i it replaces

        log_q = (student_hidden @ head.T / temperature).log_softmax(-1)
        log_p = (teacher_hidden @ teacher_head.T / temperature).log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum()

    and never holds N x V elements. Rows outside `supervision` are not projected.

    Args:
        student_hidden: (..., D), differentiable; (N, D) or (B, T, D).
        head: the student's, a `vigos.Head` or its weight (V, D) alone. Weight and bias are differentiable; nothing is
            computed for a head that needs no gradient.
        teacher_hidden: (..., D_t). The teacher gets no gradient.
        teacher_head: the teacher's, of the same vocabulary, with a bias, scale and softcap of its own. None: the
            student's head (D_t = D). Heads with the same weight tensor are read once for both.
        supervision: which rows meet, how, with which weight and clip; `Supervision.from_mask` makes it of a mask. Its
            tensors may lie on the CPU, where checking them costs no wait for the device. None: row i against row i,
            forward KL, weight 1, no clip.
        temperature: both distributions are softmax(logits / temperature); no temperature squared in the loss.
        beta: of rows of kind JSD, beta * KL(teacher || m) + (1 - beta) * KL(student || m) with
            m = (1 - beta) * student + beta * teacher, and of skew KL, whose m it is. Towards 0 a JSD approaches forward
            KL times beta, towards 1 reverse KL times 1 - beta. `kind_and_beta` translates TRL's and Liger's meaning;
            `supervision.beta` gives pairs their own.
        entry_clip: each vocabulary entry's term is clipped to this before the sum (OPSD's clip).
        labels: int64, ids whose log-probabilities are returned; (R,), or of the mask's shape.
        vocab_size: ids from here on are padding: probability 0 on both sides, no gradient.
        reduction: of `loss` over the R pairs' weight * min(divergence, clip): "sum", "mean" over the pairs whose weight
            is not 0 (0 without one), or "none", (R,).
        impl: "auto", or an engine that runs or raises: "reference", "cpu", "triton" or "cuda".

    Every other output is (R,), in the order of the pairs. All of a side's tensors share a dtype: float32, bfloat16,
    float16 or float64. Logits, statistics and sums are float32 (float64 for float64) whatever the operands are. Under
    autocast the operands are cast as in `F.linear`. Raises ValueError for what does not fit, naming the argument.

    Pairs with a `control_row` are pulled towards z* = z_t + contrast (z_t - z_c), cut to the plausible entries; the
    teacher's statistics are those of z*. While the cut is off and the teacher has no softcap that costs no product (one
    under impl="triton" with 16-bit operands). A call of the same hidden states with the control in the student's place
    gives both plain teachers' statistics.

    With heads that are sharded over the vocabulary everything else is the same on every rank, and so is the result.

    A logit of -inf on both sides is an impossible token and adds nothing. Where one side has probability 0 and the side
    that weights the logarithm does not, a KL is +inf: clipped by a finite clip, else the loss is +inf. Forward KL still
    has its gradient p_s - p_t then; reverse KL has none (NaN).
    """
    if isinstance(supervision, Supervision) and supervision.beta is not None:
        check_scalars(temperature, beta, entry_clip, impl, reduction, student_hidden.dtype)
        options: dict[str, Any] = {
            "temperature": temperature, "entry_clip": entry_clip, "vocab_size": vocab_size, "impl": impl,
        }  # fmt: skip
        sides = (student_hidden, head, teacher_hidden, teacher_head)
        return by_beta(linear_divergence, sides, supervision, labels, reduction, options)
    head = head_of(head, "head")
    teacher = head if teacher_head is None else head_of(teacher_head, "teacher_head")
    shared = teacher.weight is head.weight
    student_hidden, teacher_hidden = (
        local(x, name)[0] for x, name in ((student_hidden, "student_hidden"), (teacher_hidden, "teacher_hidden"))
    )
    check_rows(student_hidden, "student_hidden", "(..., D)")
    check_rows(teacher_hidden, "teacher_hidden", "(..., D_t)")
    device = student_hidden.device
    check_like(teacher_hidden, "teacher_hidden", student_hidden, "student_hidden", dtype=False)
    student_hidden, teacher_hidden = autocast(student_hidden, device), autocast(teacher_hidden, device)
    head = local_head(head, "head", student_hidden, "student_hidden")
    if shared:
        if teacher_hidden.shape[-1] != student_hidden.shape[-1]:
            raise ValueError(
                f"teacher_hidden must be (..., {student_hidden.shape[-1]}) for the shared head, got "
                f"{tuple(teacher_hidden.shape)}; pass teacher_head for a teacher of another width"
            )
        check_like(teacher_hidden, "teacher_hidden", student_hidden, "student_hidden")
    teacher = local_head(teacher, "teacher_head", teacher_hidden, "teacher_hidden")
    check_heads(head, teacher)
    if teacher_head is None and head.weight.requires_grad:
        warn_once(
            "teacher_head is None and head.weight is trained: the teacher's logits follow the student's head. Pass the "
            "head of the teacher's hidden states, or head itself where that is meant"
        )
    warn_of_missing_gradients(
        supervision, {"teacher_hidden": teacher_hidden, "teacher_head.weight": None if shared else teacher.weight}
    )
    if (student_hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64):
        raise ValueError(
            f"teacher_hidden must be float64 exactly when student_hidden is, got {teacher_hidden.dtype} and "
            f"{student_hidden.dtype}"
        )
    check_scalars(temperature, beta, entry_clip, impl, reduction, student_hidden.dtype)
    size = check_vocab_size(vocab_size, head.weight.shape[0], head.process_group is not None)
    rows = supervision_tensors(supervision, student_hidden, teacher_hidden)
    labels = check_labels(labels, supervision, rows[0], device)
    teacher_bias = teacher.bias
    if shared and teacher_bias is None and head.bias is not None:
        teacher_bias = torch.zeros_like(head.bias)  # None is the operator's spelling of "the student's"
    elif shared and teacher_bias is head.bias:
        teacher_bias = None
    ours, theirs = (LogitTransform(side.scale, side.softcap, temperature) for side in (head, teacher))
    group_name = "" if head.process_group is None else str(head.process_group.group_name)
    call = Call(ours, theirs, beta, entry_clip, size, group_name, impl)
    out = linear(
        (savable(student_hidden.flatten(0, -2)), savable(head.weight), savable(head.bias)),
        (savable(teacher_hidden.flatten(0, -2)), None if shared else savable(teacher.weight), savable(teacher_bias)),
        rows, labels, call,
    )  # fmt: skip
    return _output(out, rows[3], rows[4], labels, reduction)


def logits_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, supervision: Supervision | None = None,
    temperature: float = 1.0, beta: float = 0.5, entry_clip: float | None = None, labels: Tensor | None = None,
    vocab_size: int | None = None, process_group: dist.ProcessGroup | None = None, reduction: str = "sum",
    inplace: bool = False, impl: str = "auto",
) -> DivergenceOutput:  # fmt: skip
    """Compute `linear_divergence` from logits that exist. For forward KL of row i against row i it replaces

        log_q, log_p = (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum()

    Args:
        student_logits: (..., V), differentiable. teacher_logits: (..., V), no gradient. Any of the four float dtypes;
            sums are float32 (float64 for float64). Slices of a larger tensor are read where they lie.
        inplace: backward writes the gradient over `student_logits`, which saves their size. Their values are gone then,
            a second backward raises, each student row may be supervised once, and expanded logits are refused. Not
            under torch.compile. Without it the engine `cuda` writes the gradient of `loss` in forward, which saves one
            reading of the logits, where at least half of the student's rows are supervised, each once; that of pairs
            with another upstream is computed again in backward.
        process_group: each rank passes consecutive columns of the vocabulary, and the same of everything else.
        Everything else as in `linear_divergence`; with a contrast or a cut the targets take R x V floats. A scale or a
        softcap is the caller's: these are logits as softmax reads them, but for the temperature.
    """
    if isinstance(supervision, Supervision) and supervision.beta is not None:
        if inplace:
            raise ValueError("inplace must be False with supervision.beta, whose calls would read what others wrote")
        check_scalars(temperature, beta, entry_clip, impl, reduction, student_logits.dtype)
        options: dict[str, Any] = {
            "temperature": temperature, "entry_clip": entry_clip, "vocab_size": vocab_size, "impl": impl,
            "process_group": process_group,
        }  # fmt: skip
        return by_beta(logits_divergence, (student_logits, teacher_logits), supervision, labels, reduction, options)
    check_rows(student_logits, "student_logits", "(..., V)")
    check_rows(teacher_logits, "teacher_logits", "(..., V)")
    v, device = student_logits.shape[-1], student_logits.device
    if teacher_logits.shape[-1] != v:
        raise ValueError(
            f"teacher_logits must have the {v} vocabulary columns of student_logits, got {teacher_logits.shape[-1]}; "
            f"slice padded columns off first, [..., :{min(teacher_logits.shape[-1], v)}]"
        )
    if v < 1:
        raise ValueError(f"student_logits must have at least one vocabulary column, got {tuple(student_logits.shape)}")
    check_like(teacher_logits, "teacher_logits", student_logits, "student_logits", dtype=False)
    if (student_logits.dtype == torch.float64) != (teacher_logits.dtype == torch.float64):
        raise ValueError(
            f"teacher_logits must be float64 exactly when student_logits are, got {teacher_logits.dtype} and "
            f"{student_logits.dtype}"
        )
    if inplace and torch.compiler.is_compiling():
        raise ValueError("inplace must be False under torch.compile, which does not let backward write to its inputs")
    if inplace and overlaps(student_logits):
        raise ValueError(
            f"inplace must be False for student_logits whose rows share memory, got strides {student_logits.stride()}"
        )
    check_scalars(temperature, beta, entry_clip, impl, reduction, student_logits.dtype)
    size = check_vocab_size(vocab_size, v, process_group is not None)
    rows = supervision_tensors(supervision, student_logits, teacher_logits)
    labels = check_labels(labels, supervision, rows[0], device)
    transform = LogitTransform(temperature=temperature)
    group_name = "" if process_group is None else str(process_group.group_name)
    call = Call(transform, transform, beta, entry_clip, size, group_name, impl)
    warn_of_missing_gradients(supervision, {"teacher_logits": teacher_logits})
    student_logits, teacher_logits = savable(student_logits), savable(teacher_logits)
    teacher = merged(teacher_logits)
    if teacher is None:
        teacher, index = as_matrix(teacher_logits)
        rows = tuple(index.to(x.device)[x] if i in (1, 5) else x for i, x in enumerate(rows))
    if len(rows) > 5:
        if process_group is not None:
            raise ValueError("process_group must be None with a contrast or plausibility of logits, got a group")
        teacher = target_logits(teacher.detach(), list(rows), temperature, size)
        rows = (rows[0], torch.arange(rows[0].shape[0], device=rows[0].device), *rows[2:5])
    student = merged(student_logits)
    if student is None and overlaps(student_logits):
        student = student_logits.reshape(-1, v)
    if student is None:
        out = strided_logits(student_logits, teacher, rows, labels, call, inplace)
    else:
        out = logits(student, teacher, rows, labels, call, inplace)
    return _output(out, rows[3], rows[4], labels, reduction)


def _output(
    out: Sequence[Tensor], weight: Tensor, clip: Tensor, labels: Tensor | None, reduction: str
) -> DivergenceOutput:
    loss, divergence = out[:2]
    weight, clip = weight.to(divergence.device), clip.to(divergence.device)
    clipped = divergence.detach() > clip
    loss = reduced(loss, divergence, weight, clip, reduction)
    details = [x.detach() for x in out[2:8]]
    logprobs = (None, None) if labels is None else (details[4], details[5])
    divergence = divergence.clone()  # the operator's own is saved for backward; this one may be written to
    return DivergenceOutput(loss, divergence, clipped, *details[:4], *logprobs)
