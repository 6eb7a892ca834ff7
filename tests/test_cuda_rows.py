"""Ask what only the CUDA row kernels can be asked, emulated on the CPU: clusters, paths, plans of a launch, refusals.

That their results are right is in test_engines.py and test_engines_logits.py; what needs a GPU, in test_engines_gpu.py.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers.divergence_cases import KINDS, assert_same, case, logits_no_worse, of_kind, peaked_logits, run, run_logits
from helpers.engines import configure, emulate

import vigos
from vigos import reference
from vigos.divergence.engines import cuda
from vigos.divergence.engines.products import Chunks


@pytest.fixture(autouse=True)
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return emulate(monkeypatch, request)


# V under, at and past a vector, a thread's share and a block's share, with and without a tail.
@pytest.mark.parametrize("v", [1, 8, 13, 1000, 3072, 5003])
@pytest.mark.parametrize("limit", [232448, 12000], ids=["one block", "cluster"])
def test_statistics_of_blocks_and_clusters(emulator: ModuleType, v: int, limit: int) -> None:
    emulator.set_device(90, limit)
    student, teacher = peaked_logits(3, v, torch.float32, far=0.3)
    rows, labels = of_kind(3, torch.tensor(KINDS, dtype=torch.int8)), torch.tensor([0, v // 2, v - 1])
    got = run_logits(student, teacher, rows, "cuda", labels=labels, beta=0.3)
    logits_no_worse(got, student, teacher, rows, beta=0.3)
    for side, z in (("student", student.double()), ("teacher", teacher.double())):
        picked = z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
        for name, exact in (("lse", z.logsumexp(-1)), ("entropy", reference.entropy(z)), ("logprob", picked)):
            ours = getattr(got.out, f"{side}_{name}").double()
            torch.testing.assert_close(ours, exact, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("capability", "limit", "clusters"), [(80, 166912, 1), (90, 232448, 1), (90, 28000, 8), (90, 16000, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_paths_agree_with_float64(
    emulator: ModuleType, dtype: torch.dtype, capability: int, limit: int, clusters: int
) -> None:
    """Two passes below sm_90; one block, and eight, above. The gradient's error is that of its own dtype."""
    v = 6000 if dtype == torch.float32 else 12000
    emulator.set_device(capability, limit)
    resident, cluster, _ = emulator.cuda.logits_rows_plan(v, str(dtype)[6:], capability, limit)
    assert (resident, cluster) == (capability >= 90, clusters)
    student, teacher = peaked_logits(3, v, dtype, far=0.2)
    rows = of_kind(3, torch.tensor(KINDS, dtype=torch.int8))
    logits_no_worse(run_logits(student, teacher, rows, "cuda"), student, teacher, rows)


def test_plan(emulator: ModuleType) -> None:
    """Qwen2.5-VL's rows on an H100: two blocks a multiprocessor where they fit, with a part of the next row each."""
    plan = emulator.cuda.logits_rows_plan
    limit = 232448  # bytes a block may have on sm_90
    resident, cluster, shared = plan(151_936, "bfloat16", 90, limit)
    assert (resident, cluster) == (True, 8)
    assert shared <= limit / 2
    for vocab in (151_936, 152_064, 248_320):
        resident, cluster, shared = plan(vocab, "float32", 90, limit)
        assert (resident, cluster) == (True, 16)
        assert shared <= limit / 2 or vocab == 248_320
    assert plan(10_000, "bfloat16", 90, limit)[:2] == (True, 1)
    assert plan(480_000, "float32", 90, limit)[:2] == (False, 1)
    assert plan(32_000, "bfloat16", 80, 166_912)[:2] == (False, 1)
    with pytest.raises(ValueError, match="vocab must be > 0, got 0"):
        plan(0, "float32", 90, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_over_their_logits(emulator: ModuleType, dtype: torch.dtype) -> None:
    """The same bits as in a buffer of their own, in rows that take one block and rows that take a cluster of four."""
    c = case(3, 16, 1003)  # rows of no whole number of vectors
    for limit in (232448, 12000):
        emulator.set_device(90, limit)
        assert emulator.cuda.logits_rows_stay(1003, "float32")
        ours = []
        for room in (700_000_000, 0):
            with pytest.MonkeyPatch.context() as patch:
                configure(patch, "cuda", Chunks(1, waiting_chunks=1, in_place_bytes=room, stored_pairs=False))
                ours.append(run(c, "cuda", dtype, train_head=False))
        assert_same(*ours)


def test_a_narrow_gradient_over_rows_that_are_read_again(emulator: ModuleType) -> None:
    z, found = torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64)
    pointers = {name: found.data_ptr() for name in (
        "kind", "weight", "clip", "divergence", "clipped", "student_entropy", "teacher_entropy", "student_lse",
        "teacher_lse")}  # fmt: skip
    params = emulator.cuda.LogitsRowsParams(
        student=z.data_ptr(), teacher=z.data_ptr(), dlogits=z.data_ptr(), rows=1, vocab=64, logical_vocab=64,
        stride_student=64, stride_teacher=64, stride_dlogits=128, **pointers,
    )  # fmt: skip
    with pytest.raises(ValueError, match="dlogits must be another buffer than student"):
        emulator.cuda.logits_rows(params, dtype="float32", gradient_dtype="bfloat16", path="two_pass")


def test_engine_refuses_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    student, head, teacher = (torch.randn(n, 8) for n in (3, 50, 3))
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16, student_hidden is torch\.float64"):
        vigos.linear_divergence(student.double(), head.double(), teacher.double(), impl="cuda")
    with pytest.raises(ValueError, match="logits of one dtype on both sides"):
        vigos.logits_divergence(student.half(), teacher, impl="cuda")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs, the tensors are on cpu"):
        vigos.logits_divergence(student, teacher, impl="cuda")


@pytest.mark.parametrize(
    ("name", "capability", "runs"),
    [
        ("80-real", (8, 6), True), ("80-real", (9, 0), False), ("80", (10, 0), True), ("86-real", (8, 0), False),
        ("90a-real", (9, 0), True), ("90a", (10, 0), False), ("100-real", (10, 3), True), ("120", (12, 1), True),
    ],
)  # fmt: skip
def test_which_gpu_runs_which_code(name: str, capability: tuple[int, int], runs: bool) -> None:
    assert cuda._runs_on(name, *capability) is runs
