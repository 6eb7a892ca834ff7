"""Crashes of ranks: which of them are worth another start."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.processes import run_ranks

CRASH = """
import ctypes, signal, sys, time
from pathlib import Path

where, folder = sys.argv[1], Path(sys.argv[2])
libc = ctypes.CDLL(None)
starts = len(list(folder.parent.glob("start*")))
(folder.parent / f"start{starts}").touch()
if starts == 0 or where.endswith("always"):
    if where.startswith("outside"):  # a thread that the interpreter knows nothing of
        thread, argument = ctypes.c_ulong(), ctypes.c_void_p(signal.SIGSEGV)
        libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.raise_, ctypes.c_void_p), argument)
        time.sleep(60)
    else:
        libc.raise_(signal.SIGSEGV)
""".replace("libc.raise_", "libc['raise']")


@pytest.mark.parametrize(
    ("where", "code", "starts"), [("outside", 0, 2), ("outside, always", -11, 2), ("python", -11, 1)]
)
def test_a_crash_outside_python_is_given_one_more_start(where: str, code: int, starts: int, tmp_path: Path) -> None:
    script, folder = tmp_path / "crash.py", tmp_path / "ranks"
    script.write_text(CRASH)
    if starts == 2:
        with pytest.warns(UserWarning, match=r"rank 0 of crash\.py crashed in a thread without Python"):
            codes = run_ranks(script, [where, str(folder)], 1, folder, timeout=300)
    else:
        codes = run_ranks(script, [where, str(folder)], 1, folder, timeout=300)
    assert codes == [code]
    assert len(list(tmp_path.glob("start*"))) == starts
