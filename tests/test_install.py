"""From the source archive over a wheel into an empty environment: nothing is missing, and the extension is built."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import HELPERS

ROOT = Path(__file__).parents[1]


def run(*command: str, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, made from what git tracks: nothing of this folder's builds gets in."""
    folder = tmp_path_factory.mktemp("sources")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT).split("\0")
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w") as tar:
        for name in filter(None, files):
            if (ROOT / name).exists():
                tar.add(ROOT / name, name)
    packed.seek(0)
    with tarfile.open(fileobj=packed) as tar:
        tar.extractall(folder, filter="tar")
    script = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    run(sys.executable, "-c", script, folder=folder)
    return next((folder / "dist").glob("*.tar.gz"))


def test_the_archive_holds_what_a_build_needs(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    kernels = [f"vigos/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")]
    templates = [str(p.relative_to(ROOT)) for p in (ROOT / "vigos" / "report" / "templates").iterdir()]
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", *tracked, *kernels, *templates}
    assert not wanted - names


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the extension is compiled
def test_from_the_archive_over_a_wheel_into_an_empty_environment(archive: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip")
    build = ("--no-index", "--no-deps", "--no-build-isolation", "--quiet")
    compiling = {"VIGOS_BUILD": "require", "CMAKE_CXX_COMPILER_LAUNCHER": str(HELPERS / "unoptimized.sh")}
    run(*pip, "wheel", *build, "--wheel-dir", str(tmp_path), str(archive), folder=tmp_path, **compiling)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"), folder=tmp_path)
    python = str(tmp_path / "env" / "bin" / "python")
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    run(*pip, "install", *build[:2], "--quiet", "--target", str(packages), str(wheel), folder=tmp_path)
    # torch and the rest come from here. The path files here, which name the checkout, are not followed there.
    (packages / "rest.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    where = run(python, "-c", "import vigos, vigos._C; print(vigos.__file__, vigos._C.__file__)", folder=tmp_path)
    assert all(path.startswith(str(packages)) for path in where.split()), where
    findings: list[dict[str, Any]] = json.loads(run(python, "-m", "vigos", "doctor", "--json", folder=tmp_path))
    found = {(f["section"], f["name"]): f for f in findings}
    assert found["machine", "vigos._C"]["ok"]
    assert found["engines", "cpu"]["ok"]
    assert not [f for f in findings if f["ok"] is False]
    assert run(python, "-m", "vigos", "--version", folder=tmp_path).startswith("vigos ")
