"""Compiles the Triton kernels for a chip without having it, and says what each needs: one line of JSON a variant.

    python tests/helpers/triton_aot.py 90 [KERNEL ...]

Run as a process of its own (tests/test_triton_aot.py does): elsewhere the kernels may be in Triton's interpreter.
A variant is what a launcher would pass: `*dtype` and `i32` arguments, with `:16` where address or value is a multiple
of 16 as Triton's specialisation would find, constants as they are, and launch options.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import machine_code

# Bytes of shared memory a block may use (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

I32, F32 = "i32:16", "fp32"
COUNT = "i32"  # a size that need not be a multiple of anything


def divergence_variants(arch: int) -> dict[str, list[dict[str, Any]]]:
    """Row kernels: fp32 chunks of logits as `auto` has them in bf16, bf16 logits, fp32 operands, every option."""
    from vigos.kernels.divergence import LAUNCH

    z = {f"{name}_{side}": F32 for side in "st" for name in ("alpha", "inner", "height")}
    strides = {"stride_sm": I32, "stride_sv": 1, "stride_tm": I32, "stride_tv": 1}
    stats, second, grad = [], [], []
    for dtype, everything, difference in (
        ("fp32", False, False), ("bf16", False, False), ("fp32", False, True), ("fp32", True, True),
    ):  # fmt: skip
        common: dict[str, Any] = {"s_ptr": f"*{dtype}:16", "t_ptr": f"*{dtype}:16"}
        bias = "*bf16:16" if everything else None
        common |= {"s_bias_ptr": bias, "t_bias_ptr": bias, "student_row_ptr": "*i64:16", "teacher_row_ptr": "*i64:16"}
        common |= {"kind_ptr": "*i8:16", "unit": F32}
        constants = {"SOFTCAP_S": everything, "SOFTCAP_T": everything, "DIFFERENCE": difference}
        constants |= {"SCALED": not everything}
        stats.append(
            common | {"label_ptr": "*i64:16" if everything else None, "partial_ptr": "*fp32:16", "V": I32}
            | {"vocab": COUNT, "vocab_start": COUNT, "span": I32} | z | strides | {"stride_pc": COUNT}
            | {"BLOCK_V": LAUNCH.stats_block, "VEC": 4 if dtype == "fp32" else 8, "LANES": 32 * LAUNCH.stats_warps}
            | constants | {"num_warps": LAUNCH.stats_warps}
        )  # fmt: skip
        second.append(
            common | {"state_ptr": "*fp32:16", "partial_ptr": "*fp32:16", "V": I32, "vocab": COUNT, "span": I32} | z
            | {"share": F32, "entry_clip": F32} | strides | {"stride_pc": COUNT, "stride_state": COUNT}
            | {"BLOCK_V": LAUNCH.second_block, "CLIP_ENTRIES": everything}
            | constants | {"num_warps": LAUNCH.stats_warps}
        )  # fmt: skip
        grad.append(
            common | {"state_ptr": "*fp32:16", "row_grad_ptr": "*fp32:16", "order_ptr": "*i64:16"}
            | {"offsets_ptr": "*i64:16", "out_ptr": "*bf16:16", "V": I32, "vocab": COUNT} | z
            | {"share": F32, "entry_clip": F32} | strides | {"stride_state": COUNT, "stride_om": I32, "stride_ov": 1}
            | {"BLOCK_V": LAUNCH.second_block if difference else LAUNCH.grad_block, "SECOND": difference}
            | {"CLIP_ENTRIES": everything} | constants | {"num_warps": LAUNCH.grad_warps}
        )  # fmt: skip
    merged = {"partial_ptr": "*fp32:16", "kind_ptr": "*i8:16", "state_ptr": "*fp32:16", "stats_ptr": "*fp32:16"}
    tail = {"S": COUNT, "stride_pc": COUNT, "stride_state": COUNT, "BLOCK_S": 8, "num_warps": 1}
    return {
        "_stats_kernel": stats,
        "_second_stats_kernel": second,
        "_grad_kernel": grad,
        "_finish_kernel": [merged | {"R": COUNT, "LABELS": True, "unit": F32} | tail],
        "_second_finish_kernel": [merged | {"CLIP_ENTRIES": False, "DIFFERENCE": False} | tail],
    }


def tree_attention_variants(arch: int) -> dict[str, list[dict[str, Any]]]:
    """Head widths of real models (80 and 96 are padded), in 16 bits and in fp32, with window and softcap on some."""
    from vigos.kernels import tree_attention as tree

    found: dict[str, list[dict[str, Any]]] = {}
    for dtype, size, pad, everything in (
        ("bf16", 2, 64, False), ("bf16", 2, 128, True), ("fp16", 2, 256, True), ("fp32", 4, 128, False),
    ):  # fmt: skip
        p = f"*{dtype}:16"
        inputs = {"q_ptr": p, "k_ptr": p, "v_ptr": p, "dout_ptr": p, "lse_ptr": "*fp32:16", "delta_ptr": "*fp32:16"}
        outputs = {"out_ptr": p, "dq_ptr": p, "dk_ptr": p, "dv_ptr": p}
        lists = {"end_ptr": "*i32:16", "position_ptr": "*i32:16" if everything else None}
        lists |= {"list_ptr": "*i32:16", "count_ptr": "*i32:16", "stride_list": COUNT}
        scalars = {"T": COUNT, "DH": I32, "group": COUNT, "window": COUNT, "scale": F32, "cap": F32}
        strides = {f"stride_{x}{y}": I32 for x in "qkvog" for y in "th"}
        whole = inputs | outputs | lists | scalars | strides | {"PAD_D": pad, "SOFTCAP": everything}
        for name, table, kernel in (
            ("_tree_fwd_kernel", tree.FORWARD, tree._tree_fwd_kernel),
            ("_tree_bwd_q_kernel", tree.BACKWARD_Q, tree._tree_bwd_q_kernel),
            ("_tree_bwd_kv_kernel", tree.BACKWARD_KV, tree._tree_bwd_kv_kernel),
        ):
            launch = table[pad, size]
            wanted = {k: v for k, v in whole.items() if k in kernel.arg_names}
            wanted |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
            wanted |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
            found.setdefault(name, []).append(wanted)
    return found


VARIANTS = {"divergence": divergence_variants, "tree_attention": tree_attention_variants}  # by file of kernels/


def kernels() -> dict[str, tuple[str, Any]]:
    """name -> (file, function) of every Triton kernel in kernels/."""
    import vigos.kernels

    found = {}
    for module in pkgutil.iter_modules(vigos.kernels.__path__):
        for name, value in vars(importlib.import_module(f"vigos.kernels.{module.name}")).items():
            if name.startswith("_") and name.endswith("_kernel"):
                found[name] = (module.name, value)
    return found


def compile_variant(kernel: Any, variant: dict[str, Any], arch: int) -> dict[str, Any]:
    """Return what `kernel` needs on sm_<arch>: registers a thread, stack and local bytes (spills), shared bytes.

    Of the row kernels as `auto` runs them, instructions a pair too.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"enable_fp_fusion": True} | {k: v for k, v in variant.items() if k in OPTIONS}
    signature, constants, attrs = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = variant[name]
        if isinstance(value, str):
            signature[name], _, aligned = value.partition(":")
            if aligned:
                attrs[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[name] = "constexpr", value
    unknown = set(variant) - set(kernel.arg_names) - set(OPTIONS)
    if unknown:
        raise ValueError(f"{kernel.__name__} has no arguments {sorted(unknown)}")
    started = time.monotonic()
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    seconds = time.monotonic() - started
    pair: dict[str, float] = {}
    dtype = re.sub(r"[*:]|16$", "", str(variant.get("s_ptr")))
    lean = kernel.__name__ == "_stats_kernel" or (kernel.__name__ == "_grad_kernel" and not variant["SECOND"])
    if arch == 90 and lean and variant["SCALED"] and not variant["DIFFERENCE"]:
        pair = machine_code.of_triton(kernel.__name__, compiled.asm["cubin"], 4 if dtype == "fp32" else 2)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [machine_code.cuobjdump(), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(numbers["REG"]), "stack": int(numbers["STACK"]), "local": int(numbers["LOCAL"]),
        "shared": compiled.metadata.shared, "wgmma": "wgmma" in compiled.asm["ptx"], "seconds": round(seconds, 2),
        "logits": dtype, "pair": pair, "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v[248]", compiled.asm["ptx"])),
    }  # fmt: skip


def main() -> None:
    arch, *only = sys.argv[1:]
    found = kernels()
    variants = {name: listed for of in VARIANTS.values() for name, listed in of(int(arch)).items()}
    missing, stale = sorted(set(found) - set(variants)), sorted(set(variants) - set(found))
    print(json.dumps({"without_variants": missing, "without_kernel": stale}), flush=True)
    for name, (file, kernel) in found.items():
        if only and name not in only and file not in only:
            continue
        for i, variant in enumerate(variants.get(name, ())):
            print(json.dumps({"kernel": name, "variant": i} | compile_variant(kernel, variant, int(arch))), flush=True)


if __name__ == "__main__":
    main()
