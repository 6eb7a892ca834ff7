"""The documentation site builds strictly, so that a dead link or anchor fails, and loads nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_there(site):
    pages = [*(p.stem for p in (ROOT / "docs").glob("*.md")), "index", "contributing", "changelog"]
    pages += [f"examples/{p.stem}" for p in (ROOT / "examples").glob("*.py")]
    assert not [name for name in pages if not (site / f"{name}.html").is_file()]


@pytest.mark.slow
def test_api_page_has_the_docstrings(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in ("linear_divergence", "Supervision.from_mask", "load_rows", "ViGOSTrainer", "evaluate"):
        assert re.search(rf'id="vigos\.[\w.]*{re.escape(name)}"', page), name
    assert "student_hidden" in page


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"|<link[^>]*\shref="([^"]+)"', text)
        assert not [a or b for a, b in loaded if (a or b).startswith(("http", "//"))], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
