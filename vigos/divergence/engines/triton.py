"""impl="triton": per chunk of rows one GEMM with fp32 result, Triton row kernels, one GEMM for the hidden gradient.

    z = [student rows; teacher rows] @ head.T     (2 C, V) fp32; one product for both when they share the head;
                                                   of fp32 operands, student - teacher in the student's place
    statistics                                     kernels/divergence.py
    dlogits                                        (2 C, V) in the operands' dtype: the gradient is rounded once
    drow = dlogits @ head                          (2 C, D) fp32

Rows through which the loss has no gradient (clipped, weight 0) are left out of the last product: gradients of live
rows gather in the dlogits buffer across chunks and are multiplied when it is full, so that this product always has one
shape and a row's result never depends on which rows are live. How many rows of a chunk are live is read after the next
chunk's work has been given to the GPU, which so never waits for the host; a chunk's live rows come first, and the next
chunk's take the place of the others. In a CUDA graph nothing may be read, and every row takes part.

The head's gradient takes the rows' weights from the supervision: dlogits is weighted before it is rounded, and drow is
divided by the weight again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.divergence.engines.contrast import Targets, adjust, adjusted_transform, cut_labels, targets
from vigos.divergence.engines.problem import (
    STATE,
    LinearProblem,
    LinearResult,
    LogitsProblem,
    LogitsResult,
    Rows,
    Statistics,
    all_reduce,
    chunks,
)
from vigos.divergence.engines.products import Chunks, add_head_gradient, backproject, padded, product, project
from vigos.divergence.supervision import JSD, REVERSE_KL

if TYPE_CHECKING:
    from vigos.kernels.divergence import Launch, Options


@dataclass(frozen=True)
class Config(Chunks):
    """Chunks, and the launch of the row kernels; None: theirs."""

    launch: Launch | None = None


CONFIG = Config()


def device_why_not(rows: LinearProblem | LogitsProblem) -> str | None:
    """Return what tensors or machine lack for Triton's kernels, or None."""
    try:
        from vigos.kernels.numerics import INTERPRETED
    except ModuleNotFoundError as error:
        return f"Triton is not installed ({error})"
    if rows.compute_dtype == torch.float64:
        return 'its kernels compute in float32 and the tensors are float64; impl="reference" takes them'
    if rows.device.type != "cuda" and not (INTERPRETED and rows.device.type == "cpu"):
        return f"its kernels need a CUDA device, got tensors on {rows.device} (TRITON_INTERPRET=1 runs them on the CPU)"
    return None


def why_not(problem: LinearProblem) -> str | None:
    """Return why this engine cannot run `problem`, or None."""
    return device_why_not(problem)


def logits_why_not(problem: LogitsProblem) -> str | None:
    """Return why this engine cannot run `problem`, or None."""
    return device_why_not(problem)


def takes_difference(problem: LinearProblem) -> bool:
    """Return whether the student's logits are (student - teacher) @ head: fp32 products of one head with one transform.

    Rounding then is relative to the difference, which the gradient is made of. In 16 bits that of the operands is the
    larger error, and the difference would have to be rounded to 16 bits again.
    """
    return _fp32(problem) and problem.teacher_weight is None and problem.alike


def _fp32(problem: LinearProblem) -> bool:
    return problem.student_hidden.dtype == problem.teacher_hidden.dtype == torch.float32


def options_of(rows: Rows, v: int, config: Config, *, second: bool, difference: bool = False) -> Options:
    """Return the row kernels' view of `rows`, of which this rank has `v` columns; `second`: `second_sweep`'s answer."""
    from vigos.kernels.divergence import LAUNCH, Options

    return Options(
        student_row=rows.student_row.contiguous(), teacher_row=rows.teacher_row.contiguous(),
        kind=rows.kind.contiguous(), labels=None if rows.labels is None else rows.labels.contiguous(),
        vocab=rows.local_vocab(v), vocab_start=rows.vocab_start, student_transform=rows.student_transform.constants,
        teacher_transform=rows.teacher_transform.constants, share=rows.share, entry_clip=rows.entry_clip,
        difference=difference, second=second or difference, launch=config.launch or LAUNCH,
    )  # fmt: skip


