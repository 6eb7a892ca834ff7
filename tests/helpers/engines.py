"""The engines as the conformance suite runs them here: on which device, at which sizes, with which configuration."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vigos.divergence.engines import chunked, cpu, cuda, engine, triton

from .cuda_emulation import build, wide_mm

GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Profile:
    """Size an ordinary case for an engine.

    Attributes:
        n, d, v: rows, width and vocabulary: small where Triton's interpreter or the emulation of CUDA runs the kernels.
        near: distances of the teacher that the promise on precision is checked at.
        textbook: the engine sums the terms of the definition, see `assert_close`.
        difference: with one head in float32 it multiplies student - teacher, which keeps the digits of the difference.
        device: where its tensors lie.
    """

    n: int = 24
    d: int = 32
    v: int = 501
    near: tuple[float, ...] = (0.004, 0.02, 0.1, 0.5)
    textbook: bool = False
    difference: bool = True
    device: str = "cpu"


SMALL: dict[str, Any] = {"textbook": True, "n": 18, "d": 16, "v": 289, "near": (0.004, 0.1)}
REAL: dict[str, Any] = {"textbook": True, "n": 300, "d": 128, "v": 5003, "device": "cuda"}
PROFILES = {
    "reference": Profile(),
    "cpu": Profile(),
    "triton": Profile(**(REAL if GPU else SMALL)),
    "cuda": Profile(**(REAL if GPU else SMALL), difference=False),
}


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

    return triton.Config(1, 4096, Launch(stats_block=(128, 128), second_block=128, grad_block=128, span=256))


def emulate(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Put the emulation of the CUDA kernels under impl="cuda"; return its module."""
    emulator = build(request.config.cache.mkdir("cuda-emulator"))
    monkeypatch.setattr(cuda, "_module", lambda: emulator.cuda)
    monkeypatch.setattr(cuda, "_unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "_mm", wide_mm)
    emulator.set_device(90, 232448)
    return emulator


def set_up(name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make an engine run here with several chunks also at the sizes of a test, or skip."""
    if name == "triton":
        pytest.importorskip("triton")
        configure(monkeypatch, name, small_triton())
    elif name == "cuda":
        if not GPU:
            emulate(monkeypatch, request)
        elif cuda._module() is None:
            pytest.skip("vigos._C was built without CUDA")
        configure(monkeypatch, name, cuda.Config(chunk_bytes=1))
    elif name == "cpu":
        pytest.importorskip("vigos._C")
        configure(monkeypatch, name, cpu.Config(most_columns=16))
    else:
        configure(monkeypatch, name, chunked.Config(cpu_elements=16 * 501))
