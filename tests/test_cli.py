"""The command line as a user meets it: options from file and flags, errors in one line, exit codes."""

import ast
import dataclasses
import importlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vigos.cli import main
from vigos.cli.app import EVAL, PALR, PROBE, TRAIN
from vigos.cli.doctor import examine
from vigos.cli.folders import output_folder
from vigos.cli.options import UsageError, declared
from vigos.cli.train import after_training, check_trackers
from vigos.data.examples import load_rows
from vigos.divergence.engines import IMPLS
from vigos.launch import Source, run_facts
from vigos.system.files import RUN, owned
from vigos.system.screen import make_console, print_table
from vigos.train.run_folder import RunFolder
from vigos.train.watch import Watch, duration


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return int(stop.value.code or 0)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: builtin\ndata: rows\nlearning_rate: 1.0e-4\ntop_k: 7\nuse_cpu: true\n")
    source, config = TRAIN.parse(file, ["--learning-rate", "2e-4", "--output-dir", str(tmp_path / "out")])
    assert (source.model, source.data) == ("builtin", "rows")
    assert (config.learning_rate, config.top_k, config.top_p) == (2e-4, 7, 0.95)


def test_what_messages_advise_can_be_typed(tmp_path):
    """`no` in YAML is a word where words are wanted; None unsets an option; a split can be named."""
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nsave_strategy: no\nlora: no\ngrade_rollouts: off\nuse_cpu: yes\n")
    flags = ["--output-dir", str(tmp_path), "--images-column", "None", "--split", "validation", "--normalize", "null"]
    source, config = TRAIN.parse(file, [*flags, "--report-to", "none"])
    assert (source.split, config.images_column, config.save_strategy) == ("validation", None, "no")
    assert (config.lora, config.grade_rollouts, config.use_cpu, config.report_to) == (False, False, True, [])
    source, _ = EVAL.parse(
        None, [*["--model", "m", "--data", "d", "--output-dir", "o", "--images-column", "None", "--split", "test"]]
    )
    assert (source.images_column, source.split) == (None, "test")


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
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
        assert max(map(len, command.help(width).splitlines())) <= width
    assert run(command.name, "--list-options") == 0
    listed = capsys.readouterr().out
    assert all(option.flag in listed for option in command.options().values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "line 2: the key 'model' again"),
        ("model: &x a\ndata: *x\n", r"line 2: an alias \(\*name\) is not read here"),
        ("a: &a [x,x]\n" + "b: &b [*a,*a]\n" * 20, "line 2: an alias"),
        ("model: !!python/name:os.system\n", r"line 1: a tag \(tag:yaml.org,2002:python/name:os.system\) is not"),
        ("model: !!binary aGk=\n", "line 1: a tag"),
        ("\nmodel: [a, b]\n", "line 2: model must be one value, got a list"),
        ("model: 5\n", "line 1: model must be text, got 5: quote it"),
        ("lora_target_modules: [a, {b: c}]\n", "lora_target_modules must be texts, got a list"),
        ("max_steps: {a: 1}\n", "max_steps must be one value, got a dict"),
        ("max_steps: true\n", "max_steps must be a whole number, got 'True'"),
        ("max_steps: " + "9" * 5000, "line 1: a number of more than 20 digits"),
        ("max_steps: 1.0e+400\n", "max_steps must be a whole number"),
        ("learning_rate: .nan\n", "line 1: not a number"),
        ("model: a\n  data: b\n", "line 2: mapping values are not allowed here"),
        ("model: a\nlearning_rate: fast\n", "learning_rate must be a number, got 'fast'"),
        ("data: " + "[" * 5000, "run.yaml, line 1: more than 20 levels"),
        ("# " + "x" * 2**18, "must have at most 262144 bytes"),
        (b"model: \xff\xfe", "line 1: not UTF-8"),
        ("model: a\x00b", "run.yaml"),
        ("1: a\n", "line 1: a key must be text, got 1: quote it"),
        ("[a]: b\n", "line 1: a key must be text"),
        ("<<: {model: a}\n", "unknown option '<<'"),
        ("- model\n", "must hold a mapping of options, got list"),
        ("model: a\n---\nmodel: b\n", "line 2: but found another document"),
        ("model: 'a\n", "found unexpected end of stream"),
    ],
)
def test_mistakes_in_a_config_file_name_the_place(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        TRAIN.parse(file, [])


def test_dates_and_quoted_numbers_in_a_config_file_are_text(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: '5'\ndata: 2026-99-99\noutput_dir: 12:30 o\nlora: 1\nmax_steps: '7'\nlearning_rate: 5e-6\n")
    source, config = TRAIN.parse(file, ["--use-cpu", "true"])
    assert (source.model, source.data, config.output_dir) == ("5", "2026-99-99", "12:30 o")
    assert (config.lora, config.max_steps, config.learning_rate) == (True, 7, 5e-6)


def test_mistakes_end_in_one_line_on_stderr_and_code_2(tmp_path, capsys):
    assert run("train", "--config", str(tmp_path / "[red]none[/b].yaml")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: --config: no such file: {tmp_path}/[red]none[/b].yaml\n"
    assert run("report", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err == f"error: no such file or folder: {tmp_path}/none\n"


def test_errors_move_no_cursor(tmp_path, capsys):
    assert run("compare", str(tmp_path / "\x1b]0;title\x07\nerror: forged"), "b") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "\x1b" not in printed
    assert r"\x1b]0;title\x07" in printed


def test_missing_model_folder_is_one_line(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"problem": "What?", "answer": "7"}\n')
    options = ["--model", str(tmp_path / "none"), "--data", str(data), "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", "vigos", "eval", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: --model: no such folder: {tmp_path / 'none'}\n")


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
    assert summary["examples"] == 9
    assert summary["score_examples"] == 6
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


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("vigos comp", "compare"), ("vigos train --learn", "--learning-rate"), ("vigos eval --k", "--k")],
)
def test_a_shell_completes_commands_and_options(words, wanted):
    asked = {"_VIGOS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    script = "import sys; sys.argv = ['vigos']; from vigos.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == [wanted], done.stderr


@pytest.mark.parametrize(
    ("missing", "use", "wanted"),
    [
        ("transformers", "vigos.ViGOSTrainer", "vigos.ViGOSTrainer needs transformers: .*train"),
        ("requests", "vigos.evaluate", "vigos.evaluate needs requests: .*train"),
        ("typer", "importlib.import_module('vigos.cli')", "the vigos command needs typer: .*train"),
        ("jinja2", "importlib.import_module('vigos.report.page').render([])", "jinja2: .*report"),
    ],
    ids=lambda word: word.split("(")[0],
)
def test_what_is_not_installed_is_named_with_its_extra(missing, use, wanted, monkeypatch):
    import vigos

    for name in ("cli", "train.trainer", "system.http", "eval.evaluate", "eval.judge", "rollout.server"):
        parent, _, leaf = f"vigos.{name}".rpartition(".")
        if loaded := sys.modules.get(f"{parent}.{leaf}"):
            monkeypatch.setattr(sys.modules[parent], leaf, loaded)  # put back, as the next line's is
            monkeypatch.delitem(sys.modules, f"{parent}.{leaf}")
    for name in ("ViGOSTrainer", "evaluate"):
        monkeypatch.delitem(vars(vigos), name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises((ImportError, ValueError, SystemExit), match=rf"{wanted}\]'$"):
        eval(use, {"vigos": vigos, "importlib": importlib})


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_imported(tmp_path):
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    script = "import sys; from vigos.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    options = ["--model", "m", "--data", "d", "--output-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *options], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert re.fullmatch(
        r"error: --output-dir: .* holds an earlier run \(adapter, metrics.jsonl\): go on with --resume auto, "
        r"replace it with --overwrite, or name another folder\n",
        done.stderr,
    )
    assert (folder / "metrics.jsonl").is_file()


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    for name in ("adapter", "checkpoint-3", "merged", "eval"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "notes.txt").touch()
    with output_folder(tmp_path, "vigos train", RUN, resume=True, overwrite=True):
        assert (tmp_path / "adapter").is_dir(), "a resumed run is not deleted"
    with output_folder(tmp_path, "vigos train", RUN, overwrite=True):
        left = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
        assert left == {"eval", "notes.txt"}
    with pytest.raises(UsageError, match="must be a folder, got the file"), output_folder(tmp_path / "notes.txt", "x"):
        pass


def test_a_second_process_is_told_who_owns_the_folder(tmp_path, capsys):
    with owned(tmp_path, "vigos train"):
        assert run("eval", "--model", "builtin", "--data", "x", "--output-dir", str(tmp_path)) == 1
    printed = capsys.readouterr().err
    assert f"is in use by `vigos train`, process {os.getpid()} on " in printed
    assert printed.count("\n") == 1


def test_only_the_leader_rank_owns_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "metrics.jsonl").touch()
    with owned(tmp_path, "rank 0"), output_folder(tmp_path, "vigos train", RUN):
        pass


def test_a_missing_data_file_is_said_at_once(tmp_path, capsys):
    options = ["--model", "m", "--data", str(tmp_path / "none.jsonl"), "--output-dir", str(tmp_path / "x")]
    assert run("train", *options) == 2
    assert capsys.readouterr().err == f"error: --data: no such file: {tmp_path}/none.jsonl\n"


def test_demo_yaml_is_the_demo(tmp_path):
    from vigos.study.demo import FULL
    from vigos.study.plan import world_config

    data = tmp_path / "train.jsonl"
    data.touch()
    file = Path(__file__).parents[1] / "configs" / "demo.yaml"
    source, config = TRAIN.parse(file, ["--data", str(data), "--output-dir", str(tmp_path / "run")])
    assert source.model == "builtin"
    sizes = {"max_steps": FULL.steps, "per_device_train_batch_size": FULL.examples_a_step}
    demo = world_config(tmp_path / "run", seed=0, completion_steps=5, completion_top_k=5, **sizes)
    mine, theirs = config.to_dict(), demo.to_dict()
    differing = {name for name in theirs if mine[name] != theirs[name]}
    assert differing <= {"prompts_file", "disable_tqdm", "logging_dir"}, differing


def test_the_config_of_a_run_repeats_it(tmp_path):
    """config.yaml has every option in sections, derived ones and masked secrets included."""
    data = tmp_path / "train.jsonl"
    data.touch()
    flags = ["--model", "builtin", "--data", str(data), "--output-dir", str(tmp_path / "a"), "--use-cpu", "true"]
    flags += ["--preset", "released", "--clip-mode", "none", "--max-steps", "7", "--save-strategy", "no"]
    flags += ["--hub-token", "hf_secret", "--lora-target-modules", "q_proj", "v_proj", "--lr-scheduler-type", "cosine"]
    source, config = TRAIN.parse(None, flags)
    RunFolder(tmp_path / "a").write_config(config, **run_facts(source))
    text = (tmp_path / "a" / "config.yaml").read_text()
    assert "hf_secret" not in text
    again, repeated = TRAIN.parse(tmp_path / "a" / "config.yaml", ["--output-dir", str(tmp_path / "b")])
    assert again == source
    mine, theirs = config.to_dict(), repeated.to_dict()
    differing = {name for name in mine if mine[name] != theirs[name]}
    assert differing <= {"output_dir", "logging_dir", "hub_token"}, differing


def test_a_run_records_its_data_and_no_secret(tmp_path, monkeypatch):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    monkeypatch.setattr(sys, "argv", ["vigos", "train", "--hub-token", "hf_1", "--hub_token=hf_2", "--seed", "3"])
    facts = run_facts(Source(model="m", data=str(data)))
    assert facts["command"] == "vigos train --hub-token <SECRET> --hub_token=<SECRET> --seed 3"
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    assert facts["machine"]
    assert (facts["model"], facts["data"]) == ("m", str(data))
    before = facts["data_digest"]
    data.write_text("[]\n")
    assert run_facts(Source(data=str(data)))["data_digest"] != before
    assert run_facts(Source(data="owner/name"))["data_digest"] is None


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else 1)
    with pytest.raises(UsageError, match="--report-to: wandb is not installed: pip install wandb"):
        check_trackers("wandb")
    with pytest.raises(UsageError, match="wandb is not installed"):
        check_trackers(["tensorboard", "wandb"])
    check_trackers("none")
    check_trackers(None)


def test_the_line_of_a_step():
    watch = Watch(make_console(file=io.StringIO()))
    watch.started, watch.first_step = time.perf_counter() - 10, 10
    logs = {
        "loss": 0.01234, "rollout/valid": 0.9, "rollout/accuracy": 0.5, "kl/perception": 0.1, "kl/reasoning": 0.2,
        "kl/reference": 0.0, "perf/tokens_per_s": 1234.5,
    }  # fmt: skip
    line = watch.line(20, 240, logs)
    assert line.startswith("step  20/240  loss 0.0123  valid 90 %  right 50 %  KL description 0.100 reasoning 0.200  ")
    assert "1,234 tokens/s" in line
    assert line.endswith(" left")
    assert "left" not in watch.line(240, 240, logs)
    assert watch.line(1, 2, {"loss": 1.0}) == "step 1/2  loss 1.0000"
    assert [duration(s) for s in (5, 700, 12_000)] == ["5 s", "12 min", "3 h 20 min"]


def test_the_end_of_a_run_says_where_it_is_what_was_skipped_and_what_next(tmp_path):
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    skipped = [{"reason": "too_long"}, {"reason": "too_long"}, {"reason": "\x1b[2J"}]
    (tmp_path / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in skipped))
    text = "\n".join(after_training(tmp_path))
    assert f"the run is in {tmp_path}: adapter/, merged/" in text
    assert r"skipped 3 examples: 2 too_long, 1 \x1b[2J" in text
    assert f"vigos eval --model {tmp_path}/merged" in text
    assert f"vigos report {tmp_path}" in text
