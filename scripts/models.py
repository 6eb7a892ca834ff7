"""Writes docs/models.md from the table of families: what is known of each, and what is done about it.

python scripts/models.py           # writes the page; a test fails where it is not up to date
"""

from __future__ import annotations

from pathlib import Path

from vigos.models.families import table

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

HEAD = """\
# Models

Any transformers model with a language-model head and, for images, a processor can be trained. What differs between
families is how their layers mix tokens, and so if prefixes that sequences share can run once
([the prefix tree](performance.md)). `vigos doctor --model PATH` prints the row of a model before anything is trained.

- **exact**: the tests compare the tree with separate forwards on a small random model of the family: states to 1e-5 and
  gradients to 2e-5 of their norm in float32, and to 1e-12 in float64, which leaves rounding as the one difference.
  Qwen3-Next rounds more: with one of the tests' seeds its own separate forward is 2.2e-5 from float64, the tree 5e-6.
- **compared at the start**: nothing is known against sharing, and no test holds it. The first states of student and
  teacher are compared with separate forwards before the first update, as they are for a family that is not listed; a
  mismatch warns and takes both to separate forwards (`teacher_verify`).
- **no**: the trainer refuses `student_scoring="tree"` and `teacher_scoring="tree"` when it is built; `"separate"`
  trains the same loss, slower.

Layers that carry state (Gated DeltaNet, short convolutions, Mamba-2) are shared as well: each branch begins from the
state that its prefix left. transformers' own functions compute them, so kernels that it takes where they are installed
(flash-linear-attention, causal-conv1d, mamba-ssm) would be called with initial states; that was not run on a GPU.

## Adapters

A default adapter covers the layers named in the table, and the log of a run's start names what it leaves as it is.

- **Experts** are frozen by default. `--lora-target-parameters auto --lora-dropout 0` gives each expert an adapter of
  its own (peft's `target_parameters`); the merged model holds it.
- **Routers** stay frozen. `--router-aux-loss-coef 0.001` adds the load-balancing loss over the student's tokens, and
  full fine-tuning then trains the routers too. A token of a shared prefix counts as often as sequences go through it.
- `--use-rslora` scales by alpha / sqrt(r). `--use-dora` trains, but cannot be merged: `--save-merged false`.
- `--load-in-4bit` keeps the language model under the adapter in 4 bits (bitsandbytes, NF4): the frozen teacher is that
  model without the adapter, and `merged/` is written in the dtype of the run. Run on a CPU alone.

## Families

"""


def page() -> str:
    """Return the whole page."""
    return f"{HEAD}{table()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")
