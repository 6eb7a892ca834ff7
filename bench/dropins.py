"""What each drop-in changes: memory and time of the loss, and the error of its gradient, before and after.

    python bench/dropins.py                                  # this machine, V = 151,936
    python bench/dropins.py --tokens 256 --only trl gkd      # larger, fewer

Each codebase runs in a process of its own: the peer's code where it is a package (TRL, Liger), else a straight-line
statement of what it computes (tests/helpers/peer_statements.py), then ours behind the same call; runs alternate, median
counted. Forward and backward, the head frozen, as under LoRA. Memory is the peak above what stood before the call: the
allocator's on a GPU, resident memory on a CPU. Operands are bf16 and the teacher is near the student (KL around 0.01),
as in self-distillation; the error is that of the gradient, ||g - exact|| / ||exact||, exact being float64 on the same
operands. A number is printed only if the loss is right: ours to 1e-4 of float64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import Table, machine, peak_bytes, relative_error, results_file, take_turns
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from helpers import peer_statements as statements  # noqa: E402

Run = Callable[[Tensor], Tensor]  # the student's tensor -> the loss


@dataclass
class Case:
    """`student` (a leaf's values), the two ways to the loss, and the same in float64 on one token at a time."""

    student: Tensor
    before: Run
    after: Run
    exact: Run


def peaked(n: int, d: int, v: int, dtype: torch.dtype, device: str, near: float) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of a student and of a teacher next to it (N, D), and a head (V, D); entropy 1 to 3 nats a row."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(v, d, generator=g)
    favourite = torch.randint(v, (n,), generator=g)
    student = head[favourite] * (14.0 / d) + torch.randn(n, d, generator=g) * (2.0 / d**0.5)
    teacher = student + torch.randn(n, d, generator=g) * (near / d**0.5)
    return tuple(x.to(dtype).to(device) for x in (student, teacher, head))  # type: ignore[return-value]


def rows_of(student: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (1, N, V) in the operands' dtype, as a model returns them."""
    return (student @ head.T)[None], (teacher @ head.T)[None]


def trl(n: int, d: int, v: int, device: str) -> Case:
    """DistillationTrainer, reverse KL (its default), a teacher model with a head of its own."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as theirs

    from vigos.integrations.trl import chunked_divergence_loss as ours

    student, teacher, head = peaked(n, d, v, torch.bfloat16, device, 0.3)
    other, mask = head.clone(), torch.ones(1, n, device=device)

    def of(fn: Callable[..., tuple[Tensor, ...]]) -> Run:
        return lambda s: fn(s[None], teacher[None], head, other, mask, 1.0)[0]

    wide = head.double()
    return Case(student, of(theirs), of(ours), _exact_heads(teacher, wide, 1.0))


def _exact_heads(teacher: Tensor, wide: Tensor, beta: float) -> Run:
    def loss(s: Tensor) -> Tensor:
        everything = torch.ones(s.shape[0], dtype=torch.bool, device=s.device)
        return statements.heads(s, teacher.double(), wide, wide, everything, beta)[0] / s.shape[0]

    return loss


def liger(n: int, d: int, v: int, device: str) -> Case:
    """LigerFusedLinearJSDLoss, JSD(0.5), no cross-entropy; compiled on a GPU, as by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as Theirs

    from vigos.integrations.liger import LigerFusedLinearJSDLoss as Ours

    student, teacher, head = peaked(n, d, v, torch.bfloat16, device, 0.3)
    labels = torch.zeros(n, dtype=torch.int64, device=device)

    def of(cls: type) -> Run:
        module = cls(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=device == "cuda")
        return lambda s: module(s, head, teacher, head, labels)

    return Case(student, of(Theirs), of(Ours), _exact_heads(teacher, head.double(), 0.5))


def gkd(n: int, d: int, v: int, device: str) -> Case:
    """GKDTrainer's loss of logits, JSD(0.5)."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    from vigos.integrations.trl import generalized_jsd_loss

    student, teacher = rows_of(*peaked(n, d, v, torch.bfloat16, device, 0.3))
    labels = torch.zeros(1, n, dtype=torch.int64, device=device)

    def exact(s: Tensor) -> Tensor:
        terms = statements.jsd_terms(s.log_softmax(-1), teacher.double().log_softmax(-1), 0.5)
        return terms.sum() / n

    theirs = GKDTrainer.generalized_jsd_loss
    return Case(
        student, lambda s: theirs(s, teacher, labels), lambda s: generalized_jsd_loss(s, teacher, labels), exact
    )


def sdft(n: int, d: int, v: int, device: str) -> Case:
    """SDFT's and SDPO's loss of logits, forward KL."""
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss as theirs

    from vigos.integrations.trl import full_logit_self_distillation_loss as ours

    student, teacher = rows_of(*peaked(n, d, v, torch.bfloat16, device, 0.3))
    return Case(
        student,
        lambda s: theirs(s, teacher, distillation_alpha=0.0).mean(),
        lambda s: ours(s, teacher, distillation_alpha=0.0).mean(),
        lambda s: statements.jsd_terms(s.log_softmax(-1), teacher.double().log_softmax(-1), 0.0).sum() / n,
    )


def opsd(n: int, d: int, v: int, device: str) -> Case:
    """OPSD's loss of logits: forward KL, temperature 1.1, each entry clipped at 1e-3."""
    from vigos.integrations.opsd import generalized_jsd_loss

    student, teacher = rows_of(*peaked(n, d, v, torch.bfloat16, device, 0.3))
    labels = torch.zeros(1, n, dtype=torch.int64, device=device)
    return Case(
        student,
        lambda s: statements.opsd(s, teacher, labels, 0.0, 1.1, None, 1e-3),
        lambda s: generalized_jsd_loss(s, teacher, labels, 0.0, 1.1, token_clip=1e-3),
        lambda s: statements.opsd(s, teacher.double(), labels, 0.0, 1.1, None, 1e-3),
    )


def released(n: int, d: int, v: int, device: str) -> Case:
    """The released ViGOS loss on hidden states, as in the mix-in; before: both logits tensors, then its loss."""
    from vigos.integrations import released as drop_in

    student, teacher, head = peaked(n, d, v, torch.bfloat16, device, 0.3)
    mask = torch.ones(1, n, dtype=torch.bool, device=device)
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight = torch.nn.Parameter(head, requires_grad=False)
    wide = head.double()

    def before(s: Tensor) -> Tensor:
        return statements.released((teacher @ head.T)[None], (s @ head.T)[None], mask, 1.0, None, None, None)

    def after(s: Tensor) -> Tensor:
        token = drop_in._head.set(linear)
        try:
            return drop_in.masked_kl_loss(teacher[None], s[None], mask)
        finally:
            drop_in._head.reset(token)

    return Case(student, before, after, _exact_heads(teacher, wide, 0.0))


def verl(n: int, d: int, v: int, device: str) -> Case:
    """verl's top-k forward KL, k = 128, log-probabilities bounded at -10."""
    from vigos.integrations.verl import topk_forward_kl

    student, teacher = rows_of(*peaked(n, d, v, torch.bfloat16, device, 0.3))
    log_probs, ids = teacher.float().log_softmax(-1).topk(128, -1)
    return Case(
        student,
        lambda s: statements.verl(s, log_probs, ids, -10.0)[0].mean(),
        lambda s: topk_forward_kl(s, log_probs, ids, log_prob_min_clamp=-10.0)["distillation_losses"].mean(),
        lambda s: statements.verl(s, log_probs.double(), ids, -10.0)[0].mean(),
    )


CASES = {
    "trl": ("TRL DistillationTrainer", trl), "gkd": ("TRL GKD / GOLD", gkd), "sdft": ("TRL SDFT / SDPO", sdft),
    "liger": ("Liger fused linear JSD", liger), "opsd": ("OPSD", opsd), "released": ("released ViGOS", released),
    "verl": ("verl top-k", verl),
}  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


def gradient(run: Run, values: Tensor) -> tuple[float, Tensor]:
    """(loss, gradient) of one forward and backward."""
    leaf = values.clone().requires_grad_()
    loss = run(leaf)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One codebase: both sides alternately, then memory, then the gradient against float64."""
    case = CASES[name][1](args.tokens, args.width, args.vocabulary, args.device)
    sides = {"before": case.before, "after": case.after}
    out: dict[str, float] = {}
    grads = {}
    for side, run in sides.items():  # also warms up: imports, thread pools, compilation
        out[f"loss_{side}"], grads[side] = gradient(run, case.student)
    runs = {side: partial(gradient, run, case.student) for side, run in sides.items()}
    for side, time in take_turns(runs, args.device, args.repeats).items():
        out[f"ms_{side}"] = 1e3 * time
        out[f"mib_{side}"] = peak_bytes(runs[side], args.device) / 2**20
    out["loss_exact"], exact = gradient(case.exact, case.student.double())
    for side, grad in grads.items():
        out[f"error_{side}"] = relative_error(grad, exact)
    wrong = abs(out["loss_after"] - out["loss_exact"])
    if wrong > 1e-4 * abs(out["loss_exact"]) + 1e-6:
        raise SystemExit(f"{name}: our loss {out['loss_after']} is not {out['loss_exact']}; no numbers")
    return out


def main() -> None:
    """Print the table and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=896, help="hidden size")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="CSV; default: bench/results/DEVICE/dropins.csv")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)  # the child process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    about = machine(args.device, "trl", "liger-kernel")
    table = Table(args.out or results_file(args.device, "dropins"), about)
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(
        f"{args.tokens} tokens, hidden size {args.width}, V = {args.vocabulary:,}, bf16 operands, forward and backward"
    )
    print("| codebase | memory of the loss, MiB | time, ms | gradient error |\n|---|---|---|---|")
    for name in args.only:
        command = [sys.executable, __file__, "--one", name, "--device", args.device]
        for option in ("tokens", "width", "vocabulary", "repeats"):
            command += [f"--{option}", str(getattr(args, option))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        x = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {CASES[name][0]} | {x['mib_before']:,.0f} → {x['mib_after']:,.0f} "
            f"| {x['ms_before']:,.0f} → {x['ms_after']:,.0f} ({x['ms_before'] / x['ms_after']:.1f} ×) "
            f"| {x['error_before']:.2%} → {x['error_after']:.2%} |",
            flush=True,
        )
        shape = {"tokens": args.tokens, "width": args.width, "vocabulary": args.vocabulary}
        table.add([{"codebase": name, **shape, **x}])
    print(f"written to {table.path}")


if __name__ == "__main__":
    main()
