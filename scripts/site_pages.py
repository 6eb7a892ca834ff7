"""Add README, CONTRIBUTING, CHANGELOG and the examples to the documentation site: a hook of mkdocs (see mkdocs.yml).

These files stay where GitHub shows them; links between them and docs/ are rewritten for the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages whose source is outside docs/."""
    for name, page in TOP.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page with links to files outside docs/ led to the pages made from them."""
    for name, target in TOP.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(name)}", f"]({target}", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?examples/(\w+)\.py", r"](examples/\1.md", markdown)
    return markdown
