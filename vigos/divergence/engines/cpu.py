"""impl="cpu": chunks of logits from a matrix product, a C++ row kernel over them, and the product for the gradient.

A chunk's logits lie as (V, columns): the student's columns, then the teacher's. With a shared head they come from one
product of 2C columns, so the head is read once for both; the student's columns then are (student - teacher) @ head.T,
whose rounding is relative to the difference that the gradient is made of. The row kernel (csrc/cpu/divergence_kernel.h)
takes tokens along its SIMD lanes and visits the chunk twice: for the statistics, inside the product, while a block of
logits is in the second-level cache; and for divergence and gradient, which is written over the logits as (a, p_s). The
last product forms a - p_s S of the live rows while it packs them.

The products are csrc/cpu/gemm_kernel.h: a row's result depends on nothing but that row, and 16-bit heads are widened a
block at a time on the way in, so logits are float32 whatever the head is.

A chunk's memory is kept between calls: on a virtual machine 130 MiB given out anew took 0.2 to 0.5 s. The system may
take it meanwhile; `release_memory` gives it back at once.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from vigos.divergence.engines.contrast import adjust, adjusted_transform, cut_labels, targets
from vigos.divergence.engines.extension import find_extension
from vigos.divergence.engines.problem import (
    DTYPES,
    KNOWN,
    MEAN_SLOPE,
    STATE,
    LinearProblem,
    LinearResult,
    LogitsProblem,
    LogitsResult,
    Rows,
    Statistics,
    all_reduce,
    chunk_width,
    chunks,
)


@dataclass(frozen=True)
class Config:
    """chunk_bytes: of a chunk's logits, both sides. most_columns: rows of a chunk where the vocabulary is small."""

    chunk_bytes: int = 120 * 2**20
    most_columns: int = 256


CONFIG = Config()


def _why_not(device: torch.device, tensors: list[Tensor]) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device}"
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, got {x.dtype}; the reference engine takes float64"
    found = find_extension()
    return found if isinstance(found, str) else None


def why_not(problem: LinearProblem) -> str | None:
    """Return why it cannot run, or None: it needs the extension and CPU tensors of at most 32 bits."""
    tensors = [problem.student_hidden, problem.student_weight, problem.teacher_hidden, problem.teacher_weight]
    return _why_not(problem.device, [x for x in tensors if x is not None])


def logits_why_not(problem: LogitsProblem) -> str | None:
    """Return why it cannot run, or None: as `why_not`, and the vocabulary must not be sharded."""
    if problem.group is not None:
        return "its kernel for logits visits a row in one go and cannot wait for other ranks; the reference engine can"
    return _why_not(problem.device, [problem.student_logits, problem.teacher_logits])


def _c() -> ModuleType:
    extension = find_extension()
    assert not isinstance(extension, str)
    return extension


def _threads() -> int:
    return torch.get_num_threads()


class _Transforms:
    """`_C.Transforms` of both sides and the bias vectors that it points to."""

    def __init__(
        self, rows: Rows, bias_s: Tensor | None = None, bias_t: Tensor | None = None, v: int = 0,
        difference: bool = False,
    ) -> None:  # fmt: skip
        self.native = _c().Transforms(rows.student_transform.constants, rows.teacher_transform.constants, difference)
        if bias_s is not None or bias_t is not None:
            zero = torch.zeros(v)
            student = zero if bias_s is None else _copied(bias_s[:v].float())
            teacher = zero if bias_t is None else _copied(bias_t[:v].float())
            gap = torch.where((student == teacher), 0.0, student - teacher)  # also where both are -inf
            self.biases = (student, teacher, gap)
            self.native.set_biases(*(x.data_ptr() for x in self.biases))


def _matrix(x: Tensor) -> object:
    """Return the `_C.Matrix` of a tensor whose columns are contiguous."""
    return _c().Matrix(x.data_ptr(), DTYPES[x.dtype], x.stride(0), *x.shape)


def _readable(x: Tensor) -> bool:
    """Return True if C++ can read `x` where it lies: columns contiguous, addresses multiples of an element's size."""
    return (x.stride(1) == 1 or x.shape[1] == 1) and x.data_ptr() % x.element_size() == 0


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


