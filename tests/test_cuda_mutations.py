"""Kernels with one fault each must not pass: what the emulation can see, as a table.

All faults are compiled into one emulator, each behind `mutated(i)`, and one at a time is switched on. A check fails by
a wrong number, by a rule of PTX that was broken, by memory that no operand has, or by threads that all wait.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from helpers.cuda_cases import pairs_are_right, product_is_right, rows_are_right
from helpers.cuda_emulation import ROOT, build
from helpers.engines import put_under

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first time it compiles for about half a minute
LINEAR, HOPPER, HOST = "linear_hopper.cuh", "hopper.cuh", "logits_rows_host.h"
ROWS, READER = "logits_rows.cuh", "row_reader.cuh"


@dataclass(frozen=True)
class Mutation:
    """One fault: in `file`, `old` becomes `new`, where "@" is true while the fault is on.

    Without `new`, the first statement of `old` goes.
    """

    name: str
    file: str
    old: str
    new: str = ""

    def text(self, i: int) -> str:
        """Return what takes the place of `old` in mutation `i`."""
        return (self.new or f"if (!@) {self.old}").replace("@", f"mutated({i})")


MUTATIONS = (
    # Products.
    Mutation("no wait for products before the epilogue", LINEAR, "hopper::wgmma_wait<0>();"),
    Mutation("a stage is freed before its products end", LINEAR, "hopper::wgmma_wait<1>();"),
    Mutation("no fence before products", LINEAR, "hopper::wgmma_fence();"),
    Mutation("products are not committed", LINEAR, "hopper::wgmma_commit();"),
    Mutation("descriptor: half the stride", HOPPER, "(kStrideBytes >> 4)", "((@ ? 512 : kStrideBytes) >> 4)"),
    Mutation("descriptor: no swizzle", HOPPER, "(kSwizzle128 <<", "((@ ? 0 : kSwizzle128) <<"),
    Mutation("descriptor: two bits of the address lost", HOPPER, "& 0x3ffff)", "& (@ ? 0xffff : 0x3ffff))"),
    Mutation("steps of K half as long", LINEAR, "(student + 32 * i)", "(student + (@ ? 16 : 32) * i)"),
    Mutation("a tile is added to the one before", LINEAR, "k > 0 || i > 0;", "@ || k > 0 || i > 0;"),
    # Barriers and copies.
    Mutation("no sync after the barriers are made", LINEAR, "device::cluster_sync();  // both blocks'"),
    Mutation("the other block's barriers are not waited for", LINEAR, "device::cluster_sync();  // both blocks'",
             "@ ? device::block_sync() : device::cluster_sync();  // both blocks'"),
    Mutation("no fence after the barriers are made", LINEAR, "hopper::barrier_init_fence();"),
    Mutation("the consumer waits for another phase", LINEAR, "phase);\n    const", "phase ^ @);\n    const"),
    Mutation("the phase does not turn", LINEAR, "phase ^= 1;", "phase ^= !@;"),
    Mutation("the consumer does not wait", LINEAR, "hopper::barrier_wait(&full", "if (!@) hopper::barrier_wait(&full"),
    Mutation("the producer does not wait", LINEAR, "hopper::barrier_wait(&empty[ring.stage], ring.phase ^ 1);"),
    Mutation("an arrival too few", LINEAR, "4 * kConsumers)", "4 * kConsumers - @)"),
    Mutation("a stage's bytes are not announced", LINEAR, "Shared::kStageBytes);\n    //",
             "Shared::kStageBytes - @ * kTileBytes);\n    //"),
    Mutation("the stage in use is freed", LINEAR, "[before], lane);\n    before",
             "[@ ? ring.stage : before], lane);\n    before"),
    Mutation("a tile's last stage is not freed", LINEAR, "release(&empty[before], lane);\n}"),
    Mutation("tiles are not aligned", LINEAR, "(1024 - hopper::", "(@ ? 0 : 1024 - hopper::"),
    # Clusters of the product.
    Mutation("the other block is not told of a free stage", LINEAR,
             "lane < kClusterTiles)", "lane < kClusterTiles - @)"),
    Mutation("rows go to one block", LINEAR, "(1 << kClusterTiles) - 1)", "@ ? 1 : (1 << kClusterTiles) - 1)"),
    Mutation("both blocks send to one place", LINEAR, "dest + rank *", "dest + (@ ? 0 : rank) *"),
    Mutation("both blocks take one tile", LINEAR, "kClusterTiles + rank)", "kClusterTiles + (@ ? 0 : rank))"),
    Mutation("no cluster sync at the product's exit", LINEAR, "device::cluster_sync();  // a block must"),
    # Edges of the product.
    Mutation("rows past the last are written", LINEAR, "if (r >= p.rows) continue;"),
    Mutation("a tile past the last is written", LINEAR, "if (place.tile * kTileN >= p.vocab) continue;"),
    Mutation("padding of the vocabulary is a top", LINEAR, "if (left >= kTileN)", "if (@ || left >= kTileN)"),
    Mutation("half of a row's lanes have a top", LINEAR, "shuffle_xor(top, 2)", "shuffle_xor(top, @ ? 1 : 2)"),
    # Rows of stored pairs.
    Mutation("the top of another tile", READER, "(first + index)", "((@ ? 0 : first) + index)"),
    Mutation("an entry's top is another's", READER, "* kVec + i) / kTileN", "* kVec + i + 4 * @) / kTileN"),
    Mutation("pairs' bytes are not announced", READER, "expect(barrier, bytes)", "expect(barrier, bytes - 16 * @)"),
    # Rows.
    Mutation("no cluster sync at exit", ROWS, "device::cluster_sync();  // shared memory must outlive"),
    Mutation("no cluster sync before others' statistics are read", ROWS,
             "device::cluster_sync();\n      if (warp == 0) {\n        stats"),
    Mutation("no cluster sync before others' second sums are read", ROWS,
             "device::cluster_sync();\n        if (warp == 0) {\n          sums"),
    Mutation("no sync before the merge of warps", ROWS, "device::block_sync();\n    if (warp == 0) {\n      stats"),
    Mutation("no sync after the row's state is written", ROWS, "device::block_sync();\n    Row row = shared.row;"),
    Mutation("no sync before the merge of second sums", ROWS,
             "device::block_sync();\n      if (warp == 0) {\n        sums"),
    Mutation("no sync after second sums are written", ROWS, "device::block_sync();\n      row.sums = shared"),
    Mutation("a vector goes over the row's end", READER, ") / kVec - first;", ") / kVec + @ - first;"),
    Mutation("more blocks than the cluster has", ROWS, "stats = lane < rows.ranks", "stats = lane < rows.ranks + @"),
    Mutation("half a warp is merged", ROWS, "lanes / 2; mask > 0; mask /= 2) merge",
             "lanes / (@ ? 4 : 2); mask > 0; mask /= 2) merge"),
    # Rows on their way through shared memory.
    Mutation("no sync after the rows' barriers are made", READER, "device::block_sync();  // the barriers are made"),
    Mutation("no fence after the rows' barriers are made", READER, "hopper::barrier_init_fence();"),
    Mutation("a part is not waited for", READER, "hopper::barrier_wait(&full[index], phase);"),
    Mutation("a part's phase does not turn", READER, "phase ^= 1;", "phase ^= !@;"),
    Mutation("a part's bytes are not announced", READER, "kSides * bytes)", "(kSides - @) * bytes)"),
    Mutation("the teacher's part goes over the student's", READER, "slot + room, teacher", "slot + !@ * room, teacher"),
    Mutation("a place is filled before all have read it", READER, "device::block_sync();  // every thread has read it"),
    Mutation("a place is filled that is not free", READER, "send(place_of(part));", "send(place_of(part + @));"),
    Mutation("a place is never filled again", READER, "if (device::thread_index() == 0) send(place_of"),
    Mutation("the gradient is of the row before", READER, "start = slot;"),
    Mutation("one place for the statistics of two rows", READER, "turn ^= 1;", "turn ^= !@;"),
    Mutation("parts overlap by a vector", READER, "part * layout.tile;", "part * (layout.tile - @);"),
    Mutation("vectors off 16 bytes", HOST, "Dtype gradient) {\n  const int64_t count =",
             "Dtype gradient) {\n  if (@) return true;\n  const int64_t count ="),
)  # fmt: skip
SWITCH = """\
extern "C" { __attribute__((weak)) int vigos_mutation = 0; }
inline int mutated(int i) { return vigos_mutation == i; }
"""


def why_seen(emulator: ModuleType, checks: list[Callable[[Any], object]], seeds: int) -> str | None:
    """Return what the first check that fails says, or None."""
    for seed in range(1, seeds + 1):
        for check in checks:
            emulator.set_seed(1000 * seed)
            try:
                check(emulator)
            except (AssertionError, RuntimeError) as reason:
                return f"seed {seed}: {str(reason).strip().splitlines()[0]}"
    return None


def test_every_fault_is_seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = request.config.cache.mkdir("cuda-emulator")
    csrc = folder / "mutations"
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cpu"))
    for i, mutation in enumerate(MUTATIONS, 1):
        path = csrc / "cuda" / mutation.file
        text = path.read_text()
        found = text.count(mutation.old)
        assert found == 1, f"{mutation.name}: its text is {found} times in {mutation.file}; say here what it is now"
        path.write_text(text.replace(mutation.old, mutation.text(i)))
    (csrc / "mutated.h").write_text(SWITCH)
    include = ("-include", str(csrc / "mutated.h"), "-DVIGOS_EMULATED_FEW", "-Wno-dangling-else")
    emulator = build(folder, csrc, *include)
    put_under(monkeypatch, emulator)
    switch = ctypes.c_int.in_dll(ctypes.CDLL(str(emulator.__file__)), "vigos_mutation")
    of_rows = [rows_are_right, functools.partial(rows_are_right, layout="parts")]
    assert why_seen(emulator, [*of_rows, product_is_right, pairs_are_right], seeds=3) is None
    missed = []
    for i, mutation in enumerate(MUTATIONS, 1):
        switch.value = i
        checks = [*of_rows, pairs_are_right] if mutation.file in (ROWS, READER, HOST) else [product_is_right]
        reason = why_seen(emulator, checks, seeds=5)
        print(f"{mutation.name}: {reason}")
        if reason is None:
            missed.append(mutation.name)
    switch.value = 0
    assert not missed
