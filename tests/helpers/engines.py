"""The engines as the conformance suite runs them here: on which device, at which sizes, with which configuration."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vigos.divergence.engines import chunked, cpu, cuda, engine, triton
from vigos.divergence.engines.products import Chunks

from .cuda_emulation import build

GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Profile:
    """Size an ordinary case for an engine.

    Attributes:
        n, d, v: rows, width and vocabulary: small where Triton's interpreter or the emulation of CUDA runs the kernels.
        shapes: n, d, v and, where they differ, rows of the teacher.
        vocabularies, wide: of cases that start from logits.
        options, layouts: those that are tried; None: all.
        near: distances of the teacher that the promise on precision is checked at.
        textbook: the engine sums the terms of the definition, see `assert_close`.
        difference: with one head in float32 it multiplies student - teacher, which keeps the digits of the difference.
        device: where its tensors lie.
    """

    n: int = 24
    d: int = 32
    v: int = 501
    # One vocabulary entry; under, at and past a block of 64; past a slice of the C++ kernel; odd widths.
    shapes: tuple[tuple[int, ...], ...] = ((1, 7, 1), (3, 5, 63), (17, 33, 64), (40, 8, 1031), (5, 70, 4501))
    vocabularies: tuple[int, ...] = (1, 1100)
    wide: int = 4000
    options: tuple[str, ...] | None = None
    layouts: tuple[str, ...] | None = None
    near: tuple[float, ...] = (0.004, 0.02, 0.1, 0.5)
    textbook: bool = False
    difference: bool = True
    device: str = "cpu"


# Past a chunk of rows; V neither even nor a multiple of a block, or under one; D odd.
SMALL: dict[str, Any] = {
    "textbook": True, "n": 6, "d": 16, "v": 289, "near": (0.004, 0.1), "wide": 300,
    "shapes": ((1, 8, 7), (5, 24, 389, 4), (18, 17, 130)), "options": ("everything", "everything, entry clip"),
    "layouts": ("shifted", "unaligned columns", "every other column", "strided vocabulary"),
}  # fmt: skip
REAL: dict[str, Any] = {
    "textbook": True, "n": 300, "d": 128, "v": 5003, "device": "cuda", "shapes": ((131, 72, 1003), (128, 64, 128)),
    "wide": 32_000,
}  # fmt: skip
PROFILES = {
    "reference": Profile(),
    "cpu": Profile(),
    "triton": Profile(**(REAL if GPU else SMALL), vocabularies=(1, 127, 128, 401)),
    # A vector, a thread's share and a block's share, with and without a tail.
    "cuda": Profile(
        **(REAL if GPU else SMALL | {"wide": 4000}), difference=False, vocabularies=(1, 8, 13, 1000, 3072, 5003)
    ),
}

# A call takes Triton's interpreter a second or more: of its tests `make test-fast` has shapes, options and sizes.
EVERY = [pytest.param(e, marks=pytest.mark.slow if e == "triton" and not GPU else ()) for e in PROFILES]


def configure(monkeypatch: pytest.MonkeyPatch, name: str, config: Any) -> None:
    """Bind a configuration to an engine's functions."""
    module = engine(name)
    for function in ("forward", "logits_forward", "logits_backward"):
        original = getattr(module, function)
        if "config" in original.__annotations__:
            monkeypatch.setattr(module, function, functools.partial(original, config=config))


def small_triton() -> triton.Config:
    """Slices of 256 entries, blocks of 128, chunks of 16 rows, slabs of 192 entries."""
    from vigos.kernels.divergence import Launch

    return triton.Config(
        chunk_bytes=1, slab_elements=4096, launch=Launch(stats_block=128, second_block=128, grad_block=128, span=256)
    )


def emulate(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Put the emulation of the CUDA kernels under impl="cuda"; return its module."""
    emulator = build(request.config.cache.mkdir("cuda-emulator"))
    put_under(monkeypatch, emulator)
    return emulator


def put_under(monkeypatch: pytest.MonkeyPatch, emulator: Any) -> None:
    """Make an emulator what impl="cuda" runs on."""
    monkeypatch.setattr(cuda, "_module", lambda: emulator.cuda)
    monkeypatch.setattr(cuda, "_unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "_has_wgmma", lambda device: True)
    emulator.set_device(90, 232448)
    emulator.set_seed(0)


def available(name: str) -> None:
    """Skip the test where an engine for GPUs cannot run as it is."""
    if name == "triton":
        pytest.importorskip("triton")
    elif name == "cuda" and cuda._module() is None:
        pytest.skip("vigos._C was built without CUDA")


def set_up(name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make an engine run here with several chunks also at the sizes of a test, or skip."""
    if name == "triton":
        available(name)
        configure(monkeypatch, name, small_triton())
    elif name == "cuda":
        if GPU:
            available(name)
        else:
            emulate(monkeypatch, request)
        configure(monkeypatch, name, Chunks(chunk_bytes=1, waiting_chunks=1))
    elif name == "cpu":
        pytest.importorskip("vigos._C")
        configure(monkeypatch, name, cpu.Config(most_columns=16))
    else:
        configure(monkeypatch, name, chunked.Config(cpu_elements=16 * 501))


def engines_on_cpu(names: Any) -> Any:
    """Return a fixture: the name of each engine that takes tensors on the CPU here, with chunks at a test's sizes."""

    @pytest.fixture(params=[each for each in EVERY if each.values[0] in names])
    def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
        if PROFILES[request.param].device != "cpu":
            pytest.skip("its tensors lie on the CPU; the files for a GPU test it there")
        set_up(request.param, monkeypatch, request)
        return request.param

    return engine
