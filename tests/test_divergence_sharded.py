"""Heads sharded over the vocabulary: two real processes over gloo against one process with the whole head."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.divergence_cases import case, error, heads, split
from helpers.processes import FORKSERVER

import vigos

IMPLS = ("reference", "cpu", "triton")
OPTIONS = {
    "plain": {},
    "everything": {
        "temperature": 1.3, "softcap": 12.0, "scale": 0.8, "vocab_size": 280, "beta": 0.3, "clip": 0.4,
    },
    "entry clip": {"entry_clip": 0.05, "vocab_size": 280},
    "entry clip, two heads": {"entry_clip": 1e-3, "shared": False},
    "padding is a whole shard": {"vocab_size": 150},
}  # fmt: skip


def call(c, head, teacher_head, bias, labels, impl, group=None):
    hidden = c.student.float().requires_grad_()
    transform, options = split(c.options)
    ours, theirs = heads(head, teacher_head, bias, process_group=group, **transform)
    out = vigos.linear_divergence(
        hidden, ours, c.teacher.float(), theirs, supervision=c.supervision, labels=labels, impl=impl, **options
    )
    (out.loss + (out.divergence * torch.linspace(0.1, 1, out.divergence.shape[0])).sum()).backward()
    assert hidden.grad is not None
    return out, hidden.grad


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # the interpreter's: inf - inf
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        results = {}
        for impl in IMPLS:
            for name, options in OPTIONS.items():
                if impl == "triton" and name != "entry clip":  # one case of the interpreter's
                    continue
                c = case(14, 12, 301, near=0.2, bias=options.get("shared", True), **options)
                part = slice(0, 170) if rank == 0 else slice(170, 301)  # shards of different sizes
                head = c.head.float()[part].clone().requires_grad_()
                bias = None if c.student_bias is None else c.student_bias.float()[part].clone().requires_grad_()
                teacher_head = None if c.teacher_head is None else c.teacher_head.float()[part]
                labels = torch.arange(14) * 10
                out, grad = call(c, head, teacher_head, bias, labels, impl, dist.group.WORLD)
                fields = {k: x.detach() for k, x in vars(out).items()}
                results[impl, name] = (fields, grad, head.grad, None if bias is None else bias.grad)
            if impl == "triton":
                continue
            # DTensor heads, Shard(0): 301 rows over two ranks are 151 and 150. Gathering them would raise.
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

            mesh = init_device_mesh("cpu", (2,))
            c = case(14, 12, 301, near=0.2)
            head = distribute_tensor(c.head.float(), mesh, [Shard(0)]).requires_grad_()
            gather, DTensor.full_tensor = DTensor.full_tensor, None
            try:
                out, grad = call(c, head, None, None, None, impl)
            finally:
                DTensor.full_tensor = gather
            assert isinstance(head.grad, DTensor)
            assert head.grad.placements == (Shard(0),)
            fields = {k: x.detach() for k, x in vars(out).items() if x is not None}
            results[impl, "DTensor"] = (fields, grad, head.grad.to_local(), None)
            whole = distribute_tensor(c.head.float(), mesh, [Replicate()]).requires_grad_()
            out, grad = call(c, whole, None, None, None, impl)
            fields = {k: x.detach() for k, x in vars(out).items() if x is not None}
            results[impl, "replicated"] = (fields, grad, whole.grad.to_local(), None)
            with pytest.raises(ValueError, match=r"head\.weight must be replicated or Shard\(0\)"):
                call(c, distribute_tensor(c.head.float(), mesh, [Shard(1)]), None, None, None, impl)
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank computed; one start for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(rank_main, args=(port, str(folder)), nprocs=2, start_method=FORKSERVER)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(
    ("impl", "name"),
    [*((impl, name) for impl in IMPLS[:2] for name in (*OPTIONS, "DTensor", "replicated")), ("triton", "entry clip")],
)
def test_shards_agree_with_the_whole(ranks, impl, name):
    """Every output equal on both ranks, and that of one process; dhidden whole on each, dhead and dbias in parts."""
    options = OPTIONS.get(name, {})
    plain = name in ("DTensor", "replicated")
    c = case(14, 12, 301, near=0.2, bias=not plain and options.get("shared", True), **options)
    head = c.head.float().requires_grad_()
    bias = None if c.student_bias is None else c.student_bias.float().requires_grad_()
    teacher_head = None if c.teacher_head is None else c.teacher_head.float()
    out, grad = call(c, head, teacher_head, bias, None if plain else torch.arange(14) * 10, impl)
    both = [results[impl, name] for results in ranks]
    for field, value in vars(out).items():
        if value is None:
            continue
        assert torch.equal(both[0][0][field], both[1][0][field]), field
        torch.testing.assert_close(both[0][0][field], value.detach(), rtol=2e-5, atol=2e-6, msg=field)
    for fields, dhidden, *_ in both:
        assert error(dhidden.double(), grad.double()) < 1e-5
        assert fields["divergence"].shape == (14,)
    assert torch.equal(both[0][1], both[1][1])
    assert head.grad is not None
    if name == "replicated":
        assert error(both[0][2].double(), head.grad.double()) < 1e-5
        return
    assert error(torch.cat([part[2] for part in both]).double(), head.grad.double()) < 1e-5
    if bias is not None:
        assert bias.grad is not None
        assert error(torch.cat([part[3] for part in both]).double(), bias.grad.double()) < 1e-5
