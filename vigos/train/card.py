"""Model cards of final weights: what they came from, how they were trained, what their rollouts scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vigos.system.files import read_json_lines
from vigos.system.yaml_file import read_yaml

_OPTIONS = (
    "preset", "clip_mode", "token_clip", "teacher", "learning_rate", "lr_scheduler_type", "per_device_train_batch_size",
    "gradient_accumulation_steps", "temperature", "max_completion_length", "lora_r", "lora_alpha", "seed",
)  # fmt: skip
_LAST = 10  # logged steps that the scores are means of
_SCORES = {"rollout/accuracy": "right", "rollout/valid": "in the format", "teacher/knows": "known to the teacher"}


def model_card(run: str | Path, name: str) -> str:
    """Return the Markdown of a card for the folder `name` of a run, from its config.yaml and metrics.jsonl."""
    folder = Path(run)
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    ours, inherited, facts = (config.get(part) or {} for part in ("vigos", "transformers", "run"))
    options = {**inherited, **ours}
    lines = read_json_lines(folder / "metrics.jsonl")[0] if (folder / "metrics.jsonl").is_file() else []
    logged = [line for line in lines if "loss" in line and "step" in line]
    base, data = _shown(facts.get("model")), _shown(facts.get("data"))
    what = {"adapter": "A LoRA adapter", "merged": "A model with its LoRA adapter added"}.get(name, "A model")
    use = ["--model", base, "--adapter", name] if name == "adapter" else ["--model", name]
    return "\n".join(
        [
            *_header(facts.get("model"), name), "",
            f"# {_shown(folder.resolve())}", "",
            f"{what}, trained with vigos by {_method(options)}, so that it looks at the image before it answers "
            "([the method](https://arxiv.org/abs/2606.19120)).", "",
            "| | |", "|---|---|",
            *(f"| {key} | {value} |" for key, value in (
                ("base model", base), ("data", data), ("digest of the data", facts.get("data_digest") or "unknown"),
                ("optimizer steps", logged[-1]["step"] if logged else 0),
                *((key.replace("_", " "), options[key]) for key in _OPTIONS if options.get(key) is not None),
                *((f"version of {key}", value) for key, value in (facts.get("versions") or {}).items()),
            )), "",
            "## Scores", "",
            *(f"- {100 * _mean(logged, key):.1f} % of the rollouts {words}"
              for key, words in _SCORES.items() if any(key in line for line in logged[-_LAST:])),
            "", f"Means over the last {min(_LAST, len(logged))} logged steps, on training data, by sampling. Held-out "
            f"scores: `vigos eval {' '.join(use)} --data TEST --output-dir eval`.", "",
            "## Use", "",
            "The model answers under the prompts that it was trained with, which `vigos.yaml` beside this file holds; "
            "`vigos eval` reads them by itself.", "",
        ]
    )  # fmt: skip


def _header(base: Any, name: str) -> list[str]:
    known = [f"base_model: {base}"] if base and not Path(str(base)).is_absolute() and base != "builtin" else []
    library = "peft" if name == "adapter" else "transformers"
    return ["---", *known, f"library_name: {library}", "tags: [vigos, on-policy self-distillation]", "---"]


def _method(options: Mapping[str, Any]) -> str:
    return "OPSD (one privileged teacher)" if options.get("method") == "opsd" else "ViGOS (three teachers)"


def _shown(name: Any) -> str:
    """Return a name, and of a path its last part: a card that is shared should not show folders of a machine."""
    text = str(name or "unknown")
    return Path(text).name if Path(text).is_absolute() else text


def _mean(logged: list[dict[str, Any]], key: str) -> float:
    values = [float(line[key]) for line in logged[-_LAST:] if isinstance(line.get(key), int | float)]
    return sum(values) / len(values) if values else 0.0
