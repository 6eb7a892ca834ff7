"""`vigos.linear_divergence` beside its peers and its floor: time, memory, error of the gradient; forward and backward.

    python bench/divergence.py                                  # the target case of this device, then the sweeps
    python bench/divergence.py --cases target --repeats 5
    python bench/divergence.py --device cuda --out results.csv

The floor is the matrix products alone, as fast as torch has them in either orientation, in the operands' dtype: two
for the logits of student and teacher, one for the gradient of the hidden states, and one more where the head is
trained. Contenders take turns; medians. On a CPU its peak is measured, and each line says which share of it the floor's
operations would be in that time. Memory is the peak above the inputs. The error is that of the gradient against
float64 on up to 32 rows. An engine of ours that is off by more than 0.5 %, or fails, is not timed, and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import losses
import torch
from losses import Inputs
from measure import Table, checked, machine, peak_bytes, results_file, seconds, take_turns
from torch import Tensor

import vigos


@dataclass(frozen=True)
class Case:
    """One point: sizes, the rows' kind, how many of them count, and whether the head is trained."""

    n: int
    d: int
    v: int
    rows: str = "peaked"
    live: float = 1.0
    trained_head: bool = False
    kind: str = "forward"
    contrast: float = 0.0
    plausibility: float = 0.0


SMALL = "small"  # exercises the script in seconds


def cases(device: str) -> dict[str, list[Case]]:
    """Groups by name, the most wanted first; `SMALL` only where it is asked for."""
    small = [Case(64, 128, 1000), Case(64, 128, 1000, live=0.5, trained_head=True)]
    if device == "cuda":
        shapes = [(2048, 151_936), (3584, 152_064), (2560, 248_320), (4096, 128_256)]  # Qwen2.5, Qwen3.5-4B, Llama 3
        d, v = shapes[0]
        return {
            SMALL: small,
            "target": [Case(8192, *shape) for shape in shapes[:3]],
            "rows": [Case(8192, d, v, rows) for rows in ("near", "flat")],
            "live": [Case(8192, d, v, live=share) for share in (0.5, 0.1)],
            "head": [Case(8192, d, v, trained_head=True)],
            "kind": [Case(8192, d, v, kind=kind) for kind in ("reverse", "jsd")],
            "contrast": [Case(8192, d, v, contrast=1.0, plausibility=gamma) for gamma in (0.0, 0.1)],
            "n": [Case(n, d, v) for n in (1024, 2048, 4096, 16_384, 32_768)],
            "shape": [Case(8192, *shapes[3])],
            "vocabulary": [Case(8192, 2560, 262_144)],  # Gemma 3 4B
        }
    n, d, v = 512, 512, 32_000
    return {
        SMALL: small,
        "target": [Case(512, 896, 151_936)],
        "rows": [Case(n, d, v, rows) for rows in ("peaked", "near", "flat")],
        "live": [Case(n, d, v, live=share) for share in (0.5, 0.1)],
        "head": [Case(n, d, v, trained_head=True)],
        "kind": [Case(n, d, v, kind=kind) for kind in ("reverse", "jsd")],
        "contrast": [Case(n, d, v, contrast=1.0, plausibility=gamma) for gamma in (0.0, 0.1)],
        "n": [Case(size, d, v) for size in (64, 128, 256, 1024, 2048)],
        "d": [Case(n, size, v) for size in (128, 256, 1024, 2048)],
        "vocabulary": [Case(n, d, 248_320), Case(n, d, 262_144)],  # Qwen3.5, Gemma 3
        "v": [Case(n, d, size) for size in (8_000, 16_000, 64_000, 128_000)],
    }


def floor(x: Inputs, trained_head: bool) -> dict[str, Callable[[], object]]:
    """The products, each in both orientations; a run of the floor is the faster one of each."""
    student, head = x.student[x.live], x.head
    g = torch.randn(student.shape[0], head.shape[0], device=head.device).to(head.dtype)
    runs: dict[str, Callable[[], object]] = {
        "z": lambda: student @ head.T, "z*": lambda: head @ student.T,
        "dh": lambda: g @ head, "dh*": lambda: head.T @ g.T,
    }  # fmt: skip
    if trained_head:
        runs |= {"dw": lambda: g.T @ student, "dw*": lambda: student.T @ g}
    return runs


def entropy_and_divergence(x: Inputs) -> tuple[float, float]:
    """Means over the rows, in nats."""
    with torch.no_grad():
        out = vigos.linear_divergence(x.student[:64], x.head, x.teacher[:64], impl="reference")
    return out.teacher_entropy.mean().item(), out.divergence.mean().item()


FIRST_CALL = """
import sys, time
import torch, vigos
n, d, v = map(int, sys.argv[1:4])
dtype = getattr(torch, sys.argv[4])
student, teacher, head = (torch.randn(rows, d).to(dtype) for rows in (n, n, v))
for _ in range(3):
    begin = time.perf_counter()
    vigos.linear_divergence(student.clone().requires_grad_(), head, teacher, impl="cpu").loss.backward()
    print(time.perf_counter() - begin)
"""


def first_call(case: Case, dtype: torch.dtype) -> float:
    """Time of the CPU engine's first call in a process, over that of the faster of the next two."""
    sizes = [str(size) for size in (case.n, case.d, case.v)]
    command = [sys.executable, "-c", FIRST_CALL, *sizes, str(dtype).removeprefix("torch.")]
    first, *later = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return first / min(later)


