"""Rollouts one step ahead of training, from a real server process: whose they are, and what becomes of them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.async_cases import KILLS, ROUNDED, STEPS, Watched, build, sampled_here, trained
from helpers.processes import HELPERS, TESTS, start_ranks, wait_for
from helpers.training import VALID_A, config, rows, tiny_student, trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

from vigos.errors import TrainingStopped
from vigos.report.charts import _phases
from vigos.report.page import load_run, rollout_data
from vigos.rollout.server import RolloutServerError
from vigos.system.files import read_json_lines
from vigos.train.checkpoint import EXIT_CODE, checkpoints
from vigos.train.config import ViGOSConfig

CLOCKS = ("perf/", "train_")
COUNTS = ("epoch", "total_flos")  # which transformers takes from micro-batches
EPOCH = 5  # steps


class Server:
    """A `slow_rollout_server.py` that runs."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        command = [sys.executable, str(HELPERS / "slow_rollout_server.py")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def url(self, behaviour: str) -> str:
        return f"http://127.0.0.1:{self.port}/{behaviour}/v1"

    def asked(self, behaviour: str) -> list[dict[str, Any]]:
        """Its requests for completions, in the order in which they came."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/") as answer:
            return [entry for entry in json.load(answer)["asked"] if entry["path"].startswith(f"/{behaviour}/")]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def logs_of(engine: Watched) -> list[dict[str, Any]]:
    """What was logged, clocks left out."""
    return [{k: v for k, v in log.items() if not k.startswith(CLOCKS)} for log in engine.state.log_history]


def lines(run: Path) -> list[str]:
    """The lines of metrics.jsonl, clocks left out, as they stand in the file."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        json.dumps({k: v for k, v in record.items() if not k.startswith(CLOCKS)})
        for record in records
        if "loss" in record
    ]


class Ends(TrainerCallback):
    """When each step ended, on the clock that the server has too."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.at.append(time.time())


class Slow(TrainerCallback):
    """Training takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)


