"""Rows from every kind of source, and every kind of row that cannot be used."""

import base64
import io
import json
import os
import pickle
import re
import zlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from vigos.data.decode import ImageLimits
from vigos.data.examples import BadExample, ExampleDataset, ExampleStream, check_usable, load_rows

SIZE = (24, 16)


def picture(color="red", size=SIZE, mode="RGB"):
    return Image.new(mode, size, color)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def record(i=0, images=("a.png",), **changes):
    return {"problem": f"What? {i}", "images": list(images), "answer": str(i), "problem_id": f"r{i}"} | changes


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    picture("red").save(tmp_path / "a.png")
    picture("blue").save(tmp_path / "b.jpg")
    return tmp_path


def one(folder, **changes):
    """The single row of a JSONL file in `folder`."""
    options = changes.pop("options", {})
    return load_rows(write_jsonl(folder / "one.jsonl", [record(**changes)]), **options)[0]


def reason_of(folder, **changes):
    with pytest.raises(BadExample) as caught:
        one(folder, **changes)
    assert caught.value.example_id in ("r0", "0")
    assert str(caught.value).startswith(f"example {caught.value.example_id}: {caught.value.reason}: ")
    return caught.value.reason


# --- Sources ---------------------------------------------------------------------------------------------------------


def sources(folder):
    """The same three rows in every layout, one of them without an image."""
    from datasets import Dataset, DatasetDict, Features, List, Value
    from datasets import Image as ImageFeature

    records = [record(0), record(1, ["a.png", "b.jpg"], level="hard"), record(2, [])]
    records[0]["level"] = records[2]["level"] = "easy"
    read = {name: (folder / name).read_bytes() for name in ("a.png", "b.jpg")}
    with_bytes = [r | {"images": [{"bytes": read[n], "path": n} for n in r["images"]]} for r in records]
    with_objects = [r | {"images": [Image.open(folder / n) for n in r["images"]]} for r in records]

    yield "jsonl", write_jsonl(folder / "rows.jsonl", records), {}
    (folder / "rows.json").write_text(json.dumps(records))
    yield "json", str(folder / "rows.json"), {}
    (folder / "wrapped.json").write_text(json.dumps({"version": 1, "data": records}))
    yield "json with a wrapper", folder / "wrapped.json", {}
    yield "list of dicts", with_objects, {}

    features = Features({name: Value("string") for name in ("problem", "answer", "problem_id", "level")})
    features["images"] = List(ImageFeature())
    table = Dataset.from_list(with_bytes, features=features)
    yield "Dataset", table, {}
    yield "stream of datasets", table.to_iterable_dataset(), {"streaming": True}
    table.to_parquet(folder / "rows.parquet")
    yield "parquet", folder / "rows.parquet", {}
    Dataset.from_list(records).to_parquet(folder / "paths.parquet")
    yield "parquet of paths", folder / "paths.parquet", {}
    table.save_to_disk(folder / "saved")
    yield "save_to_disk", folder / "saved", {}
    DatasetDict(train=table, test=table.select([0])).save_to_disk(folder / "saved_dict")
    yield "save_to_disk of splits", folder / "saved_dict", {}

    for layout, name in (("image folder", "metadata.jsonl"), ("one file a split", "train.jsonl")):
        sub = folder / layout.replace(" ", "_")
        sub.mkdir()
        for n, content in read.items():
            (sub / n).write_bytes(content)
        write_jsonl(sub / name, records)
        yield layout, sub, {}
    hub = folder / "like_a_hub_repository" / "data"
    hub.mkdir(parents=True)
    table.to_parquet(hub / "train-00000-of-00001.parquet")
    yield "folder of parquet files", hub.parent, {}