def peak_gflops() -> float:
    """Measure what the threads compute in registers alone: multiplications and additions, in 10^9 a second."""
    extension, threads = importlib.import_module("vigos._C"), torch.get_num_threads()
    times = [(seconds(lambda: extension.multiply_add(10**7, threads), "cpu")) for _ in range(5)]
    return float(extension.multiply_add(10**7, threads)) / min(times) / 1e9


def run_case(
    case: Case, device: str, dtype: torch.dtype, repeats: int, only: list[str] | None, failed: list[str]
) -> list[dict[str, object]]:
    """The rows of one case, floor first; prints them."""
    x = losses.inputs(case.rows, case.n, case.d, case.v, dtype, device, case.live, case.kind)
    if case.contrast or case.plausibility:
        x = losses.with_control(x, case.contrast, case.plausibility)
        only = [name for name in only or losses.contenders(device) if name.startswith("vigos") and "cuda" not in name]
    at = x.live.nonzero().squeeze(1)
    at = at[:: max(1, math.ceil(at.shape[0] / 32))]
    exact = losses.exact_gradient(x, at)
    head = x.head.detach().requires_grad_(case.trained_head)
    shape: dict[str, object] = {
        "n": case.n, "d": case.d, "v": case.v, "rows": case.rows, "live": case.live, "kind": case.kind,
        "contrast": case.contrast, "plausibility": case.plausibility,
        "head": "trained" if case.trained_head else "frozen", "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    shape["entropy"], shape["divergence"] = entropy_and_divergence(x)
    print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shape.items()), flush=True)

    def gradient(loss: losses.Loss, x: Inputs = x) -> Tensor:
        leaf = x.student.detach().clone().requires_grad_()
        head.grad = None
        loss(x, leaf, head).backward()
        assert leaf.grad is not None
        return leaf.grad

    out: dict[str, dict[str, object]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, loss in losses.contenders(device).items():
        if only and name not in only:
            continue
        allowed = 0.005 if name.startswith("vigos") else None
        error = checked(name, lambda loss=loss: gradient(loss)[at], exact, allowed, failed)  # also the warm-up
        if error is None:
            continue
        mib = peak_bytes(lambda loss=loss: gradient(loss), device) / 2**20  # type: ignore[misc]
        out[name] = shape | {"engine": name, "error": error, "peak_mib": mib}
        runs[name] = lambda loss=loss: gradient(loss)  # type: ignore[misc]
    products = floor(x, case.trained_head)
    for product in products.values():
        product()
    times = take_turns(products | runs, device, repeats)
    best = {name: min(times[name], times[f"{name}*"]) for name in products if not name.endswith("*")}
    least = 2 * best["z"] + best["dh"] + best.get("dw", 0.0)
    operations = (4 if case.trained_head else 3) * 2e-9 * int(x.live.sum()) * case.d * case.v
    peak = peak_gflops() if device == "cpu" else None
    share = {} if peak is None else {"of_peak": operations / least / peak}
    lines = [shape | {"engine": "floor", "ms": 1e3 * least, "of_floor": 1.0} | share]
    shares = "".join(f"   {of:.0%} of {peak:.0f} GFLOP/s" for of in share.values())
    print(f"  {'floor':22} {1e3 * least:10.1f} ms{shares}")
    if case.contrast or case.plausibility:  # beside the same call without: what the target costs
        plain = replace(x, contrast=0.0, plausibility=0.0)
        for name in list(runs):
            twins = {"with": runs[name], "without": lambda name=name: gradient(losses.contenders(device)[name], plain)}
            both = take_turns(twins, device, repeats)
            out[name]["of_plain"] = both["with"] / both["without"]
            print(f"  {name:22} {out[name]['of_plain']:6.2f} x the call without a control")
    for name, line in out.items():
        if name in times:
            line |= {"ms": 1e3 * times[name], "of_floor": times[name] / least}
            if peak is not None:
                line["of_peak"] = operations / times[name] / peak
            print(
                f"  {name:22} {line['ms']:10.1f} ms {line['of_floor']:6.2f} x floor {line['peak_mib']:9.0f} MiB"
                f"   error {line['error']:.1e}" + (f" {line['of_peak']:5.0%} of the peak" if peak else ""),
                flush=True,
            )
        lines.append(line)
    return lines


def main() -> None:
    """Every case; the CSV is rewritten after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 (CPU), bfloat16")
    parser.add_argument("--cases", nargs="+", help="groups, such as small, target, rows, vocabulary")
    parser.add_argument("--only", nargs="+", help="contenders by name")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="CSV; default: bench/results/DEVICE/divergence.csv")
    args = parser.parse_args()
    groups = cases(args.device)
    unknown = set(args.cases or ()) - set(groups)
    if unknown:
        parser.error(f"--cases must be of {', '.join(groups)}; got {', '.join(sorted(unknown))}")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    about = machine(args.device, "triton", "trl", "liger-kernel")
    if args.device == "cpu":
        about["isa"] = importlib.import_module("vigos._C").isa()
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    wanted, failed = args.cases or [name for name in groups if name != SMALL], list[str]()
    table = Table(args.out or results_file(args.device, "divergence"), about, wanted)
    for name in wanted:
        for case in groups[name]:
            lines = run_case(case, args.device, dtype, args.repeats, args.only, failed)
            table.add({"group": name} | line for line in lines)
            if name == "target" and args.device == "cpu" and not (args.only and "vigos cpu" not in args.only):
                print(f"  vigos cpu: the first call of a process takes {first_call(case, dtype):.2f} x a later one")
    print(f"written to {table.path}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
