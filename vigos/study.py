"""`vigos study`: how the methods and their parts compare on the built-in world, as data.

    run_study(QUICK, "runs/study")        # one seed of every arm; skips what is done, so a killed study goes on

A *cell* is one arm in one world from one base and one training seed, evaluated once, after a fixed number of steps. The
base is the unit of replication: its seed decides initial weights and warm-up, and everything that happens to one base
later is correlated. Each cell leaves one JSON file; `results.csv` is all of them, and tables and figures are drawn from
that file alone (`vigos.study_results`). The test rows are the same for every cell, and nothing is chosen by looking at
them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

FORMAT = 1  # of a cell's file
MAX_TOKENS = 96  # of a completion; they take about 50
BEND_STEPS = 150  # of warm-up, after which another preference has settled
DONE = "done.json"  # in the folder of a base that is whole
TEST_SEED = 1_000  # of the held-out rows, one set for all cells


# --- What is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        kind: "base": not trained, under the same prompt; "sft": cross-entropy on completions that state the reference;
            "trainer": `ViGOSTrainer` with `options`.
    """

    name: str
    what: str
    kind: Literal["base", "sft", "trainer"] = "trainer"
    options: Mapping[str, Any] = field(default_factory=dict)


ARMS: tuple[Arm, ...] = (
    Arm("base", "untrained, under the same prompt", "base"),
    Arm("sft", "cross-entropy on completions in the format that state the reference", "sft"),
    Arm("opsd", "plain on-policy self-distillation: one privileged teacher", options={"method": "opsd"}),
    Arm("vigos", "ViGOS, the paper's prefix, no clip"),
    Arm("vigos_think", "ViGOS, the released prefix", options={"reasoning_prefix": "think"}),
    Arm("no_perception", "ViGOS without the perception teacher", options={"lambda_perception": 0.0}),
    Arm("no_reasoning", "ViGOS without the reasoning teacher", options={"lambda_reasoning": 0.0}),
    Arm("no_reference", "ViGOS without the reference teacher", options={"lambda_reference": 0.0}),
    Arm("forward_reference", "ViGOS, forward KL to the reference teacher", options={"reference_kl": "forward"}),
    Arm("clip_token", "ViGOS, tokens clipped at 0.05", options={"clip_mode": "token", "token_clip": 0.05}),
    Arm("clip_entry", "ViGOS, vocabulary entries clipped at 0.05", options={"clip_mode": "entry", "entry_clip": 0.05}),
    Arm("teacher_ema", "ViGOS, moving-average teacher", options={"teacher": "ema", "ema_decay": 0.99}),
)
ARM = {arm.name: arm for arm in ARMS}


@dataclass(frozen=True)
class World:
    """What the data and the base are like.

    Attributes:
        conflict: share of the training scenes' digits that contradict their usual ink.
        label_bias: share of the ink questions whose reference says the usual ink whatever the image shows.
        noise: of the pixels, in training and test images alike.
        shortcut: factor of how often the base prefers the usual ink; another value is another base.
    """

    conflict: float = 0.5
    label_bias: float = 0.0
    noise: float = 0.05
    shortcut: float = 1.0


@dataclass(frozen=True)
class Axis:
    """Worlds that differ in one knob, and the arms that are compared there."""

    knob: Literal["conflict", "label_bias", "noise", "shortcut"]
    levels: tuple[float, ...]
    arms: tuple[str, ...] = ("base", "opsd", "vigos")


