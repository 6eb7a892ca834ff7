"""On-policy self-distillation of a text-only model with `vigos.ViGOSTrainer`: no image anywhere.

    python examples/text_opsd.py                 # a minute on one core, nothing downloaded
    python examples/text_opsd.py --model Qwen/Qwen3-0.6B --data problems.jsonl    # problem, answer, problem_id

Without `--model` the script makes its own subject, a tiny transformer that adds single digits with a bad habit: it
forgets the carry (7 + 8 = 5) unless the answer stands in its prompt. Then it teaches itself. The student answers the
plain question; the teacher, the same weights frozen, reads the question *and* the answer, and at every token of the
student's own text says what it would have written. Half of the questions are trained on, all of them are asked after.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch

import vigos
from vigos.data.examples import load_rows
from vigos.method.encode import encode_prompt
from vigos.method.prompts import Prompts, Role

# No image, no description: the format is a thought and a box, and nothing is prefilled.
PROMPTS = Prompts(
    system="",
    format="Think, then answer in \\boxed{}.",
    student="{problem} {format}",
    reasoning="{problem} Key: {answer}. {format}",
    reference="{problem} Key: {answer}. {format}",
    prefill="",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' + message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
)


def subject() -> tuple[Any, Any]:
    """Build a byte-level tokenizer and a random two-layer model, 0.2 M parameters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), tokenizer


def encode(tokenizer: Any, a: int, b: int, keyed: bool, total: int) -> tuple[list[int], list[int]]:
    """Encode prompt and answer of one question, as the student (or, with the key, the teacher) will read them."""
    role: Role = "reference" if keyed else "student"
    prompt = encode_prompt(tokenizer, PROMPTS, role, f"{a}+{b}?", str(a + b)).ids.tolist()
    answer = f"{a}+{b} is {total}. \\boxed{{{total}}}<|im_end|>"
    return prompt, tokenizer(answer, add_special_tokens=False)["input_ids"]


def warm_up(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    """Train on answers that lose the carry three times in four for plain questions, never for those with a key."""
    draw = random.Random(seed)
    known: dict[tuple[int, int, bool, int], tuple[list[int], list[int]]] = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    pad = torch.nn.utils.rnn.pad_sequence
    model.train()
    for _ in range(steps):
        ids, labels = [], []
        for _ in range(48):
            a, b, keyed = draw.randrange(10), draw.randrange(10), draw.random() < 0.5
            case = (a, b, keyed, a + b if keyed or draw.random() < 0.25 else (a + b) % 10)
            if case not in known:
                known[case] = encode(tokenizer, *case)
            prompt, answer = known[case]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        padded = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        model(input_ids=padded, labels=pad(labels, batch_first=True, padding_value=-100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def sums(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return all hundred questions, and the half that is trained on."""
    rows = [
        {"problem": f"{a}+{b}?", "answer": str(a + b), "problem_id": f"{a}+{b}"} for a in range(10) for b in range(10)
    ]
    return rows, random.Random(seed).sample(rows, 50)


def main() -> None:
    """Make or load a model, ask, train, ask again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name of a text model; without it a tiny one is made")
    parser.add_argument("--data", help="rows with problem, answer and problem_id; needed with --model")
    parser.add_argument("--warm-up", type=int, default=400, help="steps that make the tiny model")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/text-opsd"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not args.data:
            parser.error("--model needs --data")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
        everything = train = load_rows(args.data, images_column=None)
    else:
        model, tokenizer = subject()
        warm_up(model, tokenizer, args.warm_up, args.seed)
        everything, train = (load_rows(rows, images_column=None) for rows in sums(args.seed))

    config = vigos.ViGOSConfig(
        output_dir=str(args.out), method="opsd", clip_mode="none", lora=bool(args.model), learning_rate=args.lr,
        max_steps=args.steps, per_device_train_batch_size=16, gradient_accumulation_steps=1, temperature=1.0, top_p=1.0,
        top_k=0, max_completion_length=512 if args.model else 32, max_grad_norm=1.0, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", save_merged=False, logging_steps=10, seed=args.seed,
        bf16=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = vigos.ViGOSTrainer(
        model=model, args=config, processing_class=tokenizer, train_dataset=train, prompts=PROMPTS
    )

    def ask(when: str) -> float:
        result = vigos.evaluate(
            trainer.model, tokenizer, everything, prompts=PROMPTS, max_new_tokens=config.max_completion_length
        )
        accuracy = sum(record["samples"][0]["correct"] for record in result.records) / len(result.records)
        print(f"{when}: {accuracy:.0%} of {len(result.records)} answers right")
        return accuracy

    ask("before")
    trainer.train()
    ask("after")


if __name__ == "__main__":
    main()
