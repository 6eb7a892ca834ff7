"""Peak memory, measured in processes of their own: no engine ever holds N x V elements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.divergence_cases import of_kind

import vigos
from vigos.divergence.engines import cpu
from vigos.divergence.engines.problem import LinearProblem, LogitTransform
from vigos.divergence.engines.products import Chunks

# Peaks at N and 2 N rows: what grows with N x V shows in the difference, 37.7 MB in float32, whatever a chunk takes.
N, V, D = 768, 12_288, 8
SCRIPT = """
import json, sys, threading, time
import torch, vigos

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096

class Peak:
    # The kernel's own high-water mark, reset before each measurement.
    def __enter__(self):
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        self.before = resident()
        return self
    def __exit__(self, *_):
        with open("/proc/self/status") as f:
            high = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
        self.bytes = high - self.before

torch.set_num_threads(1)  # memory does not depend on it, and time on a busy machine does
n, v, d = map(int, sys.argv[1:])
torch.manual_seed(0)
head, every_student = torch.randn(v, d), torch.randn(2 * n, d)
every_teacher = every_student + 0.1 * torch.randn(2 * n, d)

def ours(student, teacher, impl, trainable):
    hidden, weight = student.clone().requires_grad_(), head.clone().requires_grad_(trainable)
    with Peak() as peak:
        out = vigos.linear_divergence(hidden, weight, teacher, impl=impl)
        (out.loss + out.divergence.mean()).backward()
    return peak.bytes

def naive(student, teacher, impl, trainable):
    hidden = student.clone().requires_grad_()
    with Peak() as peak:
        vigos.reference.forward_kl(hidden @ head.T, teacher @ head.T).sum().backward()
    return peak.bytes

def logits(student, teacher, impl, trainable):
    s, t = (student @ head.T).requires_grad_(), teacher @ head.T
    with Peak() as peak:
        torch.autograd.grad(vigos.logits_divergence(s, t, impl=impl, inplace=True).loss, s)
    return peak.bytes

ours(every_student, every_teacher, "cpu", True)  # imports, pools, and a chunk's memory, which is kept
ours(every_student[:64], every_teacher[:64], "reference", True)
growth = {}
for name, run, impl, trainable in (
    ("cpu", ours, "cpu", False), ("cpu, trainable head", ours, "cpu", True), ("reference", ours, "reference", False),
    ("cpu, logits in place", logits, "cpu", False), ("reference, logits in place", logits, "reference", False),
    ("naive", naive, "", False),
):
    small, large = (run(every_student[:k], every_teacher[:k], impl, trainable) for k in (n, 2 * n))
    growth[name] = large - small
print(json.dumps(growth))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_engine_holds_every_logit():
    """Twice the rows take less than a quarter of N x V float32 elements more; the naive loss takes several times."""
    command = [sys.executable, "-c", SCRIPT, str(N), str(V), str(D)]
    # Freed memory goes back to the system at once and does not hide the next measurement's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth = json.loads(done.stdout)
    every_logit = 4 * N * V
    assert growth.pop("naive") > 2 * every_logit, "the measurement does not see what it should"
    for name, more in growth.items():
        assert more < 0.25 * every_logit, f"{name}: {more / 2**20:.0f} MiB more, N x V is {every_logit / 2**20:.0f} MiB"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_chunk_memory_waits_for_the_next_call_and_may_be_taken():
    """Two calls share one mapping, whose pages the system may take meanwhile; a failed call keeps nothing."""
    student, head = torch.randn(64, 8), torch.randn(24_576, 8)
    cpu.release_memory()

    def gradient():
        leaf = student.clone().requires_grad_()
        vigos.linear_divergence(leaf, head, student.flip(0), impl="cpu").loss.backward()
        return leaf.grad

    first = gradient()
    (memory,) = cpu._kept
    lines = Path("/proc/self/smaps").read_text().splitlines()
    free = sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree"))
    assert free * 1024 >= 4 * 2 * 64 * 24_576 - 2**22  # but for ends that share a page with others
    assert torch.equal(gradient(), first)
    assert cpu._kept == [memory]
    cpu.release_memory()
    assert not cpu._kept


@pytest.mark.parametrize(("d", "v"), [(2048, 151_936), (3584, 152_064), (2560, 248_320)])
@pytest.mark.parametrize("train_head", [False, True])
def test_chunks_on_a_gpu_fit_tiles_and_memory(d, v, train_head):
    """8,192 rows in bf16: whole tiles of 128, and with a frozen head at most 700 MB."""
    n = 8192
    hidden, head = (torch.empty(rows, d, dtype=torch.bfloat16, device="meta") for rows in (n, v))
    rows = of_kind(n, 0)
    problem = LinearProblem(
        student_row=rows.student_row, teacher_row=rows.teacher_row, kind=rows.kind, weight=rows.weight, clip=rows.clip,
        labels=None, student_transform=LogitTransform(), teacher_transform=LogitTransform(),
        beta=0.5, entry_clip=None, vocab_size=v, vocab_start=0, group=None, student_hidden=hidden, student_weight=head,
        teacher_hidden=hidden, teacher_weight=None, student_bias=None, teacher_bias=None, need_dhidden=True,
        need_dweight=train_head, need_dbias=False,
    )  # fmt: skip
    width = Chunks().width(problem)
    waiting = Chunks().capacity(problem, width)
    assert width % 128 == waiting % width == 0
    assert n % waiting == 0
    # A head's own gradient takes more than all of these.
    assert train_head or 2 * 4 * width * v + 2 * waiting * v + 4 * n * d <= 700e6
    in_place = Chunks().in_place(problem, waiting)
    assert in_place is ((d, v) != (3584, 152_064) and not train_head)
    assert not in_place or 2 * 4 * waiting * v + 4 * n * d <= 700e6
