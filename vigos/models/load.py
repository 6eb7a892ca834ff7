"""The one place that reads configurations, models, processors and adapters which somebody else wrote.

Code that comes with a model is never asked for and never run, unless the caller says `trust_remote_code`. Weights come
from safetensors alone. An adapter's configuration is read here first: peft imports modules that it names.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vigos.models.parts import unwrap

logger = logging.getLogger(__name__)

ADAPTER_KINDS = (
    "LORA",
    "LOHA",
    "LOKR",
    "IA3",
)  # other kinds bring prompts, models or code
_MAX_CONFIG_BYTES = 2**20


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a model folder or hub name.

    Raises:
        ValueError: the model needs code of its own, or `name` is an adapter.
    """
    from transformers import AutoConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name) is not None:
        raise ValueError(
            f"model must be whole, but {name} holds an adapter: name its base model, and {name} as adapter"
        )
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_processor(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the processor of a model folder or hub name; a tokenizer for text-only models."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_model(
    name: str, *, dtype: str = "bfloat16", attn_implementation: str | None = None, trust_remote_code: bool = False,
    load_in_4bit: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Load a model and its processor from a folder or hub name.

    Args:
        dtype: float32, float16, bfloat16, or auto: that of the file.
        load_in_4bit: keep the linear layers of the language model in 4 bits (NF4, Dettmers et al. 2023), and compute in
            `dtype`. The head and the vision tower stay as they are.

    Raises:
        ValueError: another dtype, a model that needs code of its own, an adapter, or 4 bits where there are none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if dtype not in ("float32", "float16", "bfloat16", "auto"):
        raise ValueError(f"dtype must be float32, float16, bfloat16 or auto, got {dtype!r}")
    config = load_config(name, trust_remote_code=trust_remote_code)
    has_vision = getattr(config, "vision_config", None) is not None
    family = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    options: dict[str, Any] = {"quantization_config": _four_bits(family, config, dtype)} if load_in_4bit else {}
    try:
        model = family.from_pretrained(
            name, dtype=dtype if dtype == "auto" else getattr(torch, dtype), attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code, use_safetensors=True, **options,
        )  # fmt: skip
    except (ImportError, RuntimeError) as error:
        if not load_in_4bit:
            raise
        raise ValueError(f"load_in_4bit must be false here: bitsandbytes cannot load {name}: {error}") from error
    return model, load_processor(name, trust_remote_code=trust_remote_code)


def _four_bits(family: Any, config: Any, dtype: str) -> Any:
    """Return the quantisation of a model's language model, its head left out."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes: pip install 'vigos[quantization]'")
    if dtype == "auto":
        raise ValueError("dtype must be float32, float16 or bfloat16 with load_in_4bit, got 'auto'")
    with torch.device("meta"):
        model = family.from_config(config)
    inside = set(model.get_decoder().modules())
    kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m not in inside]
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype), llm_int8_skip_modules=kept,
    )  # fmt: skip


def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> Any:
    """Put an adapter on a model: every tensor of its file, and none left as it began.

    Raises:
        ValueError: naming the folder: no adapter, of a kind that is not read, that names code, or of another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    kind = type(model).__name__
    _check_adapter_config(Path(folder) / "adapter_config.json")
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ValueError(f"adapter must hold adapter_model.safetensors, got {folder}, which does not")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)  # type: ignore[arg-type]
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        # Whatever its configuration holds reaches peft's arithmetic, and torch's where a size is another.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"adapter {folder} does not fit {kind}: {type(error).__name__}: {reason}") from error
    check_adapter_file(adapted, folder)
    return adapted


def _check_adapter_config(path: Path) -> None:
    """Raise ValueError unless an adapter's configuration is of a known kind and names no module to import."""
    if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"adapter must be a folder with adapter_config.json, got {path.parent}, which has none")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold a JSON object: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    if config.get("peft_type") not in ADAPTER_KINDS:
        raise ValueError(
            f"{path}: peft_type must be one of {', '.join(ADAPTER_KINDS)}, got {config.get('peft_type')!r}"
        )
    if config.get("megatron_config"):  # peft then imports the module that megatron_core names
        module = config.get("megatron_core")
        raise ValueError(f"{path}: megatron_config must be empty, got one that makes peft import {module!r}")


def check_adapter_file(model: nn.Module, folder: str | Path) -> None:
    """Raise ValueError unless a folder's adapter holds every tensor of the model's adapter and no other."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    core: Any = unwrap(model)
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        found = set(file.keys())
    wanted = set(get_peft_model_state_dict(core, adapter_name=core.active_adapters[0], save_embedding_layers=False))
    # peft also saves an embedding that was resized, and loads it as what it is: a parameter of the model.
    found -= {name for name in found - wanted if "embed" in name or "lm_head" in name} & set(core.state_dict())
    check_names(folder, found, wanted)


def check_names(folder: str | Path, found: set[str], wanted: set[str]) -> None:
    """Raise ValueError unless the tensors found in a folder are those wanted of an adapter."""
    if found != wanted:
        missing, unexpected = sorted(wanted - found), sorted(found - wanted)
        raise ValueError(
            f"{folder} must hold the {len(wanted)} tensors of this model's adapter, got {len(found)}: {len(missing)} "
            f"missing, {len(unexpected)} unexpected, such as {(missing + unexpected)[0]}; it was trained on another "
            "model, or with other lora_ options"
        )
    logger.debug("took all %d tensors of the adapter in %s", len(wanted), folder)
