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

- **exact**: the tests compare the tree with separate forwards on a small random model of the family, states and
  gradients, in float32.
- **compared at the start**: nothing is known against sharing, and no test holds it. The first states of student and
  teacher are compared with separate forwards before the first update, as they are for a family that is not listed; a
  mismatch warns and takes both to separate forwards (`teacher_verify`).
- **no**: the trainer refuses `student_scoring="tree"` and `teacher_scoring="tree"` when it is built; `"separate"`
  trains the same loss, slower.

A default adapter covers the layers named here. Experts and routers stay frozen under LoRA.

"""


def page() -> str:
    """Return the whole page."""
    return f"{HEAD}{table()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")
