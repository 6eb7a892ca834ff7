"""Prompts and answer format of a trained model, saved in the folders of its weights.

A model knows the wording it was trained under; asked in another one it may answer nothing that can be read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from vigos.method.prompts import Prompts
from vigos.system.yaml_file import read_yaml

FILE = "vigos.yaml"


@dataclass(frozen=True)
class Asking:
    """The prompts of a model, and the format of its answers.

    Attributes:
        validity: format that counts as valid, as in `parse_rollout`.
        span_style: spans that were supervised, for the record.
    """

    prompts: Prompts = field(default_factory=Prompts)
    validity: Literal["loose", "strict"] = "loose"
    span_style: str = "paper"

    def save(self, folder: str | Path) -> None:
        """Write `vigos.yaml` into a folder of weights."""
        import yaml

        text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        (Path(folder) / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path | None) -> Asking | None:
        """Read the file of a folder of weights; None where there is none.

        Raises:
            ValueError: naming the file, where it is not one that `save` wrote.
        """
        path = None if folder is None else Path(folder) / FILE
        if path is None or not path.is_file():
            return None
        try:
            loaded = read_yaml(path)
            known = {f.name: loaded[f.name] for f in fields(cls) if f.name in loaded}
            return cls(**known | {"prompts": Prompts(**known.get("prompts", {}))})
        except (TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} must hold the prompts that the model was trained with: {reason}") from error
