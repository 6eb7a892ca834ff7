"""`vigos doctor`: what this machine can run, each engine checked against the oracle, and how to get the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch

ENGINES = ("reference", "cpu", "triton", "triton_streaming", "cuda")
PACKAGES = {  # distribution -> what it is for and how to get it
    "triton": "Triton engines; comes with torch's CUDA builds, else pip install triton",
    "transformers": "training and scoring: pip install 'vigos[train]'",
    "peft": "LoRA: pip install 'vigos[train]'",
    "accelerate": "training: pip install 'vigos[train]'",
    "datasets": "reading data: pip install 'vigos[train]'",
    "scikit-learn": "the built-in world's handwriting: pip install 'vigos[demo]'",
    "trl": "drop-in and comparison: pip install 'vigos[trl]'",
    "liger-kernel": "comparison: pip install liger-kernel",
    "flash-attn": "one more attention backend of the prefix tree",
    "vllm": "rollout server: pip install 'vigos[vllm]'",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` None: not here, and nothing is wrong with that."""

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
    """Python, torch, GPU and the compiled extension."""
    findings = [
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
    built = importlib.util.find_spec("vigos._C") is not None
    how = "install a C++ compiler, then VIGOS_BUILD=require pip install -e . shows why it was not built"
    findings.append(Finding("machine", "vigos._C", built, "built" if built else how))
    return findings


def packages() -> list[Finding]:
    """Optional packages: found versions, or what each would bring."""
    found = {name: _version(name) for name in PACKAGES}
    return [
        Finding("packages", name, version is not None or None, version or PACKAGES[name])
        for name, version in found.items()
    ]


def self_check(impl: str) -> Finding:
    """Runs one engine on a small near-teacher case and compares loss and gradient with the oracle in float64."""
    import vigos

    device = "cuda" if torch.cuda.is_available() and impl != "cpu" else "cpu"
    generator = torch.Generator().manual_seed(0)
    n, d, v = 24, 64, 1000
    weight = torch.randn(v, d, generator=generator) * 0.5
    student = torch.randn(n, d, generator=generator)
    teacher = student + 0.02 * torch.randn(n, d, generator=generator)
    kinds = torch.tensor([vigos.FORWARD_KL, vigos.REVERSE_KL, vigos.JSD]).repeat(n // 3)
    rows = torch.arange(n)

    def run(engine: str, dtype: torch.dtype, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = student.to(where, dtype, copy=True).requires_grad_()
        supervision = vigos.Supervision(rows.to(where), rows.to(where), kinds.to(where, torch.int8))
        out = vigos.linear_divergence(
            hidden, weight.to(where, dtype), teacher.to(where, dtype), supervision=supervision, impl=engine
        )
        out.loss.backward()
        assert hidden.grad is not None
        return out.divergence.detach().double().cpu(), hidden.grad.double().cpu()

    try:
        divergence, gradient = run(impl, torch.float32, device)
    except (ValueError, ImportError) as error:  # an engine that cannot run here says why
        return Finding("engines", impl, None, str(error).splitlines()[0])
    except RuntimeError as error:
        return Finding("engines", impl, False, str(error).splitlines()[0])
    exact_divergence, exact_gradient = run("reference", torch.float64, "cpu")
    error_loss = ((divergence - exact_divergence).abs().max() / exact_divergence.abs().max()).item()
    error_gradient = ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()
    ok = error_loss < 1e-4 and error_gradient < 1e-4
    return Finding("engines", impl, ok, f"against float64: divergence {error_loss:.1e}, gradient {error_gradient:.1e}")


def drop_ins() -> list[Finding]:
    """Whether each drop-in fits the peer that is installed."""
    from vigos import integrations

    return [Finding("drop-ins", name, ok, detail) for name, ok, detail in integrations.fit()]


def examine() -> list[Finding]:
    """The whole report, in order."""
    return [*machine(), *(self_check(impl) for impl in ENGINES), *packages(), *drop_ins()]
