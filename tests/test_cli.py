"""The command line as a user meets it: options from file and flags, errors in one line, exit codes."""

import ast
import dataclasses
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys

import pytest

from vigos.cli import main
from vigos.cli.commands import EVAL, PALR, PROBE, TRAIN
from vigos.cli.doctor import examine
from vigos.cli.options import UsageError, declared
from vigos.data.examples import load_rows
from vigos.divergence.engines import IMPLS
from vigos.system.screen import make_console, print_table


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return int(stop.value.code or 0)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: builtin\ndata: rows.jsonl\nlearning_rate: 1.0e-4\ntop_k: 7\nuse_cpu: true\n")
    source, config = TRAIN.parse(file, ["--learning-rate", "2e-4", "--output-dir", str(tmp_path / "out")])
    assert (source.model, source.data) == ("builtin", "rows.jsonl")
    assert (config.learning_rate, config.top_k, config.top_p) == (2e-4, 7, 0.95)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("model: m\ndata: d\nlearnin_rate: 1\n", [], r"unknown option 'learnin_rate'; did you mean 'learning_rate'"),
        ("model: m\ndata: d\n", ["--clip-mod", "none"], r"unknown option 'clip-mod'; did you mean '?--clip-mode"),
        ("model: m\n", [], r"--data is needed"),
        ("- a list\n", [], r"must hold a mapping of options, got list"),
    ],
)
def test_unknown_and_missing_options(tmp_path, text, flags, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        TRAIN.parse(file, [*flags, "--output-dir", str(tmp_path), "--use-cpu", "true"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher", "emma"], r"--teacher must be one of frozen, ema, live, got 'emma'; did you mean 'ema'\?"),
        (["--learning-rate", "fast"], "--learning-rate must be a number, got 'fast'"),
        (["--max-steps", "1.5"], "--max-steps must be a whole number, got '1.5'"),
        (["--lora", "perhaps"], "--lora must be true or false, got 'perhaps'"),
        (["--data-root"], "--data-root must be followed by a value"),
        (["stray"], "command line: unexpected argument 'stray'"),
    ],
)
def test_a_wrong_value_is_one_line_before_anything_is_imported(tmp_path, flags, message):
    script = "import sys; from vigos.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    options = ["--model", "m", "--data", "d", "--output-dir", str(tmp_path)]
    command = [sys.executable, "-c", script, "train", *options, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == "False\n", "torch was imported"
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_options_are_those_of_the_classes():
    """The command line reads the source of the dataclasses; it must see what Python sees."""
    from vigos.eval.config import EvalConfig
    from vigos.launch import EvalSource, PalrSource, Source
    from vigos.method.objective import choices_of
    from vigos.train.config import ViGOSConfig

    for kind in (Source, PalrSource, EvalSource, EvalConfig):
        fields = {f.name: f for f in dataclasses.fields(kind)}
        options = declared(kind.__module__, kind.__name__)
        assert [o.name for o in options] == list(fields)
        for option in options:
            assert option.help == fields[option.name].metadata["help"]
            assert ast.literal_eval(option.default) == fields[option.name].default
    fields = {f.name: f for f in dataclasses.fields(ViGOSConfig)}
    options = TRAIN.options()
    for name, field in fields.items():
        assert not field.init or name in options, name
    for option in declared("vigos.train.config", "ViGOSConfig"):
        assert option.help == fields[option.name].metadata["help"]
        assert option.choices == choices_of(ViGOSConfig).get(option.name, ())
        assert option.group


@pytest.mark.parametrize("command", [TRAIN, PALR, EVAL, PROBE], ids=lambda c: c.name)
def test_help_lists_what_is_needed_first_and_fits(command, capsys):
    assert run(command.name, "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Usage: vigos {command.name} --model")
    assert f"Example:\n  vigos {command.name} " in printed
    for width in (60, 80, 120):
        lines = command.help(width).splitlines()
        options = lines[lines.index("Options:") : lines.index("Example:")]
        assert max(map(len, options)) <= max(width, 70)
    assert run(command.name, "--list-options") == 0
    listed = capsys.readouterr().out
    assert all(option.flag in listed for option in command.options().values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "line 2: the key 'model' again"),
        ("model: &x a\ndata: *x\n", r"line 2: an alias \(\*name\) is not read here"),
        ("model: !!python/name:os.system\n", "line 1: could not determine a constructor"),
        ("model: [a, b]\n", "model: must be text, got a list|model must be text, got a list"),
        ("model: a\n  data: b\n", "line 2: mapping values are not allowed here"),
        ("model: a\nlearning_rate: fast\n", "learning_rate must be a number, got 'fast'"),
        ("data: " + "[" * 5000, "run.yaml"),
    ],
)
def test_mistakes_in_a_config_file_name_the_place(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        TRAIN.parse(file, [])


def test_mistakes_end_in_one_line_on_stderr_and_code_2(tmp_path, capsys):
    assert run("train", "--config", str(tmp_path / "[red]none[/b].yaml")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: --config: no such file: {tmp_path}/[red]none[/b].yaml\n"


def test_errors_move_no_cursor(tmp_path, capsys):
    assert run("compare", str(tmp_path / "\x1b]0;title\x07\nerror: forged"), "b") == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "\x1b" not in printed
    assert r"\x1b]0;title\x07" in printed


def test_missing_model_folder_is_one_line(tmp_path):
    data = tmp_path / "rows.jsonl"  # is read first, so it must be there
    data.write_text('{"problem": "What?", "answer": "7"}\n')
    options = ["--model", str(tmp_path / "none"), "--data", str(data), "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", "vigos", "eval", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert str(tmp_path / "none") in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("width", "block"), [(40, True), (60, True), (80, True), (110, False), (None, False)])
def test_tables_never_cut_a_number(width, block, monkeypatch):
    rows = [("accuracy", "300", "67.7 %", "69.0 %", "+1.3", "-2.0 to +4.7", "0.56789"), ("prior", *["1.2345678"] * 6)]
    columns = ("metric", "examples", "a", "b", "b - a", "95 % interval", "p")
    output = io.StringIO()
    console = make_console(file=output, force_terminal=width is not None, width=width, color_system=None)
    print_table(console, columns, rows)
    text = output.getvalue()
    assert all(cell in text for row in rows for cell in row)
    assert "…" not in text
    assert ("  95 % interval: -2.0 to +4.7" in text) == block
    if width is not None:
        assert max(map(len, text.splitlines())) <= width


def test_an_ascii_terminal_gets_ascii():
    script = "from vigos.system.screen import *; print_table(make_console(), ('a', 'b'), [('–', 'λ … é')])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"lambda ... ?" in done.stdout


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
        paths = ["--data", str(tmp_path / "w" / "test.jsonl"), "--output-dir", str(tmp_path / name)]
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
