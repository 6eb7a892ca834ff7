"""Count the instructions that a GPU issues for each (student, teacher) pair of entries, read from compiled code.

    python tests/helpers/machine_code.py        a table of every row kernel, for sm_90a
    PYTHONPATH=folder-of-another-triton ...     the same with its compiler

A kernel is a graph of instructions. Of all ways through a loop, or through a kernel from its start to its end with
every loop once, the way that is counted loads the most bytes 16 at a time, takes at least so many exponentials a pair,
and is the shortest of those: rare branches (a new maximum, a tail) are not on it. Predicated instructions count: they
are issued.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# SASS instructions a pair at most, by what a kernel does; the copy's rate leaves about 58 for fp32 logits (132
# multiprocessors, 4 a clock, 1.85 GHz, 4.3 TB/s).
# Of an epilogue: a tile, a thread.
BUDGET = {"statistics": 36.0, "gradient": 36.0, "epilogue": 600.0}


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: its address, its text, and where it may go on besides the next one."""

    address: int
    text: str

    @property
    def operation(self) -> str:
        return self.text.split(" ", 2)[1 if self.text.startswith("@") else 0]

    @property
    def target(self) -> int | None:
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @property
    def ends(self) -> bool:
        """Nothing follows in the line of addresses."""
        return self.operation.split(".")[0] in ("BRA", "EXIT", "RET") and not self.text.startswith("@")

    @property
    def loaded(self) -> int:
        """Bytes of a 16-byte load from global or shared memory; 0 of anything else."""
        return 16 * (self.operation.startswith(("LDG", "LDS")) and ".128" in self.operation)


