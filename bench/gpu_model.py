"""A model of what a call costs on a GPU: matrix products, bytes, instructions; nothing in it was measured.

    python bench/gpu_model.py                             on the numbers below, which stand for an H200
    python bench/gpu_model.py copy=4.4e12 product=800e12  with what a GPU said of itself

Prints the time of one forward and backward of N = 8,192 rows with a frozen, shared head in bf16, as a ratio to three
products at `three` operations a second. Instructions a pair are read from the kernels, compiled for sm_90a here
(tests/helpers/machine_code.py); the sizes of chunks are the engines' own.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers import machine_code

from vigos.divergence.engines.products import Chunks

SHAPES = ((2048, 151_936), (3584, 152_064), (2560, 248_320))
N = 8192
# Tile of a product's result -> share of the peak that its inner loop reaches.
TILES = {
    (128, 256): 1.0, (256, 128): 1.0, (192, 192): 0.99, (128, 192): 0.95, (192, 128): 0.95, (256, 192): 0.97,
    (128, 128): 0.88, (64, 256): 0.86, (256, 64): 0.86, (64, 128): 0.72, (320, 128): 0.97,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GPU:
    """Hold what a run on a GPU says: rates a second, seconds, and shares of a rate that a kernel reaches."""

    copy: float = 4.3e12  # bytes read and written by a copy
    product: float = 815e12  # operations of a tile's inner loop, over all multiprocessors
    three: float = 790e12  # of a product whose shape fits, which the ratio is taken to
    multiprocessors: float = 132
    clock: float = 1.85e9
    issued: float = 0.85  # of the instructions that four schedulers could issue
    streamed: float = 0.9  # of the copy's rate in a kernel that reads and writes rows
    small: float = 2.5e-6  # a kernel whose work is next to nothing
    # Of `product` that our own product reaches, whose tile is the library's of 256 x 128. A stage of it moves 144 KB
    # through shared memory and keeps the tensor cores busy for as long as 128 take: 0.91 if that is the limit, or 1.
    ours: float = 0.95
    refill: float = 0.5e-6  # of our product's tile, until its tensor cores have work again after the epilogue
    merge: float = 3e-6  # of the blocks of a cluster: barriers, shuffles, one row's finish

    def gemm(self, m: int, n: int, k: int, out_bytes: int) -> float:
        """Seconds of a product of bf16 operands: the best tile and split of the depth, in whole waves of tiles."""
        best = math.inf
        for (tile_m, tile_n), share in TILES.items():
            tiles = math.ceil(m / tile_m) * math.ceil(n / tile_n)
            for split in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16):
                if split > 1 and k / split < 1024:
                    continue
                waves = math.ceil(tiles * split / self.multiprocessors)
                each = 2 * tile_m * tile_n * (k / split) / (self.product / self.multiprocessors * share) + 1.5e-6
                partial = 0.0 if split == 1 else m * n * 4 * split / self.copy
                moved = (m * k * 2 + n * k * 2 + m * n * out_bytes) / self.copy
                best = min(best, max(waves * each + partial, 1.05 * moved))
        return best

    def pair_product(self, rows: int, v: int, d: int, epilogue: float) -> float:
        """Seconds of the product that stores pairs: tiles of 256 x 128, both sides together, two a cluster."""
        waves = math.ceil(math.ceil(rows / 128) * math.ceil(v / 256) / (self.multiprocessors // 2))
        multiply = 2 * 256 * 128 * d / (self.product / self.multiprocessors * self.ours)
        return waves * (multiply + epilogue * 8 / 4 / (self.clock * self.issued) + self.refill)

    def issue(self, pairs: float, instructions: float) -> float:
        """Seconds to issue so many instructions for each pair of entries."""
        return pairs * instructions / 32 / (4 * self.multiprocessors * self.clock * self.issued)

    def rows(self, pairs: float, moved: float, instructions: float) -> float:
        """Seconds of a kernel over so many pairs of entries, from its bytes and its instructions a pair."""
        return max(pairs * moved / (self.copy * self.streamed), self.issue(pairs, instructions))

    def one_visit(self, v: int, statistics: float, gradient: float, entry_bytes: int = 8) -> float:
        """Seconds of the kernel that reads a row once, which 16 blocks share and keep in their multiprocessors.

        Copies run beside it all: the next row's are on their way. A block computes, merges and writes one after the
        other, and two a multiprocessor take turns where their parts of a row fit, 227 KB in all.
        """
        pairs, part = N * v, entry_bytes * math.ceil(v / 16)
        whole = self.rows(pairs, entry_bytes + 2, statistics + gradient)
        alone = self.issue(pairs, statistics + gradient) + self.merge * N * 16 / self.multiprocessors
        return max(whole, alone / min(2, 227 * 1024 // (part + part // 4 + 2048)))


def parts(gpu: GPU, engine: str, d: int, v: int, counts: dict[str, dict[str, float]]) -> tuple[dict[str, float], float]:
    """Return (seconds by part, bytes of the buffers) of an engine's call."""
    config, pairs = Chunks(), N * v
    width = config.chunk_bytes // (8 * v) // 128 * 128
    waiting = config.waiting_chunks * width
    # Gradients over their logits; eight blocks, which every such GPU takes, must hold a row.
    in_place = engine == "cuda" or (
        engine != "triton" and 8 * waiting * v + 4 * N * d <= config.in_place_bytes and v <= 226 * 1024
    )
    width = waiting if in_place else width
    chunks, products = math.ceil(N / width), math.ceil(N / waiting)
    found = {"logits": chunks * gpu.gemm(2 * width, v, d, 4)}
    if engine == "cuda":  # pairs, whose gradients go over them
        kernel = counts["pair_rows resident pair_bf16"]
        found["logits"] = products * gpu.pair_product(waiting, v, d, counts["pair_product linear_hopper"]["epilogue"])
        found["rows"] = gpu.one_visit(v, kernel["statistics"], kernel["gradient"], 4)
        chunks, small = products, 10
    elif engine == "triton":
        found["statistics"] = gpu.rows(pairs, 8, counts["_stats_kernel fp32"]["statistics"])
        found["gradient"] = gpu.rows(pairs, 10, counts["_grad_kernel fp32"]["gradient"])
        small = 10  # kernels of a chunk whose work is next to nothing, by reading: index, cat, fill, copy, finish
    else:
        kernel = counts["logits_rows resident f32_bf16"]
        found["rows"] = gpu.one_visit(v, kernel["statistics"], kernel["gradient"])
        small = 10
    found["hidden"] = products * gpu.gemm(waiting, d, v, 4)
    found["small"] = chunks * small * gpu.small
    found["ends"] = N * d * (5 * 4 + 2 + 8) / gpu.copy
    entry_bytes = 4 if engine == "cuda" else 8
    return found, entry_bytes * v * width + (0 if in_place else 2 * v * waiting) + 4 * N * d


