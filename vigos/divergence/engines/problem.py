"""Problems that engines are given and results that they return; everything was checked in `vigos.divergence.api`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

STATE = 8  # columns of LogitsResult.state

# Codes in C++ (csrc/numerics.h).
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# What the engines `reference` and `cpu` know of a row once its statistics are complete: both maxima, the logarithms of
# the sums of exp(z - maximum), L_s - L_t, and the mean slope S that the gradient p_s times subtracts. csrc/cpu has the
# same columns; those of the GPU's kernels are named in kernels/numerics.py.
TOP_S, LOG_SUM_S, TOP_T, LOG_SUM_T, LSE_GAP, MEAN_SLOPE = range(6)
KNOWN = 6


@dataclass(frozen=True)
class LogitTransform:
    """Turn a head's raw logits, bias included, into the z that softmax sees.

    With a softcap z = softcap * tanh(scale * raw / softcap) / temperature, else z = scale * raw / temperature; in the
    engines' words height * tanh(inner * raw), or alpha * raw.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def alpha(self) -> float:
        """Return dz / draw at raw = 0: scale / temperature."""
        return self.scale / self.temperature

    @property
    def inner(self) -> float:
        """Return scale / softcap, or 0 without a softcap."""
        return 0.0 if self.softcap is None else self.scale / self.softcap

    @property
    def height(self) -> float:
        """Return the largest |z|, softcap / temperature, or 0 without a softcap."""
        return 0.0 if self.softcap is None else self.softcap / self.temperature

    @property
    def constants(self) -> tuple[float, float, float]:
        """Return (alpha, inner, height), as kernels take a transform."""
        return self.alpha, self.inner, self.height

    def __call__(self, raw: Tensor) -> Tensor:
        """Return z of raw logits of any shape."""
        return raw * self.alpha if self.softcap is None else torch.tanh(raw * self.inner) * self.height


@dataclass(frozen=True)
class Rows:
    """The supervised rows, what to compute for them, and how logits become distributions: shared by both operations.

    Sizes: R supervised rows; N student rows, M teacher rows; V the vocabulary held here (all of it, or one shard).

    Attributes:
        student_row, teacher_row: int64 (R,), in range; may repeat, in any order.
        kind: int8 (R,), one of `vigos.divergence.supervision.KINDS`.
        weight, clip: float32 (R,); the loss is sum of weight * min(divergence, clip).
        labels: int64 (R,) global vocabulary ids, or None.
        student_transform, teacher_transform: from each side's raw logits to z; the two may differ.
        beta: of rows of kind JSD and of skew KL, in (0, 1).
        skewed: some rows are of skew KL.
        entry_clip: clip of each vocabulary entry's term before the sum, or None.
        vocab_size: logical size of the whole vocabulary; global ids beyond it have probability 0.
        vocab_start: global id of this shard's first entry; 0 without a group.
        group: process group over which the vocabulary is sharded, or None.
        control_row, contrast, plausibility: int64 and float32 (R,), the targets as in `vigos.Supervision`; all of them
            None where every target is its teacher row.
    """

    student_row: Tensor
    teacher_row: Tensor
    kind: Tensor
    weight: Tensor
    clip: Tensor
    labels: Tensor | None
    student_transform: LogitTransform
    teacher_transform: LogitTransform
    beta: float
    entry_clip: float | None
    vocab_size: int
    vocab_start: int
    group: dist.ProcessGroup | None
    skewed: bool = field(default=False, kw_only=True)
    control_row: Tensor | None = field(default=None, kw_only=True)
    contrast: Tensor | None = field(default=None, kw_only=True)
    plausibility: Tensor | None = field(default=None, kw_only=True)

    def pairs(self, index: Tensor, **changes: Any) -> Self:
        """Return the problem of some pairs, without labels."""
        names = ("student_row", "teacher_row", "kind", "weight", "clip", "control_row", "contrast", "plausibility")
        columns = {name: getattr(self, name) for name in names}
        chosen = {name: x if x is None else x[index] for name, x in columns.items()}
        return replace(self, **({"labels": None} | chosen | changes))

    @property
    def share(self) -> float:
        """Return the smaller of beta and 1 - beta, as kernels take it: negative where it is the student's.

        In float32 1 - beta would lose the digits of a beta close to 1.
        """
        return self.beta if self.beta <= 0.5 else self.beta - 1

    @property
    def n_rows(self) -> int:
        """R, the number of pairs."""
        return self.student_row.shape[0]

    @property
    def alike(self) -> bool:
        """True if both sides have one transform: z_s - z_t then follows from the difference of raw logits."""
        return self.student_transform == self.teacher_transform

    def entries_a_rank(self, v: int) -> int:
        """Return `v`, or with a group a rank's mean share: sizes of chunks must be the same on every rank."""
        return v if self.group is None else math.ceil(self.vocab_size / self.group.size())

    def local_vocab(self, v: int) -> int:
        """Return how many of this rank's `v` entries are real ones."""
        return max(0, min(v, self.vocab_size - self.vocab_start))


