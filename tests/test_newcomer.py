"""Do what a new user does, in its short form: the commands of `tests/newcomer.sh`, as processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_commands_of_a_new_user(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "NEWCOMER_FOLDER": str(tmp_path)}
    script = Path(__file__).with_name("newcomer.sh")
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("newcomer: all is well\n")
