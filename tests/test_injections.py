"""`bench/injections.py` in small: a real `vigos train` killed, resumed with something changed, and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.processes import output_of

SCRIPT = Path(__file__).parents[1] / "bench" / "injections.py"


@pytest.mark.slow
def test_nothing_is_lost_but_the_step_under_way(tmp_path: Path) -> None:
    counts = ["--kills", "3", "--changed", "3", "--damaged", "2", "--output", str(tmp_path / "found.json")]
    output_of(SCRIPT, counts, tmp_path / "log")
    found = json.loads((tmp_path / "found.json").read_text())
    killed = found["killed"]
    assert sum(killed["kills"].values()) == 3
    assert killed["steps lost but the one under way"] == killed["ended otherwise"] == 0
    rate, more, fewer = found["changed"]
    assert [each["exit code"] for each in found["changed"]] == [0, 0, 0]
    assert all(each["history kept"] for each in found["changed"])
    assert any("changed since: learning_rate 0.001 -> 0.0001" in line for line in rate["said"])
    assert any("changed since: max_steps 4 -> 5" in line for line in more["said"])
    assert any("all its steps are trained" in line for line in fewer["said"])
    for each in found["damaged"]:
        assert each["exit code"] == 0, each
        assert each["same weights"]
        name = Path(each["file"]).name
        assert any(f"checkpoint-2 is damaged ({name}" in line for line in each["said"])
