"""On-policy self-distillation of a vision-language model with TRL's own trainer and the fused loss.

    python examples/trl_world.py                      # 60 steps on the built-in world, some minutes on two cores
    python examples/trl_world.py --steps 5 --evaluate 0

`trl_patch.patch()` is the one line that puts vigos' loss under `DistillationTrainer`. The rest is TRL: its generation,
its optimizer, its logs. One subclass of 40 lines gives the teacher, a frozen copy of the student, a prompt of its own,
the question *with* the reference answer; that is plain OPSD, `method="opsd"` of `vigos.ViGOSTrainer`, which also has
the three routed teachers, shared prefixes and clips that TRL's loop has no place for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import pad

import vigos
from vigos.data.examples import load_rows
from vigos.integrations import trl as trl_patch
from vigos.rollout.engine import placeholder_ids
from vigos.world import load_base, world_prompts, write_world

PROMPTS = world_prompts()


class PrivilegedDistillationTrainer(DistillationTrainer):
    """TRL's trainer with one change: the teacher reads the column "teacher_prompt" where the student reads "prompt".

    Both prompts carry the same images, and both are followed by the student's completion.
    """

    _of_teacher: dict[str, Tensor]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "teacher_prompt" not in self._signature_columns:
            self._signature_columns.append("teacher_prompt")

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        messages = [
            [{"role": "user", "content": [{"type": "image", "image": row["images"][0]}, *row["teacher_prompt"]]}]
            for row in inputs
        ]
        ids, _, fields = self._tokenize_prompts(messages)
        completion, mask = out["completion_ids"], out["completion_mask"]

        def joined(prompts: list[list[int]], fill: int, after: Tensor) -> Tensor:
            left = pad([torch.tensor(p) for p in prompts], padding_value=fill, padding_side="left")
            return torch.cat([left.to(after.device), after], dim=1)

        out["teacher_input_ids"] = joined(ids, self._tokenizer.pad_token_id, completion)
        out["teacher_attention_mask"] = joined([[1] * len(p) for p in ids], 0, mask)
        out["teacher_mm_token_type_ids"] = joined(fields["mm_token_type_ids"], 0, torch.zeros_like(completion))
        return out

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        self._of_teacher = {name: inputs[f"teacher_{name}"] for name in names}
        return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    def _get_last_hidden_state(
        self, unwrapped_model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **images: Any
    ) -> Tensor:
        if unwrapped_model is self.accelerator.unwrap_model(self.teacher_model):
            read = self._of_teacher
            input_ids, attention_mask = read["input_ids"], read["attention_mask"]
            images["mm_token_type_ids"] = read["mm_token_type_ids"]
        return super()._get_last_hidden_state(unwrapped_model, input_ids, attention_mask, logits_to_keep, **images)


def dataset(file: Path) -> list[dict[str, Any]]:
    """Read the world's rows with TRL's columns: prompt, images, and the teacher's own prompt."""
    rows = []
    for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
        row = json.loads(line)
        student = PROMPTS.user_text("student", row["problem"])
        teacher = PROMPTS.user_text("reference", row["problem"], row["answer"])
        rows.append({
            "prompt": [{"role": "user", "content": student}],
            "teacher_prompt": [{"type": "text", "text": teacher}],
            "images": [Image.open(file.parent / name).convert("RGB") for name in row["images"]],
        })  # fmt: skip
    return rows


def main() -> None:
    """Write data, train, and say how the answers changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=600, help="training questions")
    parser.add_argument("--evaluate", type=int, default=100, help="test triplets before and after; 0: none")
    parser.add_argument("--out", type=Path, default=Path("runs/trl-world"))
    args = parser.parse_args()
    trl_patch.patch(["distillation"])

    from datasets import Dataset

    train = write_world(args.out / "data", "train", args.rows)
    student, processor = load_base()
    teacher, _ = load_base()
    untouched = processor.chat_template
    # The world's completions continue an opened description; vigos prefills it, TRL's template has to.
    processor.chat_template = untouched.replace("<|im_start|>assistant\n", f"<|im_start|>assistant\n{PROMPTS.prefill}")
    config = DistillationConfig(
        output_dir=str(args.out), max_steps=args.steps, per_device_train_batch_size=16, learning_rate=3e-4,
        max_completion_length=96, temperature=1.0, beta=0.0, logging_steps=5, report_to="none", save_strategy="no",
        gradient_checkpointing=False, bf16=False, use_cpu=not torch.cuda.is_available(),
        generation_kwargs={"suppress_tokens": list(placeholder_ids(student.config))},  # a sampled one has no image
    )  # fmt: skip
    trainer = PrivilegedDistillationTrainer(
        model=student, teacher_model=teacher, args=config, train_dataset=Dataset.from_list(dataset(train)),
        processing_class=processor,
    )  # fmt: skip

    def answers(when: str) -> None:
        if not args.evaluate:
            return
        test = write_world(args.out / "data", "test", args.evaluate)
        template, processor.chat_template = processor.chat_template, untouched
        try:
            student.eval()
            result = vigos.evaluate(student, processor, load_rows(test), prompts=PROMPTS, max_new_tokens=96)
            print(when, {name: x for name, x in result.summary().items() if isinstance(x, float)})
        finally:
            processor.chat_template = template

    answers("before:")
    trainer.train()
    answers("after:")


if __name__ == "__main__":
    main()
