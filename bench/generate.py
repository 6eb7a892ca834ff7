"""Rollouts by the model's own `generate`: prompts run once for all their rollouts, against once for each.

    python bench/generate.py                            # this machine, a model that fits it
    python bench/generate.py --size 3b --device cuda    # random weights of the 3B shape

Both sample the same completions of the same images and questions; `alone` is given a prompt of its own a rollout.
Greedy completions are compared before a time is printed. Contenders take turns, the median counts.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from measure import Table, machine, results_file, take_turns
from prefix_tree import IMAGE, QUESTION, SIZES, SYSTEM, VISION_END, VISION_START, build, picture, words

from vigos.method.encode import EncodedPrompt
from vigos.rollout.engine import Sampling
from vigos.rollout.generate import TransformersEngine


def prompt(image_tokens: int, seed: int) -> EncodedPrompt:
    """System words, an image, a question."""
    image = torch.tensor([VISION_START, *[IMAGE] * image_tokens, VISION_END])
    ids = torch.cat([words(SYSTEM, 0), image, words(QUESTION, seed)])
    return EncodedPrompt(ids, (ids == IMAGE).long(), picture(image_tokens, seed))


def main() -> None:
    """Every case, both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rollouts", type=int, default=4, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="CSV; default bench/results/DEVICE/generate_SIZE.csv")
    args = parser.parse_args()
    model = build(args.size, args.device, torch.float32 if args.device == "cpu" else torch.bfloat16)
    engine = TransformersEngine(model, eos_token_ids=(), pad_token_id=0, banned_token_ids=(IMAGE,))
    about = machine(args.device, "transformers")
    table = Table(args.out or results_file(args.device, f"generate_{args.size}"), about)
    print(" · ".join(about.values()))
    sampling = Sampling(temperature=0.0, max_new_tokens=args.new_tokens)
    for image_tokens in args.image_tokens:
        prompts = [prompt(image_tokens, seed) for seed in range(args.prompts)]
        copies = [replace(p) for p in prompts for _ in range(args.rollouts)]
        runs = {
            "alone": lambda copies=copies: engine.generate(copies, sampling, 0),  # type: ignore[misc]
            "shared": lambda prompts=prompts: engine.generate(prompts, replace(sampling, n=args.rollouts), 0),  # type: ignore[misc]
        }
        alone, shared = (run() for run in runs.values())
        if not all(map(torch.equal, alone, shared)) and args.device == "cpu":
            raise SystemExit("the completions differ")
        times = take_turns(runs, args.device, args.repeats)
        tokens = len(copies) * args.new_tokens
        table.add(
            {
                "size": args.size, "image_tokens": image_tokens, "prompts": args.prompts, "rollouts": args.rollouts,
                "new_tokens": args.new_tokens, "scheme": name, "seconds": s, "tokens_per_s": tokens / s,
                "speedup": times["alone"] / s,
            }
            for name, s in times.items()
        )  # fmt: skip
        for name, s in times.items():
            shown = f"{s:7.3f} s {tokens / s:7.0f} tokens/s {times['alone'] / s:5.2f} x"
            print(f"{image_tokens:6} {name:7} {shown}", flush=True)
    print(f"written to {table.path}")


if __name__ == "__main__":
    main()