def of_rows(options: Options, block: slice, student_row: Tensor, teacher_row: Tensor) -> Options:
    """Select the rows of `block`, whose logits are rows `student_row` and `teacher_row` of the chunk."""
    labels = None if options.labels is None else options.labels[block]
    return replace(options, student_row=student_row, teacher_row=teacher_row, kind=options.kind[block], labels=labels)


def of_all_ranks(partial: Tensor, rows: Rows, slices: int) -> Tensor:
    """Gather every rank's slices in rank order, so that all ranks merge the same numbers in the same order.

    `slices`: how many the largest possible shard has.
    """
    if rows.group is None:
        return partial
    from vigos.kernels.numerics import LABEL_S, LABEL_T, LOWEST, MAX_S, MAX_T

    # Ranks may hold shards of different sizes; a slice without entries is a sum over nothing.
    full = partial.new_zeros(*partial.shape[:2], slices)
    full[[MAX_S.value, MAX_T.value]] = LOWEST.value
    full[[LABEL_S.value, LABEL_T.value]] = -math.inf
    full[:, :, : partial.shape[2]] = partial
    parts = [torch.empty_like(full) for _ in range(rows.group.size())]
    dist.all_gather(parts, full, group=rows.group)
    return torch.cat(parts, dim=2)


def measure(
    rows: Rows, options: Options, student: Tensor, teacher: Tensor, student_bias: Tensor | None,
    teacher_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute statistics (5 or 7, R) and state (R, STATE) of rows whose logits exist."""
    from vigos.kernels import divergence as kernels

    state = torch.zeros(options.n_rows, STATE, dtype=torch.float32, device=student.device)
    partial = kernels.row_partials(student, teacher, options, student_bias, teacher_bias)
    stats = kernels.finish(of_all_ranks(partial, rows, kernels.slices(rows.vocab_size, options.launch)), options, state)
    if not options.second:
        return stats, state
    second = kernels.second_partials(student, teacher, options, state, student_bias, teacher_bias)
    if rows.group is not None:
        second = all_reduce(second.sum(2, keepdim=True), rows.group)
    kernels.finish_second(second, options, state, stats)
    return stats, state


def statistics_of(stats: Tensor, labels: bool) -> Statistics:
    """Return the rows of a tensor (5 or 7, R) as named statistics."""
    fields = [row.clone() for row in stats]  # outputs of an operator must not share memory
    return Statistics(*fields[:5], *(fields[5:7] if labels else (None, None)))


def told(rows: Rows) -> tuple[bool | None, bool]:
    """Return whether every row has a gradient, and whether any needs a second sweep: one wait for the device.

    In a CUDA graph nothing can be asked: None, and the second sweep is made.
    """
    if rows.device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # type: ignore[attr-defined]
        return None, True
    silent = ((rows.clip < math.inf) | (rows.weight == 0)).any()
    silent, jsd = torch.stack([silent, (rows.kind == JSD).any()]).tolist()
    return not silent, jsd or rows.entry_clip is not None


def half_scale(options: Options, state: Tensor) -> Tensor:
    """Return (R,) powers of two that keep a row's gradient inside fp16 and most of it above fp16's 6e-8.

    |d KL(student || teacher) / dz| = p |log p/q - KL| <= 2 KL + 2/e, because sum p |log p/q| <= KL + 2/e; the other
    divergences have gradients below 2. Clipped entries move a sum by at most 1; fp16 ends at 65504.
    """
    from vigos.kernels.numerics import LSE_GAP, MEAN_GAP, PIVOT

    pivot, lse_gap, mean_gap = (state[:, column.value] for column in (PIVOT, LSE_GAP, MEAN_GAP))
    kl = torch.where(options.kind == REVERSE_KL, (pivot - lse_gap + mean_gap).clamp(min=0.0), 0.5)
    scale = torch.exp2(torch.floor(torch.log2(10000.0 / (options.student_transform[0] * (2.0 * kl + 1.0)))))
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)


class Gradients:
    """Accumulator of a chunked engine: the rows' hidden gradients, the head's and the bias's.

    Attributes:
        drow: (R, D) fp32 or None. computed: (R,) bool. dweight: (V, D) fp32 or None. dbias: (V,) fp32 or None.
        dlogits: (capacity, V), gradients of live rows that wait for their product.
    """

    def __init__(self, problem: LinearProblem, width: int, config: Config, all_live: bool | None) -> None:
        v, d = problem.student_weight.shape
        r, device = problem.n_rows, problem.device
        self.problem, self.config = problem, config
        self.capacity = config.capacity(problem, width)
        self.real = problem.local_vocab(v)
        self.head = problem.need_dweight or problem.need_dbias
        self.drow = torch.zeros(r, d, dtype=torch.float32, device=device) if problem.need_dhidden else None
        self.computed = torch.full((r,), bool(all_live), device=device)
        # What `live` would answer for each chunk, where that is known.
        known = all_live and not self.head and gradient_dtype(problem) != torch.float16
        ones = torch.ones(width, device=device)
        self.known = (ones.bool(), ones) if known else None
        self.dweight = torch.zeros(v, d, dtype=torch.float32, device=device) if problem.need_dweight else None
        self.dbias = torch.zeros(v, dtype=torch.float32, device=device) if problem.need_dbias else None
        self.dtype = gradient_dtype(problem)
        # The interpreter truncates where a GPU rounds to nearest, so on the CPU torch does the rounding.
        stored = self.dtype if device.type == "cuda" else torch.float32
        self.dlogits = torch.empty(self.capacity, v, dtype=stored, device=device)
        self.everyone = all_live is not False  # what cannot be told takes part
        self.offsets = torch.arange(width + 1, device=device)
        self.waiting: list[tuple[Tensor, Tensor]] = []  # (row of the supervision, what its dlogits was multiplied by)
        self.filled = 0
        # The last chunk's rows at the end of dlogits, after `skipped` of the chunk's rows that went before.
        self.unread = 0
        self.skipped = 0
        self.live_count = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def add(self, z: Tensor, options: Options, state: Tensor, divergence: Tensor, block: slice) -> None:
        """Add the gradients of a chunk's live rows; multiplies whenever `capacity` of them have come together."""
        from vigos.kernels import divergence as kernels

        problem, n = self.problem, options.n_rows
        live, factor = self.live(options, state, divergence, block)
        rows = self.offsets[:n] if self.everyone else torch.argsort(~live, stable=True)  # live ones first
        self.settle()
        placed = 0
        while placed < n:
            now = rows[placed : placed + self.capacity - self.filled]
            m = now.shape[0]
            kernels.row_grad(
                z, z, options, state, factor, now, self.offsets[: m + 1],
                self.dlogits[self.filled : self.filled + m], problem.student_bias, problem.teacher_bias,
            )  # fmt: skip
            self.waiting.append((now + block.start, factor[now]))
            self.filled, placed, self.unread, self.skipped = self.filled + m, placed + m, m, placed
            if self.filled == self.capacity:
                self.flush()
        if not self.everyone:
            self.live_count.copy_(live.sum(), non_blocking=True)
            if self.copied is not None:
                self.copied.record()

    def settle(self) -> None:
        """Give up the places of the last chunk's rows that turn out to have no gradient."""
        if not self.everyone and self.unread > 0:
            if self.copied is not None:
                self.copied.synchronize()
            live = min(self.unread, max(0, int(self.live_count) - self.skipped))
            self.filled -= self.unread - live
            rows, factor = self.waiting[-1]
            self.waiting[-1] = rows[:live], factor[:live]
        self.unread = 0

    def live(self, options: Options, state: Tensor, divergence: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """Return (which rows of the chunk have a gradient, the factor of their dlogits; 0 for the others)."""
        weight, clip = self.problem.weight[block], self.problem.clip[block]
        if self.known is not None:
            return self.known[0][: weight.shape[0]], self.known[1][: weight.shape[0]]
        live = (weight != 0) & ~(divergence > clip)  # a NaN divergence counts, so that it is seen
        self.computed[block] = live
        if self.head:
            factor = weight
        else:
            factor = half_scale(options, state) if self.dtype == torch.float16 else torch.ones_like(weight)
        return live, torch.where(live, factor, 0.0)

    def flush(self) -> None:
        """Multiply what waits in `dlogits`."""
        if self.filled == 0:
            return
        problem, n = self.problem, self.filled
        rows, factor = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting, self.filled, self.unread = [], 0, 0
        dlogits = self.dlogits.to(self.dtype)
        if self.drow is not None:
            drow = torch.empty(self.capacity, self.drow.shape[1], dtype=torch.float32, device=self.drow.device)
            # Rows past n hold something old: rows do not mix.
            backproject(dlogits, problem.student_weight, self.real, drow, self.config)
            if self.head or self.dtype == torch.float16:
                drow[:n] = torch.where((factor != 0)[:, None], drow[:n] / factor[:, None], 0.0)
            self.drow[rows] = drow[:n]
        if self.dweight is not None:
            hidden = problem.student_hidden.new_zeros(self.capacity, problem.student_hidden.shape[1])
            hidden[:n] = problem.student_hidden[problem.student_row[rows]].masked_fill((factor == 0)[:, None], 0.0)
            dlogits[n:] = 0
            add_head_gradient(self.dweight, dlogits, hidden, self.config)
        if self.dbias is not None:
            self.dbias += dlogits[:n].sum(0, dtype=torch.float32)

    def into(self, result: LinearResult) -> None:
        """Finish the products and put all gradients into `result`."""
        self.settle()
        self.flush()
        result.drow, result.dweight, result.dbias = self.drow, self.dweight, self.dbias
        if result.drow is not None:
            result.computed = self.computed
            all_reduce(result.drow, self.problem.group)


def gradient_dtype(problem: LinearProblem) -> torch.dtype:
    """Return the dtype of dlogits: the head's, except fp16 with a head to train.

    fp16 needs a power of two a row to hold small gradients, which the sum over rows of a head's gradient cannot undo.
    """
    head = problem.need_dweight or problem.need_dbias
    dtype = problem.student_weight.dtype
    return torch.float32 if head and dtype == torch.float16 else dtype


def _project(
    problem: LinearProblem, block: slice, width: int, z: Tensor, config: Config, step: Tensor | None = None
) -> None:
    """Write student logits, or theirs less the target's, to z[:width] and target logits to z[width:].

    step: (n, D) from the teacher's hidden states to the targets', of float32 operands.
    """
    student = problem.student_hidden[padded(problem.student_row[block], width)]
    teacher = problem.teacher_hidden[padded(problem.teacher_row[block], width)]
    separation = student - teacher if takes_difference(problem) else None
    if step is not None:
        step = torch.nn.functional.pad(step, (0, 0, 0, width - step.shape[0]))
        teacher, separation = teacher + step, None if separation is None else separation - step
    project(problem, student if separation is None else separation, teacher, z, config)


def _adjust(
    problem: LinearProblem, found: Targets, block: slice, width: int, z: Tensor, config: Config, *, difference: bool
) -> Tensor:
    """Put the targets that are made of logits into z; return what was cut, bool (V, k)."""
    v, n = problem.local_vocab(z.shape[1]), block.stop - block.start
    head = problem.student_weight if problem.teacher_weight is None else problem.teacher_weight

    def separation(entries: Tensor) -> Tensor:
        # Of the whole chunk and vocabulary: another shape might round a row's product otherwise.
        assert problem.control_row is not None
        control = problem.teacher_hidden[padded(problem.control_row[block], width)]
        raw = torch.empty(width, z.shape[1], dtype=torch.float32, device=z.device)
        if _fp32(problem):
            control = problem.teacher_hidden[padded(problem.teacher_row[block], width)] - control
        product(control, head.T, raw, config)
        raw = raw if _fp32(problem) else z_t - raw
        return raw[found.places][:, entries].T

    z_t = z[width:] if problem.teacher_transform.softcap is None else z[width:].clone()
    return adjust(problem, found, z[:n, :v].T, z[width : width + n, :v].T, separation, difference=difference)


def forward(problem: LinearProblem, config: Config = CONFIG) -> LinearResult:
    """Compute the statistics of every row, and the gradients of the rows through which the loss has one."""
    biases = (problem.student_bias, problem.teacher_bias)
    student_bias, teacher_bias = (None if b is None else b.contiguous() for b in biases)  # kernels step by one
    problem = replace(problem, student_bias=student_bias, teacher_bias=teacher_bias)
    r, v, device = problem.n_rows, problem.student_weight.shape[0], problem.device
    labels = problem.labels is not None
    stats = torch.empty(7 if labels else 5, r, dtype=torch.float32, device=device)
    need = problem.need_dhidden or problem.need_dweight or problem.need_dbias
    width = config.width(problem)
    theirs, bias = adjusted_transform(problem)
    seen = replace(problem, teacher_transform=theirs, teacher_bias=bias)  # as the row kernels see it
    difference = takes_difference(seen)
    all_live, second = told(problem)
    gradients = Gradients(seen, width, config, all_live) if need else None
    if r > 0:
        all_rows = options_of(seen, v, config, second=second, difference=difference)
        z = torch.empty(2 * width, v, dtype=torch.float32, device=device)
        index = torch.arange(2 * width, device=device)
        for block in chunks(r, width):
            n = block.stop - block.start
            options = of_rows(all_rows, block, index[:n], index[width : width + n])
            found = targets(problem, torch.arange(r, device=device)[block], wide=_fp32(problem))
            _project(seen, block, width, z, config, None if found is None else found.step)
            cut = None
            if found is not None and (found.places.shape[0] > 0 or theirs is not problem.teacher_transform):
                cut = _adjust(problem, found, block, width, z, config, difference=difference)
            stats[:, block], state = measure(seen, options, z, z, problem.student_bias, bias)
            if labels and found is not None and cut is not None:
                few = torch.arange(r, device=device)[block][found.places]
                stats[6, few] = stats[6, few].masked_fill(cut_labels(problem, cut, few), -math.inf)
            if gradients is not None:
                gradients.add(z, options, state, stats[0, block], block)
    result = LinearResult(statistics_of(stats, labels))
    if gradients is not None:
        gradients.into(result)
    return result


def logits_forward(problem: LogitsProblem, config: Config = CONFIG) -> LogitsResult:
    """Compute the statistics of every row from logits, in place."""
    options = options_of(problem, problem.student_logits.shape[1], config, second=told(problem)[1])
    stats, state = measure(problem, options, problem.student_logits, problem.teacher_logits, None, None)
    return LogitsResult(statistics_of(stats, problem.labels is not None), state)


def logits_backward(
    problem: LogitsProblem, state: Tensor, row_grad: Tensor, *, out: Tensor | None = None, config: Config = CONFIG
) -> Tensor:
    """Return dlogits (N, V) in the logits' dtype: row_grad[r] * d divergence[r] / d student_logits, summed over pairs.

    `out` may be the student's logits, repeated rows or not. Rows with row_grad 0 are not read.
    """
    from vigos.kernels import divergence as kernels

    student = problem.student_logits
    if out is None:
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
    order = problem.student_row.argsort(stable=True)
    ends = torch.searchsorted(problem.student_row[order], torch.arange(student.shape[0] + 1, device=student.device))
    kernels.row_grad(
        student, problem.teacher_logits, options_of(problem, student.shape[1], config, second=told(problem)[1]),
        state, row_grad.float().contiguous(), order, ends, out, None, None,
    )  # fmt: skip
    return out
