"""Plan of `vigos study`, as data: which methods and parts of methods are compared on the built-in world.

A *cell* is one arm in one world from one base and one training seed, evaluated once, after a fixed number of steps. The
base is the unit of replication: its seed decides initial weights and warm-up, and everything that happens to one base
later is correlated. Each cell leaves one JSON file; `results.csv` is all of them, and tables and figures are drawn from
that file alone (`vigos.study.results`). The test rows are the same for every cell, and nothing is chosen by looking at
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vigos.train.config import ViGOSConfig
    from vigos.world.tasks import Asked

FORMAT = 1  # of a cell's file
MAX_TOKENS = 96  # of a completion; they take about 50
BEND_STEPS = 150  # of warm-up, after which another preference has settled
HARD_BASE = 100  # bases from this number on are bent from the shipped one: they read faint digits and named places
DONE = "done.json"  # in the folder of a finished base
TEST_SEED = 1_000  # of the held-out rows, one set for all cells


# Options of every training run on the world, where a tiny model needs others than the paper's. The learning rate is for
# a model three orders of magnitude smaller. The token clip is off: most of a description's divergence lies above
# 0.05 nats in this world, and clipping it costs Score.
OPTIONS: Mapping[str, Any] = {
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-4,
    "warmup_steps": 5,
    "max_grad_norm": 1.0,
    "clip_mode": "none",
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_completion_length": MAX_TOKENS,
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def world_config(output_dir: str | Path, *, seed: int, **changes: Any) -> ViGOSConfig:
    """Return the options of a training run on the world: `OPTIONS`, the world's prompts, and `changes`."""
    from vigos.train.config import ViGOSConfig
    from vigos.world.prompts import PROMPTS_FILE

    fixed = {"output_dir": str(output_dir), "prompts_file": str(PROMPTS_FILE), "seed": seed, "data_seed": seed}
    return ViGOSConfig(**{**OPTIONS, **fixed, **changes})


# --- What is compared -------------------------------------------------------------------------------------------------


Reference = Literal["own", "other", "wrong", "none"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        kind: "base": not trained, under the same prompt; "sft": cross-entropy on completions that state the reference;
            "trainer": `ViGOSTrainer` with `options`.
        reference: what the privileged teachers are told: the example's own answer, that of another example of the same
            kind, a wrong one of the same kind, or "?". Evaluation knows the true answers.
        boxes: its examples name the part of the image that their question asks about, as `box`.
        sharpened: its only teacher is the base under the student's prompt, at the temperature where its mean entropy on
            the base's rollouts is that of OPSD's teacher.
    """

    name: str
    what: str
    kind: Literal["base", "sft", "trainer"] = "trainer"
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: Reference = "own"
    boxes: bool = False
    sharpened: bool = False


def recipe(name: str) -> dict[str, Any]:
    """Return the options of a published method's configuration, `configs/recipes`."""
    import yaml

    import vigos.train

    folder = Path(vigos.train.__path__[0]) / "recipes"
    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))


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
_TOLD: Mapping[Reference, str] = {"other": "another example's answer", "wrong": "a wrong answer", "none": "nothing"}
CONTROLS: tuple[Arm, ...] = tuple(
    Arm(f"{method}_{reference}", f"{title}, told {what}", options=options, reference=reference)
    for method, title, options in (("opsd", "OPSD", {"method": "opsd"}), ("vigos", "ViGOS", {}))
    for reference, what in _TOLD.items()
)


