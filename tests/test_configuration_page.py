"""docs/configuration.md is what the dataclass says, and says it of every option."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

from vigos.launch import Source
from vigos.train.config import ViGOSConfig

ROOT = Path(__file__).parents[1]


def test_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    page = runpy.run_path(str(ROOT / "scripts" / "configuration.py"))["page"]()
    assert written == page, "run: python scripts/configuration.py"
    own = [f.name for f in dataclasses.fields(ViGOSConfig) if f.name in ViGOSConfig.__annotations__]
    for name in [*own, *(f.name for f in dataclasses.fields(Source))]:
        assert written.count(f"\n| `{name}` |") in (1, 2), name  # twice: options that presets fill
    assert all(f.metadata.get("help") for f in dataclasses.fields(ViGOSConfig) if f.name in own)


def test_page_of_models_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "models.py"))["page"]()
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == page, "run: python scripts/models.py"