def test_every_source_gives_the_same_rows(folder, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    seen = []
    for name, source, options in sources(folder):
        for streaming in {options.get("streaming", False), True}:
            rows = load_rows(source, **(options | {"streaming": streaming}))
            assert isinstance(rows, ExampleStream if streaming else ExampleDataset)
            got = list(rows)
            assert [r["problem_id"] for r in got] == ["r0", "r1", "r2"], name
            assert [r["answer"] for r in got] == ["0", "1", "2"]
            assert [r["problem"] for r in got] == ["What? 0", "What? 1", "What? 2"]
            assert [r["extra"] for r in got] == [{"level": "easy"}, {"level": "hard"}, {"level": "easy"}], name
            assert [[i.size for i in r["images"]] for r in got] == [[SIZE], [SIZE, SIZE], []]
            assert all(i.mode == "RGB" for r in got for i in r["images"])
            assert got[1]["images"][0].getpixel((3, 3)) == (255, 0, 0)
            assert got[1]["images"][1].getpixel((3, 3))[2] > 250
            if not streaming:
                assert len(rows) == 3
                assert rows[-1]["problem_id"] == "r2"
                with pytest.raises(IndexError, match="example 3 of 3"):
                    rows[3]
        seen.append(name)
    assert len(seen) == 13


def test_splits_of_a_saved_dict_and_of_an_image_folder(folder):
    from datasets import Dataset, DatasetDict

    rows = [record(i, []) for i in range(3)]
    for r in rows:
        del r["images"]
    DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1])).save_to_disk(folder / "d")
    assert len(load_rows(folder / "d", split="test")) == 1
    with pytest.raises(ValueError, match="split must be one of train, test, got 'dev'"):
        load_rows(folder / "d", split="dev")
    (folder / "images" / "test").mkdir(parents=True)
    picture().save(folder / "images" / "test" / "x.png")
    metadata = {"file_name": "x.png", "problem": "What?", "answer": "7"}  # as `datasets` names it
    write_jsonl(folder / "images" / "test" / "metadata.jsonl", [metadata])
    row = load_rows(folder / "images", split="test")[0]
    assert (row["problem_id"], len(row["images"]), row["extra"]) == ("0", 1, {})


def test_hub_names_go_to_datasets(folder, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        if args[0] == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub")
        return datasets.Dataset.from_list([record(0, [])])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("somebody/set", split="validation")
    assert rows[0]["problem_id"] == "r0"
    assert asked == [(("somebody/set",), {"split": "validation", "streaming": False})]
    with pytest.raises(ValueError, match=r"no file or folder 'nobody/nothing', and as a dataset on the hub: .*exist"):
        load_rows("nobody/nothing")
    with pytest.raises(ValueError, match=r"there is no 'data/train.jsonl'"):
        load_rows("data/train.jsonl")  # a file that is missing is never looked up on the hub
    assert len(asked) == 2


def test_images_as_bytes_objects_addresses_and_single_values(folder):
    png = encoded(picture())
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    kinds = {
        "bytes": png,
        "object": picture(),
        "dict": {"bytes": png, "path": None},
        "uri": uri,
        "path": folder / "a.png",
    }
    for name, entry in kinds.items():
        for images in (entry, [entry]):
            (row,) = load_rows([record(0) | {"images": images}], data_root=folder)
            assert [i.size for i in row["images"]] == [SIZE], name
    for nothing in (None, []):
        assert load_rows([record(0) | {"images": nothing}])[0]["images"] == []


def test_modes_become_rgb():
    half = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 12, 16))
    deep = Image.new("I;16", SIZE, 256 * 100)
    images = {
        "transparent": (encoded(half), (20, 3), (255, 255, 255)),  # on white, not on black
        "opaque part": (encoded(half), (3, 3), (255, 0, 0)),
        "grey": (encoded(picture(90, mode="L")), (3, 3), (90, 90, 90)),
        "grey of 16 bits": (encoded(deep), (3, 3), (100, 100, 100)),
        "palette": (encoded(picture().convert("P")), (3, 3), (255, 0, 0)),
        "one bit": (encoded(picture(1, mode="1")), (3, 3), (255, 255, 255)),
        "gif": (encoded(picture(), "GIF"), (3, 3), (255, 0, 0)),
    }
    for name, (content, at, color) in images.items():
        image = load_rows([record(0) | {"images": [content]}])[0]["images"][0]
        assert (image.mode, image.getpixel(at)) == ("RGB", color), name


def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    image = load_rows([record(0) | {"images": [encoded(picture(), "JPEG", exif=exif)]}])[0]["images"][0]
    assert image.size == SIZE[::-1]