def main() -> None:
    changes = dict(x.split("=") for x in sys.argv[1:])
    gpu = GPU(**{name: float(x) for name, x in changes.items()})
    counts = machine_code.table()
    for kernel, each in counts.items():
        print(f"{kernel:36}" + "".join(f" {name} {x:.1f}" for name, x in each.items()))
    for d, v in SHAPES:
        three = 6 * N * d * v / gpu.three
        print(f"\nD {d}, V {v}: three products {three * 1e3:.1f} ms")
        for engine in ("triton", "cuda, fp32 logits", "cuda"):
            found, memory = parts(gpu, engine, d, v, counts)
            total = sum(found.values())
            print(
                f"  {engine:18}{total * 1e3:6.1f} ms  ratio {total / three:.2f}  {memory / 1e6:4.0f} MB  "
                + ", ".join(f"{name} {x * 1e3:.1f}" for name, x in found.items())
            )
    v, pairs = 151_936, N * 151_936
    kernel, copied = counts["logits_rows resident bf16_bf16"], pairs * 6 / gpu.copy
    triton = [counts[f"_{name}_kernel bf16"] for name in ("stats", "grad")]
    times = {
        "cuda": gpu.one_visit(v, kernel["statistics"], kernel["gradient"], 4),
        "triton": gpu.rows(pairs, 4, triton[0]["statistics"]) + gpu.rows(pairs, 6, triton[1]["gradient"]),
    }
    print(f"\nlogits_divergence of bf16 logits, V {v}: 3 N V items at the copy's rate take {copied * 1e3:.1f} ms")
    for engine, time in times.items():
        print(f"  {engine:8}{time * 1e3:6.1f} ms, {copied / time:.0%} of it")


if __name__ == "__main__":
    main()
