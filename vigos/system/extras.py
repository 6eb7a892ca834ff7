"""Commands that add an optional part of vigos, wherever this copy of it came from."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install(extra: str) -> str:
    """Return the pip command that adds an extra: from the same folder, file or index that vigos came from."""
    try:
        source = json.loads(distribution("vigos").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        source = {}
    address = str(source.get("url", ""))
    if "dir_info" in source:
        editable = "-e " if source["dir_info"].get("editable") else ""
        return f"pip install {editable}'{url2pathname(urlsplit(address).path)}[{extra}]'"
    return f"pip install 'vigos[{extra}] @ {address}'" if address else f"pip install 'vigos[{extra}]'"