@dataclass(frozen=True)
class Plan:
    """A whole study."""

    name: str
    arms: tuple[str, ...] = tuple(ARM)
    axes: tuple[Axis, ...] = ()
    bases: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    steps: int = 100
    rows_a_step: int = 32
    learning_rate: float = 6e-4
    triplets: int = 200  # of the test rows: one image that agrees with the prior and two that do not
    palr_rows: int = 64
    check_triplets: int = 100

    def __post_init__(self) -> None:
        for name in (*self.arms, *(arm for axis in self.axes for arm in axis.arms)):
            if name not in ARM:
                raise ValueError(f"arms must be among {', '.join(ARM)}, got {name!r}")
        for name in ("steps", "rows_a_step", "triplets", "check_triplets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.bases or not self.seeds:
            raise ValueError("bases and seeds must each hold at least one number, got none")

    def cells(self) -> list[Cell]:
        """Every cell once, those of the default world first; the untrained arm has no training seed."""
        wanted = [(World(), self.arms)]
        for axis in self.axes:
            wanted += [(replace(World(), **{axis.knob: level}), axis.arms) for level in axis.levels]
        found: dict[str, Cell] = {}
        for seed in self.seeds:  # outermost: a study that was stopped has a whole seed first
            for world, arms in wanted:
                for base in self.bases:
                    for arm in arms:
                        if arm != "base" or seed == self.seeds[0]:
                            cell = Cell(arm, _untrained(world) if arm == "base" else world, base, seed, self)
                            found.setdefault(cell.key, cell)
        return list(found.values())


_SIZES = ("steps", "rows_a_step", "learning_rate", "triplets", "palr_rows")


@dataclass(frozen=True)
class Cell:
    """One arm in one world from one base and seed."""

    arm: str
    world: World
    base: int
    seed: int
    plan: Plan

    @property
    def settings(self) -> dict[str, Any]:
        """Everything its result depends on."""
        sizes = {name: getattr(self.plan, name) for name in _SIZES}
        how = {"kind": ARM[self.arm].kind, "options": dict(ARM[self.arm].options)}
        where = {**asdict(self.world), "base": self.base, "seed": self.seed}
        return {"format": FORMAT, "arm": self.arm, **how, **where, **sizes}

    @property
    def key(self) -> str:
        """Names its file; another setting gives another name, so a changed plan repeats what it changes."""
        digest = hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=5).hexdigest()
        return f"{self.arm}-base{self.base}-seed{self.seed}-{digest}"


def _untrained(world: World) -> World:
    """The world of the untrained arm: what only the training set knows is left at its default."""
    return replace(world, conflict=World.conflict, label_bias=World.label_bias)


FULL = Plan(
    "full",
    axes=(
        Axis("label_bias", (0.25, 0.5, 0.75, 1.0)),
        Axis("conflict", (0.1,)),
        Axis("noise", (0.2,)),
        Axis("shortcut", (0.7,)),
    ),
    bases=(0, 1, 2, 3, 4),
    seeds=(0, 1),
)
# One seed of every arm on the base that ships, and what H1 is about.
QUICK = replace(FULL, name="quick", axes=(Axis("label_bias", (1.0,)),), bases=(0,), seeds=(0,))


