"""The study: its plan, its statistics on known data, its arms in small, and that a killed one goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import CUT_OFF, VALID_A, completion_ids, config, processor
from PIL import Image
from rich.console import Console
from scipy import stats

from vigos.cli import main
from vigos.data.examples import load_rows
from vigos.divergence.reference import entropy
from vigos.divergence.supervision import FORWARD_KL, REVERSE_KL
from vigos.method.objective import Objective
from vigos.method.spans import parse_rollout
from vigos.method.supervise import assign
from vigos.method.views import View
from vigos.study.cell import (
    add_boxes,
    cell_config,
    change_references,
    measure,
    stated,
    temperature_of,
    write_sharpened,
)  # fmt: skip
from vigos.study.plan import (
    ARM,
    ARMS,
    CONTROL,
    FROZEN,
    FULL,
    METHOD,
    METHODS,
    QUICK,
    SEARCH,
    Axis,
    Cell,
    Plan,
    World,
    reduced,
    three_teachers,
)  # fmt: skip
from vigos.study.results import (
    by_base,
    difference,
    draw,
    findings,
    in_world,
    pairs,
    print_results,
    read_csv,
    t_interval,
    write_csv,
)
from vigos.study.run import run_study
from vigos.train.config import ViGOSConfig
from vigos.world import load_base, write_world
from vigos.world.tasks import Asked

ROOT = Path(__file__).resolve().parents[1]
TINY = Plan("tiny", arms=("base", "vigos"), steps=2, examples_a_step=4, triplets=2, palr_examples=4, check_triplets=1)


# --- Plan -------------------------------------------------------------------------------------------------------------


def test_plans_hold_every_arm_and_no_cell_twice() -> None:
    quick = QUICK.cells()
    assert {cell.arm for cell in quick} == {arm.name for arm in ARMS}
    assert len({cell.key for cell in quick}) == len(quick) == 14
    full = FULL.cells()
    assert len({cell.key for cell in full}) == len(full)
    assert (len(FULL.bases), len(FULL.seeds)) >= (5, 2)
    untrained = [cell for cell in full if cell.arm == "base"]
    worlds = {(c.world.noise, c.world.shortcut) for c in full}
    assert len(untrained) == len(FULL.bases) * len(worlds), "what only the training set knows is not evaluated again"


def test_the_search_leaves_the_study_alone() -> None:
    """Its worlds and its base are new, and the knobs that it brought leave the names of older cells as they were."""
    cells = SEARCH.cells()
    assert len({(c.world.conflict, c.world.faint, c.world.place) for c in cells if c.arm == "vigos"}) == 12
    assert len(cells) == 4 + 2 * 12  # the untrained model once for each kind of image and question
    assert not {c.base for c in cells} & {c.base for c in FULL.cells()}
    assert [c.base for c in reduced(SEARCH, bases=2).cells() if c.arm == "base"] == [100, 101] * 4
    assert Cell("opsd", World(), 0, 0, FULL).key == "opsd-base0-seed0-d01c51353b"
    frozen = FROZEN.cells()
    assert len(frozen) == 5 * (1 + 2 * 2 * 2)
    assert not {c.base for c in frozen} & ({c.base for c in FULL.cells()} | set(SEARCH.bases))


def test_a_changed_setting_is_another_cell() -> None:
    cell = Cell("vigos", World(), 0, 0, TINY)
    for other in (
        replace(cell, seed=1), replace(cell, base=1), replace(cell, world=World(noise=0.1)), replace(cell, arm="opsd"),
        replace(cell, world=World(faint=0.5)), replace(cell, world=World(place=1.0)),
        replace(cell, plan=replace(TINY, steps=3)), replace(cell, plan=replace(TINY, learning_rate=1e-3)),
    ):  # fmt: skip
        assert other.key != cell.key
    assert replace(cell, plan=replace(TINY, seeds=(0, 1), name="other")).key == cell.key


def test_a_smaller_plan_is_part_of_the_larger_one() -> None:
    small = reduced(FULL, bases=2, seeds=1, axes=["label_bias"])
    assert {cell.key for cell in small.cells()} < {cell.key for cell in FULL.cells()}
    assert {cell.base for cell in small.cells()} == {0, 1}
    assert {cell.world.noise for cell in small.cells()} == {World.noise}
    assert reduced(FULL) == FULL
    assert {cell.key for cell in QUICK.cells()} < {cell.key for cell in FULL.cells()}
    assert {cell.plan.steps for cell in reduced(FULL, steps=60).cells()} == {60}
    with pytest.raises(ValueError, match="axes must be among label_bias, conflict, noise, shortcut, got 'colour'"):
        reduced(FULL, axes=["colour"])
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        reduced(FULL, seeds=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("vigos", "magic")}, "arms must be among base, .*, got 'magic'"),
        ({"axes": (Axis("noise", (0.1,), ("magic",)),)}, "arms must be among base, .*, got 'magic'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seeds": ()}, "bases and seeds must each hold at least one number, got none"),
    ],
)
def test_wrong_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_every_arm_is_a_configuration(tmp_path: Path) -> None:
    made = {a.name: cell_config(Cell(a.name, World(), 0, 3, TINY), tmp_path) for a in ARMS if a.kind == "trainer"}
    assert made["vigos"].objective.lambdas == (1.0, 1.0, 2.0)
    assert made["opsd"].method == "opsd"
    assert made["no_perception"].objective.lambdas == (0.0, 1.0, 2.0)
    assert (made["clip_token"].clip_mode, made["clip_token"].token_clip) == ("token", 0.05)
    assert {c.seed for c in made.values()} == {3}
    options = [f.name for f in dataclasses.fields(ViGOSConfig)]
    for name, args in made.items():
        changed = {k for k in options if getattr(args, k, None) != getattr(made["vigos"], k, None)}
        assert changed == set(ARM[name].options) - ({"entry_clip"} if name == "clip_entry" else {"token_clip"}), name


def test_reference_direction() -> None:
    cut = parse_rollout(completion_ids(CUT_OFF), processor().tokenizer)
    valid = parse_rollout(completion_ids(VALID_A), processor().tokenizer)
    kinds = {}
    for direction in ("reverse", "forward"):
        args = config(Path("unused"), reference_kl=direction)
        kinds[direction] = [a.kind for a in assign(cut, args.objective)]
        assert {a.kind for a in assign(valid, args.objective)} == {FORWARD_KL}
    assert kinds == {"reverse": [REVERSE_KL], "forward": [FORWARD_KL]}
    with pytest.raises(ValueError, match="reference_kl must be one of reverse, forward, got 'backward'"):
        ViGOSConfig(output_dir="unused", use_cpu=True, reference_kl="backward")  # type: ignore[arg-type]


# --- What the off-policy arm is taught --------------------------------------------------------------------------------


def test_stated_completions_are_valid_and_say_the_reference(tmp_path: Path) -> None:
    path = write_world(tmp_path, "train", n=80, label_bias=0.5, asked=Asked(place=0.5))
    kinds, lies = set(), 0
    for line in path.read_text().splitlines():
        row = json.loads(line)
        text = stated(row)
        spans = parse_rollout(completion_ids(text), processor().tokenizer)
        assert spans.valid, text
        assert spans.answer_text == row["answer"], text
        assert row["answer"] in text.split("<think>")[1].split("</think>")[0]
        described = [f"{d} in {i}" in text for d, i in zip(row["digits"], row["inks"], strict=True)]
        lies += not all(described)
        assert sum(described) >= len(described) - (row["kind"] == "ink")
        assert "None" not in text
        kinds.add(row["kind"])
    assert kinds == {"ink", "which", "larger", "sum", "count"}
    assert lies > 5


@pytest.mark.parametrize("reference", ["other", "wrong", "none"])
def test_controls_tell_the_teachers_something_else(tmp_path: Path, reference: str) -> None:
    path = write_world(tmp_path, "train", n=80)
    before = [json.loads(line) for line in path.read_text().splitlines()]
    change_references(path, reference, seed=0)
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r | {"answer": ""} for r in before] == [r | {"answer": ""} for r in after]  # nothing else changes
    kept = sum(a["answer"] == b["answer"] for a, b in zip(before, after, strict=True))
    if reference == "other":
        assert sorted((r["kind"], r["answer"]) for r in before) == sorted((r["kind"], r["answer"]) for r in after)
        assert 0 < kept < 40
    else:
        assert kept == 0
        assert {r["answer"] for r in after} == {"?"} or reference == "wrong"
    assert len(CONTROL.cells()) == 5 * (1 + 2 * 13)


def test_controls_show_or_weigh_something_else(tmp_path: Path) -> None:
    """They differ from ViGOS, written out as data, in one field."""
    plain = cell_config(Cell("vigos", World(), 0, 0, TINY), tmp_path).objective.roster
    assert Objective(teachers=three_teachers()).roster == plain
    for name in ("blank", "other"):
        seen = cell_config(Cell(f"vigos_{name}_image", World(), 0, 0, TINY), tmp_path).objective.roster
        assert seen == (replace(plain[0], view=View(name)), *plain[1:])
    unlikely = cell_config(Cell("vigos_unlikely", World(), 0, 0, TINY), tmp_path).objective.roster
    assert unlikely == tuple(replace(teacher, weigh={"unlikely": 0.5}) for teacher in plain)
    opsd = cell_config(Cell("opsd", World(), 0, 0, TINY), tmp_path).objective.roster[2]
    (alone,) = cell_config(Cell("opsd_unlikely", World(), 0, 0, TINY), tmp_path).objective.roster
    assert alone == replace(opsd, weigh={"unlikely": 0.5})


def test_a_teacher_as_sure_as_the_privileged_one(tmp_path: Path) -> None:
    """Its logits are the base's over the temperature, at which its mean entropy is the privileged teacher's."""
    logits = torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 1.0, 4.0):
        found = temperature_of(logits, float(entropy(logits / temperature).mean()))
        assert found == pytest.approx(temperature, rel=1e-6)
    examples = list(load_rows(write_world(tmp_path / "train", "train", n=6)))
    cell = Cell("opsd_sharpened", World(), 0, 0, TINY)
    temperature = write_sharpened(tmp_path / "sharp", None, examples, cell_config(cell, tmp_path / "run"))
    assert 0.5 < temperature < 2
    ids = torch.arange(8)[None]
    with torch.no_grad():
        sharp, plain = (load_base(folder)[0](input_ids=ids).logits for folder in (tmp_path / "sharp", None))
    torch.testing.assert_close(sharp, plain / temperature, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sharp, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arm", METHODS, ids=lambda arm: arm.name)
def test_methods_of_others_are_arms(tmp_path: Path, arm: Any) -> None:
    cells = METHOD.cells()
    assert len(cells) == 5 + 5 * 2 * 2 * 6  # the untrained model once a base
    cell = next(c for c in cells if c.arm == arm.name)
    args = cell_config(cell, tmp_path)
    assert [t.name for t in args.objective.roster] == [t["name"] for t in arm.options["teachers"]]
    if not arm.boxes:
        return
    path = write_world(tmp_path, "train", n=60, asked=Asked(place=0.5))
    add_boxes(path)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        with Image.open(tmp_path / row["images"][0]) as image:
            seen = View.read(arm.options["teachers"][0]["view"])([image], row, seed="")[0]
        assert seen.width == 28 * (1 if row["kind"] in ("ink", "which") else len(row["digits"]))
        if row["kind"] == "ink":
            assert row["inks"][row["box"][0] // 28] == row["answer"]
        if row["kind"] == "which":
            assert str(row["digits"][row["box"][0] // 28]) == row["answer"]


# --- Statistics -------------------------------------------------------------------------------------------------------


def row(arm: str, base: int, seed: int, score: str, **more: Any) -> dict[str, Any]:
    values = {**dataclasses.asdict(World()), "steps": 10, "seconds": 1.5}
    found = {"score": score.count("1") / len(score), "score_items": score, "prior_items": "1" * (len(score) // 2)}
    rest = {"prior": 1.0, "valid_rate": 0.9, "description": None, "named": 0.0, "follows": None, "tokens": 20.0,
            "palr_all": 0.25, "palr_description": 0.0, "palr_reasoning": None, "temperature": None}  # fmt: skip
    return {"arm": arm, "base": base, "seed": seed} | values | rest | found | more


def test_csv_gives_back_what_was_written(tmp_path: Path) -> None:
    rows = [row("vigos", 0, 1, "0101"), row("base", 2, 0, "1111", noise=0.3)]
    assert read_csv(write_csv(tmp_path / "results.csv", rows)) == [{k: r[k] for k in read_csv(tmp_path / "results.csv")[0]} for r in rows]  # fmt: skip  # noqa: E501
    with pytest.raises(ValueError, match="secret"):
        write_csv(tmp_path / "more.csv", [rows[0] | {"secret": 1}])


def test_t_interval_is_scipys() -> None:
    values = [0.1, 0.25, -0.05, 0.3, 0.2]
    mean, interval, p = t_interval(values)
    exact = stats.ttest_1samp(values, 0.0)
    low, high = exact.confidence_interval(0.95)
    assert mean == pytest.approx(0.16)
    assert interval == pytest.approx((low, high))
    assert p == pytest.approx(exact.pvalue)
    assert t_interval([0.2]) == (0.2, None, None)
    assert t_interval([0.0, 0.0]) == (0.0, (0.0, 0.0), 1.0)
    assert t_interval([0.5, 0.5]) == (0.5, (0.5, 0.5), 0.0)


def test_bases_are_the_unit_of_replication() -> None:
    """Ten seeds of one base are one observation, however well they agree."""
    rows = [row(arm, 0, s, items) for s in range(10) for arm, items in (("opsd", "1100"), ("vigos", "1110"))]
    found = difference(rows, "vigos", "opsd")
    assert found is not None
    assert (found.mean, found.interval, found.p_value) == (0.25, None, None)
    rows += [row(arm, 1, 0, items) for arm, items in (("opsd", "1000"), ("vigos", "1111"))]
    rows += [row("vigos", 2, 0, "1111")]
    found = difference(rows, "vigos", "opsd")
    assert found is not None
    assert found.by_base == {0: 0.25, 1: 0.75}
    assert found.interval is not None
    assert by_base(rows, "vigos", "score") == {0: 0.75, 1: 1.0, 2: 1.0}
    assert difference(rows, "vigos", "sft") is None


def test_pairs_count_a_triplet_once() -> None:
    mine, theirs = "1111111100" * 4, "0011111111" * 4
    better = row("vigos", 0, 0, "1" * 40), row("opsd", 0, 0, "0" * 10 + "1" * 30)
    (pair,) = pairs(list(better), "vigos", "opsd")
    assert (pair.better, pair.worse, pair.difference) == (10, 0, 0.25)
    assert pair.p_value == pytest.approx(stats.binomtest(0, 5).pvalue)  # ten images of five triplets
    assert 0 < pair.interval[0] < 0.25 < pair.interval[1]
    (level,) = pairs([row("vigos", 0, 0, mine), row("opsd", 0, 0, theirs)], "vigos", "opsd")
    assert (level.better, level.worse, level.p_value) == (8, 8, pytest.approx(1.0))
    assert len(pairs([row("vigos", 0, 5, mine), row("base", 0, 0, theirs)], "vigos", "base")) == 1
    assert pairs([row("vigos", 0, 5, mine), row("opsd", 0, 0, theirs)], "vigos", "opsd") == []
    with pytest.raises(ValueError, match="must share their test rows, got 40 and 4 outcomes"):
        pairs([row("vigos", 0, 0, mine), row("opsd", 0, 0, "1111")], "vigos", "opsd")


def test_findings_are_signed_as_they_are_said() -> None:
    rows = []
    for b, extra in enumerate(("00", "10", "00")):
        rows += [
            row("opsd", b, 0, "11111100" + extra), row("vigos", b, 0, "11111000" + extra),
            row("clip_token", b, 0, "11110000" + extra), row("base", b, 0, "11000000" + extra),
            row("opsd", b, 0, "1000000000", label_bias=1.0), row("vigos", b, 0, "11111000" + extra, label_bias=1.0),
        ]  # fmt: skip
    h1, h2, h3 = (f.difference for f in findings(rows))
    assert h1 is not None
    assert h2 is not None
    assert h3 is not None
    assert h1.by_base == pytest.approx({0: 0.5, 1: 0.6, 2: 0.5})
    assert h1.interval is not None
    assert h1.interval[0] > 0
    assert (round(h2.mean, 6), round(h3.mean, 6)) == (0.1, 0.1)
    assert {r["arm"] for r in in_world(rows, World(label_bias=1.0))} == {"opsd", "vigos", "base"}
    assert [f.difference for f in findings(rows[:1])] == [None, None, None]


def test_tables_and_figures_come_from_the_files(tmp_path: Path) -> None:
    rows = [
        row(arm, b, s, "1" * (k + 2) + "0" * (6 - k), label_bias=bias, description=0.5)
        for k, arm in enumerate(("base", "opsd", "vigos"))
        for b in (0, 1)
        for s in (0, 1)
        for bias in (0.0, 1.0)
        if arm != "base" or (s, bias) == (0, 0.0)
    ]
    check = {"shortcut": 1.0, "noise": 0.05, "rate": 0.4, "low": 0.3, "high": 0.5, "n": 10}
    checks = [
        {"base": b, **check, "precondition": p, "measure": m, "met": p != "P2"}
        for b in (0, 1)
        for p, m in (("P1", "difference"), ("P2", "difference"), ("P3", "score"))
    ]
    write_csv(tmp_path / "results.csv", rows)
    write_csv(tmp_path / "preconditions.csv", checks)
    written = draw(tmp_path / "results.csv", tmp_path / "preconditions.csv", tmp_path / "figures")
    assert [p.name for p in written] == ["study-arms.svg", "study-axes.svg"]
    text = written[0].read_text()
    assert "2 base(s)" in text
    assert "P2 difference 40, 40 % (met by 0 of 2)" in text
    assert "Score over label bias" in written[1].read_text()
    again = draw(tmp_path / "results.csv", tmp_path / "preconditions.csv", tmp_path / "again")
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in written]
    console = Console(record=True, width=200)
    print_results(tmp_path / "results.csv", console)
    table = console.export_text()
    assert "-12.5 (-12.5 to -12.5, 2 bases)" in table
    assert "H1" in table
    with pytest.raises(SystemExit) as stop:
        main(["study", "--draw-only", "--output-dir", str(tmp_path)])
    assert stop.value.code in (0, None)
    with pytest.raises(SystemExit) as stop:
        main(["study", "--draw-only", "--output-dir", str(tmp_path / "none")])
    assert stop.value.code == 2


def test_committed_figures_come_from_committed_data(tmp_path: Path) -> None:
    """Every cell of the plan, each once."""
    data = ROOT / "bench" / "results" / "study"
    for path in draw(data / "results.csv", data / "preconditions.csv", tmp_path):
        assert path.read_bytes() == (ROOT / "docs" / "images" / path.name).read_bytes(), (
            f"{path.name}: run bench/plots.py"
        )
    keys = ("arm", "conflict", "label_bias", "noise", "shortcut", "base", "seed", "steps")
    found = [tuple(row[k] for k in keys) for row in read_csv(data / "results.csv")]

    wanted = [(c.arm, *dataclasses.astuple(c.world)[:4], c.base, c.seed, c.plan.steps) for c in FULL.cells()]
    assert sorted(found) == sorted(wanted)
    plans = {
        "controls": CONTROL,
        "methods": METHOD,
        "search": SEARCH,
        "frozen": FROZEN,
    }  # whose files hold a part of them
    for name in sorted({path.stem for path in data.glob("*.csv")} & {*plans}):
        rows = [tuple(r[k] for k in (*keys, "faint", "place")) for r in read_csv(data / f"{name}.csv")]
        cells = {(c.arm, *dataclasses.astuple(c.world)[:4], c.base, c.seed, c.plan.steps, c.world.faint, c.world.place)
                 for c in plans[name].cells()}  # fmt: skip
        assert len({*rows}) == len(rows) > 0, name
        assert {*rows} <= cells, name


# --- Running ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["sft", "opsd", "teacher_ema"])
def test_a_cell_is_measured_and_repeats(tmp_path: Path, arm: str) -> None:
    cell = Cell(arm, World(label_bias=1.0), 0, 0, TINY)
    torch.manual_seed(5)
    first, second = (measure(cell, None, tmp_path / name) for name in "ab")
    assert first == second
    assert len(first["score_items"]) == 4
    assert len(first["prior_items"]) == 2
    assert first["score"] == first["score_items"].count("1") / 4
    assert ("palr_all" in first) == (arm != "sft")


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    """Killed with SIGKILL once its first file is there: what was done stays, the rest is done, and nothing is left over
    afterwards."""
    script = (
        "from vigos.study.plan import Plan\nfrom vigos.study.run import run_study\n"
        "plan = Plan('tiny', arms=('base',), steps=2, examples_a_step=4, triplets=2,"
        " palr_examples=4, check_triplets=1)\n"
        f"if __name__ == '__main__': run_study(plan, {str(tmp_path / 'study')!r})\n"
    )
    file = tmp_path / "run.py"
    file.write_text(script)
    process = subprocess.Popen([sys.executable, str(file)], start_new_session=True)
    folder = tmp_path / "study"
    deadline = time.monotonic() + 120
    while not [*folder.glob("c*/*.json")] and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("c*/*.json")}
    assert before
    assert not (folder / "results.csv").exists()
    finished: list[str] = []
    plan = replace(TINY, arms=("base",))
    path = run_study(plan, folder, progress=lambda what, done, total: finished.append(what))
    assert len(finished) == 2 - len(before)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [r["arm"] for r in read_csv(path)] == ["base"]
    content = path.read_bytes()
    run_study(plan, folder, progress=lambda what, done, total: finished.append(what))
    assert len(finished) == 2 - len(before), "nothing is done twice"
    assert path.read_bytes() == content
    measures = {r["precondition"] for r in read_csv(folder / "preconditions.csv")}
    assert measures == {"P1", "P2", "P3", "P4", "P5"}
