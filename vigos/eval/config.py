"""Options of an evaluation, the same for `vigos.evaluate`, the probes and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vigos.method.spans import Validity

if TYPE_CHECKING:
    from vigos.rollout.engine import Sampling


@dataclass(frozen=True)
class EvalConfig:
    """Set how answers are sampled and counted.

        EvalConfig(k=5, temperature=1.0)

    Every sample has a random stream of its own that follows from `seed` and the example's id, so neither the batch
    size (up to rounding) nor the other examples change it, and two models are compared under the same random numbers.

    Raises:
        ValueError: k above n, several samples at temperature 0, or a batch without sequences.
    """

    k: int = field(default=1, metadata={"help": "k of pass@k."})
    n: int | None = field(
        default=None, metadata={"help": "Samples an example; default: k. More than one need a temperature."}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "In (0, 1]; 1: no limit."})
    top_k: int = field(default=0, metadata={"help": "0: no limit."})
    max_new_tokens: int = field(
        default=1024, metadata={"help": "Tokens a completion may have; one that is cut there counts as unfinished."}
    )
    batch_size: int = field(
        default=16, metadata={"help": "Sequences generated together; with a server, requests under way."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    validity: Validity | None = field(
        default=None,
        metadata={"help": "Format that counts as valid, loose or strict, as in `parse_rollout`; unset: the model's."},
    )
    max_prompt_length: int = field(
        default=8192, metadata={"help": "Examples with a longer prompt, in tokens, are skipped; 0: no limit."}
    )
    resume: bool = field(
        default=True, metadata={"help": "Go on after the records that are there; false: start them anew."}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.samples:
            raise ValueError(f"k must be between 1 and n = {self.samples}, got {self.k}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"temperature must be above 0 for {self.samples} samples an example: at 0 they are all the same"
            )
        if self.max_prompt_length < 0:
            raise ValueError(f"max_prompt_length must be at least 0 (0: no limit), got {self.max_prompt_length}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def samples(self) -> int:
        """Return the number of samples an example: n, by default k."""
        return self.k if self.n is None else self.n

    def sampling(self) -> Sampling:
        """Return what a rollout engine samples with; raises ValueError for values out of range."""
        from vigos.rollout.engine import Sampling

        return Sampling(self.temperature, self.top_p, self.top_k, self.max_new_tokens, self.samples)
