"""Training metrics as ratios of sums, so that micro-batches, ranks and steps between two logs add up exactly."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vigos.divergence.api import DivergenceOutput
from vigos.method.spans import REASONS
from vigos.method.supervise import SEGMENTS, TERMS, Rollout, SupervisedBatch

PER_TERM = (
    "loss",  # clipped divergence as normalised in the loss, before it is multiplied by lambda
    "kl",  # mean divergence of its tokens before the clip
    "token_share",  # its tokens among all completion tokens
    "clipped_tokens",  # share of its tokens that were clipped
    "clipped_kl",  # share of its divergence that the clip took away
    "student_entropy",
    "teacher_entropy",
)
# Of a step's time. Tokens: of completions; read by teachers; read by the student (forward, backward); pairs.
PARTS = ("rollout", "teacher", "student", "divergence", "backward")
PER_ROLLOUT = (
    "rollout/valid", "teacher/knows", "rollout/finished", "rollout/tagless", "rollout/accuracy",
    *(f"rollout/invalid/{reason}" for reason in REASONS),
    "length/completion", "length/description", "length/reasoning", "length/answer",
    "loss/router",  # load balancing of a mixture's experts, before it is multiplied by router_aux_loss_coef
    "examples/skipped", "steps/dropped",
    "rollout/age",  # with async_rollout: optimizer steps between the weights that sampled and those that train
    "mismatch/mean",  # nats between the engine's and the trainer's log-probability of a supervised token
    *(f"perf/{part}_s" for part in PARTS), "perf/sync_s", "perf/step_s",
    *(f"perf/{part}_tokens_per_s" for part in PARTS), "perf/tokens_per_s",
    "perf/tflops", "perf/mfu",
    "perf/rollout_wait_s",  # with async_rollout: the part of perf/rollout_s for which the step was blocked
)  # fmt: skip
# Added up over ranks, averaged over optimizer steps.
PER_STEP = (
    "examples/skipped", "steps/dropped", "perf/step_s", *(f"perf/{part}_s" for part in PARTS),
)  # fmt: skip


def names_of(terms: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all metrics of a run with these teachers; PALR in the steps in which it is measured."""
    palr = ("palr/all", *(f"palr/{name}" for name in SEGMENTS), *(f"palr/teacher/{term}" for term in terms))
    return (*(f"{name}/{term}" for term in terms for name in PER_TERM), *PER_ROLLOUT, *palr)


