"""The logits row kernels against the memory: time, share of a device copy's bandwidth, peak memory, error.

    python bench/logits_rows.py --device cuda
    python bench/logits_rows.py --device cpu --rows 64 --vocab 8000     # the script itself, on any machine

The floor of loss and gradient reads both rows once and writes the gradient once, 3 N V items: what the engine `cuda`
does in forward. The others visit the rows again in backward, 5 N V, and so does `cuda` in rows whose upstream is not
their weight. A copy of one matrix, timed in the same run, gives the bandwidth. Peaked rows,
teacher near the student, forward KL; the error is that of the gradient against float64 on a few rows. A number is
printed after its gradient was checked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Table, checked, machine, peak_bytes, results_file, take_turns
from torch import Tensor

import vigos
from vigos import reference


def peaked(rows: int, v: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Logits (rows, v) with four winners a row, and a teacher 0.1 away."""
    generator = torch.Generator(device=device).manual_seed(0)
    student = torch.randn(rows, v, generator=generator, device=device).mul_(2)
    winners = torch.randint(v, (rows, 4), generator=generator, device=device)
    student.scatter_add_(1, winners, 8 + 3 * torch.rand(rows, 4, generator=generator, device=device))
    teacher = student + 0.1 * torch.randn(rows, v, generator=generator, device=device)
    return student.to(dtype), teacher.to(dtype)


Gradient = Callable[[Tensor, Tensor], Tensor]  # (student, teacher) -> dlogits


def differentiated(loss: Gradient) -> Gradient:
    """The gradient of a loss with respect to the student's logits."""

    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        leaf = student.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, teacher), leaf)[0]

    return gradient


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """Plain PyTorch, fp32 softmax."""
    return reference.forward_kl(student.float(), teacher.float()).sum()


def engines(device: str) -> dict[str, Gradient]:
    """By name. Those that cannot run here are found out by running them."""

    def ours(impl: str) -> Gradient:
        return differentiated(lambda student, teacher: vigos.logits_divergence(student, teacher, impl=impl).loss)

    if device == "cpu":
        return {"vigos cpu": ours("cpu"), "vigos reference": ours("reference"), "eager": differentiated(eager)}
    return {
        "vigos cuda": ours("cuda"), "vigos triton": ours("triton"), "vigos reference": ours("reference"),
        "eager": differentiated(eager), "compile": differentiated(torch.compile(eager)),
    }  # fmt: skip


def main() -> None:
    """Every engine at every shape; a row of the CSV as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="default: 4096 on a GPU, 256 on a CPU")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256, 151_936])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None, help="CSV to write")
    args = parser.parse_args()
    about = machine(args.device)
    sizes, failed = args.rows or [4096 if args.device == "cuda" else 256], list[str]()
    table = Table(args.out or results_file(args.device, "logits_rows"), about)
    print(", ".join(about.values()))
    for dtype_name in args.dtypes:
        for n in sizes:
            for v in args.vocab:
                table.add(cases(n, v, getattr(torch, dtype_name), args.device, args.repeats, failed))
    print(f"written to {table.path}")
    if failed:
        raise SystemExit("\n".join(failed))


def cases(n: int, v: int, dtype: torch.dtype, device: str, repeats: int, failed: list[str]) -> list[dict[str, object]]:
    """All engines at one shape."""
    student, teacher = peaked(n, v, dtype, device)
    some = torch.arange(0, n, max(1, n // 4), device=device)
    doubled = student[some].double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.forward_kl(doubled, teacher[some].double()).sum(), doubled)
    runs: dict[str, Callable[[], Tensor]] = {"copy": student.clone}
    errors, peaks = {"copy": 0.0}, {"copy": 0.0}
    for name, gradient in engines(device).items():

        def step(gradient: Gradient = gradient) -> Tensor:
            return gradient(student, teacher)

        error = checked(f"{dtype} {n:6} {v:7} {name}", lambda step=step: step()[some], wanted, 0.02, failed)
        if error is None:
            continue
        errors[name] = error
        peaks[name] = peak_bytes(step, device) / 2**20
        runs[name] = step
    out: list[dict[str, object]] = []
    times = take_turns(runs, device, repeats)
    copy_gbps = 2 * student.numel() * dtype.itemsize / times["copy"] * 1e-9
    for name, time in times.items():
        gbps = copy_gbps if name == "copy" else 3 * student.numel() * dtype.itemsize / time * 1e-9
        print(
            f"{dtype} {n:6} {v:7} {name:16} {1e3 * time:9.3f} ms {gbps:5.0f} GB/s {gbps / copy_gbps:4.0%} of the copy "
            f"{peaks[name]:8.0f} MiB  error {errors[name]:.1e}"
        )
        out.append(
            {
                "dtype": str(dtype).removeprefix("torch."), "rows": n, "vocab": v, "engine": name, "ms": 1e3 * time,
                "gbps": gbps, "share_of_copy": gbps / copy_gbps, "peak_mib": peaks[name], "error": errors[name],
            }
        )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
