"""What an untrusted checkpoint or model folder must not do, and what must not be written. Data: test_data.py,
test_images.py; models and adapters: test_loading.py; the page: test_report.py.

Every attack here is real: a pickle that writes a file when it is loaded, a model folder that brings code.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hostile_images import jpeg_of_scans, tiff_of_scans
from helpers.training import VALID_A, VALID_B, config, rows, tiny_student, trainer

from vigos.data.decode import ImageLimits
from vigos.data.examples import load_rows


def run(folder: Path, **options: Any) -> Any:
    return trainer(tiny_student(), config(folder, **options), rows(4), texts=[VALID_A, VALID_B])


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_the_payload_works(tmp_path: Path) -> None:
    """Else the tests below would pass whatever the code does."""
    file = tmp_path / "evil.bin"
    torch.save(Payload(tmp_path / "mark"), file)
    torch.load(file, weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_runs_no_pickle(name: str, tmp_path: Path) -> None:
    """Resuming either refuses the file or never reads it."""
    run(tmp_path, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert checkpoint.is_dir()
    mark = tmp_path / "mark"
    torch.save(Payload(mark), checkpoint / name)
    try:
        run(tmp_path, max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    except (pickle.UnpicklingError, ValueError, RuntimeError) as refused:
        assert "weights_only" in str(refused) or "pickle" in str(refused).lower()  # noqa: PT017
    assert not mark.exists()


@pytest.mark.slow
def test_hostile_images_cost_their_rows_and_no_more(tmp_path: Path) -> None:
    """In the training process and in workers of the data loader: the run goes on, and says what it left out."""
    images = [jpeg_of_scans((8000, 8000), 2000), tiff_of_scans(4000, 99, 4), "../secret.png", "http://127.0.0.1/a.png"]
    hostile = [rows(1)[0] | {"images": [image], "problem_id": f"bad-{i}"} for i, image in enumerate(images)]
    mixed = [row for pair in zip(rows(4), hostile, strict=True) for row in pair]
    data = load_rows(mixed, data_root=tmp_path, limits=ImageLimits(decode_seconds=0.2))
    for workers in (0, 1):
        folder = tmp_path / f"run-{workers}"
        options = config(folder, max_steps=4, dataloader_num_workers=workers)
        made = trainer(tiny_student(), options, data, texts=[VALID_A, VALID_B])  # type: ignore[arg-type]
        made.train()
        assert made.state.global_step == 4
        skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
        assert [(line["example"], line["reason"]) for line in skipped] == [
            ("bad-0", "decode_too_slow"),
            ("bad-1", "decode_too_slow"),
            ("bad-2", "outside_root"),
            ("bad-3", "remote_image"),
        ]
        assert made.rollouts.skipped.total() == 4
        assert made.rollouts.examples_used == 4


def test_tokens_do_not_reach_the_run_folder(tmp_path: Path) -> None:
    secret = "hf_" + "s3cr3t" * 5
    made = run(tmp_path, hub_token=secret)
    made.train()
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file.name
    assert secret not in repr(made.args)