@dataclass(frozen=True)
class LinearProblem(Rows):
    """Divergences between rows of `student_hidden @ student_weight.T` and of `teacher_hidden @ teacher_weight.T`.

    Attributes:
        student_hidden: (N, D); teacher_hidden: (M, D_t). Any float dtype, any strides.
        student_weight: (V, D). teacher_weight: (V, D_t), or None: the student's head serves both (D_t = D).
        student_bias, teacher_bias: (V,) or None. With a shared head without a bias of the teacher's own, both are the
            same tensor.
        need_dhidden: compute `drow`. need_dweight, need_dbias: compute the head's gradients.
    """

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor | None
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    need_dhidden: bool
    need_dweight: bool
    need_dbias: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 operands, else float32: the dtype of logits, statistics and stored gradients."""
        return torch.float64 if self.student_hidden.dtype == torch.float64 else torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the student's head."""
        return self.student_weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.student_hidden.device


@dataclass(frozen=True)
class LogitsProblem(Rows):
    """The same for logits that exist.

    Attributes:
        student_logits: (N, V); teacher_logits: (M, V). Any float dtype, any strides.
        dlogits: None, or what `logits_forward` writes the gradient of the loss to: (N', V), rows `dlogits_row` (R,),
            none of them twice; 0 where `live_rows` is False. The rows that nobody names are not its business.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    dlogits: Tensor | None = None
    dlogits_row: Tensor | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 logits, else float32."""
        return torch.float64 if self.student_logits.dtype == torch.float64 else torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the student's logits."""
        return self.student_logits.dtype

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.student_logits.device


@dataclass
class Statistics:
    """Row statistics in the compute dtype. log-probabilities are None without labels."""

    divergence: Tensor  # (R,) nats, before the row's clip
    student_entropy: Tensor  # (R,) nats
    teacher_entropy: Tensor  # (R,) nats
    student_lse: Tensor  # (R,)
    teacher_lse: Tensor  # (R,)
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None

    @classmethod
    def empty(cls, rows: LinearProblem | LogitsProblem) -> Statistics:
        """Allocate statistics of `rows`; every element is to be written."""
        fields = [torch.empty(rows.n_rows, dtype=rows.compute_dtype, device=rows.device) for _ in range(7)]
        return cls(*fields[:5], *(fields[5:] if rows.labels is not None else (None, None)))


@dataclass
class LinearResult:
    """Result of an engine's `forward` for a `LinearProblem`.

    Attributes:
        statistics: of all R rows.
        computed: bool (R,), the rows whose gradient `drow` holds: weight != 0 and not clipped. None without
            need_dhidden.
        drow: (R, D) in the compute dtype, d divergence[r] / d student_hidden[student_row[r]], not weighted. Rows
            outside `computed` are 0. None without need_dhidden. With a group: summed over the ranks.
        dweight: (V, D) in the compute dtype, gradient of the loss at upstream 1, or None.
        dbias: (V,) likewise.
    """

    statistics: Statistics
    computed: Tensor | None = None
    drow: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


@dataclass
class LogitsResult:
    """Result of `logits_forward`: the statistics, and whatever `logits_backward` needs of them.

    Attributes:
        state: (R, STATE) in the compute dtype, opaque to everyone but the engine, which may leave columns unused.
    """

    statistics: Statistics
    state: Tensor


def live_rows(rows: Rows, divergence: Tensor) -> Tensor:
    """Return the rows with a gradient of the loss, bool (R,). A NaN divergence counts, so that it is seen."""
    return (rows.weight != 0) & ~(divergence > rows.clip)


def chunk_width(n: int, most: int, multiple: int = 16) -> int:
    """Return one width for all chunks of `n` rows: at most about `most`, a multiple of `multiple`, as even as it gets.

    Every chunk is padded to it: a matrix product of another shape may round differently, and a row's result must not
    depend on which rows share its chunk.
    """
    chunks = max(1, math.ceil(n / max(most, multiple)))
    return multiple * math.ceil(math.ceil(max(n, 1) / chunks) / multiple)  # no rows: a width all the same


def chunks(n: int, width: int) -> Iterator[slice]:
    """Yield slices that cover range(n)."""
    for start in range(0, n, width):
        yield slice(start, min(start + width, n))


def all_reduce(x: Tensor, group: dist.ProcessGroup | None, op: str = "sum") -> Tensor:
    """Reduce over the ranks that share the vocabulary, in place; nothing without a group."""
    if group is not None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
    return x