def test_other_column_names_and_numbers_as_answers(folder):
    path = write_jsonl(folder / "x.jsonl", [{"q": "What?", "pics": "a.png", "gold": 3.5, "uid": 17, "more": [1]}])
    row = load_rows(path, problem_column="q", images_column="pics", answer_column="gold", id_column="uid")[0]
    assert (row["problem"], row["answer"], row["problem_id"], row["extra"]) == ("What?", "3.5", "17", {"more": [1]})
    assert row["images"][0].size == SIZE
    assert "pics" in load_rows(path, problem_column="q", images_column=None, answer_column="gold")[0]["extra"]


def test_rows_without_an_id_are_numbered_and_blank_lines_skipped(folder):
    lines = [json.dumps({"problem": "p", "answer": "a"}), "", "   ", json.dumps({"problem": "q", "answer": "b"})]
    (folder / "x.jsonl").write_text("\n".join(lines))
    for streaming in (False, True):
        rows = list(load_rows(folder / "x.jsonl", streaming=streaming))
        assert [(r["problem_id"], r["problem"], r["images"]) for r in rows] == [("0", "p", []), ("1", "q", [])]


def test_image_placeholders_leave_the_problem(folder):
    assert one(folder, problem="<image>Find x.")["problem"] == "Find x."
    assert one(folder, problem="<image>\nFind x.")["problem"] == "Find x."
    assert one(folder, problem="In <image> find x.")["problem"] == "In find x."
    assert one(folder, problem="<image>Find x.", options={"image_placeholder": None})["problem"] == "<image>Find x."
    assert reason_of(folder, problem="<image><image>Which?") == "image_count"


# --- Rows that cannot be used -----------------------------------------------------------------------------------------


