"""CUDA C++ for Hopper: both projections and the online statistics in one kernel (TMA, wgmma), no logit stored.

    forward    statistics of all rows (csrc/cuda/linear_hopper.cuh), then chunk by chunk of rows the same products
               again -> dlogits (C, V) bf16 -> drow = dlogits @ W
    products   2 without gradients, 5 with dhidden (the floor is 3), 6 with a trainable head

It saves the logits' traffic and memory, not products: `impl="cuda"` computes the logits once, which is less work where
a gradient is needed and its 600 MiB are there. Nothing here has been run on a GPU yet.

Takes bf16 operands of widths that are multiples of 8, forward and reverse KL, temperature and logit_scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vigos.divergence.engines import cuda
from vigos.divergence.engines.problem import (
    STATE,
    LinearProblem,
    LinearResult,
    Statistics,
    chunk_width,
    chunks,
    live_rows,
)
from vigos.divergence.supervision import JSD

# Bytes of one chunk's dlogits: 768 rows of 151,936 entries, 6 tiles of 128.
CHUNK_BYTES = 240 * 2**20
TILE = 128  # rows of a block


def why_not(problem: LinearProblem) -> str | None:
    """None, or the reason for people."""
    operands = [
        ("student_hidden", problem.student_hidden), ("lm_head_weight", problem.student_weight),
        ("teacher_hidden", problem.teacher_hidden), ("teacher_lm_head_weight", problem.teacher_weight),
    ]  # fmt: skip
    for name, x in operands:
        if x is not None and x.dtype != torch.bfloat16:
            return f"it multiplies bfloat16 operands, {name} is {x.dtype}; use impl='cuda'"
        if x is not None and x.shape[1] % 8 != 0:
            return f"rows must be multiples of 16 bytes, {name} has {x.shape[1]} columns; use impl='cuda'"
    if problem.student_bias is not None or problem.teacher_bias is not None:
        return "it adds no bias; use impl='cuda'"
    if problem.softcap is not None:
        return "it has no softcap; use impl='cuda'"
    if problem.entry_clip is not None:
        return "entry_clip needs a second visit of the logits; use impl='cuda'"
    reason = cuda._common(problem, problem.device)
    if reason is None and problem.device.type == "cuda" and torch.cuda.get_device_capability(problem.device) != (9, 0):
        major, minor = torch.cuda.get_device_capability(problem.device)
        reason = f"wgmma needs compute capability 9.0, this GPU has {major}.{minor}; use impl='cuda'"
    if reason is None and bool((problem.kind == JSD).any()):
        reason = "JSD needs a second visit of the logits; use impl='cuda'"
    return reason


def _matrix(x: Tensor) -> Tensor:
    """`x` as the copy engine wants it: 16-byte aligned rows of contiguous columns."""
    fits = x.stride(1) == 1 and cuda._stride(x) % 8 == 0 and cuda._stride(x) >= x.shape[1] and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(problem: LinearProblem) -> LinearResult:
    """Statistics of every row; gradients of the rows through which the loss has one."""
    module = cuda._module()
    assert module is not None
    device, r = problem.device, problem.n_rows
    v, d = problem.student_weight.shape
    statistics = Statistics.empty(problem)
    result = LinearResult(statistics)
    if problem.need_dhidden:
        result.drow = torch.zeros(r, d, device=device)
        result.computed = torch.zeros(r, dtype=torch.bool, device=device)
    if problem.need_dweight:
        result.dweight = torch.zeros(v, d, device=device)
    if r == 0:
        return result
    # The copy engine reads consecutive rows. The gathered copies are small beside one chunk of logits.
    hidden_s, hidden_t = (
        _matrix(problem.student_hidden[problem.student_row]), _matrix(problem.teacher_hidden[problem.teacher_row]),
    )  # fmt: skip
    head_s = _matrix(problem.student_weight)
    head_t = None if problem.teacher_weight is None else _matrix(problem.teacher_weight)
    kind, clip = problem.kind.contiguous(), problem.clip.float().contiguous()
    state = torch.zeros(r, STATE, device=device)
    labels = None if problem.labels is None else problem.labels.contiguous()
    label_logits = None if labels is None else torch.empty(2, r, device=device)
    clipped = torch.empty(r, dtype=torch.bool, device=device)
    sms = _multiprocessors(device)
    common = {
        "student_weight": head_s.data_ptr(), "teacher_weight": cuda._address(head_t), "d": d, "d_t": hidden_t.shape[1],
        "vocab": v, "logical_vocab": problem.local_vocab(v), "alpha": problem.alpha, "stream": cuda._stream(device),
        "strides": tuple(
            cuda._stride(x) for x in (hidden_s, hidden_t, head_s, head_s if head_t is None else head_t)
        ),
    }  # fmt: skip
    _, splits = module.linear_hopper_plan(r, v, sms)
    partial = torch.empty(module.running_fields, splits, r, device=device)
    with torch.cuda.device_of(head_s):
        module.linear_statistics(
            student_hidden=hidden_s.data_ptr(), teacher_hidden=hidden_t.data_ptr(), rows=r, kind=kind.data_ptr(),
            splits=splits, state=state.data_ptr(), partial=partial.data_ptr(), labels=cuda._address(labels),
            label_logits=cuda._address(label_logits), clip=clip.data_ptr(),
            divergence=statistics.divergence.data_ptr(), clipped=clipped.data_ptr(),
            student_entropy=statistics.student_entropy.data_ptr(),
            teacher_entropy=statistics.teacher_entropy.data_ptr(),
            student_lse=statistics.student_lse.data_ptr(), teacher_lse=statistics.teacher_lse.data_ptr(),
            student_logprob=cuda._address(statistics.student_logprob),
            teacher_logprob=cuda._address(statistics.teacher_logprob), **common,
        )  # fmt: skip
    if not (problem.need_dhidden or problem.need_dweight):
        return result

    live = live_rows(problem, statistics.divergence)
    live_float = live.float()
    width = chunk_width(r, CHUNK_BYTES // (2 * v), TILE)
    dlogits = torch.zeros(width, v + v % 2, dtype=torch.bfloat16, device=device)[:, :v]
    for at in chunks(r, width):
        n = at.stop - at.start
        _, splits = module.linear_hopper_plan(n, v, sms)
        with torch.cuda.device_of(head_s):
            module.linear_gradient(
                student_hidden=hidden_s[at].data_ptr(), teacher_hidden=hidden_t[at].data_ptr(), rows=n,
                kind=kind[at].data_ptr(), splits=splits, state=state[at].data_ptr(), live=live_float[at].data_ptr(),
                dlogits=dlogits.data_ptr(), stride_dlogits=cuda._stride(dlogits), **common,
            )  # fmt: skip
        dlogits[n:].zero_()  # the GEMM's shape, which decides how it rounds, is the same for every chunk
        if result.drow is not None and result.computed is not None:
            result.drow[at], result.computed[at] = cuda._mm(dlogits, head_s)[:n], live[at]
        if result.dweight is not None:
            cuda.add_dweight(result.dweight, dlogits[:n], hidden_s[at], live[at], problem.weight[at])
    return result
