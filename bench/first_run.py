"""Measure what the first 90 seconds on a GPU must bring home: ceilings, error, ratio, where the time goes, the chunk.

    python bench/first_run.py --device cuda --out first.json
    python bench/first_run.py --device cpu --out first.json     # the same at small sizes: a rehearsal

Sections, in this order; the file is written again after each, so that a run that is cut off leaves what it had:

ceilings    a device copy, a product of 8192^3, and the products of the model of bench/NOTES.md, 16-bit operands
precision   impl="auto" and this device's fastest engine against float64, on up to 32 of 300 rows
target      that engine beside three products at the shapes of the target, ten repeats
profile     one call of it, kernel by kernel
chunks      the same with other numbers of rows a chunk

Clocks are warmed for a second first. A section that no longer fits --seconds is left out, and the file says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import divergence
import losses
import torch
from divergence import Case
from measure import checked, machine, seconds, synchronize, take_turns
from torch import Tensor

from vigos.divergence.engines import cpu, engine, triton

ALLOWED = 0.005  # of the gradient's norm, in 16 bits


class First:
    """The run: its results by section, and the clock they share."""

    def __init__(self, device: str, out: Path, limit: float, repeats: int) -> None:
        self.device, self.out, self.limit, self.repeats = device, out, limit, repeats
        self.begin = time.monotonic()
        self.found: dict[str, object] = {"machine": machine(device, "triton"), "seconds": {}}
        self.failed: list[str] = []
        self.gpu = device == "cuda"
        self.fastest = "triton" if self.gpu else "cpu"
        self.dtype = torch.bfloat16
        self.shapes = [(8192, 2048, 151_936), (8192, 3584, 152_064), (8192, 2560, 248_320)]
        if not self.gpu:
            self.dtype = torch.float32
            self.shapes = [(64, 128, 1000), (64, 224, 1001), (64, 160, 1600)]

    def section(self, name: str, run: Callable[[], object]) -> None:
        """Run one; its result, or why there is none, goes to the file."""
        start = time.monotonic()
        if start - self.begin > self.limit:
            self.found[name] = "no time"
        else:
            print(f"{start - self.begin:5.1f} s  {name}", flush=True)
            try:
                self.found[name] = run()
            except Exception as error:  # whatever a driver raises: the next section may still run
                self.found[name] = f"{type(error).__name__}: {error}"
                self.failed.append(f"{name}: {self.found[name]}")
                print(f"  {self.found[name]}", flush=True)
        times = self.found["seconds"]
        assert isinstance(times, dict)
        times[name] = round(time.monotonic() - start, 2)
        partial_file = self.out.with_suffix(".part")
        partial_file.write_text(json.dumps(self.found, indent=1) + "\n")
        partial_file.replace(self.out)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def warm(self) -> None:
        """Keep the device busy until its clocks are up."""
        a = self.random(*((4096, 4096) if self.gpu else (256, 256)))
        until = time.monotonic() + (1.0 if self.gpu else 0.1)
        while time.monotonic() < until:
            for _ in range(10):
                a @ a
            synchronize(self.device)

    def times(self, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each, after a call of each."""
        for run in runs.values():
            run()
        return take_turns(runs, self.device, self.repeats)

    def ceilings(self) -> dict[str, float]:
        """GB/s of the copy; TFLOP/s of the products, named by rows x columns x depth and the dtype of the result."""
        big = 2**31 if self.gpu else 2**20
        source = torch.empty(big, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        rates = {"copy": 2e-9 * big / self.times({"copy": lambda: target.copy_(source)})["copy"]}
        print(f"  {'copy':36} {rates['copy']:10.4g} GB/s")
        side = 8192 if self.gpu else 256
        a, b = self.random(side, side), self.random(side, side)
        runs: dict[str, Callable[[], object]] = {f"{side} x {side} x {side}": lambda: a @ b}
        work = {f"{side} x {side} x {side}": 2.0 * side**3}
        _, d, v = self.shapes[0]
        head = self.random(v, d)
        for rows in (256, 512, 704, 768, 1024) if self.gpu else (16, 32):
            hidden, dlogits = self.random(rows, d), self.random(rows, v)
            wide = {"out_dtype": torch.float32} if self.gpu else {}
            logits, gradient = f"{rows} x {v} x {d} float32", f"{rows} x {d} x {v} float32"
            runs[logits] = partial(torch.mm, hidden, head.T, **wide)
            runs[gradient] = partial(torch.mm, dlogits, head, **wide)
            work |= dict.fromkeys((logits, gradient), 2.0 * rows * v * d)
        for name, took in self.times(runs).items():
            rates[name] = work[name] / took * 1e-12
            print(f"  {name:36} {rates[name]:10.4g} TFLOP/s")
        return rates

    def precision(self) -> dict[str, float | None]:
        """Error of the gradient, relative to its norm. The rows are made anew: nothing is left of another call."""
        _, d, v = self.shapes[0]
        x = losses.inputs("peaked", 300 if self.gpu else 40, d, v, self.dtype, self.device)
        at = torch.arange(0, len(x.student), max(1, len(x.student) // 32), device=self.device)
        exact = losses.exact_gradient(x, at)

        def gradient(impl: str) -> Tensor:
            leaf = x.student.clone().requires_grad_()
            return torch.autograd.grad(losses.ours(impl, x, leaf, x.head), leaf)[0][at]

        out: dict[str, float | None] = {}
        for impl in ("auto", self.fastest, "reference"):
            out[impl] = checked(impl, partial(gradient, impl), exact, ALLOWED, self.failed)
            print(f"  {impl:12} {out[impl] if out[impl] is None else format(out[impl], '.2e')}", flush=True)
        return out

    def target(self) -> list[dict[str, object]]:
        """Rows as in the CSV of bench/divergence.py."""
        rows: list[dict[str, object]] = []
        for shape in self.shapes:
            only = [f"vigos {self.fastest}"]
            rows += divergence.run_case(Case(*shape), self.device, self.dtype, self.repeats, only, self.failed)
        return rows

    def call(self) -> Callable[[], Tensor]:
        """Forward and backward at the first shape."""
        x = losses.inputs("peaked", *self.shapes[0], self.dtype, self.device)

        def run() -> Tensor:
            leaf = x.student.detach().clone().requires_grad_()
            return torch.autograd.grad(losses.ours(self.fastest, x, leaf, x.head), leaf)[0]

        return run

    def profile(self) -> list[dict[str, object]]:
        """Kernels of one call, the longest first: ms, calls, share of the device's time."""
        run = self.call()
        run()
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if self.gpu else [])]) as profiler:
            run()
            synchronize(self.device)
        on_device = torch.autograd.DeviceType.CUDA if self.gpu else torch.autograd.DeviceType.CPU
        spent = [
            (e.self_device_time_total if self.gpu else e.self_cpu_time_total, e.count, e.key)
            for e in profiler.key_averages()
            if e.device_type == on_device
        ]
        total = sum(us for us, _, _ in spent) or 1.0
        rows: list[dict[str, object]] = []
        for us, count, name in sorted(spent, reverse=True)[:20]:
            rows.append({"ms": us / 1e3, "calls": count, "share": us / total, "kernel": name})
            print(f"  {us / 1e3:9.3f} ms {count:5} x {us / total:6.1%}  {name[:90]}")
        return rows

    def chunks(self) -> dict[str, float]:
        """Milliseconds of a call by the rows of a chunk."""
        module, v = engine(self.fastest), self.shapes[0][2]
        run, forward, out = self.call(), module.forward, dict[str, float]()
        for rows in (128, 256, 384, 512) if self.gpu else (16, 32):
            # Logits of both sides in fp32.
            size = {"chunk_bytes": rows * v * 8} if self.gpu else {"most_columns": rows}
            config = replace(triton.CONFIG if self.gpu else cpu.CONFIG, **size)  # type: ignore[type-var]
            module.forward = partial(forward, config=config)  # type: ignore[attr-defined]
            try:
                run()
                took = sorted(seconds(run, self.device) for _ in range(self.repeats))
                out[str(rows)] = 1e3 * took[len(took) // 2]
                print(f"  {rows:5} rows {out[str(rows)]:9.2f} ms", flush=True)
            finally:
                module.forward = forward  # type: ignore[attr-defined]
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--seconds", type=float, default=100.0, help="after which no section begins")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    run = First(args.device, args.out, args.seconds, args.repeats)
    run.warm()
    for name in ("ceilings", "precision", "target", "profile", "chunks"):
        run.section(name, getattr(run, name))
    if run.failed:
        sys.exit("\n".join(run.failed))


if __name__ == "__main__":
    main()
