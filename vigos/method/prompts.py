"""Prompts of the four roles: the student, and the three teachers in their contexts.

The wording is ours and every line of it can be replaced: `Prompts.from_file("prompts.yaml")` reads a YAML mapping
of the fields below. Placeholders are `{problem}`, `{answer}` and `{format}`; other braces are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vigos.system.yaml_file import read_yaml

Role = str  # one of ROLES, or the template of a teacher of a run's own
ROLES: tuple[Role, ...] = ("student", "perception", "reasoning", "reference")

DESCRIPTION_OPEN, DESCRIPTION_CLOSE = "<description>", "</description>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
BOX_OPEN, BOX_CLOSE = r"\boxed{", "}"


@dataclass(frozen=True)
class Prompts:
    """Text templates of the four roles.

    Each of `student`, `perception`, `reasoning`, `reference` is the text of one user turn, put after the row's images;
    `system` is the system turn they share (empty: none). `prefill` opens the assistant's turn of the student and of the
    reference teacher; `think_prefill` opens the reasoning teacher's when it does not read the student's description
    (preset "released"). `chat_template_kwargs` are handed to the chat template, such as {"enable_thinking": False};
    under a role's name stand those of this role alone, such as {"student": {"enable_thinking": True}}.
    """

    system: str = "You are a careful assistant who looks at the image before answering."
    format: str = (
        "First write down what the image shows between <description> and </description>. Then reason step by step "
        "between <think> and </think>, relying on your description. End with the final answer alone in \\boxed{}."
    )
    student: str = "{problem}\n\n{format}"
    perception: str = ""
    reasoning: str = (
        "{problem}\n\nA trusted solution gives this answer: {answer}\n"
        "Understand why it is right, then work the problem out in your own words and end with \\boxed{}."
    )
    reference: str = "{problem}\n\nA trusted solution gives this answer: {answer}\n\n{format}"
    prefill: str = DESCRIPTION_OPEN
    think_prefill: str = THINK_OPEN
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_file(cls, path: str | Path) -> Prompts:
        """Read the templates from a YAML mapping; fields left out keep their default.

        Raises:
            ValueError: the file is no mapping, names an unknown template, or a template is no text.
        """
        loaded = read_yaml(path)
        if not isinstance(loaded, dict):
            raise ValueError(
                f"prompts file {path} must hold a mapping of template names to text, got {type(loaded).__name__}"
            )
        known = [f.name for f in fields(cls)]
        for key, value in loaded.items():
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ValueError(f"prompts file {path}: unknown template {key!r}{hint}")
            wanted, kind = ("a mapping", dict) if key == "chat_template_kwargs" else ("text", str)
            if not isinstance(value, kind):
                raise ValueError(f"prompts file {path}: {key} must be {wanted}, got {type(value).__name__}")
        return cls(**loaded)

    def with_template_kwargs(self, more: str | Mapping[str, Any] | None) -> Prompts:
        """Return the prompts with further `chat_template_kwargs`, given as a mapping or as JSON of one.

        Raises:
            ValueError: it is no JSON object.
        """
        if isinstance(more, str):
            try:
                more = json.loads(more)
            except ValueError as error:
                raise ValueError(f"chat_template_kwargs must be a JSON object, got {more!r}: {error}") from error
        if more is not None and not isinstance(more, Mapping):
            raise ValueError(f"chat_template_kwargs must be a JSON object, got {more!r}")
        return replace(self, chat_template_kwargs={**self.chat_template_kwargs, **more}) if more else self

    def template_kwargs(self, role: Role) -> dict[str, Any]:
        """Return what the chat template is given for `role`."""
        shared = {name: value for name, value in self.chat_template_kwargs.items() if name not in ROLES}
        return shared | dict(self.chat_template_kwargs.get(role) or {})

    def user_text(self, role: Role, problem: str, answer: str = "", columns: Mapping[str, str] | None = None) -> str:
        """Return the text of the user turn of `role`, or of a template. Braces inside the values are never expanded.

        Args:
            columns: further placeholders, by name.
        """
        if role not in ROLES and role and "{" not in role:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
        values = {"{problem}": problem, "{answer}": answer, "{format}": self.format}
        values |= {f"{{{name}}}": text for name, text in (columns or {}).items()}
        pieces, rest = [], getattr(self, role) if role in ROLES else role
        while rest:
            position, name = min(((rest.find(name), name) for name in values if name in rest), default=(-1, ""))
            if position < 0:
                break
            pieces += [rest[:position], values[name]]
            rest = rest[position + len(name) :]
        return "".join([*pieces, rest])

    def messages(
        self, role: Role, problem: str, answer: str = "", num_images: int = 1,
        columns: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Return the conversation of `role` as chat templates take it, images first so that the roles share them."""
        text = self.user_text(role, problem, answer, columns)
        content: list[dict[str, str]] = [{"type": "image"}] * num_images
        if text:
            content = [*content, {"type": "text", "text": text}]
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []
        return [*system, {"role": "user", "content": content}]