class _Heads:
    """Iterate over both heads' real rows, the teacher's None if shared; C++ gets copies of what it cannot read."""

    BLOCK = 4096

    def __init__(self, student: Tensor, teacher: Tensor | None, real: int) -> None:
        self.heads = [None if x is None else x[:real] for x in (student, teacher)]
        readable = all(x is None or _readable(x) for x in self.heads)
        self.real, self.step = real, max(1, real) if readable else self.BLOCK

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield (first row, rows of the student's head, the same of the teacher's)."""
        for block in chunks(self.real, self.step):
            student, teacher = (x if x is None or _readable(x) else _copied(x[block]) for x in self.heads)
            assert student is not None
            yield block.start, student, teacher


KEPT_BYTES = 160 * 2**20  # a chunk's memory is kept for the next call up to this size
_kept: list[mmap.mmap] = []  # what the last call left, at most one


def _memory(size: int) -> mmap.mmap | None:
    """Return at least `size` bytes, the last call's or new ones, in huge pages; None where malloc serves as well.

    The system gives memory out page by page, each with a fault and a clearing: in small pages 120 MiB take 30,000.
    """
    if size < 2**23 or not hasattr(mmap, "MADV_HUGEPAGE") or not hasattr(mmap, "MADV_FREE"):
        return None
    with suppress(IndexError):  # another thread may have it
        if len(memory := _kept.pop()) >= size:
            return memory
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _keep(memory: mmap.mmap | None) -> None:
    """Keep a chunk's memory for the next call; until then the system takes pages back when it is short of them."""
    if memory is not None and len(memory) <= KEPT_BYTES:
        memory.madvise(mmap.MADV_FREE)
        _kept[:] = [memory]


def release_memory() -> None:
    """Give back what the last call left for the next one, at most 160 MiB."""
    _kept.clear()


def _normalise(rows: Rows, sums: Tensor) -> tuple[Tensor, ...]:
    """Turn (6, width) sums into lse_s, lse_t, both entropies and the first KNOWN - 1 columns of what is known."""
    tops, rest = sums[:2], sums[2:].view(2, 2, -1)
    if rows.group is not None:
        most = all_reduce(tops.clone(), rows.group, "max")
        fall = torch.where(tops == -float("inf"), -float("inf"), tops - most)
        shift = torch.where(rest[0] == 0, 0.0, rest[0] * torch.where(fall == -float("inf"), 0.0, fall))
        factor = fall.exp()
        rest = all_reduce(torch.stack([rest[0] * factor, (rest[1] + shift) * factor]), rows.group)
        tops = most
    total, first = rest
    log = total.log()
    lse, entropy = tops + log, log - first / total
    lse_gap = (tops[0] - tops[1]) + (total[0] / total[1]).log()
    return lse[0], lse[1], entropy[0], entropy[1], torch.stack([tops[0], log[0], tops[1], log[1], lse_gap])


