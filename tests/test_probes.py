"""The probes: what happens to the images, and what they find on a model that looks and on one that guesses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.training import picture, rows
from PIL import Image

from vigos.cli import main
from vigos.data.examples import BadExample, ExampleDataset, load_rows
from vigos.eval.probes import PROBES, ProbedExamples, blurred, probe
from vigos.launch import ProbeSource
from vigos.world import load_base, world_prompts, write_world


def dataset(n: int = 6) -> ExampleDataset:
    found = load_rows(rows(n))
    assert isinstance(found, ExampleDataset)
    return found


def test_images_alone_are_changed() -> None:
    data = dataset()
    removed, softened, swapped = (ProbedExamples(data, name, seed=3) for name in PROBES)
    for i, row in enumerate(data):
        for other in (removed[i], softened[i], swapped[i]):
            assert {k: v for k, v in other.items() if k != "images"} == {k: v for k, v in row.items() if k != "images"}
        assert removed[i]["images"] == []
        assert softened[i]["images"][0].size == row["images"][0].size
        assert np.asarray(softened[i]["images"][0]).std() < 0.3 * np.asarray(row["images"][0]).std()
        shown = next(j for j, r in enumerate(data) if r["images"][0].tobytes() == swapped[i]["images"][0].tobytes())
        assert data[shown]["answer"] != row["answer"]
        assert swapped[i]["images"][0].tobytes() == swapped[i]["images"][0].tobytes()
    assert [r["images"][0].tobytes() for r in ProbedExamples(data, "swapped", seed=3)] == [
        r["images"][0].tobytes() for r in swapped
    ]


def test_a_swap_needs_another_row_with_as_many_images() -> None:
    pair = rows(2)
    pair[0]["images"] = [picture(1), picture(2)]
    data = load_rows(pair)
    assert isinstance(data, ExampleDataset)
    with pytest.raises(BadExample, match=r"no other example has 2 image\(s\) to swap in"):
        ProbedExamples(data, "swapped")[0]
    same = [row | {"answer": "red"} for row in rows(2)]
    data = load_rows(same)
    assert isinstance(data, ExampleDataset)
    assert ProbedExamples(data, "swapped")[0]["images"][0].tobytes() == data[1]["images"][0].tobytes()


def test_views_of_a_run(tmp_path: Path) -> None:
    """Each role's view is a probe of its own; an example that does not allow it is refused like any."""
    teachers = [{"name": "cropped", "view": {"crop": "box"}}, {"name": "lent", "view": "other"}, {"name": "plain"}]
    vigos = {"teachers": teachers, "student_view": {"downscale": 4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"vigos": vigos}))
    views = ProbeSource(views_of=str(tmp_path)).views()
    assert views.keys() == {"view-cropped", "view-lent", "view-student"}
    data = load_rows([row | {"box": [0, 0, 16, 16]} for row in rows(3)] + rows(1, start=3))
    assert isinstance(data, ExampleDataset)
    shown = {name: ProbedExamples(data, None, view=view) for name, view in views.items()}
    image = data[0]["images"][0]
    assert shown["view-cropped"][0]["images"][0].tobytes() == image.crop((0, 0, 16, 16)).tobytes()
    assert shown["view-student"][0]["images"][0].size == image.size
    assert shown["view-lent"][0]["images"][0].tobytes() in {data[i]["images"][0].tobytes() for i in (1, 2, 3)}
    with pytest.raises(BadExample, match="no field 'box' for the view crop"):
        shown["view-cropped"][3]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"vigos": {"method": "opsd"}}))
    with pytest.raises(ValueError, match="views_of must be a run whose roles have views, got"):
        ProbeSource(views_of=str(tmp_path)).views()


def test_wrong_names_and_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="probe must be one of removed, blurred, swapped, got 'mirrored'"):
        ProbedExamples(dataset(), "mirrored")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"examples must be an ExampleDataset from load_rows \(not a stream\), got list"
    ):
        probe(None, None, rows(2))  # type: ignore[arg-type]


def test_blur_follows_the_size() -> None:
    small, large = picture(0), picture(0).resize((320, 320), 0)
    spread = [float(np.asarray(blurred(image)).std()) for image in (small, large)]
    assert spread[1] == pytest.approx(spread[0], rel=0.35)


@pytest.mark.slow
def test_the_builtin_model_looks(tmp_path: Path) -> None:
    """The right image is worth much; where every row has the same picture, a swap is worth exactly nothing."""
    path = write_world(tmp_path / "w", "test", n=24)
    model, processor = load_base()
    data = load_rows(path)
    assert isinstance(data, ExampleDataset)
    options = {"prompts": world_prompts(), "max_new_tokens": 64, "batch_size": 72}
    intact, found = probe(model, processor, data, folder=tmp_path, probes=("removed", "swapped"), **options)
    swapped = found["swapped"]
    assert swapped.comparison.examples == 72
    assert swapped.comparison.interval[1] < 0
    assert swapped.comparison.difference == pytest.approx(
        swapped.result.summary()["accuracy"] - intact.summary()["accuracy"]
    )
    assert swapped.comparison.difference < -0.3
    grey = Image.new("RGB", data[0]["images"][0].size, (128, 128, 128))
    blind = load_rows([{k: row[k] for k in ("problem", "answer", "problem_id")} | {"images": [grey]} for row in data])
    assert isinstance(blind, ExampleDataset)
    same = probe(model, processor, blind, probes=("swapped",), **options)[1]["swapped"].comparison
    assert (same.difference, same.better, same.worse, same.p_value) == (0.0, 0, 0, 1.0)
    again, _ = probe(model, processor, data, folder=tmp_path, probes=(), **options)
    assert again.records == intact.records
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["intact.jsonl", "removed.jsonl", "swapped.jsonl"]


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_world(tmp_path / "w", "test", n=3)
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--model", "builtin", "--data", str(path), "--output-dir", str(tmp_path / "p"),
              "--max-new-tokens", "64"])  # fmt: skip
    assert stop.value.code in (0, None)
    found = json.loads((tmp_path / "p" / "probes.json").read_text())
    assert list(found) == ["intact", *PROBES]
    assert found["removed"]["examples"] == 9
    assert "against intact" in capsys.readouterr().out
