"""CUDA C++: torch's GEMMs with fp32 logits, a chunk of tokens at a time, and one kernel for everything between them.

The row kernel (`csrc/cuda/logits_rows.cuh`) reads each row of logits once: on sm_90 a cluster of thread blocks keeps it
in distributed shared memory, takes the statistics, and writes the gradient from there; elsewhere it reads it twice.

    linear   logits (2 C, V) fp32 of both sides -> statistics, dlogits in their dtype: over the student's logits,
             C = 512, where a row stays in shared memory; else of two chunks (2 C, V), C = 256 -> drow = dlogits @ W.
             On sm_90, where `stores_pairs` holds, a product of our own (csrc/cuda/linear_hopper.cuh) leaves both
             logits of an entry in the 4 bytes of one: C = 512
    logits   statistics, the state of each row and, where it is asked for, its gradient at the weights; backward writes
             the rows whose upstream is another, or all of dlogits (N, V), in place of the logits if asked

Memory of the linear path at V = 151,936: 8 * 512 * V bytes beside the results, or (8 + 2 itemsize) * 256 * V; half of
the first where pairs are stored. Nothing here has been run on a GPU yet: the engine is reached by `impl="cuda"` alone,
never by "auto".
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from vigos.divergence.engines.extension import find_extension
from vigos.divergence.engines.problem import (
    STATE,
    LinearProblem,
    LinearResult,
    LogitsProblem,
    LogitsResult,
    Rows,
    Statistics,
    chunks,
    live_rows,
)
from vigos.divergence.engines.products import Chunks, add_head_gradient, backproject, padded, project

CONFIG = Chunks()
TILE = 128  # entries of the vocabulary; kTileN in csrc/cuda/linear_hopper.h
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _module() -> ModuleType | None:
    """Return vigos._C.cuda, or None where the extension was built without CUDA."""
    return getattr(find_extension(), "cuda", None)


def _unavailable(device: torch.device) -> str | None:
    """Return why no call can run on `device`, or None."""
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {device}"
    module = _module()
    if isinstance(found := find_extension(), str):
        return found
    if module is None:
        return "vigos._C was built without CUDA; reinstall where nvcc is found, or with VIGOS_CUDA=ON"
    capability = torch.cuda.get_device_capability(device)
    built = module.architectures.split()
    if not any(_runs_on(name, *capability) for name in built):
        wanted = ".".join(map(str, capability))
        return (
            f"vigos._C holds CUDA code for {', '.join(built)}, this GPU is {wanted}; "
            f"reinstall with TORCH_CUDA_ARCH_LIST={wanted}"
        )
    return None


def _runs_on(name: str, major: int, minor: int) -> bool:
    """Return whether code for a CMake architecture runs: 80-real on 8.x, 80 (PTX) also on later ones, 90a on 9.0."""
    number = name.removesuffix("-real")
    if not number.isdigit():
        return number == f"{major}{minor}a"
    built = divmod(int(number), 10)
    return built <= (major, minor) and (built[0] == major or number == name)


def _common(rows: Rows, device: torch.device) -> str | None:
    if rows.control_row is not None:
        return "it has no kernel for a contrast or a cut target; impl='triton' has"
    if rows.group is not None:
        return "it does not shard the vocabulary over a process group; use impl='reference'"
    return _unavailable(device)


def why_not(problem: LinearProblem) -> str | None:
    """Return why this engine cannot run `problem`, or None."""
    for name, x in (("student_hidden", problem.student_hidden), ("teacher_hidden", problem.teacher_hidden)):
        if x.dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, {name} is {x.dtype}"
    return _common(problem, problem.device)


def logits_why_not(problem: LogitsProblem) -> str | None:
    """Return why this engine cannot run `problem`, or None."""
    student, teacher = problem.student_logits, problem.teacher_logits
    if student.dtype not in DTYPES or teacher.dtype != student.dtype:
        return (
            f"it takes float32, float16 or bfloat16 logits of one dtype on both sides, "
            f"got {student.dtype} and {teacher.dtype}"
        )
    return _common(problem, problem.device)


def _name(dtype: torch.dtype) -> str:
    return "stored_pair" if dtype == torch.int32 else str(dtype).removeprefix("torch.")


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _addressable(x: Tensor) -> bool:
    return (x.shape[1] == 1 or x.stride(1) == 1) and (x.shape[0] == 1 or x.stride(0) >= x.shape[1])


def _rows_of(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last dimension and rows that do not overlap, as the kernels address it."""
    return x if _addressable(x) else x.contiguous()