def forward(problem: LinearProblem, config: Config = CONFIG) -> LinearResult:
    """Compute the statistics of every row, and the gradients of the rows through which the loss has one."""
    c = _c()
    r, d = problem.n_rows, problem.student_weight.shape[1]
    v = problem.student_weight.shape[0]
    real = problem.local_vocab(v)
    statistics = Statistics.empty(problem)
    result = LinearResult(statistics)
    need = problem.need_dhidden or problem.need_dweight or problem.need_dbias
    if problem.need_dhidden:
        result.drow = torch.zeros(r, d)
        result.computed = torch.zeros(r, dtype=torch.bool)
    if problem.need_dweight:
        result.dweight = torch.zeros(v, d)
    if problem.need_dbias:
        result.dbias = torch.zeros(v)
    if r == 0:
        return result
    heads = _Heads(problem.student_weight, problem.teacher_weight, real)
    shared = problem.teacher_weight is None
    theirs, teacher_bias = adjusted_transform(problem)
    seen = replace(problem, teacher_transform=theirs)
    difference = shared and seen.alike
    transform = _Transforms(seen, problem.student_bias, teacher_bias, real, difference)
    options = c.Options(problem.share, problem.entry_clip)
    # Rows of one kind side by side: the kernel has code of its own for 16 columns of one kind.
    order = torch.argsort(problem.kind, stable=True)
    width = chunk_width(r, min(config.most_columns, config.chunk_bytes // (8 * problem.entries_a_rank(v))))
    size = max(1, real) * 2 * width
    memory = _memory(4 * size)
    buffer = torch.empty(size) if memory is None else torch.frombuffer(memory, dtype=torch.float32)
    for block in chunks(r, width):
        rows, n = order[block], block.stop - block.start
        w = (n + 15) // 16 * 16
        logits = buffer[: real * 2 * w].view(real, 2 * w)
        student, teacher = torch.zeros(w, d), torch.zeros(w, problem.teacher_hidden.shape[1])
        student[:n] = problem.student_hidden[problem.student_row[rows]]
        teacher[:n] = problem.teacher_hidden[problem.teacher_row[rows]]
        kind = torch.zeros(w, dtype=torch.int32)
        kind[:n] = problem.kind[rows]
        kind[n:] = kind[n - 1]
        found, cut = targets(problem, rows), None
        step = None if found is None else found.step
        first = student - teacher if difference else student
        if step is not None:
            teacher[:n] += step
            if difference:
                first[:n] -= step
        sums = torch.zeros(6, w, dtype=torch.float64)
        sums[:2] = -float("inf")
        chunk = c.Chunk(_address(logits), _address(logits, 0, w), 2 * w, 2 * w, real, w)
        changed = found is not None and (found.places.shape[0] > 0 or theirs is not problem.teacher_transform)
        _project(heads, first, teacher, logits, None if changed else (transform.native, sums))
        if found is not None and changed:
            cut = adjust(
                problem, found, logits[:, :n], logits[:, w : w + n],
                partial(_separation, problem, rows[found.places]), difference=difference,
            )  # fmt: skip
            c.chunk_statistics(chunk, transform.native, sums.data_ptr(), _threads())
        known = torch.zeros(KNOWN, w)
        lse_s, lse_t, entropy_s, entropy_t, known[:MEAN_SLOPE] = _normalise(problem, sums)
        if problem.labels is not None:
            assert statistics.student_logprob is not None
            assert statistics.teacher_logprob is not None
            z_s, z_t = _label_logits(seen, teacher_bias, logits, problem.labels[rows], difference)
            if found is not None and cut is not None:
                z_t[found.places] = z_t[found.places].masked_fill(
                    cut_labels(problem, cut, rows[found.places]), -float("inf")
                )
            statistics.student_logprob[rows] = (z_s - lse_s[:n]).float()
            statistics.teacher_logprob[rows] = (z_t - lse_t[:n]).float()
        weighted = problem.weight[rows] != 0
        measured = torch.empty(2, w, dtype=torch.float64)
        c.chunk_measure(
            chunk, transform.native, options, known.data_ptr(), kind.data_ptr(), need and bool(weighted.any()),
            measured.data_ptr(), _threads(),
        )  # fmt: skip
        all_reduce(measured, problem.group)
        known[MEAN_SLOPE] = measured[1]
        statistics.divergence[rows] = measured[0, :n].float()
        statistics.student_lse[rows], statistics.teacher_lse[rows] = lse_s[:n].float(), lse_t[:n].float()
        statistics.student_entropy[rows], statistics.teacher_entropy[rows] = (
            entropy_s[:n].float(),
            entropy_t[:n].float(),
        )
        live = (weighted & ~(statistics.divergence[rows] > problem.clip[rows])).nonzero().squeeze(1)
        if not need or live.shape[0] == 0:
            continue
        index, live_at = live.int(), rows[live]
        slopes = partial(_slopes, logits, known[MEAN_SLOPE], index)
        if result.drow is not None and result.computed is not None:
            drow = torch.zeros(live.shape[0], d)
            for start, head_s, _ in heads:
                part = drow if start == 0 else torch.empty_like(drow)
                c.backproject(slopes(start), _matrix(head_s), part.data_ptr(), _threads())
                if start > 0:
                    drow += part
            result.drow[live_at] = drow
            result.computed[live_at] = True
        if result.dweight is not None or result.dbias is not None:
            weight = problem.weight[live_at].float()
            hidden = student[live] * weight[:, None]
            dweight, dbias = (0 if x is None else x.data_ptr() for x in (result.dweight, result.dbias))
            c.accumulate_head(slopes(0), real, hidden.data_ptr(), d, weight.data_ptr(), dweight, dbias, _threads())
    _keep(memory)
    if result.drow is not None:
        all_reduce(result.drow, problem.group)
    return result


def _address(logits: Tensor, row: int = 0, column: int = 0) -> int:
    return logits.data_ptr() + 4 * (row * logits.shape[1] + column)


def _project(
    heads: _Heads, student: Tensor, teacher: Tensor, logits: Tensor, statistics: tuple[object, Tensor] | None
) -> None:
    """Write a chunk's logits (V, 2 w); with (transforms, sums) merge their sums, (6, w), into these."""
    c, w = _c(), student.shape[0]
    both = torch.cat([student, teacher]) if heads.heads[1] is None else student
    for start, head_s, head_t in heads:
        s, t = _address(logits, start), _address(logits, start, w)
        if head_t is not None:
            c.project(_matrix(head_t), teacher.data_ptr(), teacher.shape[1], w, t, 2 * w, _threads())
        chunk = c.Chunk(s, t, 2 * w, 2 * w, head_s.shape[0], w, start)
        done = () if statistics is None else (chunk, statistics[0], statistics[1].data_ptr())
        c.project(_matrix(head_s), both.data_ptr(), both.shape[1], both.shape[0], s, 2 * w, _threads(), *done)


def _slopes(logits: Tensor, mean_slope: Tensor, live: Tensor, start: int) -> object:
    """Return the `_C.Slopes` of a measured chunk's live columns (int32) from vocabulary entry `start` on."""
    w = logits.shape[1] // 2
    return _c().Slopes(
        _address(logits, start), _address(logits, start, w), 2 * w, w, mean_slope.data_ptr(), live.data_ptr(),
        live.shape[0],
    )  # fmt: skip


def _separation(problem: LinearProblem, pairs: Tensor, entries: Tensor) -> Tensor:
    """Return raw_t - raw_c of some vocabulary entries and pairs, (u, k) float32."""
    assert problem.control_row is not None
    head = problem.student_weight if problem.teacher_weight is None else problem.teacher_weight
    hidden = problem.teacher_hidden
    separation = hidden[problem.teacher_row[pairs]].float() - hidden[problem.control_row[pairs]].float()
    out = torch.empty(entries.shape[0], separation.shape[0])
    few = head if entries.shape[0] == head.shape[0] else head[entries]
    k = separation.shape[0]
    for start, part, _ in _Heads(few, None, entries.shape[0]):
        _c().project(_matrix(part), separation.data_ptr(), few.shape[1], k, _address(out, start), k, _threads())
    return out


def _label_logits(
    problem: LinearProblem, teacher_bias: Tensor | None, logits: Tensor, labels: Tensor, difference: bool
) -> Tensor:
    """Return (2, n) float64: both sides' z of each row's label, summed over the ranks that share the vocabulary."""
    n, width = labels.shape[0], logits.shape[1] // 2
    local = labels - problem.vocab_start
    mine = (local >= 0) & (local < logits.shape[0])
    out = torch.zeros(2, n, dtype=torch.float64)
    columns = torch.arange(n)[mine]
    raws = [logits[local[mine], columns + side * width].double() for side in (0, 1)]
    if difference:
        raws[0] += raws[1]
    sides = ((problem.student_bias, problem.student_transform), (teacher_bias, problem.teacher_transform))
    for side, (bias, transform) in enumerate(sides):
        raw = raws[side] if bias is None else raws[side] + bias[local[mine]].double()
        out[side, mine] = transform(raw)
    return all_reduce(out, problem.group)


# --- logits that exist -----------------------------------------------------------------------------------------------


def _rows_of(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a matrix that C++ can read, row index into it): `x` itself or a copy of the rows."""
    if _readable(x):
        return x, index
    return _copied(x[index]), torch.arange(index.shape[0])


def _row_blocks(problem: LogitsProblem, rows: Tensor, config: Config) -> list[Tensor]:
    """Return `rows` as one block, or in blocks small enough to be copied."""
    tensors = (problem.student_logits, problem.teacher_logits)
    if all(_readable(x) for x in tensors):
        return [rows]
    return list(rows.split(max(1, config.chunk_bytes // (8 * tensors[0].shape[1]))))


def logits_forward(problem: LogitsProblem, config: Config = CONFIG) -> LogitsResult:
    """Compute the statistics of every row; a row is read twice, the second time from a cache."""
    c = _c()
    r, v = problem.n_rows, problem.local_vocab(problem.student_logits.shape[1])
    out = torch.empty(r, KNOWN + 5, dtype=torch.float64)  # what is known, divergence, entropies, lse
    transform, options = _Transforms(problem), c.Options(problem.share, problem.entry_clip)
    kind = problem.kind.int()
    for rows in _row_blocks(problem, torch.arange(r), config):
        student, student_row = _rows_of(problem.student_logits, problem.student_row[rows])
        teacher, teacher_row = _rows_of(problem.teacher_logits, problem.teacher_row[rows])
        kinds, part = kind[rows].contiguous(), out[rows[0] : rows[-1] + 1] if len(rows) else out
        student_row, teacher_row = student_row.contiguous(), teacher_row.contiguous()
        c.rows_forward(
            _matrix(student), _matrix(teacher), student_row.data_ptr(), teacher_row.data_ptr(), kinds.data_ptr(),
            len(rows), v, transform.native, options, part.data_ptr(), _threads(),
        )  # fmt: skip
    state = torch.zeros(r, STATE)
    state[:, :KNOWN] = out[:, :KNOWN]
    statistics = out[:, KNOWN:].T
    logprobs: list[Tensor | None] = [None, None]
    if problem.labels is not None:
        sides = (
            (problem.student_logits, problem.student_row, problem.student_transform),
            (problem.teacher_logits, problem.teacher_row, problem.teacher_transform),
        )
        for side, (logits, row, transform_) in enumerate(sides):
            z = transform_(logits[row, problem.labels].double())
            logprobs[side] = (z - statistics[3 + side]).float()
    return LogitsResult(Statistics(*(column.float() for column in statistics), *logprobs), state)


def _rounds(index: Tensor) -> list[Tensor]:
    """Return the positions of `index` in groups within which no value repeats: one group if none does."""
    if index.unique().shape[0] == index.shape[0]:
        return [torch.arange(index.shape[0])]
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    position = torch.arange(index.shape[0])
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    rank = position - torch.where(first, position, 0).cummax(0).values
    return [order[rank == i] for i in range(int(rank.max()) + 1)]


def logits_backward(
    problem: LogitsProblem, state: Tensor, row_grad: Tensor, *, out: Tensor | None = None, config: Config = CONFIG
) -> Tensor:
    """Return dlogits (N, V) in the logits' dtype. `out` may be the student's logits; row_grad 0: not read."""
    c = _c()
    logits = problem.student_logits
    target = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    if not _readable(target):  # in place over logits that the kernel cannot write
        target.copy_(logits_backward(problem, state, row_grad, config=config))
        return target
    active = (row_grad != 0).nonzero().squeeze(1)
    transform, options = _Transforms(problem), c.Options(problem.share, problem.entry_clip)
    v = problem.local_vocab(logits.shape[1])
    for i, round_ in enumerate(_rounds(problem.student_row[active])):
        for rows in _row_blocks(problem, active[round_], config):
            student, source_row = _rows_of(logits, problem.student_row[rows])
            teacher, teacher_row = _rows_of(problem.teacher_logits, problem.teacher_row[rows])
            copied = student is not logits
            written = torch.empty_like(student, memory_format=torch.contiguous_format) if copied else target
            kinds, states, scale = (
                problem.kind[rows].int(),
                state[rows].contiguous(),
                row_grad[rows].float().contiguous(),
            )
            c.rows_backward(
                _matrix(student), _matrix(teacher), source_row.contiguous().data_ptr(),
                teacher_row.contiguous().data_ptr(), kinds.data_ptr(), states.data_ptr(), STATE,
                scale.data_ptr(), len(rows), v, transform.native, options, _matrix(written),
                i > 0 and not copied, _threads(),
            )  # fmt: skip
            if copied and i > 0:
                target[problem.student_row[rows]] += written
            elif copied:
                target[problem.student_row[rows]] = written
    quiet = torch.ones(logits.shape[0], dtype=torch.bool)
    quiet[problem.student_row[active]] = False
    target[quiet] = 0
    return target
