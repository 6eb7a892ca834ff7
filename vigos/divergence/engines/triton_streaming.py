"""impl="triton_streaming": no logit is stored; the gradient recomputes those of the rows that have one.

Five products with a frozen shared head where impl="triton" needs three, in exchange for a workspace of
WORKSPACE_BYTES whatever the vocabulary. The head's gradient and the treatment of weights are those of impl="triton".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vigos.divergence.engines.problem import STATE, LinearProblem, LinearResult, all_reduce, chunk_width, chunks
from vigos.divergence.engines.triton import (
    all_take_part,
    device_why_not,
    gradient_dtype,
    half_scale,
    of_all_ranks,
    options_of,
    product,
    statistics_of,
    takes_difference,
)

if TYPE_CHECKING:
    from vigos.kernels.divergence import Options
    from vigos.kernels.streaming import Operands

WORKSPACE_BYTES = 64 << 20  # dlogits of CHUNK_ROWS rows and a slab of the vocabulary
CHUNK_ROWS = 2048  # rows a product: arithmetic-bound on every chip we know, at 16,384 entries a slab in bf16


def why_not(problem: LinearProblem) -> str | None:
    """None if this engine runs `problem`."""
    return device_why_not(problem)


def _measure(problem: LinearProblem, x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Statistics (5 or 7, R) and state (R, STATE) of every row."""
    from vigos.kernels import divergence as kernels
    from vigos.kernels import streaming

    state = torch.zeros(problem.n_rows, STATE, dtype=torch.float32, device=problem.device)
    partial = streaming.stream_partials(x, options)
    partial = of_all_ranks(partial, problem, streaming.slices(problem.vocab_size, x.launch))
    stats = kernels.finish(partial, options, state)
    second = streaming.stream_partials(x, options, state)
    if problem.group is not None:
        second = all_reduce(second.sum(2, keepdim=True), problem.group)
    kernels.finish_second(second, options, state, stats)
    return stats, state


def _gradients(
    problem: LinearProblem, x: Operands, options: Options, state: Tensor, divergence: Tensor, result: LinearResult
) -> None:
    """Fills the gradients of `result`, which are zero, from the rows through which the loss has one."""
    from vigos.kernels import streaming

    (v, d), device = problem.student_weight.shape, problem.device
    head = problem.need_dweight or problem.need_dbias
    live = (problem.weight != 0) & ~(divergence > problem.clip)  # a NaN divergence counts, so that it is seen
    dtype = gradient_dtype(problem)
    if head:
        factor = problem.weight
    else:
        factor = half_scale(options, state) if dtype == torch.float16 else torch.ones_like(problem.weight)
    factor = torch.where(live, factor, 0.0)
    rows = torch.arange(problem.n_rows, device=device) if all_take_part(problem) else live.nonzero().squeeze(1)
    # One shape for every product, by the number of all rows: live ones must not change each other's rounding.
    width = chunk_width(problem.n_rows, CHUNK_ROWS)
    stored = dtype if device.type == "cuda" else torch.float32  # the interpreter truncates: torch rounds there
    block = x.launch.block_v
    slab = min(max(block, WORKSPACE_BYTES // (width * stored.itemsize) // block * block), v)
    for at in chunks(rows.shape[0], width):
        now = rows[at]
        n = now.shape[0]
        drow = torch.zeros(width, d, dtype=torch.float32, device=device)
        scratch = torch.empty_like(drow)
        hidden = problem.student_hidden.new_zeros(width, d)
        hidden[:n] = problem.student_hidden[problem.student_row[now]].masked_fill((factor[now] == 0)[:, None], 0.0)
        for part in chunks(v, slab):
            workspace = torch.zeros(width, part.stop - part.start, dtype=stored, device=device)
            streaming.stream_grad(x, options, state, factor, now, part.start, part.stop, workspace[:n])
            dlogits = workspace.to(dtype)
            if result.drow is not None:
                product(dlogits, problem.student_weight[part], scratch)
                drow += scratch
            if result.dweight is not None:
                piece = torch.empty(part.stop - part.start, d, dtype=torch.float32, device=device)
                product(dlogits.T, hidden, piece)
                result.dweight[part] += piece
            if result.dbias is not None:
                result.dbias[part] += dlogits.sum(0, dtype=torch.float32)
        if result.drow is not None:
            if head or dtype == torch.float16:
                by = factor[now][:, None]
                drow[:n] = torch.where(by != 0, drow[:n] / by, 0.0)
            result.drow[now] = drow[:n]
    if result.drow is not None:
        result.computed = live
        all_reduce(result.drow, problem.group)


def forward(problem: LinearProblem) -> LinearResult:
    """Statistics of every row; gradients of the rows through which the loss has one."""
    from vigos.kernels import streaming

    (v, d), r, device = problem.student_weight.shape, problem.n_rows, problem.device
    options = options_of(problem, v, difference=takes_difference(problem))
    x = streaming.operands(
        problem.student_hidden, problem.teacher_hidden, problem.student_weight, problem.teacher_weight,
        problem.student_bias, problem.teacher_bias, options,
    )  # fmt: skip
    stats, state = _measure(problem, x, options)
    result = LinearResult(statistics_of(stats, problem.labels is not None))
    if problem.need_dhidden:
        result.drow = torch.zeros(r, d, dtype=torch.float32, device=device)
    if problem.need_dweight:
        result.dweight = torch.zeros(v, d, dtype=torch.float32, device=device)
    if problem.need_dbias:
        result.dbias = torch.zeros(v, dtype=torch.float32, device=device)
    if problem.need_dhidden or problem.need_dweight or problem.need_dbias:
        _gradients(problem, x, options, state, stats[0], result)
    return result
