"""A script in a process of its own: a deadline over the whole exchange, and a new process after one that died."""

from pathlib import Path

import pytest

from vigos.sandbox import Worker, WorkerDied

SCRIPT = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin.buffer:
    question = json.loads(line)
    if question == "echo":
        print(json.dumps({"bytes": 3}), flush=True)
        sys.stdout.buffer.write(b"abc")
    elif question == "stall":  # in the middle of its line
        sys.stdout.write('{"bytes')
        sys.stdout.flush()
        time.sleep(60)
    elif question == "short":  # fewer bytes than it says
        print(json.dumps({"bytes": 1000}), flush=True)
        time.sleep(60)
    elif question == "deaf":  # leaves its input in the pipe
        time.sleep(60)
    elif question == "die":
        os._exit(7)
    elif question == "garbage":
        print("[1, 2", flush=True)
        time.sleep(60)
    sys.stdout.flush()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return Worker(script)


@pytest.mark.parametrize(("question", "payload"), [("stall", b""), ("short", b""), ("deaf", b"x" * 2**22)])
def test_a_deadline_ends_every_part_of_an_exchange(worker: Worker, question: str, payload: bytes) -> None:
    assert worker.ask("echo", timeout_s=60) == ({"bytes": 3}, b"abc")
    first = worker.process
    with pytest.raises(TimeoutError, match=r"no answer in 0\.5 s"):
        worker.ask(question, payload, timeout_s=0.5)
    assert first is not None
    assert first.poll() is not None
    assert worker.ask("echo", timeout_s=60) == ({"bytes": 3}, b"abc")
    worker.stop()


def test_a_death_has_its_code(worker: Worker) -> None:
    with pytest.raises(WorkerDied, match="ended with code 7") as death:
        worker.ask("die", timeout_s=60)
    assert death.value.code == 7
    with pytest.raises(WorkerDied, match="ended with code -9"):
        worker.ask("garbage", timeout_s=60)
    assert worker.ask("echo", timeout_s=60)[1] == b"abc"
    worker.stop()


def test_a_script_that_does_not_start(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(ImportError, match="did not start: it ended with code 3"):
        Worker(script).ask("echo", timeout_s=60)
