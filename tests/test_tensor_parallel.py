"""A student that transformers loads tensor-parallel: two real processes (gloo, CPU) against one on the same rows.

The tiny Qwen2.5-VL is sharded by transformers' own plan: attention and MLP by columns and rows, embedding and head over
the vocabulary. Both processes run every case, so that their start is paid once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from helpers.processes import HELPERS, run_ranks
from helpers.tensor_parallel_cases import CASES, RANKS, run, save_students
from helpers.tiny_models import tiny_model
from helpers.training import tiny_student
from safetensors.torch import load_file
from test_distributed import CLOCKS, largest_gap
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from vigos.models.tensor_parallel import Replicas, check_accumulation, check_dropout, check_head, layout_of

pytestmark = pytest.mark.skipif(
    not hasattr(transformers.Trainer, "_sync_replicated_trainable_parameters"),
    reason=f"transformers {transformers.__version__} does not train models that were loaded in slices (5.23 does)",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained students, which every process loads."""
    folder = tmp_path_factory.mktemp("models")
    save_students(folder)
    return folder


COPIES = ("sampled", "everything")  # of the cases, also with two copies of the model


@pytest.fixture(scope="module")
def copies(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two groups, whose copies of the model FSDP2 cuts into pieces."""
    folder = tmp_path_factory.mktemp("copies")
    arguments = [str(models), str(folder), str(RANKS), *COPIES]
    codes = run_ranks(HELPERS / "tensor_parallel_cases.py", arguments, 2 * RANKS, folder, timeout=420)
    assert codes == [0] * 2 * RANKS
    return folder


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which both ranks have left what came out of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = [str(models), str(folder), str(RANKS), *CASES]
    codes = run_ranks(HELPERS / "tensor_parallel_cases.py", arguments, RANKS, folder, timeout=420)
    assert codes == [0] * RANKS
    return folder


def found_in(folder: Path, ranks: int = RANKS) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_group_equals_one_process(case: str, models: Path, ranks: Path, tmp_path: Path) -> None:
    """Losses, every other metric, and parameters after five steps, to 1e-5; the teacher's weights as well."""
    check(case, models, ranks, tmp_path, RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("case", COPIES)
def test_two_groups_equal_one_process(case: str, models: Path, copies: Path, tmp_path: Path) -> None:
    """The same on four ranks, where groups have different rows."""
    check(case, models, copies, tmp_path, 2 * RANKS)


def check(case: str, models: Path, ranks: Path, tmp_path: Path, count: int) -> None:
    alone = run(case, models, tmp_path)
    assert len(alone["logs"]) == 5
    assert largest_gap(alone["start"], alone["parameters"]) > 1e-2, "nothing was trained"
    for each in found_in(ranks / case, count):
        for expected, log in zip(alone["logs"], each["logs"], strict=True):
            kept = {k: v for k, v in expected.items() if not k.startswith(CLOCKS)}
            assert {k: v for k, v in log.items() if not k.startswith(CLOCKS)} == pytest.approx(kept, rel=1e-5, abs=1e-9)
        for name in ("start", "parameters", "teacher"):
            assert largest_gap(alone[name], each[name]) < 1e-5, name
        if CASES[case].get("teacher", "frozen") == "frozen" and not CASES[case].get("lora", True):
            assert largest_gap(alone["start"], each["teacher"]) == 0, "the frozen teacher has moved"
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors")]
    assert written, "nothing was saved"
    for name in written:  # whole, and as a plain model or adapter
        assert largest_gap(load_file(tmp_path / name), load_file(ranks / case / name)) < 1e-5, name
    configs = [path.relative_to(tmp_path) for path in tmp_path.rglob("*config.json")]
    for name in configs:
        assert json.loads((tmp_path / name).read_text()) == json.loads((ranks / case / name).read_text()), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_head_is_used_where_it_lies(case: str, ranks: Path) -> None:
    """No collective of rollouts and steps carries as much as half a head."""
    for each in found_in(ranks / case):
        assert each["local_head"] <= (each["head"] + 1) // 2 + 32  # rows are dealt out whole
        assert 0 < each["traffic"][0] < each["head"] // 2
        assert each["gathered"][0] >= each["head"] // 2, "the measurement sees no gathered head"
        assert "lora_dropout must be 0 where 2 tensor-parallel ranks do not divide the 33 inputs" in each["refused"]


@pytest.mark.slow
def test_one_rank_asks_for_its_group(ranks: Path) -> None:
    """A rollout server's completions reach the other ranks, and so does its failure."""
    first, second = (each["shared"] for each in found_in(ranks / "lora"))
    for ids, none, _ in (first, second):
        assert [x.tolist() for x in ids] == [[3, 1], [], [2]]
        assert none == []
    assert first[2] == "the server is gone"
    assert second[2] == "sampling failed on rank 0, whose output says why"


def test_what_is_refused() -> None:
    """Layouts that the trainer cannot follow, by the name of what has to change."""
    from transformers.distributed import DistributedConfig

    with pytest.raises(ValueError, match="tensor_parallel must divide the number of processes, 8, got 3"):
        layout_of(3, 8)
    assert (layout_of(2, 8).tp_size, layout_of(2, 8).fsdp_size) == (2, 4)
    model = tiny_student(tied=True)
    assert Replicas.of(model, 3, 4) == Replicas(count=4, index=3)
    check_head(model)
    model.config.distributed_config = DistributedConfig(tp_size=2, pp_size=2)
    with pytest.raises(ValueError, match="distributed_config must have pp_size=1, got 2"):
        Replicas.of(model, 0, 4)
    model.config.distributed_config = DistributedConfig(tp_size=2, fsdp_size=2)
    with pytest.raises(ValueError, match=r"train_head must be false .* fsdp_size=2"):
        check_head(model)


def test_accumulation_is_refused_for_norms_inside_attention() -> None:
    """transformers would sum their accumulated gradients over and over."""
    from transformers.distributed import DistributedConfig

    model = tiny_model("qwen3")
    check_accumulation(model, 2)
    model.config.distributed_config = DistributedConfig(tp_size=2)
    check_accumulation(model, 1)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps must be 1 where .*layers\.0.*q_norm.*, got 2"):
        check_accumulation(model, 2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_norm" not in name)
    check_accumulation(model, 2)
    qwen2_5 = tiny_student()
    qwen2_5.config.distributed_config = DistributedConfig(tp_size=2)
    check_accumulation(qwen2_5, 2)


def test_slices_of_another_origin_and_of_several_widths(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = tiny_student()
        layer = model.model.language_model.layers[0].mlp.down_proj
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
        with pytest.raises(ValueError, match=r"sharded by transformers.*got DTensor parameters such as .*down_proj"):
            Replicas.of(model, 0, 1)
        check_dropout(model, 0.5)  # one slice is as wide as itself
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_records_are_written_once_and_the_same(models: Path, ranks: Path, tmp_path: Path) -> None:
    """Rollouts of a group stand in one file a step, with the likeliest tokens of the whole vocabulary."""
    run("lora", models, tmp_path)
    files = sorted(path.name for path in (tmp_path / "completions").glob("*.jsonl"))
    assert files == sorted(path.name for path in (ranks / "lora" / "completions").glob("*.jsonl"))
    assert len(files) == 5
    supervised = 0
    for name in ("skipped.jsonl", *(f"completions/{file}" for file in files)):
        ours, theirs = (leaves(folder / name) for folder in (ranks / "lora", tmp_path))
        assert [x for x in ours if not isinstance(x, float)] == [x for x in theirs if not isinstance(x, float)]
        numbers = [x for x in ours if isinstance(x, float)]
        assert numbers == pytest.approx([x for x in theirs if isinstance(x, float)], abs=2e-5)
        supervised += len(numbers)
    assert supervised > 1000


def leaves(path: Path) -> list[Any]:
    """Every value in a JSONL file, in order."""
    found: list[Any] = []

    def walk(x: Any) -> None:
        for each in x.values() if isinstance(x, dict) else x:
            walk(each) if isinstance(each, dict | list) else found.append(each)

    walk([json.loads(line) for line in path.read_text().splitlines()])
    return found
