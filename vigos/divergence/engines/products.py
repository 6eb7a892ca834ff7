"""Matrix products of the engines for GPUs, and the chunks of rows that fit their tiles.

Results are fp32 whatever the operands are. A chunk's logits are one product of 2 C rows where both sides share the
head; the gradients of several chunks wait in one buffer and are multiplied with the head together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vigos.divergence.engines.problem import LinearProblem, chunk_width, chunks

DEPTH = 64  # a product's depth is a multiple of it where padding is left out


@dataclass(frozen=True)
class Chunks:
    """Sizes that decide speed and memory.

    Attributes:
        chunk_bytes: what the logits of a chunk may take: at V = 151,936 256 rows, 512 in the first product.
        waiting_chunks: how many chunks' gradients are multiplied with the head at a time, 512 rows; whole tiles of 128,
            and of 8,192 rows none is left over.
        waiting_with_head: the same where the head has a gradient, which every such product reads and writes.
        in_place_bytes: where the gradients that wait for a product may take their logits' place, those are one chunk if
            it fits beside the rows' hidden gradients: 512 rows at D 2,048, V 151,936.
        stored_pairs: keep logits as pairs of 16-bit numbers where the engine `cuda` can: twice the rows of a chunk.
        slab_elements: elements of a product that are converted or accumulated at a time where no kernel takes the
            operands as they are.
    """

    chunk_bytes: int = 300 << 20
    waiting_chunks: int = 2
    waiting_with_head: int = 4
    in_place_bytes: int = 700_000_000
    stored_pairs: bool = True
    slab_elements: int = 16 << 20

    def width(self, problem: LinearProblem) -> int:
        """Return the rows of a chunk; the same on every rank that holds a shard."""
        sides = 2 if problem.control_row is None else 3
        most = self.chunk_bytes // (problem.entries_a_rank(problem.student_weight.shape[0]) * 4 * sides)
        tile = 128 if most >= 128 and problem.n_rows >= 8 * 128 else 16  # of few rows, padding costs more
        return chunk_width(problem.n_rows, most // tile * tile, tile)

    def capacity(self, problem: LinearProblem, width: int) -> int:
        """Return the rows whose gradients wait for their product."""
        head = problem.need_dweight or problem.need_dbias
        waiting = self.waiting_with_head if head else self.waiting_chunks
        return min(waiting, -(-problem.n_rows // width)) * width

    def in_place(self, problem: LinearProblem, rows: int, entry_bytes: int = 8) -> bool:
        """Return whether gradients of `rows` rows go over their logits, an entry's of both sides in `entry_bytes`."""
        v, d = problem.student_weight.shape
        only_hidden = problem.need_dhidden and not (problem.need_dweight or problem.need_dbias)
        return only_hidden and entry_bytes * rows * v + 4 * problem.n_rows * d <= self.in_place_bytes


def padded(index: Tensor, width: int) -> Tensor:
    """Return `index` with its last entry repeated up to `width`: every product has the same shape."""
    n = index.shape[0]
    return index if n == width else torch.cat([index, index[-1:].expand(width - n)])


def product(a: Tensor, b: Tensor, out: Tensor, config: Chunks) -> None:
    """Write out = a @ b in fp32, whatever the operands are: 16-bit ones of one dtype are not converted on a GPU."""
    if a.dtype == b.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.dtype == b.dtype and a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        a = a.float()
        for block in chunks(b.shape[1], max(1, config.slab_elements // max(1, b.shape[0]))):
            out[:, block] = a @ b[:, block].float()


def project(problem: LinearProblem, student: Tensor, teacher: Tensor, z: Tensor, config: Chunks) -> None:
    """Write the logits of `student` (C, D) to z[:C], those of `teacher` (C, D_t) to z[C:]."""
    width = student.shape[0]
    if problem.teacher_weight is None:
        product(torch.cat([student, teacher]), problem.student_weight.T, z, config)
    else:
        product(student, problem.student_weight.T, z[:width], config)
        product(teacher, problem.teacher_weight.T, z[width:], config)


def backproject(dlogits: Tensor, weight: Tensor, real: int, out: Tensor, config: Chunks) -> None:
    """Compute out = dlogits @ weight over the first `real` entries; weight rows past them are in no product.

    The last few entries are multiplied apart, so that the large product's depth stays a multiple of the tensor cores'.
    """
    if real == weight.shape[0]:
        product(dlogits, weight, out, config)
        return
    main = real - real % DEPTH
    tail = torch.nn.functional.pad(weight[main:real], (0, 0, 0, DEPTH - (real - main)))
    last = torch.empty_like(out)
    product(torch.nn.functional.pad(dlogits[:, main:real], (0, DEPTH - (real - main))), tail, last, config)
    product(dlogits[:, :main], weight[:main], out, config)
    out += last


def add_head_gradient(dweight: Tensor, dlogits: Tensor, hidden: Tensor, config: Chunks) -> None:
    """Add dlogits.T @ hidden to dweight (V, D) fp32; the sum stays fp32."""
    if dlogits.dtype == hidden.dtype == torch.float32:
        dweight.addmm_(dlogits.T, hidden)
    elif dlogits.dtype == hidden.dtype and dweight.is_cuda:
        torch.addmm(dweight, dlogits.T, hidden, out_dtype=torch.float32, out=dweight)  # type: ignore[call-overload]
    else:
        for block in chunks(dweight.shape[0], max(1, config.slab_elements // hidden.shape[1])):
            dweight[block] += dlogits[:, block].T.float() @ hidden.float()