class Metrics:
    """Hold numerators and denominators by name. Names are fixed, so that sums over ranks line up."""

    def __init__(self, terms: Sequence[str] = TERMS) -> None:
        names = names_of(terms)
        self.terms = tuple(terms)
        self._index = {name: i for i, name in enumerate(names)}
        self._sums = torch.zeros(2, len(names), dtype=torch.float64)
        self._largest = -1.0  # below 0: nothing was measured

    def add(self, name: str, numerator: float | Tensor, denominator: float | Tensor = 1.0) -> None:
        """Add to the ratio `name`."""
        i = self._index[name]
        self._sums[0, i] += float(numerator)
        self._sums[1, i] += float(denominator)

    def add_step(self, share: float) -> None:
        """Count one optimizer step in the averages over steps; `share` of it, one over the number of ranks."""
        for name in (*(f"loss/{term}" for term in self.terms), *PER_STEP):
            self.add(name, 0.0, share)

    def add_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Add validity, reasons, lengths and, where they were graded, accuracy of rollouts."""
        for rollout in rollouts:
            spans = rollout.spans
            self.add("rollout/valid", spans.valid)
            self.add("rollout/finished", spans.finished)
            self.add("rollout/tagless", spans.reason == "tagless")
            for reason in REASONS:
                self.add(f"rollout/invalid/{reason}", spans.reason == reason)
            if rollout.correct is not None:
                self.add("rollout/accuracy", rollout.correct)
            self.add("length/completion", spans.length)
            for part in ("description", "reasoning", "answer"):
                start, end = getattr(spans, part)
                if end > start:
                    self.add(f"length/{part}", end - start)

    def add_terms(
        self, batch: SupervisedBatch, out: DivergenceOutput, lambdas: Sequence[float], scale: float,
        losses: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add losses, divergences, entropies and clipping by term; `scale` is the one that `supervise` was given.

        Args:
            losses: (R,), each pair's part of the loss where it is composed outside the divergence.
        """
        term = batch.term.long()
        divergence = out.divergence.detach().double().cpu()
        added = torch.minimum(divergence, batch.supervision.clip.double())  # type: ignore[union-attr]
        columns = torch.stack(
            [
                (added * batch.supervision.weight.double() if losses is None else losses.detach().double().cpu())  # type: ignore[union-attr]
                / scale,
                divergence,
                torch.ones_like(divergence),
                out.clipped.double().cpu(),
                divergence - added,
                out.student_entropy.double().cpu(),
                out.teacher_entropy.double().cpu(),
            ]
        )
        sums = torch.zeros(len(columns), len(self.terms), dtype=torch.float64).index_add_(1, term, columns)
        completion_tokens = sum(rollout.spans.length for rollout in batch.rollouts)
        for t, name in enumerate(self.terms):
            loss, kl, tokens, clipped, cut, student_entropy, teacher_entropy = sums[:, t].tolist()
            self.add(f"loss/{name}", loss / lambdas[t] if lambdas[t] else 0.0, 0.0)
            self.add(f"kl/{name}", kl, tokens)
            self.add(f"token_share/{name}", tokens, completion_tokens)
            self.add(f"clipped_tokens/{name}", clipped, tokens)
            self.add(f"clipped_kl/{name}", cut, kl)
            self.add(f"student_entropy/{name}", student_entropy, tokens)
            self.add(f"teacher_entropy/{name}", teacher_entropy, tokens)

    def add_mismatch(self, sampled: Tensor, trained: Tensor) -> None:
        """Add the differences of log-probabilities (R,), where the engine that sampled gave one (not NaN)."""
        difference = (sampled - trained.float().cpu())[~sampled.isnan()].abs()
        if len(difference):
            self.add("mismatch/mean", difference.sum(), len(difference))
            self._largest = max(self._largest, difference.max().item())

    def state(self) -> list[list[float]]:
        """Return the sums since the last `collect`, and the largest mismatch."""
        return [*self._sums.tolist(), [self._largest]]

    def restore(self, state: list[list[float]]) -> None:
        """Go on from a `state`."""
        *sums, (self._largest,) = state
        self._sums = torch.tensor(sums, dtype=torch.float64)

    def collect(
        self, reduce: Callable[[Tensor], Tensor], largest: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, float]:
        """Return the ratios since the last call over all ranks, and the largest mismatch.

        Args:
            reduce: sums a tensor over ranks.
            largest: takes a tensor's maximum over them; None: there is one.

        Ratios without a denominator are left out, and so are the reasons for which no rollout was invalid.
        """
        numerator, denominator = reduce(self._sums).double().cpu()
        self._sums = torch.zeros_like(self._sums)
        values = (numerator / denominator).tolist()
        silent = {i for name, i in self._index.items() if name.startswith("rollout/invalid/") and not numerator[i]}
        found = {name: values[i] for name, i in self._index.items() if denominator[i] > 0 and i not in silent}
        top = torch.tensor(self._largest, dtype=torch.float64)
        top, self._largest = (top if largest is None else largest(top)), -1.0
        return found | ({"mismatch/largest": top.item()} if top >= 0 else {})


# Dense bfloat16 TFLOP/s from the data sheets, by what a device's name holds; the first that fits.
_PEAK_TFLOPS = (
    ("B200", 2250.0), ("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("A100", 312.0), ("L40S", 362.0),
    ("4090", 165.0), ("A10G", 70.0), ("L4", 121.0),
)  # fmt: skip


def peak_tflops(device: torch.device) -> float | None:
    """Return the dense bfloat16 peak of a GPU, TFLOP/s; None for CPUs and for GPUs without a known data sheet."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS if part in name), None)


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of this process, GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