def three_teachers(**changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return ViGOS's teachers as data, with further fields of those that are named."""
    found: dict[str, dict[str, Any]] = {
        "perception": {"reads": "perception", "spans": "description", "rollouts": "valid", "prefill": ""},
        "reasoning": {"reads": "reasoning", "spans": ["reasoning", "answer"], "rollouts": "valid"},
        "reference": {"reads": "reference", "rollouts": "invalid", "kind": "reverse", "weight": 2.0},
    }
    return [{"name": name, **fields, **changes.get(name, {})} for name, fields in found.items()]


UNLIKELY = {"weigh": {"unlikely": 0.5}}  # tokens that the student gave less than one half
SIGHT: tuple[Arm, ...] = tuple(
    Arm(f"vigos_{name}_image", f"ViGOS, {what} before the perception teacher", options={"teachers": teachers})
    for name, what in (("blank", "a grey image"), ("other", "another example's image"))
    for teachers in [three_teachers(perception={"view": name})]
)
DENSITY: tuple[Arm, ...] = (
    Arm("opsd_sharpened", "OPSD, as sure of itself by temperature, told nothing", sharpened=True),
    Arm(
        "opsd_unlikely", "OPSD on tokens below 0.5 of the student",
        options={"teachers": [{"name": "reference", "reads": "reference", **UNLIKELY}]},
    ),
    Arm(
        "vigos_unlikely", "ViGOS on tokens below 0.5 of the student",
        options={"teachers": three_teachers(**dict.fromkeys(("perception", "reasoning", "reference"), UNLIKELY))},
    ),
)  # fmt: skip
METHODS: tuple[Arm, ...] = (
    Arm("contrast_erased", "contrast with an erased image (2607.21556)", options=recipe("contrast-erased")),
    Arm("visual_advantage", "OPSD, tokens weighed by the image (2605.21924)", options=recipe("visual-advantage")),
    Arm("crop_teacher", "a teacher that sees a crop (2605.18740)", options=recipe("crop-teacher"), boxes=True),
    Arm("degraded_student", "a student of degraded images (2608.14144)", options=recipe("degraded-student")),
)
ARM = {arm.name: arm for arm in (*ARMS, *CONTROLS, *SIGHT, *DENSITY, *METHODS)}


@dataclass(frozen=True)
class World:
    """The data and the base that a cell starts from.

    Attributes:
        conflict: share of the training scenes' digits that contradict their usual ink.
        label_bias: share of the ink questions whose reference says the usual ink whatever the image shows.
        noise: of the pixels, in training and test images alike.
        shortcut: factor of how often the base prefers the usual ink; another value is another base.
        faint: how far the ink of the asked digit is washed out, in training and test images alike.
        place: share of ink questions that name the digit's place, and neither digit nor ink.
    """

    conflict: float = 0.5
    label_bias: float = 0.0
    noise: float = 0.05
    shortcut: float = 1.0
    faint: float = 0.0
    place: float = 0.0

    @property
    def asked(self) -> Asked:
        """Return how the asked digit is shown and named."""
        from vigos.world.tasks import Asked

        return Asked(self.faint, self.place)


HARD = World(faint=0.9, place=0.5)  # what the warm-up of bases from HARD_BASE on holds


@dataclass(frozen=True)
class Axis:
    """Worlds that differ in one knob, and the arms that are compared there."""

    knob: Literal["conflict", "label_bias", "noise", "shortcut"]
    levels: tuple[float, ...]
    arms: tuple[str, ...] = ("base", "opsd", "vigos")


@dataclass(frozen=True)
class Plan:
    """A study: arms, axes, bases, seeds and sizes; in `worlds` base, opsd and vigos are compared as well."""

    name: str
    arms: tuple[str, ...] = tuple(arm.name for arm in ARMS)
    axes: tuple[Axis, ...] = ()
    worlds: tuple[World, ...] = ()
    bases: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    steps: int = 100
    examples_a_step: int = 32
    learning_rate: float = 6e-4
    triplets: int = 200  # of the test rows: one image that agrees with the prior and two that do not
    palr_examples: int = 64
    check_triplets: int = 100

    def __post_init__(self) -> None:
        for name in (*self.arms, *(arm for axis in self.axes for arm in axis.arms)):
            if name not in ARM:
                raise ValueError(f"arms must be among {', '.join(ARM)}, got {name!r}")
        for name in ("steps", "examples_a_step", "triplets", "check_triplets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.bases or not self.seeds:
            raise ValueError("bases and seeds must each hold at least one number, got none")

    def cells(self) -> list[Cell]:
        """Return every cell once, those of the default world first; the untrained arm has no training seed."""
        wanted = [(World(), self.arms)]
        for axis in self.axes:
            wanted += [(replace(World(), **{axis.knob: level}), axis.arms) for level in axis.levels]
        wanted += [(world, Axis.arms) for world in self.worlds]
        found: dict[str, Cell] = {}
        for seed in self.seeds:  # outermost: a study that was stopped has a whole seed first
            for world, arms in wanted:
                for base in self.bases:
                    for arm in arms:
                        if arm != "base" or seed == self.seeds[0]:
                            cell = Cell(arm, _untrained(world) if arm == "base" else world, base, seed, self)
                            found.setdefault(cell.key, cell)
        return list(found.values())


_SIZES = ("steps", "examples_a_step", "learning_rate", "triplets", "palr_examples")


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
        arm = ARM[self.arm]
        how: dict[str, Any] = {"kind": arm.kind, "options": dict(arm.options)}
        if arm.reference != "own":
            how["reference"] = arm.reference
        if arm.sharpened:
            how["sharpened"] = True
        world = asdict(self.world)
        for later in ("faint", "place"):  # knobs that came after the first study: its cells keep their names
            if not world[later]:
                del world[later]
        where = {**world, "base": self.base, "seed": self.seed}
        return {"format": FORMAT, "arm": self.arm, **how, **where, **sizes}

    @property
    def key(self) -> str:
        """Names its file; another setting gives another name, so a changed plan repeats what it changes."""
        digest = hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=5).hexdigest()
        return f"{self.arm}-base{self.base}-seed{self.seed}-{digest}"


def _untrained(world: World) -> World:
    """Return the world of the untrained arm: knobs of the training set alone are at their defaults."""
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
# What is left of either method where its privilege is worth nothing.
_CONTROLS = (arm.name for arm in (*CONTROLS, *SIGHT, *DENSITY))
CONTROL = replace(FULL, name="controls", arms=("base", "opsd", "vigos", *_CONTROLS), axes=())
# Recipes of others on the same worlds: with true references, and with such as always state the habit.
_COMPARED = ("base", "opsd", "vigos", *(arm.name for arm in METHODS))
METHOD = replace(FULL, name="methods", arms=_COMPARED, axes=(Axis("label_bias", (1.0,), _COMPARED),))
# Training scenes almost all in line with the habit, and descriptions that depend more on what the teacher was told: a
# search, in small, on a base that no other plan uses.
SEARCH = Plan(
    "search",
    arms=(),
    worlds=tuple(
        World(conflict=conflict, faint=faint, place=place)
        for conflict in (0.0, 0.05, 0.02)
        for faint in (0.0, 0.9)
        for place in (0.0, 1.0)
    ),
    bases=(HARD_BASE,),
    steps=60,
    examples_a_step=16,
    triplets=100,
    palr_examples=8,
    check_triplets=50,
)

# What the search chose, at the study's size: plain digits that the question names, training scenes that agree with the
# habit always, or in 95 of 100. Its bases are bent as the search's was, from other seeds: none of them was searched on.
FROZEN = replace(
    FULL, name="frozen", arms=("base",), axes=(Axis("conflict", (0.0, 0.05), ("opsd", "vigos")),),
    bases=tuple(range(HARD_BASE + 1, HARD_BASE + 6)),
)  # fmt: skip


def reduced(
    plan: Plan, *, bases: int | None = None, seeds: int | None = None, steps: int | None = None,
    axes: Sequence[str] | None = None,
) -> Plan:  # fmt: skip
    """Return a plan with the first `bases` bases and `seeds` seeds, other steps, the named axes alone (None: as it is).

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
        bases=plan.bases if bases is None else tuple(range(plan.bases[0], plan.bases[0] + bases)),
        seeds=plan.seeds if seeds is None else tuple(range(seeds)),
        steps=plan.steps if steps is None else steps,
        axes=plan.axes if axes is None else tuple(axis for axis in plan.axes if axis.knob in axes),
    )