def _stride(x: Tensor) -> int:
    """Return the elements from row to row; a single row's stride may be anything, and counts if it can be one."""
    return x.stride(0) if x.shape[0] > 1 or x.stride(0) >= x.shape[1] else x.shape[1]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _scalars(rows: Rows, v: int) -> dict[str, object]:
    return {
        "vocab": v, "logical_vocab": rows.local_vocab(v), "student_transform": rows.student_transform.constants,
        "teacher_transform": rows.teacher_transform.constants, "share": rows.share,
        "entry_clip": math.inf if rows.entry_clip is None else rows.entry_clip,
    }  # fmt: skip


def _run_rows(
    rows: LinearProblem | LogitsProblem, student: Tensor, teacher: Tensor, statistics: Statistics, *,
    student_row: Tensor | None = None, teacher_row: Tensor | None = None, dlogits: Tensor | None = None,
    dlogits_row: Tensor | None = None, weight: Tensor | None = None, state: Tensor | None = None,
    bias: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:  # fmt: skip
    """Launch over `rows.n_rows` rows: row r is student[student_row[r]] (or student[r]), and dlogits likewise.

    student, teacher (·, V) of one dtype with unit column stride, or stored pairs as int32 and the tiles' largest z_t;
    dlogits (·, V) times `weight` (R,), unweighted without it, 0 where `live_rows` is False; state (R, STATE);
    statistics are written.
    """
    module = _module()
    assert module is not None
    clipped = torch.empty(rows.n_rows, dtype=torch.bool, device=student.device)
    # Held in names until the launch: a temporary's memory could be handed out again before the kernel reads it.
    kind, clip = rows.kind.contiguous(), rows.clip.float().contiguous()
    weight = (rows.weight != 0).float() if weight is None else weight.float().contiguous()
    labels = None if rows.labels is None else rows.labels.contiguous()
    with torch.cuda.device_of(student):
        params = module.LogitsRowsParams(
            student=student.data_ptr(), teacher=teacher.data_ptr(), dlogits=_address(dlogits),
            student_row=_address(student_row), teacher_row=_address(teacher_row), kind=kind.data_ptr(),
            dlogits_row=_address(dlogits_row), weight=weight.data_ptr(), clip=clip.data_ptr(),
            student_bias=_address(bias[0]), teacher_bias=_address(bias[1]), labels=_address(labels),
            clipped=clipped.data_ptr(), state=_address(state),
            **{name: _address(x) for name, x in vars(statistics).items()},
            rows=rows.n_rows, stride_student=_stride(student), stride_teacher=_stride(teacher),
            stride_dlogits=0 if dlogits is None else _stride(dlogits), **_scalars(rows, student.shape[1]),
        )  # fmt: skip
        gradient_dtype = dlogits.dtype if dlogits is not None else rows.dtype
        module.logits_rows(
            params, dtype=_name(student.dtype), gradient_dtype=_name(gradient_dtype), stream=_stream(student.device)
        )


def _has_wgmma(device: torch.device) -> bool:
    """Return whether this GPU, and the code that was built for it, have Hopper's products."""
    module = _module()
    return (
        module is not None
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and not {"90a", "90a-real"}.isdisjoint(module.architectures.split())
    )


def stores_pairs(problem: LinearProblem, config: Chunks = CONFIG) -> bool:
    """Return whether logits are kept as fp16 (z_t - its tile's largest) and fp16 (z_s - z_t), in 4 bytes an entry.

    Kinds, weights, both clips, labels, temperature, scale, padding and a head of the teacher's own go either way. Kept
    in fp32 are: operands that are not of one 16-bit dtype or that the copy engine cannot address, biases, softcaps,
    sides with different transforms, and everything on another GPU than of compute capability 9.0.
    """
    heads = [problem.student_weight, problem.teacher_weight]
    operands = [x for x in (problem.student_hidden, problem.teacher_hidden, *heads) if x is not None]
    return (
        config.stored_pairs
        and _has_wgmma(problem.device)
        and operands[0].dtype in (torch.float16, torch.bfloat16)
        and all(x.dtype == operands[0].dtype and x.shape[1] % 8 == 0 for x in operands)
        and all(x is None or (_addressable(x) and _stride(x) % 8 == 0 and x.data_ptr() % 16 == 0) for x in heads)
        and problem.student_bias is None
        and problem.teacher_bias is None
        and problem.student_transform.softcap is None
        and problem.alike
    )


# --- from hidden states ----------------------------------------------------------------------------------------------


def _slice(statistics: Statistics, rows: slice) -> Statistics:
    """Return views of some rows: what is written to them is written to `statistics`."""
    return Statistics(*(None if x is None else x[rows] for x in vars(statistics).values()))  # type: ignore[arg-type]


def forward(problem: LinearProblem, config: Chunks = CONFIG) -> LinearResult:
    """Compute the statistics of every row, and the gradients of the rows through which the loss has one."""
    device, r = problem.device, problem.n_rows
    v, d = problem.student_weight.shape
    statistics = Statistics.empty(problem)
    result = LinearResult(statistics)
    if problem.need_dhidden:
        result.drow = torch.zeros(r, d, device=device)
        result.computed = torch.zeros(r, dtype=torch.bool, device=device)
    if problem.need_dweight:
        result.dweight = torch.zeros(v, d, device=device)
    if problem.need_dbias:
        result.dbias = torch.zeros(v, device=device)
    if r == 0:
        return result
    need = problem.need_dhidden or problem.need_dweight or problem.need_dbias
    bias = [None if b is None else b.float().contiguous() for b in (problem.student_bias, problem.teacher_bias)]
    width, dlogits, module = config.width(problem), None, _module()
    assert module is not None
    capacity, dtype = config.capacity(problem, width), problem.student_weight.dtype
    pairs = stores_pairs(problem, config)
    stay = module.logits_rows_stay(v, "stored_pair" if pairs else "float32")
    in_place = stay and config.in_place(problem, capacity, 4 if pairs else 8)
    width = capacity if in_place else min(2 * width, capacity) if pairs else width
    capacity -= capacity % width
    columns = -(-v // TILE) * TILE  # rows of whole tiles and vectors
    if pairs:
        z_s = torch.empty(width, columns, dtype=torch.int32, device=device)
        z_t = torch.empty(width, columns // TILE, device=device)
    else:
        z = torch.empty(2 * width, columns, device=device)
        z_s, z_t = z[:width], z[width:, :v]
    if in_place:
        dlogits = z_s.view(dtype)[:, :v]
    elif need:
        dlogits = torch.zeros(capacity, columns, dtype=dtype, device=device)[:, :v]
    first = 0  # row of the supervision whose gradient lies at the start of dlogits
    for chunk in chunks(r, width):
        # Every chunk is as wide as the first, its last row repeated: the GEMM's shape decides how it rounds. Ours sums
        # each row alike.
        student, teacher = (
            hidden[index[chunk] if pairs else padded(index[chunk], width)]
            for hidden, index in (
                (problem.student_hidden, problem.student_row), (problem.teacher_hidden, problem.teacher_row),
            )
        )  # fmt: skip
        if pairs:
            _project_pairs(problem, student, teacher, z_s, z_t)
        else:
            project(problem, student, teacher, z[:, :v], config)
        labels = None if problem.labels is None else problem.labels[chunk]
        part = replace(
            problem, student_row=problem.student_row[chunk], teacher_row=problem.teacher_row[chunk],
            kind=problem.kind[chunk], weight=problem.weight[chunk], clip=problem.clip[chunk], labels=labels,
        )  # fmt: skip
        places = slice(chunk.start - first, chunk.stop - first)
        _run_rows(
            part, z_s[:, :v], z_t, _slice(statistics, chunk), bias=(bias[0], bias[1]),
            dlogits=None if dlogits is None else dlogits[places],
        )  # fmt: skip
        if dlogits is not None and (places.stop == capacity or chunk.stop == r):
            _multiply(problem, result, dlogits, slice(first, chunk.stop), config)
            first = chunk.stop
    return result


def _project_pairs(problem: LinearProblem, student: Tensor, teacher: Tensor, pairs: Tensor, tops: Tensor) -> None:
    """Write the logits of `student` (n, D) and `teacher` (n, D_t) to pairs[:n] (·, V), the tiles' largest to `tops`."""
    module = _module()
    assert module is not None
    head, other = problem.student_weight, problem.teacher_weight
    v, d = head.shape
    with torch.cuda.device_of(student):
        params = module.PairProductParams(
            student_hidden=student.data_ptr(), teacher_hidden=teacher.data_ptr(), student_weight=head.data_ptr(),
            teacher_weight=_address(other), pairs=pairs.data_ptr(), tops=tops.data_ptr(), d=d, d_t=teacher.shape[1],
            rows=student.shape[0], vocab=v, logical_vocab=problem.local_vocab(v), stride_student_hidden=d,
            stride_teacher_hidden=teacher.shape[1], stride_student_weight=_stride(head),
            stride_teacher_weight=0 if other is None else _stride(other), stride_pairs=_stride(pairs),
            stride_tops=_stride(tops),
        )  # fmt: skip
        module.pair_product(params, dtype=_name(student.dtype), stream=_stream(student.device))


def _multiply(problem: LinearProblem, result: LinearResult, dlogits: Tensor, rows: slice, config: Chunks) -> None:
    """Add to `result` what follows from dlogits[:n], gradients of `rows`; later places hold something old."""
    n = rows.stop - rows.start
    live = live_rows(problem, result.statistics.divergence)[rows]
    weight = torch.where(live, problem.weight[rows], 0.0)
    if result.drow is not None and result.computed is not None:
        drow = torch.empty(dlogits.shape[0], result.drow.shape[1], device=dlogits.device)
        head = problem.student_weight
        backproject(dlogits, head, problem.local_vocab(head.shape[0]), drow, config)
        result.drow[rows], result.computed[rows] = drow[:n], live
    if result.dbias is not None:
        result.dbias += torch.mv(dlogits[:n].float().T, weight)
    if result.dweight is not None:
        # The weights go to the narrow operand.
        hidden = problem.student_hidden[problem.student_row[rows]]
        weighted = torch.where(live[:, None], hidden.float() * weight[:, None], 0.0).to(hidden.dtype)
        add_head_gradient(result.dweight, dlogits[:n], weighted, config)


# --- from logits -----------------------------------------------------------------------------------------------------


def logits_forward(problem: LogitsProblem) -> LogitsResult:
    """Compute statistics and state of every row, and its gradient if asked, in one kernel."""
    statistics = Statistics.empty(problem)
    state = torch.zeros(problem.n_rows, STATE, device=problem.device)
    if problem.n_rows > 0:
        _run_rows(
            problem, _rows_of(problem.student_logits), _rows_of(problem.teacher_logits), statistics,
            student_row=problem.student_row.contiguous(), teacher_row=problem.teacher_row.contiguous(), state=state,
            dlogits=problem.dlogits, weight=problem.weight,
            dlogits_row=None if problem.dlogits_row is None else problem.dlogits_row.contiguous(),
        )  # fmt: skip
    return LogitsResult(statistics, state)


def logits_backward(
    problem: LogitsProblem, state: Tensor, row_grad: Tensor, *, out: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """Return dlogits (N, V) in the logits' dtype: row_grad[r] * d divergence[r] / d student_logits, summed over pairs.

    `out` may be the student's logits: a thread reads an entry before it writes it. Rows with row_grad 0 are not read.
    """
    module = _module()
    assert module is not None
    n, v = problem.student_logits.shape
    student, teacher = _rows_of(problem.student_logits), _rows_of(problem.teacher_logits)
    if out is None:
        out = torch.empty_like(problem.student_logits, memory_format=torch.contiguous_format)
    if n == 0:
        return out
    into = out if _addressable(out) else torch.empty(n, v, dtype=out.dtype, device=out.device)
    # Row n's supervised rows are order[offsets[n]:offsets[n + 1]].
    order = torch.argsort(problem.student_row, stable=True)
    offsets = torch.searchsorted(problem.student_row[order], torch.arange(n + 1, device=student.device))
    teacher_row, kind = problem.teacher_row.contiguous(), problem.kind.contiguous()
    grads, before = row_grad.float().contiguous(), None if kept is None else kept.float().contiguous()
    with torch.cuda.device_of(student):
        params = module.LogitsGradientParams(
            student=student.data_ptr(), teacher=teacher.data_ptr(), dlogits=into.data_ptr(), order=order.data_ptr(),
            offsets=offsets.data_ptr(), teacher_row=teacher_row.data_ptr(), kind=kind.data_ptr(),
            row_grad=grads.data_ptr(), kept=_address(before), state=state.data_ptr(), rows=n,
            stride_student=_stride(student), stride_teacher=_stride(teacher), stride_dlogits=_stride(into),
            **_scalars(problem, v),
        )  # fmt: skip
        module.logits_gradient(params, dtype=_name(student.dtype), stream=_stream(student.device))
    return out if into is out else out.copy_(into)
