"""Find out what this machine can run: each engine checked against the oracle, and how to get the rest."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from vigos.divergence.engines import IMPLS, UNPROVEN, engine
from vigos.divergence.engines.extension import find_extension
from vigos.divergence.engines.self_check import check
from vigos.system.extras import install

PACKAGES = {  # distribution -> what it is for, and the extra that brings it
    "triton": ("Triton engines; comes with torch's CUDA builds, else pip install triton", ""),
    "transformers": ("training and scoring", "train"),
    "peft": ("LoRA", "train"),
    "accelerate": ("training", "train"),
    "datasets": ("reading data", "train"),
    "scikit-learn": ("the built-in world's handwriting", "demo"),
    "trl": ("drop-in and comparison", "trl"),
    "liger-kernel": ("comparison: pip install liger-kernel", ""),
    "flash-attn": ("one more attention backend of the prefix tree", ""),
    "vllm": ("rollout server", "vllm"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` None: not installed or not built, which is no error."""

    section: str
    name: str
    ok: bool | None
    detail: str


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> list[Finding]:
    """Describe Python, torch, GPU and the compiled extension."""
    findings = [
        Finding("machine", "vigos", True, _version("vigos") or "not installed"),
        Finding("machine", "python", True, f"{platform.python_version()} on {platform.machine()}"),
        Finding("machine", "torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        detail = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        findings.append(Finding("machine", "gpu", True, detail))
    else:
        findings.append(Finding("machine", "gpu", None, "none visible to torch; the reference and cpu engines run"))
    found = find_extension()
    built = not isinstance(found, str)
    detail = f"built; instruction set in use: {found.isa()}" if not isinstance(found, str) else found
    findings.append(Finding("machine", "vigos._C", built, detail))
    return findings


def packages() -> list[Finding]:
    """List optional packages: found versions, or what each would bring."""
    found = {name: _version(name) for name in PACKAGES}
    return [
        Finding("packages", name, version is not None or None, version or _brings(*PACKAGES[name]))
        for name, version in found.items()
    ]


def _brings(purpose: str, extra: str) -> str:
    return f"{purpose}: {install(extra)}" if extra else purpose


def self_check(impl: str) -> Finding:
    """Run one engine on a small near-teacher case and compare divergence and gradient with the oracle in float64."""
    device = "cuda" if torch.cuda.is_available() and impl != "cpu" else "cpu"
    try:
        found = check(engine(impl), device)
    except RuntimeError as error:
        return Finding("engines", impl, False, str(error).splitlines()[0])
    note = "; not yet proven on a GPU, so never behind impl='auto'" if impl in UNPROVEN else ""
    if isinstance(found, str):  # why it cannot run here
        return Finding("engines", impl, None, found + note)
    errors = f"against float64: divergence {found.divergence:.1e}, gradient {found.gradient:.1e}"
    return Finding("engines", impl, found.ok, f"{errors} ({str(found.dtype).removeprefix('torch.')}){note}")


def drop_ins() -> list[Finding]:
    """Report whether each drop-in fits the installed version of its library."""
    from vigos import integrations

    return [Finding("drop-ins", name, ok, detail) for name, ok, detail in integrations.fit()]


def examine() -> list[Finding]:
    """Return all findings, in order."""
    return [*machine(), *(self_check(impl) for impl in IMPLS), *packages(), *drop_ins()]


def examine_model(model: str) -> dict[str, str]:
    """Return what is known of a model's family: how it is scored, what LoRA adapts.

    Args:
        model: folder, hub name, or "builtin".
    """
    from vigos.models.families import describe
    from vigos.models.load import load_config
    from vigos.world import checkpoint_path

    return describe(load_config(str(checkpoint_path()) if model == "builtin" else model))
