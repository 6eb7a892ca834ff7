"""The command line as a user meets it: options from file and flags, errors in one line, exit codes."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import typer

from vigos.cli import UsageError, main, parse_run
from vigos.data.examples import load_rows
from vigos.divergence.engines import IMPLS
from vigos.doctor import examine


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return int(stop.value.code or 0)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: builtin\ndata: rows.jsonl\nlearning_rate: 1.0e-4\ntop_k: 7\nuse_cpu: true\n")
    source, config = parse_run(file, ["--learning-rate", "2e-4", "--output-dir", str(tmp_path / "out")])
    assert (source.model, source.data) == ("builtin", "rows.jsonl")
    assert (config.learning_rate, config.top_k, config.top_p) == (2e-4, 7, 0.95)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("model: m\ndata: d\nlearnin_rate: 1\n", [], r"unknown option 'learnin_rate'; did you mean 'learning_rate'"),
        ("model: m\ndata: d\n", ["--clip-mod", "none"], r"unknown option 'clip-mod'; did you mean 'clip_mode'"),
        ("model: m\n", [], r"--data is needed"),
        ("- a list\n", [], r"must hold a mapping of options, got list"),
    ],
)
def test_unknown_and_missing_options(tmp_path, text, flags, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        parse_run(file, [*flags, "--output-dir", str(tmp_path), "--use-cpu", "true"])


def test_misspelt_choice_names_the_choices(tmp_path, capsys):
    flags = ["--model", "m", "--data", "d", "--output-dir", str(tmp_path), "--use-cpu", "true"]
    with pytest.raises(typer.Exit) as stop:
        parse_run(None, [*flags, "--reasoning-prefix", "studnt"])
    assert stop.value.exit_code == 2
    printed = capsys.readouterr().err
    assert "studnt" in printed
    assert "student" in printed


def test_mistakes_end_in_one_line_and_code_2(tmp_path, capsys):
    assert run("train", "--config", str(tmp_path / "none.yaml")) == 2
    printed = capsys.readouterr().out
    assert "no such file" in printed
    assert "Traceback" not in printed


def test_missing_model_folder_is_one_line(tmp_path):
    data = tmp_path / "rows.jsonl"  # is read first, so it must be there
    data.write_text('{"problem": "What?", "answer": "7"}\n')
    options = ["--model", str(tmp_path / "none"), "--data", str(data), "--output", str(tmp_path)]
    command = [sys.executable, "-m", "vigos", "eval", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert str(tmp_path / "none") in done.stdout
    assert "Traceback" not in done.stderr


def test_list_options_shows_every_own_field(capsys):
    assert run("train", "--list-options") == 0
    printed = capsys.readouterr().out
    assert "--lambda_reference" in printed
    assert "--model" in printed


@pytest.mark.slow
def test_doctor_checks_every_engine_against_the_oracle(capsys):
    findings = {(f.section, f.name): f for f in examine()}
    assert {name for section, name in findings if section == "engines"} == set(IMPLS)
    assert findings["engines", "reference"].ok
    assert not any(f.ok is False for f in findings.values()), [f for f in findings.values() if f.ok is False]
    assert run("doctor", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == len(findings)


def test_world_generate_eval_and_compare(tmp_path, capsys):
    assert run("world", "generate", str(tmp_path / "w"), "--split", "test", "--n", "3") == 0
    for name, seed in (("a", "0"), ("b", "1")):
        paths = ["--data", str(tmp_path / "w" / "test.jsonl"), "--output", str(tmp_path / name)]
        sampling = ["--temperature", "1", "--max-new-tokens", "48", "--seed", seed]
        assert run("eval", "--model", "builtin", *paths, *sampling) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["rows"] == 9
    assert summary["score_rows"] == 6
    capsys.readouterr()
    assert run("compare", *(str(tmp_path / name / "records.jsonl") for name in "ab")) == 0
    assert "accuracy" in capsys.readouterr().out


def test_python_m_vigos_and_the_version():
    import vigos

    done = subprocess.run([sys.executable, "-m", "vigos", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    assert vigos.__version__ == importlib.metadata.version("vigos")
    assert vigos.load_rows is load_rows
