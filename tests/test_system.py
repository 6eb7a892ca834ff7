"""Files that are replaced, read back around damage, and folders that one process owns: with real processes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vigos.system.files import FolderInUse, owned, read_json_lines, replace_file, replace_json
from vigos.system.text import printable


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    """Killed with SIGKILL at any moment of a thousand replacements."""
    path = tmp_path / "value.json"
    replace_json(path, {"n": 0, "text": "x" * 200_000})
    script = (
        "import sys\nfrom vigos.system.files import replace_json\n"
        "for n in range(100_000): replace_json(sys.argv[1], {'n': n, 'text': 'x' * 200_000}); print(n, flush=True)\n"
    )
    for wait in (1, 3, 7):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(wait):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(json.loads(path.read_text())["text"]) == 200_000


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = replace_file(tmp_path / "a" / "page.html", "old")
    script = (
        "import resource, sys\nfrom vigos.system.files import replace_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\nimport signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: replace_file(sys.argv[1], 'n' * 5000)\nexcept OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert f"{path} could not be written" in done.stdout, done.stderr
    assert "it is as it was" in done.stdout
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = replace_file(tmp_path / "file", "a")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(0o640)
    replace_file(path, "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_lines_are_read_around_damage(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    deep = b"[" * 100_000
    file.write_bytes(b'{"n": 1}\n{"n": 2\n\xff\xfe\n[3]\n' + deep + b'\n\n{"n": 4}\n{"n": 5')
    found, damaged = read_json_lines(file)
    assert [line["n"] for line in found] == [1, 4]
    assert damaged == 4


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    with (
        owned(tmp_path, "vigos train"),
        pytest.raises(FolderInUse, match=rf"in use by `vigos train`, process {os.getpid()} on \S+ since \d{{4}}-"),
        owned(tmp_path, "vigos eval"),
    ):
        pass
    with owned(tmp_path, "vigos eval"):
        pass


def test_the_owner_is_known_to_other_processes_and_forgotten_when_it_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom vigos.system.files import owned\n"
        "with owned(sys.argv[1], 'vigos train'): print('owned', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"owned\n"
    with pytest.raises(FolderInUse, match=f"process {process.pid} on "), owned(tmp_path, "vigos eval"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 120
    while True:
        try:
            with owned(tmp_path, "vigos eval"):
                break
        except FolderInUse:
            assert time.monotonic() < deadline, "the lock of a killed process stayed"


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x1b]0;title\x07", "a\nerror: forged", "a\rb", "\u202egnp.exe", "\x9b31m", "\ud800", "\x00"]
)
def test_printable_text_obeys_no_terminal(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable("Grüße, 東京 [red]x[/]") == "Grüße, 東京 [red]x[/]"
    assert printable(shown) == shown