def reduced(
    plan: Plan, *, bases: int | None = None, seeds: int | None = None, steps: int | None = None,
    axes: Sequence[str] | None = None,
) -> Plan:  # fmt: skip
    """A plan with the first `bases` bases and `seeds` seeds, other steps, and the named axes alone (None: as it is).

    Cells of a smaller plan with as many steps are cells of the larger one: a study can grow.
    """
    for name, value in (("bases", bases), ("seeds", seeds)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    knobs = [axis.knob for axis in plan.axes]
    for knob in axes or ():
        if knob not in knobs:
            raise ValueError(f"axes must be among {', '.join(knobs)}, got {knob!r}")
    return replace(
        plan,
        bases=plan.bases if bases is None else tuple(range(bases)),
        seeds=plan.seeds if seeds is None else tuple(range(seeds)),
        steps=plan.steps if steps is None else steps,
        axes=plan.axes if axes is None else tuple(axis for axis in plan.axes if axis.knob in axes),
    )


# --- Running ----------------------------------------------------------------------------------------------------------

Progress = Callable[[str, int, int], None]  # (what was finished, done, in all)


@dataclass(frozen=True)
class _Task:
    """A function that leaves a file."""

    what: str
    leaves: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def run_study(plan: Plan, folder: str | Path, *, jobs: int = 1, progress: Progress | None = None) -> Path:
    """Makes the bases, checks them, runs every cell that is not done yet; returns `results.csv`.

    Args:
        folder: gets bases/, checks/, cells/, results.csv and preconditions.csv.
        jobs: processes side by side, each on one thread.
    """
    from vigos.study_results import write_csv

    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cells, n = plan.cells(), plan.check_triplets
    bases = sorted({(cell.base, cell.world.shortcut) for cell in cells})
    worlds = sorted({(cell.base, cell.world.shortcut, cell.world.noise) for cell in cells})
    stages = [
        [
            _Task(f"base {b}", path / DONE, make_base, (path, b))
            for b in plan.bases
            if (path := base_folder(folder, b, World.shortcut)) is not None
        ],
        [
            _Task(f"base {b}, shortcut {s:g}", path / DONE, bend_base, (path, straight, b, s))
            for b, s in bases
            for path, straight in [(base_folder(folder, b, s), base_folder(folder, b, World.shortcut))]
            if s != World.shortcut and path is not None
        ],
        [
            *(
                _Task(f"P1-P5 of base {w[0]}, noise {w[2]:g}", check_file(folder, *w, n), check_base, (folder, *w, n))
                for w in worlds
            ),
            *(_Task(cell.key, cell_file(folder, cell), run_cell, (folder, cell)) for cell in cells),
        ],
    ]
    total = sum(map(len, stages))
    waiting = [[task for task in stage if not task.leaves.is_file()] for stage in stages]
    done = total - sum(map(len, waiting))
    for stage in waiting:
        for what in _in_processes(stage, jobs):
            done += 1
            if progress is not None:
                progress(what, done, total)
    rows = [row for w in worlds for row in _read(check_file(folder, *w, n))]
    write_csv(folder / "preconditions.csv", rows)
    return write_csv(folder / "results.csv", [_read(cell_file(folder, cell)) for cell in cells])


def _in_processes(tasks: list[_Task], jobs: int) -> Iterator[str]:
    """Runs tasks, each in a process that is used once: what one leaves in memory is nobody else's."""
    if not tasks:
        return
    if sys.platform == "linux":  # a process of its own for each task, without importing everything again
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vigos.trainer", "vigos.evaluation", "vigos.world.pretrain"])
    else:
        context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(task.function, *task.arguments): task.what for task in tasks}
        try:
            for future in as_completed(waiting):
                future.result()
                yield waiting[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _write(path: Path, value: Any) -> None:
    """All or nothing: a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def base_folder(folder: Path, seed: int, shortcut: float) -> Path | None:
    """Where a base lies; None: it is the one that ships."""
    return None if (seed, shortcut) == (0, 1.0) else folder / "bases" / f"seed{seed}-shortcut{shortcut:g}"


def make_base(path: Path, seed: int) -> None:
    """Warms a base model up from nothing: about 25 minutes on two cores."""
    from vigos.world.pretrain import pretrain

    _write(path / DONE, pretrain(path, seed=seed))


def bend_base(path: Path, start: Path | None, seed: int, shortcut: float) -> None:
    """Warms a base up a little further, in a world where the usual ink is believed `shortcut` times as often."""
    from vigos.world import load_base
    from vigos.world.pretrain import Recipe, pretrain

    strength = tuple(min(0.97, shortcut * p) for p in Recipe().prior_strength)
    recipe = Recipe(
        seed=seed, see_steps=0, read_steps=0, mixture_steps=BEND_STEPS, learning_rate=1e-3, prior_strength=strength
    )
    _write(path / DONE, pretrain(path, recipe=recipe, start=load_base(start)))


def check_file(folder: Path, seed: int, shortcut: float, noise: float, triplets: int) -> Path:
    """The preconditions of a base at a noise."""
    return folder / "checks" / f"seed{seed}-shortcut{shortcut:g}-noise{noise:g}-n{triplets}.json"


def check_base(folder: Path, seed: int, shortcut: float, noise: float, triplets: int) -> None:
    """P1 to P5 of a base at a noise, as rows of preconditions.csv."""
    from vigos.world import check

    found = check(base_folder(folder, seed, shortcut), n=triplets, seed=TEST_SEED, noise=noise, show=False)
    of = {"base": seed, "shortcut": shortcut, "noise": noise}
    rows = [
        {**of, "precondition": key, "measure": name, **value, "met": values.get("met", "")}
        for key, values in found.items()
        for name, value in values.items()
        if name != "met"
    ]
    _write(check_file(folder, seed, shortcut, noise, triplets), rows)


def cell_file(folder: Path, cell: Cell) -> Path:
    """The row of results.csv that a cell leaves."""
    return folder / "cells" / f"{cell.key}.json"


def run_cell(folder: Path, cell: Cell) -> None:
    """Trains and evaluates one cell."""
    from vigos.study_cell import measure

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(cell, base_folder(folder, cell.base, cell.world.shortcut), Path(scratch))
    which = {"arm": cell.arm, **asdict(cell.world), "base": cell.base, "seed": cell.seed, "steps": cell.plan.steps}
    _write(cell_file(folder, cell), which | found | {"seconds": round(time.perf_counter() - started, 1)})