def bomb(width, height):
    """A PNG of a few bytes that claims width x height pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"problem": ""}, "empty_problem"),
        ({"problem": " \n"}, "empty_problem"),
        ({"problem": 7}, "empty_problem"),
        ({"answer": ""}, "empty_answer"),
        ({"answer": "  "}, "empty_answer"),
        ({"answer": None}, "empty_answer"),
        ({"answer": float("nan")}, "empty_answer"),
        ({"answer": ["1", "2"]}, "bad_answer"),
        ({"answer": float("inf")}, "bad_answer"),
        ({"answer": r"\frac{1}{2"}, "unbalanced_answer"),
        ({"answer": "}{"}, "unbalanced_answer"),
        ({"answer": "x\\"}, "unbalanced_answer"),  # it would swallow the brace that closes \boxed{
        ({"images": ["none.png"]}, "missing_image"),
        ({"images": ["."]}, "missing_image"),
        ({"images": ["a\0b.png"]}, "missing_image"),
        ({"images": ["x" * 5000]}, "missing_image"),
        ({"images": ["../outside.png"]}, "outside_root"),
        ({"images": ["/etc/hostname"]}, "outside_root"),
        ({"images": ["link.png"]}, "outside_root"),
        ({"images": ["https://example.org/a.png"]}, "remote_image"),
        ({"images": ["s3://bucket/a.png"]}, "remote_image"),
        ({"images": ["file:///etc/hostname"]}, "remote_image"),
        ({"images": ["a.png", "truncated.jpg"]}, "unreadable_image"),
        ({"images": ["truncated.png"]}, "unreadable_image"),
        ({"images": ["empty.png"]}, "unreadable_image"),
        ({"images": ["text.png"]}, "unreadable_image"),
        ({"images": ["drawing.eps"]}, "unreadable_image"),
        ({"images": ["data:image/png,abc"]}, "unreadable_image"),
        ({"images": ["data:image/png;base64,!!"]}, "unreadable_image"),
        ({"images": ["two.png"]}, "too_small"),
        ({"images": ["bomb.png"]}, "too_many_pixels"),
        ({"images": ["huge.png"]}, "too_many_pixels"),
        ({"images": ["strip.png"]}, "aspect_ratio"),
        ({"images": [3]}, "unknown_image"),
        ({"images": [{"url": "x"}]}, "unknown_image"),
    ],
    ids=lambda v: v if isinstance(v, str) else json.dumps(v)[:40].replace("\\u0000", "NUL"),
)
def test_bad_rows(folder, changes, reason, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    picture().save(outside / "secret.png")
    picture().save(folder.parent / "outside.png")
    os.symlink(outside / "secret.png", folder / "link.png")
    noise = Image.effect_noise((200, 100), 90)
    (folder / "truncated.jpg").write_bytes(encoded(noise, "JPEG")[:-400])
    (folder / "truncated.png").write_bytes(encoded(noise)[:-400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\nshowpage\n")
    picture(size=(2, 1)).save(folder / "two.png")
    picture(size=(2000, 8)).save(folder / "strip.png")
    (folder / "bomb.png").write_bytes(bomb(9_000, 9_000))  # past our bound
    (folder / "huge.png").write_bytes(bomb(60_000, 60_000))  # past Pillow's own as well
    assert reason_of(folder, **changes) == reason


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds odd
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_damaged_files_are_bad_rows_and_nothing_else(kind, data):
    content = bytearray(encoded(Image.linear_gradient("L").resize((12, 10)).convert("RGB"), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 60).map(lambda i: i % len(content)))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)) | st.just(len(content)))]
    (row,) = load_rows([record(0) | {"images": [bytes(content)]}], bad_examples="return")
    assert isinstance(row, BadExample) or row["images"][0].mode == "RGB"


def test_limits_are_arguments(folder):
    assert one(folder, options={"limits": ImageLimits(max_pixels=24 * 16, min_side=16)})["images"]
    assert reason_of(folder, options={"limits": ImageLimits(max_pixels=24 * 16 - 1)}) == "too_many_pixels"
    assert reason_of(folder, options={"limits": ImageLimits(min_side=17)}) == "too_small"
    for name in ("max_pixels", "min_side"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ImageLimits(**{name: 0})


def test_paths_outside_the_root_can_be_allowed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    picture().save(outside)
    assert one(folder, images=[str(outside)], options={"allow_outside_root": True})["images"]
    assert one(folder, images=["x.png"], options={"data_root": outside.parent})["images"]
    with pytest.raises(BadExample, match="needs data_root"):
        load_rows([record(0, [str(outside)])])[0]
    with pytest.raises(ValueError, match=r"data_root must be a folder, got '.*gone'"):
        load_rows([record()], data_root=folder / "gone")


def test_broken_lines_and_records_cost_one_row(folder):
    lines = [json.dumps(record(0)), '{"problem": "cut', "[1, 2]", json.dumps({"problem": "no answer"}), '"\ud800"']
    (folder / "x.jsonl").write_bytes(
        b"\n".join(line.encode("utf-8", "surrogatepass") for line in lines) + b"\n\xff\xfe{}\n" + b'{"a":1}'
    )
    for streaming in (False, True):
        got = list(load_rows(folder / "x.jsonl", bad_examples="return", streaming=streaming))
        assert got[0]["problem_id"] == "r0"
        assert [r.reason for r in got[1:]] == ["malformed_record"] * 2 + ["missing_field"] + [
            "malformed_record"
        ] * 2 + ["missing_field"]
        assert got[1].example_id == "1"
        assert "has problem" not in got[1].detail
        assert "no field 'answer'; it has problem" in got[3].detail
    with pytest.raises(BadExample, match="example 1: malformed_record"):
        load_rows(folder / "x.jsonl")[1]


def test_bad_rows_travel_through_data_loader_workers(folder):
    path = write_jsonl(folder / "x.jsonl", [record(i, ["a.png" if i % 3 else "gone.png"]) for i in range(10)])
    for streaming in (False, True):
        rows = load_rows(path, bad_examples="return", streaming=streaming)
        loader = DataLoader(rows, batch_size=2, num_workers=2, collate_fn=list)
        got = [row for batch in loader for row in batch]
        bad = [row for row in got if isinstance(row, BadExample)]
        assert sorted(row.example_id for row in bad) == ["r0", "r3", "r6", "r9"]
        assert sorted(r["problem_id"] for r in got if not isinstance(r, BadExample)) == [
            "r1",
            "r2",
            "r4",
            "r5",
            "r7",
            "r8",
        ]
    again = pickle.loads(pickle.dumps(bad[0]))
    assert (again.example_id, again.reason, again.detail) == (bad[0].example_id, "missing_image", bad[0].detail)


def test_workers_of_a_datasets_stream_name_rows_apart():
    from datasets import Dataset

    table = Dataset.from_list([{"problem": "p", "answer": str(i)} for i in range(8)]).to_iterable_dataset(num_shards=2)
    loader = DataLoader(load_rows(table, streaming=True), batch_size=None, num_workers=2)
    rows = list(loader)
    assert sorted(r["answer"] for r in rows) == [str(i) for i in range(8)]
    assert len({r["problem_id"] for r in rows}) == 8


def test_images_are_opened_when_asked_for(folder, monkeypatch):
    path = write_jsonl(folder / "x.jsonl", [record(i) for i in range(5)])
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a[0]) or original(*a, **k))
    rows = load_rows(path)
    assert (len(rows), opened) == (5, [])
    rows[3]
    assert len(opened) == 1


# --- Mistakes in the call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (("question", "answer"), {}, "problem_column 'problem' is not in the data: .* has question, answer"),
        (("problems", "answer"), {}, r"did you mean problem_column='problems'\?"),
        (("problem", "answers"), {}, r"answer_column 'answer' .* did you mean answer_column='answers'\?"),
        (
            ("problem", "answer", "image"),
            {},
            r"did you mean images_column='image'\? images_column=None \(--images-column none\)",
        ),
        (("problem", "answer", "image_path"), {}, r"did you mean images_column='image_path'\?"),
        (
            ("problem", "answer"),
            {"images_column": "pics"},
            "images_column 'pics' is not in the data.*images_column=None .--images-column none. if",
        ),
        (("problem", "answer", "uid"), {"id_column": "uuid"}, r"did you mean id_column='uid'\?"),
    ],
)
def test_unknown_columns_are_named_with_what_is_there(folder, columns, options, message):
    path = write_jsonl(folder / "x.jsonl", [dict.fromkeys(columns, "x")])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            load_rows(path, streaming=streaming, **options)


def test_sources_that_are_none(folder):
    (folder / "empty").mkdir()
    (folder / "x.csv").write_text("a,b")
    (folder / "bad.json").write_text("{")
    (folder / "number.json").write_text("3")
    (folder / "nothing.jsonl").write_text("\n")
    cases = {
        folder / "gone.jsonl": "the data must be a file, a folder or the name of a dataset; there is no",
        folder / "x.csv": r"the data must end in .jsonl, .json or .parquet or be a folder",
        folder / "empty": "holds no dataset: .* found nothing",
        folder / "bad.json": "is not one JSON document",
        folder / "number.json": "must hold a list of objects, got int",
        folder / "nothing.jsonl": "has no records with named fields",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_rows(source)
    with pytest.raises(ValueError, match="the list has no records"):
        load_rows([])
    with pytest.raises(ValueError, match=r"the data must be a path, .* got int"):
        load_rows(3)
    with pytest.raises(ValueError, match="bad_examples must be one of raise, return, got 'skip'"):
        load_rows([record()], bad_examples="skip")


def test_a_stream_of_datasets_needs_streaming():
    from datasets import Dataset

    with pytest.raises(ValueError, match="pass streaming=True"):
        load_rows(Dataset.from_list([record(0, [])]).to_iterable_dataset())


def test_check_usable(folder):
    good, bad = record(0), record(1, ["gone.png"])
    path = write_jsonl(folder / "x.jsonl", [good, bad] * 50)
    for streaming in (False, True):
        rows = load_rows(path, streaming=streaming)
        assert check_usable(rows, probe=10).total() == 10
        assert check_usable(rows, probe=1000) == Counter(ok=50, missing_image=50)
        nothing = load_rows(write_jsonl(folder / "y.jsonl", [bad, bad | {"answer": ""}]), streaming=streaming)
        with pytest.raises(
            ValueError, match=r"none of the 2 examples read is usable \(.*missing_image 1.*; the first: example r1"
        ):
            check_usable(nothing)
    with pytest.raises(ValueError, match="the dataset has no examples"):
        check_usable(ExampleDataset([], rows.reader, "raise"))


def test_importing_needs_no_optional_package():
    import subprocess
    import sys

    code = "import sys; sys.modules.update(dict.fromkeys(['PIL', 'datasets', 'transformers'])); "
    code += "import vigos.data.examples, vigos.method.spans"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Bounds, before anything is parsed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "7" * 60_000}, "too_long"),
        ({"problem": "x" * 300_000}, "too_long"),
        ({"problem": "half a pair \ud83d here"}, "not_text"),
        ({"answer": "\ude00"}, "not_text"),
        ({"images": ["a.png"] * 100}, "image_count"),
    ],
)
def test_examples_without_measure_are_counted_and_skipped(folder, changes, reason):
    assert reason_of(folder, **changes) == reason


def test_json_nested_without_end_costs_one_example(folder):
    path = folder / "deep.jsonl"
    deep = '{"problem": "p", "answer": "a", "extra": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path.write_text(json.dumps(record(0)) + "\n" + deep + "\n" + json.dumps(record(2)) + "\n")
    for streaming in (False, True):
        found = list(load_rows(path, bad_examples="return", streaming=streaming))
        assert [getattr(row, "reason", "ok") for row in found] == ["ok", "malformed_record", "ok"]


def test_foreign_text_in_a_reason_obeys_no_terminal(folder):
    path = write_jsonl(folder / "rows.jsonl", [record(0, problem_id="\x1b[2J\nerror: forged", answer="")])
    with pytest.raises(BadExample) as caught:
        load_rows(path)[0]
    assert str(caught.value).isprintable()
    assert caught.value.example_id == "\x1b[2J\nerror: forged"


@settings(deadline=None)
@given(st.text("ab \t\n", max_size=12), st.text("ab \t\n", max_size=12), st.text("ab \t\n", max_size=12))
def test_marks_are_taken_out_as_a_regular_expression_would(a, b, c):
    problem = f"x{a}<image>{b}<image>{c}x"
    (row,) = load_rows([record(0, [picture(), picture()], problem=problem)])
    assert row["problem"] == re.sub(r"[ \t]*\n?<image>\n?[ \t]*", " ", problem).strip()


def test_a_question_of_tabs_takes_no_quadratic_time(folder):
    tabs = "\t" * 100_000
    (row,) = load_rows([record(0, [picture()], problem=f"x{tabs}y<image>{tabs}")])
    assert row["problem"] == f"x{tabs}y"


def test_the_first_examples(folder):
    path = write_jsonl(folder / "rows.jsonl", [record(i) for i in range(5)])
    for streaming in (False, True):
        rows = load_rows(path, streaming=streaming).first(2)
        assert [row["problem_id"] for row in rows] == ["r0", "r1"]
        assert [row["problem_id"] for row in rows] == ["r0", "r1"]
        assert [row["problem_id"] for row in rows.first(9)][:2] == ["r0", "r1"]
    rows = load_rows(path)
    assert (len(rows.first(2)), len(rows.first(9)), rows.first(2)[-1]["problem_id"]) == (2, 5, "r1")


def test_examples_name_their_images(folder):
    named = [{"path": "b.jpg", "bytes": None}, "a.png", encoded(picture())]
    (row,) = load_rows([record(0, named)], data_root=folder)
    assert row["image_paths"] == ["b.jpg", "a.png", None]


def test_images_and_ids_that_only_later_lines_have(tmp_path):
    """Columns are known from the first hundred records; the default names hold for all."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    line = {"problem": "q", "answer": "a"}
    lines = [line] * 150 + [line | {"images": ["a.png"], "problem_id": "late"}, line | {"image": "a.png"}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    for streaming in (False, True):
        got = list(load_rows(path, streaming=streaming, bad_examples="return"))
        assert (got[0]["problem_id"], len(got[0]["images"])) == ("0", 0)
        assert (got[150]["problem_id"], len(got[150]["images"])) == ("late", 1)
        assert got[151].reason == "image_column", "an image under another name is not dropped without a word"


def test_a_replaced_parquet_file_gives_its_own_rows_whatever_its_time_stamp(tmp_path):
    from datasets import Dataset

    path = tmp_path / "rows.parquet"
    for answer in ("red", "tan"):
        new = tmp_path / "new.parquet"
        Dataset.from_list([{"problem": "Which ink?", "answer": answer}]).to_parquet(new)
        os.utime(new, (1, 1))
        new.replace(path)
        assert load_rows(path, images_column=None)[0]["answer"] == answer


@pytest.mark.parametrize("nothing", [None, float("nan"), "", " ", [], [None], [""], [float("nan")]])
def test_what_stands_for_no_image(nothing):
    (example,) = load_rows([{"problem": "What?", "answer": "1", "images": nothing}])
    assert example["images"] == []
