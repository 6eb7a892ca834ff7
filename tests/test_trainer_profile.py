"""`--profile`, and the configurations and the memory table that docs/scaling.md speaks of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.processes import output_of
from helpers.training import CUT_OFF, VALID_A, config, rows, tiny_student, trainer

from vigos.cli.app import TRAIN
from vigos.train.metrics import peak_tflops
from vigos.train.profiling import NAMES, Phases, table

ROOT = Path(__file__).parents[1]
PHASES = set(NAMES) - {"sync"}  # nobody is sent weights


def test_profile_says_where_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = config(tmp_path, max_steps=5, profile=True, clip_mode="none", max_completion_length=8)
    engine = trainer(tiny_student(), args, rows(10))
    engine.train()
    written = (tmp_path / "profile" / "table.txt").read_text()
    assert written in capsys.readouterr().out
    seconds = {line[: line.index("  ")]: float(line.split()[-4]) for line in written.splitlines()[1:]}
    assert seconds.keys() == {*PHASES, "the rest", "a step"}
    assert all(value > 0 for name, value in seconds.items() if name != "the rest")
    assert sum(v for n, v in seconds.items() if n != "a step") == pytest.approx(seconds["a step"], abs=2e-3)
    assert seconds["rollouts"] > seconds["divergence"], "eight forwards against one small product"
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    ranges = {e["name"] for e in trace["traceEvents"] if str(e.get("name", "")).startswith("vigos::")}
    assert ranges >= {f"vigos::{name}" for name in PHASES}
    logs = [log for log in engine.state.log_history if "loss" in log]
    assert all(log["perf/tflops"] > 0 and log["perf/tokens_per_s"] > 0 for log in logs)
    assert not any("perf/mfu" in log for log in logs), "nobody states the peak of a CPU"


def test_images_are_decoded_in_other_processes(tmp_path: Path) -> None:
    """With workers for the rows a run is the same run."""
    found = []
    for workers in (0, 2):
        args = config(tmp_path, max_steps=3, clip_mode="none", max_completion_length=8, dataloader_num_workers=workers)
        data = [*rows(5), {**rows(1)[0], "answer": ""}]
        engine = trainer(tiny_student(), args, data)
        engine.train()
        found.append([{k: v for k, v in log.items() if "perf/" not in k} for log in engine.state.log_history[:3]])
    assert found[0] == found[1]
    assert sum(log["examples/skipped"] for log in found[0]) == 1


def test_profile_needs_its_steps(tmp_path: Path) -> None:
    engine = trainer(tiny_student(), config(tmp_path, max_steps=3, profile=True), rows(4), texts=[VALID_A, CUT_OFF])
    with pytest.raises(ValueError, match="profile needs at least 4 steps, got 3"):
        engine.train()
    args = config(tmp_path, max_steps=4, save_strategy="steps", save_steps=3)
    trainer(tiny_student(), args, rows(4), texts=[VALID_A, CUT_OFF]).train()
    args = config(tmp_path, max_steps=4, profile=True)
    trainer(tiny_student(), args, rows(4), texts=[VALID_A, CUT_OFF]).train(str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "adapter").is_dir(), "a resumed run with fewer steps left goes on, without a profile"
    assert not (tmp_path / "profile").exists()


def test_phases_count_no_second_twice() -> None:
    phases = Phases()
    with phases("teachers"):
        pass
    assert sum(phases.seconds.values()) == 0, "off"
    phases.on = True
    with phases("backward"), phases("student forward"):
        torch.ones(300, 300) @ torch.ones(300, 300)
    assert phases.seconds["backward"] < phases.seconds["student forward"]
    assert table({"teachers": 1.0}, total=4.0, steps=2).splitlines()[1:] == [
        "teachers     0.5000 s   25.0 %", "the rest     1.5000 s   75.0 %", "a step       2.0000 s  100.0 %",
    ]  # fmt: skip
    assert peak_tflops(torch.device("cpu")) is None


# --- configs/ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_takes_the_configurations(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through accelerate's own launcher, up to the environment that it would start eight processes with."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.chdir(ROOT)
    path = f"configs/{name}.yaml"
    assert load_config_from_file(path).num_processes == 8
    args = launch_command_parser().parse_args(["--config_file", path, "-m", "vigos", "train"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # what the launcher asks before it takes the file
    args, *_ = _validate_launch_command(args)
    assert args.num_processes == 8
    if name.startswith("zero"):
        assert args.use_deepspeed
        found = HfDeepSpeedConfig(args.deepspeed_config_file)
        assert (found.get_value("zero_optimization.stage"), found.is_zero3()) == (int(name[-1]), name == "zero3")
        for key in ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            assert found.get_value(key) == "auto", "the trainer's own value counts"
        return
    env = prepare_multi_gpu_env(args)
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (env.get("ACCELERATE_USE_FSDP"), env.get("FSDP_VERSION")) == (
        ("true", "2") if name == "fsdp2" else (None, None)
    )
    if name == "fsdp2":
        from accelerate.utils import FullyShardedDataParallelPlugin

        for key, value in env.items():
            if key.startswith("FSDP_"):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
        assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
        assert "transformer" in str(plugin.auto_wrap_policy)


RUNS = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if not p.read_text().startswith("# accelerate launch")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_configuration_is_read(path: Path, tmp_path: Path) -> None:
    """By `vigos train`, which knows every line; the test above is for those of accelerate."""
    flags = ["--data", "hub/set", "--output-dir", str(tmp_path), "--use-cpu", "true"]
    source, args = TRAIN.parse(path, flags)
    written = yaml.safe_load(path.read_text())
    assert source.model == written.pop("model")
    for name, value in written.items():
        kept = getattr(source if name == "dtype" else args, name)
        assert getattr(kept, "value", kept) == value or name == "report_to", name


# --- Memory from shapes ----------------------------------------------------------------------------------------------


def test_memory_table_of_the_page_is_the_models(tmp_path: Path) -> None:
    output_of(ROOT / "bench" / "memory_model.py", ["--check"], tmp_path / "log")  # else: run bench/memory_model.py
    assert "| 7B LoRA, 1 GPU or DDP |" in (ROOT / "docs" / "scaling.md").read_text()


def test_memory_model_counts_what_is_published() -> None:
    """Parameters, adapters and caches by hand; the rest follows how a run is divided."""
    sys.path.insert(0, str(ROOT / "bench"))
    from memory_model import CONFIGS, Run, Shape, memory

    shape = Shape(CONFIGS["3B"]())
    assert shape.parameters == 3_754_622_976, "of the published checkpoint"
    kv, inner = 2 * 128, 11_008
    assert shape.lora(64) == 36 * 64 * (2 * (2048 + 2048) + 2 * (2048 + kv) + 3 * (2048 + inner))
    assert (shape.cache, shape.state) == (36 * 2 * kv * 2, 0)
    one, eight = (memory(shape, Run(lora=False, gpus=n, sharded=n > 1)) for n in (1, 8))
    assert eight["gradients, AdamW"] == pytest.approx(one["gradients, AdamW"] / 8)
    assert memory(shape, Run(lora=True, gpus=1, sharded=False, pack=8192))["activations"] * 2 == pytest.approx(
        memory(shape, Run(lora=True, gpus=1, sharded=False))["activations"]
    )
    hybrid = Shape(CONFIGS["Qwen3.5-4B"]())
    assert hybrid.parameters == pytest.approx(4.54e9, rel=1e-3)
    assert (hybrid.cache, hybrid.state) == (8 * 2 * 4 * 256 * 2, 24 * 32 * 128 * 128 * 4)
