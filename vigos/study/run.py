"""Run a study: make the bases, check them, train and evaluate every cell, each in a separate process.

    run_study(QUICK, "runs/study")        # one seed of every arm

A task leaves one file and is left out where that file exists, so a killed study goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from vigos.study.plan import BEND_STEPS, DONE, HARD, HARD_BASE, TEST_SEED, Cell, Plan, World
from vigos.system.files import replace_file

Progress = Callable[[str, int, int], None]  # (what was finished, done, in all)


@dataclass(frozen=True)
class _Task:
    """A function that leaves a file."""

    what: str
    leaves: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def run_study(plan: Plan, folder: str | Path, *, jobs: int = 1, progress: Progress | None = None) -> Path:
    """Make the bases, check them, run every cell that is not done yet; return the path of `results.csv`.

    Args:
        folder: gets bases/, checks/, cells/, results.csv and preconditions.csv.
        jobs: processes side by side, each on one thread.
    """
    from vigos.study.results import write_csv

    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cells, n = plan.cells(), plan.check_triplets
    bases = sorted({(cell.base, cell.world.shortcut) for cell in cells})
    seen = {(cell.base, replace(cell.world, conflict=0.5, label_bias=0.0)) for cell in cells}  # what a base can tell
    worlds = sorted(seen, key=lambda w: (w[0], astuple(w[1])))
    stages = [
        [
            _Task(f"base {b}", path / DONE, make_base, (path, b))
            for b in plan.bases
            if b < HARD_BASE and (path := base_folder(folder, b, World.shortcut)) is not None
        ],
        [
            _Task(f"base {b}, shortcut {s:g}", path / DONE, bend_base, (path, straight, b, s))
            for b, s in bases
            for path, straight in [(base_folder(folder, b, s), base_folder(folder, b, World.shortcut))]
            if path is not None and (s != World.shortcut or b >= HARD_BASE)
        ],
        [
            *(
                _Task(f"P1-P5 of base {b}, {_named(w)}", check_file(folder, b, w, n), check_base, (folder, b, w, n))
                for b, w in worlds
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
    rows = [row for b, w in worlds for row in _read(check_file(folder, b, w, n))]
    write_csv(folder / "preconditions.csv", rows)
    return write_csv(folder / "results.csv", [_read(cell_file(folder, cell)) for cell in cells])


def _in_processes(tasks: list[_Task], jobs: int) -> Iterator[str]:
    """Run tasks, each in a process that is used once, and yield the name of each as it ends."""
    if not tasks:
        return
    if sys.platform == "linux":  # a process of its own for each task, without importing everything again
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vigos.train.trainer", "vigos.eval.evaluate", "vigos.world.warmup"])
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
    """Write JSON by rename: a file that exists is complete."""
    replace_file(path, json.dumps(value))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def base_folder(folder: Path, seed: int, shortcut: float) -> Path | None:
    """Return the folder of a base; None for the one that ships."""
    return None if (seed, shortcut) == (0, 1.0) else folder / "bases" / f"seed{seed}-shortcut{shortcut:g}"


def make_base(path: Path, seed: int) -> None:
    """Warm a base model up from nothing: about 25 minutes on two cores."""
    from vigos.world.warmup import pretrain

    _write(path / DONE, pretrain(path, seed=seed))


def bend_base(path: Path, start: Path | None, seed: int, shortcut: float) -> None:
    """Warm a base up a little further, in a world where the usual ink is believed `shortcut` times as often.

    A base from `HARD_BASE` on starts from the one that ships, and sees faint digits and questions that name a place.
    """
    from vigos.world import load_base
    from vigos.world.warmup import Recipe, pretrain

    strength = tuple(min(0.97, shortcut * p) for p in Recipe().prior_strength)
    hard = seed >= HARD_BASE
    recipe = Recipe(
        seed=seed, see_steps=0, read_steps=0, mixture_steps=100 if hard else BEND_STEPS, scenes=16 if hard else 48,
        learning_rate=1e-3,
        prior_strength=strength, faint=HARD.faint if hard else 0.0, place=HARD.place if hard else 0.0,
    )  # fmt: skip
    _write(path / DONE, pretrain(path, recipe=recipe, start=load_base(None if hard else start)))


def check_file(folder: Path, seed: int, world: World, triplets: int) -> Path:
    """Return the file that holds the preconditions of a base in a world."""
    hard = "".join(f"-{name}{value:g}" for name, value in _hardness(world).items())
    name = f"seed{seed}-shortcut{world.shortcut:g}-noise{world.noise:g}{hard}-n{triplets}.json"
    return folder / "checks" / name


def _named(world: World) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in ({"noise": world.noise} | _hardness(world)).items())


def _hardness(world: World) -> dict[str, float]:
    """Return what makes the asked digit hard to see or to name, where anything does."""
    return {name: value for name in ("faint", "place") if (value := getattr(world, name))}


def check_base(folder: Path, seed: int, world: World, triplets: int) -> None:
    """Measure P1 to P5 of a base in a world, and write them as rows of preconditions.csv."""
    from vigos.study.preconditions import check

    found = check(
        base_folder(folder, seed, world.shortcut), n=triplets, seed=TEST_SEED, noise=world.noise, asked=world.asked,
        show=False,
    )  # fmt: skip
    where = {"base": seed, "shortcut": world.shortcut, "noise": world.noise, **_hardness(world)}
    rows = [
        {**where, "precondition": key, "measure": name, **value, "met": values.get("met", "")}
        for key, values in found.items()
        for name, value in values.items()
        if name != "met"
    ]
    _write(check_file(folder, seed, world, triplets), rows)


def cell_file(folder: Path, cell: Cell) -> Path:
    """Return the file that holds a cell's row of results.csv."""
    return folder / "cells" / f"{cell.key}.json"


def run_cell(folder: Path, cell: Cell) -> None:
    """Train and evaluate one cell, and write its row."""
    from vigos.study.cell import measure

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(cell, base_folder(folder, cell.base, cell.world.shortcut), Path(scratch))
    which = {"arm": cell.arm, **asdict(cell.world), "base": cell.base, "seed": cell.seed, "steps": cell.plan.steps}
    _write(cell_file(folder, cell), which | found | {"seconds": round(time.perf_counter() - started, 1)})
