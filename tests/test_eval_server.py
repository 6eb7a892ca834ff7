"""`vigos eval --server-url`: the same records as with the model at hand, from a real server process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_rollout_server import start

from vigos.cli import main
from vigos.world import write_world


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return write_world(tmp_path / "world", "test", n=3, seed=7)


def run(rows: Path, output: Path, *options: str) -> int:
    command = ["eval", "--model", "builtin", "--data", str(rows), "--output-dir", str(output), "--max-new-tokens", "48"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--temperature", "0.8", "--k", "2", *options])
    return int(stop.value.code or 0)


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()[1:]]


@pytest.mark.slow
def test_answers_from_a_server(rows: Path, tmp_path: Path) -> None:
    process, port = start()
    try:
        served = ["--server-url", f"http://127.0.0.1:{port}/good/v1", "--server-model", "base"]
        assert run(rows, tmp_path / "served", *served) == 0
    finally:
        process.kill()
        process.wait()
    assert run(rows, tmp_path / "local") == 0
    assert records(tmp_path / "served") == records(tmp_path / "local")
    assert len(records(tmp_path / "local")) == 9


def test_half_an_address_or_an_adapter_is_refused(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(rows, tmp_path / "a", "--server-url", "http://127.0.0.1:1/v1") == 1
    assert "server_url and server_model go together" in capsys.readouterr().err
    options = ["--server-url", "http://127.0.0.1:1/v1", "--server-model", "base", "--adapter", "runs/x"]
    assert run(rows, tmp_path / "b", *options) == 1
    assert "adapter must be loaded by the server" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
