"""Teacher scoring: the prefix tree against separate forwards and against the released scheme.

    python bench/prefix_tree.py                              # this machine, a model that fits it
    python bench/prefix_tree.py --family qwen3_5             # Qwen3.5's layers: 3 of 4 are Gated DeltaNet
    python bench/prefix_tree.py --size 3b --device cuda      # random weights of the 3B shape

Three schemes score the same step, in turn, so that a busy machine slows them alike:

    released   three teachers, each a padded batch of every whole rollout: three vision passes, logits for all tokens
    separate   routed and cut, one padded batch after another under a token budget, no logits
    tree       routed and cut, every distinct prefix once, no logits

Before a time is printed, the hidden states of `tree` are compared with those of `separate`. Operations are counted by
torch's counter. Processor time is that of all threads together, the steadier figure on a busy machine. Memory is the
highest resident size (CPU) or allocation (GPU) above what was there before. Ratios are against `released`.
`kl_deviation` is what a scheme's rounding does to the loss: the mean absolute difference of the tokens' KL, over its
mean, from teachers scored one sequence a forward; `separate` shows what batching alone does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Table, machine, peak_bytes, results_file, seconds
from torch.utils.flop_counter import FlopCounterMode

import vigos
from vigos.method.encode import EncodedPrompt, ImageInputs, ScoredSequence
from vigos.models.inputs import padded_batch
from vigos.models.parts import lm_head
from vigos.scoring.hidden_states import hidden_states

IMAGE, VISION_START, VISION_END = 3, 4, 5
PATCH, MERGE = 14, 2
DESCRIPTION, COMPLETION, QUESTION, ANSWER, SYSTEM = 64, 192, 60, 40, 24  # tokens

# text: hidden, intermediate, layers, heads, kv heads, vocabulary; vision: hidden, intermediate, depth, heads.
# 3b and 7b are Qwen2.5-VL's shapes; in all of them the tower costs about as much a token as the language model.
SIZES = {
    "2m": ((64, 172, 2, 2, 1, 32_000), (32, 86, 4, 2)),
    "5m": ((256, 768, 6, 4, 2, 32_000), (128, 344, 6, 4)),
    "25m": ((512, 1408, 8, 8, 2, 32_000), (256, 684, 8, 4)),
    "100m": ((768, 2304, 14, 12, 2, 32_000), (384, 1024, 12, 6)),
    "3b": ((2048, 11_008, 36, 16, 2, 151_936), (1280, 3420, 32, 16)),
    "7b": ((3584, 18_944, 28, 28, 4, 152_064), (1280, 3420, 32, 16)),
}
# image tokens, rollouts a prompt, invalid rollouts a prompt
CASES = [
    (256, 1, 0), (1024, 1, 0), (64, 4, 0), (256, 4, 0), (1024, 4, 0), (1024, 4, 2), (1024, 4, 4), (256, 8, 0),
    (4096, 4, 0),
]  # fmt: skip
GPU_CASES = [  # the most wanted first
    (1024, 4, 0), (1024, 1, 0), (1024, 8, 0), (256, 4, 0), (4096, 4, 0), (256, 1, 0), (256, 8, 0), (4096, 1, 0),
    (4096, 8, 0), (1024, 4, 2), (1024, 4, 4),
]  # fmt: skip


def build(size: str, device: str, dtype: torch.dtype, family: str = "qwen2_5_vl") -> torch.nn.Module:
    config, kind = (qwen3_5 if family == "qwen3_5" else qwen2_5_vl)(size)
    torch.manual_seed(0)
    with torch.device(device):
        return kind(config).to(dtype).eval().requires_grad_(False)


def qwen3_5(size: str) -> tuple[Any, type]:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    (hidden, inner, layers, heads, kv_heads, vocab), (v_hidden, v_inner, depth, v_heads) = SIZES[size]
    half = hidden // heads // 2
    part = half * 3 // 8
    config = Qwen3_5Config(
        text_config={
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": hidden // heads,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "linear_num_key_heads": heads // 2, "linear_num_value_heads": heads, "linear_key_head_dim": hidden // heads,
            "linear_value_head_dim": hidden // heads, "max_position_embeddings": 32_768,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e7, "mrope_section": [half - 2 * part, part, part],
                "mrope_interleaved": True, "partial_rotary_factor": 1.0,
            },
        },
        vision_config={
            "hidden_size": v_hidden, "intermediate_size": v_inner, "depth": depth, "num_heads": v_heads,
            "out_hidden_size": hidden, "patch_size": PATCH, "spatial_merge_size": MERGE,
        },
        image_token_id=IMAGE, video_token_id=6, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip
    return config, Qwen3_5ForConditionalGeneration


def qwen2_5_vl(size: str) -> tuple[Any, type]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    (hidden, inner, layers, heads, kv_heads, vocab), (v_hidden, v_inner, depth, v_heads) = SIZES[size]
    half = hidden // heads // 2  # rotary frequencies, a quarter for time and the rest for height and width
    part = half * 3 // 8
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "max_position_embeddings": 32_768, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * part, part, part],
            },
        },
        vision_config={
            "hidden_size": v_hidden, "intermediate_size": v_inner, "depth": depth, "num_heads": v_heads,
            "out_hidden_size": hidden, "patch_size": PATCH, "spatial_merge_size": MERGE,
            "fullatt_block_indexes": list(range(depth // 4 - 1, depth, depth // 4)),
        },
        image_token_id=IMAGE, video_token_id=6, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip
    return config, Qwen2_5_VLForConditionalGeneration


def words(n: int, seed: int) -> torch.Tensor:
    return torch.randint(10, 30_000, (n,), generator=torch.Generator().manual_seed(seed))


def picture(tokens: int, seed: int) -> ImageInputs:
    """Random pixels of an image that takes `tokens` placeholders, as Qwen's processor lays them out."""
    columns = next(c for c in range(int(tokens**0.5), 0, -1) if tokens % c == 0)
    grid = torch.tensor([[1, MERGE * tokens // columns, MERGE * columns]])
    pixels = torch.randn(4 * tokens, 3 * 2 * PATCH * PATCH, generator=torch.Generator().manual_seed(seed))
    return ImageInputs.from_tensors({"pixel_values": pixels, "image_grid_thw": grid})


def prompt(image: ImageInputs, tokens: int, user: torch.Tensor) -> EncodedPrompt:
    ids = torch.cat([
        words(SYSTEM, 1), torch.tensor([VISION_START]), torch.full((tokens,), IMAGE), torch.tensor([VISION_END]), user
    ])  # fmt: skip
    return EncodedPrompt(ids, (ids == IMAGE).long(), image)


def step(image_tokens: int, rollouts: int, invalid: int, rows: int = 4) -> tuple[list, list[list]]:
    """A step of `rows` rollouts: what the routed teachers score, and the released scheme's three batches."""
    routed: list[ScoredSequence] = []
    released: list[list[ScoredSequence]] = [[], [], []]
    for row in range(max(rows, rollouts)):
        problem = row // rollouts
        image = picture(image_tokens, 100 + problem)
        question, answer = words(QUESTION, 200 + problem), words(ANSWER, 300 + problem)
        roles = {
            "perception": prompt(image, image_tokens, words(5, 2)),
            "reasoning": prompt(image, image_tokens, torch.cat([question, answer, words(5, 3)])),
            "reference": prompt(image, image_tokens, torch.cat([question, answer, words(30, 4)])),
        }
        completion = words(COMPLETION, 400 + row)
        for batch, encoded in zip(released, roles.values(), strict=True):
            batch.append(ScoredSequence(encoded, completion, torch.arange(COMPLETION), (row, "")))
        if row % rollouts < invalid:
            spans = {"reference": torch.arange(COMPLETION)}
        else:
            spans = {"perception": torch.arange(DESCRIPTION), "reasoning": torch.arange(DESCRIPTION + 4, COMPLETION)}
        routed += [ScoredSequence(roles[role], completion, span, (row, role)) for role, span in spans.items()]
    return routed, released


def student_sequences(released: list[list[ScoredSequence]]) -> list[ScoredSequence]:
    """The student's view of the same rollouts: the reference prompt stands in for its own, which is as long."""
    return [ScoredSequence(s.prompt, s.completion_ids, torch.arange(COMPLETION), s.owner) for s in released[2]]


def supervision(routed: list[ScoredSequence], device: str) -> vigos.Supervision:
    """Teacher row i, in the order of `routed`, against the student's row of the same token; weights as a mean."""
    at = torch.cat([s.owner[0] * COMPLETION + s.scored for s in routed]).to(device)
    return vigos.Supervision(at, torch.arange(len(at), device=device), weight=1.0 / len(at))


def kl_deviations(
    model: torch.nn.Module, routed: list[ScoredSequence], released: list[list[ScoredSequence]],
    teachers: dict[str, torch.Tensor],
) -> dict[str, float]:  # fmt: skip
    """Of each scheme's `teachers` (M, D), against those of one sequence a forward, for the same student."""
    head = lm_head(model).weight
    student = hidden_states(model, student_sequences(released), scoring="separate")
    pairs = supervision(routed, str(head.device))

    def tokens(teacher: torch.Tensor) -> torch.Tensor:
        return vigos.linear_divergence(student, head, teacher, supervision=pairs).divergence

    alone = tokens(torch.cat([hidden_states(model, [s], scoring="separate") for s in routed]))
    return {name: ((tokens(rows) - alone).abs().mean() / alone.mean()).item() for name, rows in teachers.items()}


def run_released(model: torch.nn.Module, batches: list[list[ScoredSequence]]) -> None:
    for batch in batches:
        members = [(torch.cat([s.prompt.ids, s.completion_ids]), s.prompt) for s in batch]
        model(**padded_batch(model, members), use_cache=False).logits  # noqa: B018


def cpu_flash(query, key, *_, **__):
    """torch's counter knows no operations of its CPU attention."""
    return 4 * query[0] * query[1] * query[2] * query[3] * key[2]


Result = tuple[float, float, float, float]  # teraflop, wall seconds, processor seconds, peak MiB


def measure(fns: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, Result]:
    """Medians of each scheme, the schemes taking turns."""
    flops, memory = dict[str, float](), dict[str, float]()
    wall, processor = ({name: [] for name in fns} for _ in range(2))
    table = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_flash}
    for name, fn in fns.items():  # also the warm-up
        with FlopCounterMode(display=False, custom_mapping=table) as counter:
            memory[name] = peak_bytes(fn, device) / 2**20
        flops[name] = counter.get_total_flops() / 1e12
    for _ in range(repeats):
        for name, fn in fns.items():
            used = time.process_time()
            wall[name].append(seconds(fn, device))
            processor[name].append(time.process_time() - used)
    return {n: (flops[n], median(wall[n]), median(processor[n]), memory[n]) for n in fns}


def schemes(
    model: torch.nn.Module, routed: list[ScoredSequence], released: list[list[ScoredSequence]], backend: str
) -> dict[str, Callable[[], object]]:
    return {
        "released": lambda: run_released(model, released),
        "separate": lambda: hidden_states(model, routed, scoring="separate"),
        "tree": lambda: hidden_states(model, routed, scoring="tree", backend=backend),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=("qwen2_5_vl", "qwen3_5"), default="qwen2_5_vl")
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", default="auto", help="attention of the tree")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of cases, from 0; the others keep their results")
    parser.add_argument("--out", type=Path, default=None, help="CSV; default bench/results/DEVICE/prefix_tree_*.csv")
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model = build(args.size, args.device, dtype, args.family)
    about = machine(args.device, "transformers")
    every = CASES if args.device == "cpu" else GPU_CASES
    cases = {"-".join(map(str, case)): case for case in ([every[i] for i in args.cases] if args.cases else every)}
    name = args.size + ("" if args.family == "qwen2_5_vl" else f"_{args.family}")
    table = Table(args.out or results_file(args.device, f"prefix_tree_{name}"), about, cases)
    print(" · ".join(about.values()))
    print(
        " image rollouts invalid scheme     tokens    Tflop        s    cpu s     MiB   released/this: flop    s  cpu s"
    )
    for group, (image_tokens, rollouts, invalid) in cases.items():
        routed, released = step(image_tokens, rollouts, invalid)
        tree = hidden_states(model, routed, scoring="tree", backend=args.backend)
        separate = hidden_states(model, routed, scoring="separate")
        deviation = ((tree - separate).norm() / separate.norm()).item()
        kl = kl_deviations(model, routed, released, {"separate": separate, "tree": tree})
        if not deviation < (1e-4 if dtype == torch.float32 else 3e-2):
            raise SystemExit(f"tree and separate differ by {deviation:.1e} of their norm")
        result = measure(schemes(model, routed, released, args.backend), args.device, args.repeats)
        tokens = counts(model, routed, released)
        for scheme, (flops, wall, processor, mib) in result.items():
            ratios = [base / own for base, own in zip(result["released"][:3], (flops, wall, processor), strict=True)]
            print(
                f"{image_tokens:6} {rollouts:8} {invalid:7} {scheme:9} {tokens[scheme]:7} {flops:8.3f} {wall:8.3f} "
                f"{processor:8.3f} {mib:7.0f}             {ratios[0]:7.2f} {ratios[1]:5.2f} {ratios[2]:5.2f}"
                f"{f'   kl {kl[scheme]:.1e}' if scheme in kl else ''}",
                flush=True,
            )
            table.add(
                [{
                    "group": group, "size": name, "image_tokens": image_tokens, "rollouts": rollouts,
                    "invalid_a_prompt": invalid,
                    "scheme": scheme, "tokens": tokens[scheme], "teraflop": round(flops, 5),
                    "runtime_s": round(wall, 4), "processor_s": round(processor, 4), "peak_mib": round(mib),
                    "flop_ratio": round(ratios[0], 3), "speedup": round(ratios[1], 3),
                    "processor_speedup": round(ratios[2], 3), "deviation": f"{deviation:.1e}",
                    "kl_deviation": f"{kl[scheme]:.1e}" if scheme in kl else "",
                }]
            )  # fmt: skip
    print(f"written to {table.path}")


def counts(
    model: torch.nn.Module, routed: list[ScoredSequence], released: list[list[ScoredSequence]]
) -> dict[str, int]:
    """Tokens the language model reads, padding included."""
    from vigos.scoring.forwards import plan_forwards

    longest = [max(len(s.prompt.ids) + len(s.completion_ids) for s in batch) for batch in released]
    return {
        "released": sum(len(batch) * n for batch, n in zip(released, longest, strict=True)),
        **{
            scheme: sum(each.tokens for each in plan_forwards(model, routed, scheme, 16_384, "auto", None))
            for scheme in ("separate", "tree")
        },
    }


if __name__ == "__main__":
    main()
