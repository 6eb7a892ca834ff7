"""Images that ask for too much: every hostile file here is built, is decoded for real, and would take many times longer
than its limit. What else an image column may hold: test_data.py."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hostile_images import bmp_of_runs, encoded, jpeg_of_scans, png_of_empty_chunks, tiff_of_scans
from PIL import Image
from torch.utils.data import DataLoader

from vigos.data import decode as decoding
from vigos.data.benchmarks import load_benchmark
from vigos.data.decode import MAX_EXIF, WEBP_HERE, ImageLimits, decode, to_rgb
from vigos.data.examples import BadExample, load_rows
from vigos.data.images import BadImage, ImageLoader

# Each would take between 3 s and a minute.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "JPEG of 2,000 scans": lambda: jpeg_of_scans((8000, 8000), 2000),
    "BMP of runs": lambda: bmp_of_runs((5000, 5000)),
    "PPM of odd maximum": lambda: b"P6 5000 5000 100\n" + bytes(75_000_000),
    "PNG of empty chunks": lambda: png_of_empty_chunks((100, 100), 4_000_000),
    "TIFF of progressive strips": lambda: tiff_of_scans(4000, 99, 4),
}


def reason_of(source: Any, limits: ImageLimits | None = None) -> str:
    with pytest.raises(BadImage) as caught:
        decode(source, limits or ImageLimits())
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason


# --- Time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "file"])
def test_decoding_ends_in_time(name: str, as_file: bool, tmp_path: Path) -> None:
    source: Any = HOSTILE[name]()
    if as_file:
        (tmp_path / "x").write_bytes(source)
        source = tmp_path / "x"
    start = time.thread_time()
    assert reason_of(source, ImageLimits(decode_seconds=0.2)) == "decode_too_slow"
    assert time.thread_time() - start < 1.5  # a limit, and the piece that was being decoded when it came


def test_the_worst_piece_of_a_jpeg() -> None:
    """Scans cut to their header alone, 12 bytes each: the most passes that fit between two looks at the clock."""
    content = jpeg_of_scans((8100, 8100), 1)
    last = content.rindex(b"\xff\xda")
    head = content[last : last + 2 + int.from_bytes(content[last + 2 : last + 4], "big")]
    start = time.thread_time()
    assert (
        reason_of(content[:last] + head * 100_000 + content[-2:], ImageLimits(decode_seconds=0.1)) == "decode_too_slow"
    )
    assert time.thread_time() - start < 5


def test_only_the_first_frame_is_decoded() -> None:
    frames = [Image.new("L", (64, 64), i % 250) for i in range(400)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        content = encoded(frames[7], kind, save_all=True, append_images=frames, lossless=True)
        image = decode(content, ImageLimits(decode_seconds=0.5))
        assert image.size == (64, 64)
        assert image.getpixel((3, 3)) == (7, 7, 7), kind


@pytest.mark.slow
def test_rows_that_take_too_long_are_counted_in_workers_too(tmp_path: Path) -> None:
    """Main process and forked workers, whose own decoding processes start beside an inherited one."""
    good = Image.new("RGB", (32, 32), "red")
    images = [HOSTILE["JPEG of 2,000 scans"](), encoded(good, "TIFF"), HOSTILE["TIFF of progressive strips"](), good]
    records = [{"problem": "p", "answer": "a", "problem_id": str(i), "images": [x]} for i, x in enumerate(images * 2)]
    rows = load_rows(records, bad_examples="return", limits=ImageLimits(decode_seconds=0.3))
    wanted = ["decode_too_slow", (255, 0, 0), "decode_too_slow", (255, 0, 0)] * 2
    for workers in (0, 2):
        found = [row for batch in DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=list) for row in batch]
        assert [r.reason if isinstance(r, BadExample) else r["images"][0].getpixel((1, 1)) for r in found] == wanted


def test_decode_seconds_is_checked() -> None:
    for value in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"decode_seconds must be positive, got {value}"):
            ImageLimits(decode_seconds=value)


# --- The other process ------------------------------------------------------------------------------------------------


def in_this_process(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return to_rgb(image, "")


def test_the_other_process_gives_the_same_pixels(tmp_path: Path) -> None:
    photo = Image.merge("RGBA", [Image.effect_noise((120, 80), sigma) for sigma in (10, 40, 60, 90)])
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    files = {
        "TIFF": encoded(photo, "TIFF", compression="tiff_lzw"),
        "TIFF of 16 bits": encoded(Image.new("I;16", (24, 16), 256 * 100), "TIFF"),
        "AVIF": encoded(photo, "AVIF", speed=10),
        "AVIF on its side": encoded(photo, "AVIF", speed=10, exif=exif),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        here = in_this_process(content)
        for source in (content, tmp_path / name):
            image = decode(source, ImageLimits())
            assert (image.mode, image.size, image.tobytes()) == ("RGB", here.size, here.tobytes()), name


def test_large_webp_goes_to_the_other_process() -> None:
    worker = decoding._worker()
    worker.stop()
    for height, apart in ((64, False), (WEBP_HERE // 4096 + 1, True)):
        picture = Image.linear_gradient("L").convert("RGB").resize((4096, height))
        content = encoded(picture, "WEBP", method=0)
        assert decode(content, ImageLimits()).tobytes() == in_this_process(content).tobytes()
        assert (worker.process is not None) == apart


def test_limits_hold_in_the_other_process() -> None:
    tiff = encoded(Image.effect_noise((300, 200), 50), "TIFF", compression="tiff_lzw")
    assert reason_of(tiff, ImageLimits(max_pixels=59_999)) == "too_many_pixels"
    assert reason_of(tiff, ImageLimits(min_side=201)) == "too_small"
    assert reason_of(tiff, ImageLimits(max_aspect=1.2)) == "aspect_ratio"
    assert reason_of(tiff[: len(tiff) // 2]) == "unreadable_image"
    assert reason_of(b"\0\0\0\x1cftypavif" + bytes(100)) == "unreadable_image"


def test_a_process_that_died_is_replaced() -> None:
    good = encoded(Image.new("RGB", (32, 32), "red"), "TIFF")
    decode(good, ImageLimits())
    process = decoding._worker().process
    assert process is not None
    killer = threading.Timer(0.3, os.kill, [process.pid, signal.SIGKILL])
    killer.start()
    with pytest.raises(BadImage, match=r"unreadable_image: .*the process that decodes it died: it ended with code -9"):
        decode(tiff_of_scans(4000, 99, 4), ImageLimits(decode_seconds=60))
    assert decode(good, ImageLimits()).getpixel((3, 3)) == (255, 0, 0)
    assert decoding._worker().process is not process


def test_waiting_is_not_decoding() -> None:
    """A process without a processor for longer than its limit: a busy machine must not change which rows are used."""
    good = encoded(Image.new("RGB", (32, 32), "red"), "TIFF")
    decode(good, ImageLimits())
    process = decoding._worker().process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, [process.pid, signal.SIGCONT]).start()
    start = time.monotonic()
    assert decode(good, ImageLimits(decode_seconds=0.5)).getpixel((3, 3)) == (255, 0, 0)
    assert time.monotonic() - start > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_another_thread_decodes() -> None:
    good = encoded(Image.new("RGB", (32, 32), "red"), "TIFF")
    with decoding._worker().lock, multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(decode, (good, ImageLimits())).get(timeout=300).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce RLIMIT_AS")
def test_memory_is_bounded() -> None:
    code = "import vigos.data.decode as d; d.bound_memory(2**29); bytearray(2**28); bytearray(2**29)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.rstrip().endswith("MemoryError")
    assert decoding.memory_bytes(ImageLimits()) < 2**32


# --- Bytes ------------------------------------------------------------------------------------------------------------


def test_files_of_too_many_bytes(tmp_path: Path) -> None:
    content = encoded(Image.new("L", (32, 32)))
    (tmp_path / "x.png").write_bytes(content)
    for source in (content, tmp_path / "x.png"):
        assert decode(source, ImageLimits(max_bytes=len(content))).size == (32, 32)
        assert reason_of(source, ImageLimits(max_bytes=len(content) - 1)) == "too_many_bytes"


def test_exif_that_fits_no_segment() -> None:
    def image(count: int) -> bytes:
        return encoded(Image.new("L", (32, 32)), exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0".ljust(count, b"\0"))

    assert decode(image(MAX_EXIF), ImageLimits()).size == (32, 32)
    with pytest.raises(BadImage, match=r"unreadable_image: .* Exif data of more than 65536 bytes"):
        decode(image(MAX_EXIF + 10), ImageLimits())


# --- The root ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """data/a.png and outside/secret.png, with links between them."""
    for folder, name in (("data", "a.png"), ("outside", "secret.png")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / folder / name)
    data = tmp_path / "data"
    (data / "sub").mkdir()
    (data / "folder").symlink_to(tmp_path / "outside")
    (data / "file.png").symlink_to(tmp_path / "outside" / "secret.png")
    (data / "relative.png").symlink_to("../outside/secret.png")
    (data / "chain.png").symlink_to("file.png")
    (data / "inside.png").symlink_to("sub/../a.png")
    (data / "loop.png").symlink_to("loop.png")
    (tmp_path / "linked").symlink_to(data)
    return data


def test_paths_stay_in_the_root(tree: Path) -> None:
    loader = ImageLoader(tree)
    secret = tree.parent / "outside" / "secret.png"
    out = [
        "../outside/secret.png",
        "sub/../../outside/secret.png",
        str(secret),
        "//" + str(secret),
        "folder/secret.png",
    ]
    for path in (*out, "file.png", "relative.png", "chain.png", secret, "/dev/zero", "/proc/self/environ"):
        with pytest.raises(BadImage, match=r"outside_root: .*allow_outside_root"):
            loader.load(path)
    for path in (f"file://{secret}", f"FILE://{secret}", "ftp://x/a.png", f"http://x/../../{secret}"):
        with pytest.raises(BadImage, match=r"remote_image: .*save the images in a folder first"):
            loader.load(path)
    for path in ("loop.png", "~/a.png", "file:a.png", "."):
        with pytest.raises(BadImage, match="missing_image"):
            loader.load(path)
    for path in ("a.png", "sub/../a.png", "inside.png", str(tree / "a.png"), {"path": "a.png", "bytes": None}):
        assert loader.load(path).size == (32, 32)
    assert ImageLoader(tree.parent / "linked").load("a.png").size == (32, 32)
    with pytest.raises(BadImage, match="outside_root"):
        ImageLoader(tree.parent / "linked").load("../outside/secret.png")


def test_paths_out_of_the_root_if_allowed(tree: Path) -> None:
    loader = ImageLoader(tree, allow_outside_root=True)
    for path in ("../outside/secret.png", str(tree.parent / "outside" / "secret.png"), "chain.png"):
        assert loader.load(path).size == (32, 32)
    with pytest.raises(BadImage, match="missing_image: no such file: /dev/zero"):  # a device is no file
        loader.load("/dev/zero")


def test_benchmarks_have_the_same_bounds(tree: Path) -> None:
    (tree / "slow.jpg").write_bytes(HOSTILE["JPEG of 2,000 scans"]())
    names = ["a.png", "../outside/secret.png", "https://example.org/a.png", "slow.jpg"]
    lines = [f'{{"question": "q", "answer": "a", "image": "{name}"}}' for name in names]
    (tree / "rows.jsonl").write_text("\n".join(lines))
    rows = load_benchmark("realworldqa", tree / "rows.jsonl")
    rows.bad_examples = "return"
    assert rows.reader.images.limits == ImageLimits()
    images = replace(rows.reader.images, limits=ImageLimits(decode_seconds=0.2))
    rows.reader = replace(rows.reader, images=images)
    found = [row.reason if isinstance(row, BadExample) else "ok" for row in rows]
    assert found == ["ok", "outside_root", "remote_image", "decode_too_slow"]
    allowed = load_benchmark("realworldqa", tree / "rows.jsonl", allow_outside_root=True)
    assert allowed[1]["images"][0].size == (32, 32)


def _deep(values, mode, name, folder):
    """A file of one grey deeper than 8 bits, written as `name` says."""
    array = np.tile(np.array(values, dtype=mode), (8, 8))
    path = folder / name
    if name.endswith(".pgm"):
        head = f"P5 {array.shape[1]} {array.shape[0]} 65535\n".encode()
        path.write_bytes(head + array.astype(">u2").tobytes())
    else:
        Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize(
    ("values", "mode", "name", "wanted"),
    [
        ([0, 256, 32768, 65535], "uint16", "a.pgm", [0, 1, 128, 255]),
        ([0, 100, 200, 255], "uint16", "dark.pgm", [0, 0, 0, 0]),
        ([0, 256, 32768, 65535], "uint16", "a.png", [0, 1, 128, 255]),
        ([0, 256, 32768, 65535], "uint16", "a.tif", [0, 1, 128, 255]),
        ([0, 7, 128, 255], "int32", "eight.tif", [0, 7, 128, 255]),
        ([0, 256, 32768, 65535], "int32", "sixteen.tif", [0, 1, 128, 255]),
        ([-5, 2**23, 2**30, 2**31 - 1], "int32", "full.tif", [0, 1, 128, 255]),
        ([0, 0.25, 0.5, 1], "float32", "unit.tif", [0, 63, 127, 255]),
        ([0, 7, 128, 255], "float32", "eight-float.tif", [0, 7, 128, 255]),
        ([-1, float("nan"), 32768, 65535], "float32", "sixteen-float.tif", [0, 0, 128, 255]),
    ],
)
def test_grey_deeper_than_8_bits_keeps_its_shades(tmp_path, values, mode, name, wanted):
    image = ImageLoader(tmp_path).load(str(_deep(values, mode, name, tmp_path)))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in wanted]
