"""The world's own prompts, short because a tiny model pays for every token."""

from __future__ import annotations

from pathlib import Path

from vigos.method.prompts import Prompts

PROMPTS_FILE = Path(__file__).with_name("prompts.yaml")


def world_prompts() -> Prompts:
    """Load `vigos/world/prompts.yaml`, the templates that the base was warmed up on and its training must use."""
    return Prompts.from_file(PROMPTS_FILE)