class After(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, act: Callable[[Any], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act(control)


# --- Whose rollouts they are ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, Ends, Path]:
    """Eight steps, the sixth of which begins an epoch."""
    folder, ends = tmp_path_factory.mktemp("ran"), Ends()
    engine = build(folder / "run", server.url("ran"), ends)
    engine.train()
    return engine, ends, folder


@pytest.mark.slow
def test_rollouts_come_from_the_weights_of_one_step_before(ran: tuple[Watched, Ends, Path], server: Server) -> None:
    """Token by token what the model at hand writes from those weights; an epoch's first step has its own."""
    engine, ends, _ = ran
    assert sorted(engine.written) == list(range(STEPS))
    asked = server.asked("ran")
    differ = 0
    for step in range(STEPS):
        first = step % EPOCH == 0
        old = step if first else step - 1
        assert engine.written[step] == sampled_here(engine, step, engine.weights[old]), step
        differ += not first and engine.written[step] != sampled_here(engine, step, engine.weights[step])
        mine = [entry for entry in asked if entry["seed"] in engine.requests[step].seeds]
        assert len(mine) == len(engine.requests[step].examples)
        names = {entry["model"] for entry in mine}
        assert len(names) == 1, "from one set of weights, never from two"
        assert names.pop().startswith(f"vigos-{old}" if old else "base")
        if not first:
            assert all(entry["begin"] < ends.at[step - 1] for entry in mine), "beside the step before"
            assert all(entry["begin"] > ends.at[step - 2] for entry in mine if step > 1), "after the one before that"
    assert differ >= 3, "a step changes what is sampled, or this test would see nothing"
    assert len(asked) == sum(len(request.examples) for request in engine.requests.values()), "nothing past the end"
    assert not [t for t in threading.enumerate() if t.name.startswith("vigos-")]


@pytest.mark.slow
def test_the_same_run_twice_is_the_same_run(ran: tuple[Watched, Ends, Path], server: Server) -> None:
    """And a server that takes its time, now more, now less, changes nothing."""
    engine, _, folder = ran
    shutil.rmtree(folder / "again", ignore_errors=True)
    again = build(folder / "again", server.url("delay-0.05,again"))
    again.train()
    assert again.written == engine.written
    assert logs_of(again) == logs_of(engine)
    assert any(log.get("examples/skipped") == 1 for log in logs_of(engine))
    skipped = [[json.loads(line) for line in (folder / run / "skipped.jsonl").open()] for run in ("run", "again")]
    assert skipped[0] == skipped[1]
    assert [record["step"] // EPOCH for record in skipped[0]] == [0, 1][: len(skipped[0])]


@pytest.mark.slow
def test_micro_batches_change_no_rollout(server: Server, tmp_path: Path) -> None:
    """Four rows at once, or two and two more; an epoch's last step has two."""
    whole = build(tmp_path / "whole", server.url("whole"), per_device_train_batch_size=4, **ROUNDED)
    cut = build(tmp_path / "cut", server.url("cut"), gradient_accumulation_steps=2, **ROUNDED)
    for engine in (whole, cut):
        engine.train()
    assert cut.written == whole.written
    assert [request.micro_batches for request in cut.requests.values()] == [2, 2, 1, 2, 2, 1]
    for log, expected in zip(logs_of(cut), logs_of(whole), strict=True):
        kept = {k: v for k, v in expected.items() if k not in COUNTS}
        assert {k: v for k, v in log.items() if k not in COUNTS} == pytest.approx(kept, rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module")
def ranks(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = ["ranks", str(folder), server.url("delay-0.05,ranks")]
    processes = start_ranks(HELPERS / "async_cases.py", arguments, 2, folder)
    assert wait_for(processes, folder, timeout=200) == [0, 0]
    return folder


@pytest.mark.slow
def test_two_ranks_have_the_rollouts_of_one_process(server: Server, ranks: Path, tmp_path: Path) -> None:
    """Each samples its share ahead, and no adapter goes while the other still samples from it."""
    alone = build(tmp_path / "alone", server.url("alone"), **ROUNDED)
    alone.train()
    found = [json.loads((ranks / f"rollouts-{rank}.json").read_text()) for rank in range(2)]
    for step, rollouts in alone.written.items():
        assert [ids for each in found for ids in each[str(step)]] == rollouts, step
    weights = trained(alone)
    for rank in range(2):
        theirs = load_file(ranks / f"weights-{rank}.safetensors")
        assert max(float((theirs[name] - weights[name]).abs().max()) for name in weights) < 1e-4


@pytest.mark.slow
def test_a_rank_whose_server_fails_says_so_and_the_other_stops(ranks: Path) -> None:
    assert "chat/completions refused: status 400" in (ranks / "error-1.txt").read_text()
    assert "rank 0 of 2 stops: another rank has gone" in (ranks / "error-0.txt").read_text()


# --- What it is worth -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sampling_overlaps_training(server: Server, tmp_path: Path) -> None:
    """Sample the next rollouts while training sleeps for 0.6 s a step; bench/async_rollout.py has the gain."""
    found = {}
    for ahead in (0, 1):
        engine = build(
            tmp_path / str(ahead),
            server.url(f"delay-0.6,worth-{ahead}"),
            Slow(0.6),
            max_steps=4,
            async_rollout=bool(ahead),
            completion_steps=1,
        )
        engine.train()
        found[ahead] = [log for log in engine.state.log_history if "loss" in log]
    assert not any("perf/rollout_wait_s" in log for log in found[0]), "nothing new in a run without it"
    for log in found[1][1:]:
        assert log["perf/rollout_s"] > 0.6
        assert log["perf/rollout_wait_s"] < log["perf/rollout_s"] - 0.3
    assert [log["rollout/age"] for log in found[1]] == [0, 1, 1, 1]
    records = [r for p in sorted((tmp_path / "1" / "completions").glob("*.jsonl")) for r in read_json_lines(p)[0]]
    assert {(r["step"], r["version"]) for r in records} == {(1, 0), (2, 0), (3, 1), (4, 2)}
    assert {(r["step"], r["age"]) for r in rollout_data([load_run(tmp_path / "1")])["rollouts"]} == {
        (1, 0), (2, 1), (3, 1), (4, 1)
    }  # fmt: skip
    assert all(log["perf/sync_s"] > 0 for log in found[0][1:])
    assert found[1][0]["perf/rollout_wait_s"] > 0.6, "the first step has to wait for its own"


@pytest.mark.slow
def test_profile_tells_what_lay_beside(server: Server, tmp_path: Path) -> None:
    build(tmp_path, server.url("delay-0.3,profile"), Slow(0.4), max_steps=4, profile=True).train()
    table = (tmp_path / "profile" / "table.txt").read_text()
    seconds = {line[: line.index("  ")]: float(line.split()[-4]) for line in table.splitlines()[1:]}
    assert seconds["rollouts, overlapping"] > 0.3
    assert seconds["rollouts"] < seconds["rollouts, overlapping"] - 0.15
    parts = [v for name, v in seconds.items() if name not in ("a step", "rollouts, overlapping")]
    assert sum(parts) == pytest.approx(seconds["a step"], abs=2e-3)


def test_the_report_draws_what_a_step_waited_for() -> None:
    line = {"step": 3, "perf/rollout_s": 5.0, "perf/rollout_wait_s": 1.0, "perf/teacher_s": 0.5, "perf/step_s": 4.0}
    drawn = _phases(line)
    assert (drawn["rollouts"], drawn["rest"]) == (1.0, 2.5)
    del line["perf/rollout_wait_s"]
    assert _phases(line | {"perf/step_s": 6.0})["rollouts"] == 5.0


# --- Restarts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restarted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("restarts")
    arguments = ["restarts", str(folder), server.url("delay-0.1,restarts")]
    processes = start_ranks(HELPERS / "async_cases.py", arguments, 1, folder, env={"WORLD_SIZE": "1", "NO_PROXY": "*"})
    codes = wait_for(processes, folder, timeout=400)
    left = time.time()
    for log in sorted(folder.glob("*.log")):
        print(log.name, log.read_text()[-600:])
    assert codes == [0]
    return folder, json.loads((folder / "found.json").read_text()) | {"left": left}


@pytest.mark.slow
def test_killed_with_rollouts_under_way_it_ends_as_if_nothing_had_happened(
    restarted: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = restarted
    assert found["whole"] == 0
    killed = found["killed"]
    assert killed["kills"] == KILLS
    assert killed["with_rollouts"] >= KILLS - 2, "all checkpoints but an epoch's last hold the next step's"
    assert killed["restarts_from"] == sorted(killed["restarts_from"])
    assert killed["exit_code"] == 0
    assert len(lines(folder / "whole")) == STEPS // 2
    assert lines(folder / "killed") == lines(folder / "whole")
    ours, theirs = (load_file(folder / run / "adapter" / "adapter_model.safetensors") for run in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_sigterm_waits_for_the_rollouts_and_keeps_them(restarted: tuple[Path, dict[str, Any]]) -> None:
    folder, found = restarted
    assert found["stopped"]["exit_codes"] == [EXIT_CODE, 0]
    assert [name for name, kept in found["stopped"]["checkpoints"].items() if kept] == ["checkpoint-2"]
    assert lines(folder / "stopped") == lines(folder / "whole")


@pytest.mark.slow
def test_a_run_that_fails_does_not_wait_for_a_server_that_hangs(restarted: tuple[Path, dict[str, Any]]) -> None:
    _, found = restarted
    assert found["hangs"]["message"] == "no such luck"
    assert found["left"] - found["hangs"]["left_at"] < 20, "a request may take 600 s"


@pytest.mark.slow
def test_what_the_checkpoint_holds_decides(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the rollouts: the same run. Without, or for other options: sampled anew from the checkpoint's weights."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    whole = build(tmp_path / "run", server.url("decides"), **options)
    whole.train()
    checkpoint, state = tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2" / "vigos_state-0.json"
    kept = json.loads(state.read_text())
    assert kept["rollouts"]["completions"]["completions"] == whole.written[2]
    assert (
        json.loads((tmp_path / "run" / "checkpoint-4" / "vigos_state-0.json").read_text())["rollouts"]["completions"]
        is None
    )

    def resumed(**other: Any) -> Watched:
        engine = build(tmp_path / "run", server.url("decides"), **(options | other))
        engine.train(resume_from_checkpoint=str(checkpoint))
        return engine

    same = resumed()
    assert {step: whole.written[step] for step in (2, 3)} == same.written
    with caplog.at_level(logging.WARNING, logger="vigos.rollout.prefetch"):
        cooler = resumed(temperature=0.5)
    assert cooler.written[2] != whole.written[2]
    assert caplog.text.count("step 3 samples its rollouts now: those in the checkpoint are of other examples") == 1
    state.write_text(json.dumps(kept | {"rollouts": kept["rollouts"] | {"completions": None}}))
    without = resumed()
    assert without.written[2] != whole.written[2]
    assert without.written[2] == sampled_here(without, 2, without.weights[2]), "of the weights that it starts from"


# --- Faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_fails_ends_the_run_as_it_does_without(server: Server, tmp_path: Path) -> None:
    """The same message from the same step, with the same checkpoints, however far ahead the rollouts were."""
    found = {}
    for ahead in (0, 1):
        behaviour = f"refuses-at-7,fails-{ahead}"  # in the fourth step, whether a bad row came before or not
        run = tmp_path / str(ahead)
        engine = build(
            run, server.url(behaviour), async_rollout=bool(ahead), save_strategy="steps", save_steps=1, max_steps=5
        )
        with pytest.raises(RolloutServerError, match=r"chat/completions refused: status 400: .*enough of it") as error:
            engine.train()
        steps = [int(path.name.split("-")[1]) for path in checkpoints(run)]
        found[ahead] = (str(error.value).replace(behaviour, ""), steps, len(lines(run)))
        last = json.loads((checkpoints(run)[-1] / "vigos_state-0.json").read_text())
        assert last["rollouts"]["completions"] is None, "what failed is not kept"
    assert found[0] == found[1]
    again = build(tmp_path / "1", server.url("recovered"), save_strategy="steps", save_steps=1, max_steps=5)
    again.train(resume_from_checkpoint=str(checkpoints(tmp_path / "1")[-1]))
    assert again.state.global_step == 5
    assert len(lines(tmp_path / "1")) == 5


@pytest.mark.slow
def test_stopped_while_the_server_fails_it_still_has_its_checkpoint(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(control: Any) -> None:
        os.kill(os.getpid(), 15)
        time.sleep(0.05)

    engine = build(tmp_path, server.url("refuses-at-3,stopped"), After(1, stop))
    with caplog.at_level(logging.WARNING, logger="vigos.train.rollouts"):
        engine.train()
    assert engine.interrupted
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert "the checkpoint is without the next step's rollouts, whose sampling failed" in caplog.text
    assert "status 400" in caplog.text


@pytest.mark.slow
def test_an_epoch_that_is_broken_off_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    """Its next step's rollouts are dropped; the new epoch begins with its own rows and weights."""

    def end(control: Any) -> None:
        control.should_epoch_stop = True

    engine = build(tmp_path, server.url("broken-off"), After(2, end))
    engine.train()
    assert sorted(engine.written) == list(range(2 + EPOCH))
    assert engine.written[2] == sampled_here(engine, 2, engine.weights[2])
    assert engine.written[3] == sampled_here(engine, 3, engine.weights[2])


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1, 0, "1", None])
def test_nothing_but_true_and_false(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"async_rollout must be True or False, got {wrong!r}"):
        ViGOSConfig(output_dir=str(tmp_path), use_cpu=True, async_rollout=wrong)


@pytest.mark.parametrize("texts", [None, [VALID_A]], ids=["generate", "another of its kind"])
def test_an_engine_without_weights_of_its_own_is_refused(texts: list[str] | None, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"async_rollout must be false with an engine that samples from the model .* got true"
    ):
        trainer(tiny_student(), config(tmp_path, async_rollout=True), rows(2), texts=texts)


def test_nor_put_in_its_place_later(tmp_path: Path) -> None:
    options = {"rollout_engine": "server", "vllm_server_base_url": "http://127.0.0.1:9/v1", "rollout_model": "base"}
    engine = trainer(tiny_student(), config(tmp_path, async_rollout=True, max_steps=3, **options), rows(8))
    from helpers.training import ScriptedEngine

    engine.rollouts.engine = ScriptedEngine([VALID_A])
    with pytest.raises(ValueError, match=r"async_rollout must be false with .* got true with ScriptedEngine"):
        engine.train()


# --- Last, for it takes the server with it ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_process_that_is_killed(server: Server, tmp_path: Path) -> None:
    dies = After(2, lambda control: server.stop())
    engine = build(tmp_path, server.url("delay-0.5,killed"), dies, save_strategy="steps", save_steps=1)
    # While it samples; where a step takes longer than the server's answers, when it is asked next.
    with pytest.raises(
        TrainingStopped, match=r"(chat/completions|v1/models) failed 1 times, last with ConnectionError"
    ):
        engine.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