def cuobjdump() -> str:
    """Triton's package carries the tool."""
    import triton

    return str(shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def disassemble(path: Path, arch: str = "sm_90a") -> dict[str, list[Instruction]]:
    """Instructions by mangled name of the functions in a cubin, object or library."""
    options = [] if path.suffix == ".cubin" else ["-arch", arch]
    sass = subprocess.run([cuobjdump(), "-sass", *options, path], capture_output=True, text=True, check=True).stdout
    found = {}
    for body in sass.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", body, re.MULTILINE)
        code = [Instruction(int(address, 16), text) for address, text in lines]
        found[body.split("\n")[0].strip()] = [x for x in code if not x.operation.startswith("NOP")]
    return found


def disassemble_bytes(cubin: bytes) -> dict[str, list[Instruction]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return disassemble(Path(file.name))


def _ways(code: list[Instruction], last: int | None, counted: str = "") -> dict[tuple[int, int], int]:
    """(bytes loaded, exponentials) -> fewest instructions from the first of `code` to address `last`, or to an end.

    counted: an operation whose number takes the place of the bytes.
    """
    at = {x.address: i for i, x in enumerate(code)}
    ways: list[dict[tuple[int, int], int]] = [{} for _ in code]
    ways[0] = {(0, 0): 0}
    done: dict[tuple[int, int], int] = {}
    for i, x in enumerate(code):
        onward = [i + 1] if not x.ends and i + 1 < len(code) else []
        if x.target is not None and at.get(x.target, -1) > i:
            onward.append(at[x.target])
        finishes = x.address == last if last is not None else x.operation.startswith("EXIT")
        for (loaded, exps), count in ways[i].items():
            state = loaded + (x.operation == counted if counted else x.loaded), exps + ("MUFU.EX2" in x.text)
            for into in [done] * finishes + [ways[j] for j in onward]:
                into[state] = min(count + 1, into.get(state, 1 << 30))
        ways[i] = {}
    return done


def _a_pair(ways: dict[tuple[int, int], int], itemsize: int, exps: float) -> tuple[float, float] | None:
    """(instructions a pair, pairs of a thread) of the shortest way that loads most and has enough exponentials."""
    most = max((loaded for loaded, _ in ways), default=0)
    pairs = most / (2 * itemsize)
    counts = [count for (loaded, e), count in ways.items() if loaded == most and e >= exps * pairs]
    return (min(counts) / pairs, pairs) if most and counts else None


def of_kernel(code: list[Instruction], itemsize: int, *, exps: float) -> float:
    """Instructions a pair of a kernel that loads each entry once, from its start to its end."""
    found = _a_pair(_ways(code, None), itemsize, exps)
    if found is None:
        raise ValueError(f"no way through the kernel loads entries and takes {exps} exponentials for each pair of them")
    return found[0]


def of_loops(code: list[Instruction], itemsize: int, *, stores: bool) -> float:
    """Instructions a pair of the loop with the most pairs a turn; of several, the most.

    Two exponentials a pair; loops inside which there is another such one do not count. stores: it writes gradients, or
    it does not.
    """
    at = {x.address: i for i, x in enumerate(code)}
    found: list[tuple[int, int, float, float]] = []
    for i, x in enumerate(code):
        if x.target is None or x.target > x.address or x.target not in at:
            continue
        body = code[at[x.target] : i + 1]
        if stores != any(y.operation.startswith("STG") for y in body):
            continue
        each = _a_pair(_ways(body, x.address), itemsize, 2)
        if each is not None and not any(x.target <= a and b <= x.address for a, b, *_ in found):
            found.append((x.target, x.address, *each))
    if not found:
        raise ValueError("no loop loads entries and takes two exponentials for each pair of them")
    return max(found, key=lambda loop: (loop[3], loop[2]))[2]


def of_cuda(functions: dict[str, list[Instruction]]) -> dict[str, dict[str, float]]:
    """Instructions a pair in the kernels of an object file whose rows are aligned, by what they do."""
    found: dict[str, dict[str, float]] = {}
    for name, code in functions.items():
        # Rows on whole vectors and not transformed; the others are one slow path.
        if shape := re.search(r"logits_gradient_kernelI(\w+?)Lb1ELb0EE", name):
            found["logits_gradient"] = {"gradient": of_loops(code, 4 if shape[1] == "f" else 2, stores=True)}
        elif shape := re.search(r"(Row|Pair)ReaderINS_16LogitsRowsParamsE(?:(\w+?)Lb1ELb0E)?EE\w*?Lb([01])EEEv", name):
            # A stored pair's 4 bytes are both sides' entry.
            itemsize = 4 if shape[2] == "f" else 2
            kernel = f"{'logits_rows' if shape[1] == 'Row' else 'pair_rows'} {('two_pass', 'resident')[int(shape[3])]}"
            found[kernel] = {
                "statistics": of_loops(code, itemsize, stores=False), "gradient": of_loops(code, itemsize, stores=True)
            }  # fmt: skip
        elif "pair_product_kernel" in name:
            found["pair_product" + " two heads" * ("ILb0E" in name)] = {"epilogue": of_epilogue(code)}
    return found


def of_epilogue(code: list[Instruction]) -> float:
    """Instructions of a thread from a tile's last product to where the next tile begins, a whole tile being stored."""
    last = max(i for i, x in enumerate(code) if "HGMMA" in x.text)
    wait = next(
        i for i in range(last, len(code)) if "WARPGROUP.DEPBAR" in code[i].text and code[i].text.endswith("0x0")
    )
    end = next(x.address for x in code[wait:] if x.target is not None and x.target < code[last].address)
    stored = _ways(code[wait:], end, counted="STG.E.64")
    most = max(stores for stores, _ in stored)
    return float(min(count for (stores, _), count in stored.items() if stores == most))


def of_triton(kernel: str, cubin: bytes, itemsize: int) -> dict[str, float]:
    """Instructions a pair in a Triton row kernel, by what it does."""
    (code,) = disassemble_bytes(cubin).values()
    if kernel == "_stats_kernel":
        return {"statistics": of_loops(code, itemsize, stores=False)}
    return {"gradient": of_kernel(code, itemsize, exps=2), "gradient, reverse": of_kernel(code, itemsize, exps=1)}


def compiled(source: str) -> Path:
    """Compile a file of csrc/cuda for sm_90a; kept in the user's cache for as long as its sources stay as they are."""
    csrc = ROOT / "csrc"
    headers = [csrc / "numerics.h", *sorted((csrc / "cuda").glob("*.*h")), csrc / "cuda" / f"{source}.cu"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vigos"
    cubin = folder / f"{source}-{digest}.cubin"
    if not cubin.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = cubin.with_suffix(f".{os.getpid()}")
        options = ["-cubin", "-arch=sm_90a", "-std=c++20", "-O3", "-o", partial, csrc / "cuda" / f"{source}.cu"]
        subprocess.run(["nvcc", *options], check=True)
        partial.replace(cubin)
    return cubin


def table() -> dict[str, dict[str, float]]:
    """Instructions a pair of every lean row kernel, by kernel and dtypes of logits and gradient."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_aot.py"), "90", "_stats_kernel", "_grad_kernel"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout.splitlines()[1:]  # fmt: skip
    found = {}
    for line in map(json.loads, lines):
        if line["pair"]:
            found[f"{line['kernel']} {line['logits']}"] = line["pair"]
    if shutil.which("nvcc"):
        for source in ("logits_rows_f32_bf16", "logits_rows_bf16_bf16", "logits_rows_pair_bf16", "linear_hopper"):
            for kernel, counts in of_cuda(disassemble(compiled(source))).items():
                found[f"{kernel} {source.removeprefix('logits_rows_')}"] = counts
    return found


if __name__ == "__main__":
    for kernel, counts in table().items():
        print(f"{kernel:40}" + "".join(f"  {name} {count:.1f}" for name, count in counts.items()))
