"""One image from a file or from bytes that nobody vouches for, within bounds of pixels, bytes, seconds and memory.

    image = decode(Path("figure.png"), ImageLimits())  # PIL, RGB; or `BadImage`, which says why not

Size and number of pixels are read from the header before anything is decoded. Time: most decoders take their input in
pieces, which are handed to them by a file that looks at the clock; a file of few pixels can still ask for hours, as a
JPEG of ten thousand scans does. TIFF and AVIF, and WebP above `WEBP_HERE`, take all in one call that nothing can
interrupt: they are decoded in another process, which ends itself. That process is this file run as a script, so it
imports nothing of ours.
"""

from __future__ import annotations

import io
import json
import math
import signal
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

    from vigos.sandbox import Worker

# What a photograph or a figure comes in. Formats that run an interpreter (EPS, PDF) or are rare attack surface are not.
# Several JPEGs in one file (MPO) come as JPEG.
IN_PIECES = ("JPEG", "PNG", "GIF", "BMP", "PPM")
AT_ONCE = ("TIFF", "AVIF", "WEBP")

# Pixels. WebP takes time and memory in proportion to pixels and bytes alone: some 15 ns and at most 600 bytes a pixel.
WEBP_HERE = 2**21
# Pixels x bytes that a JPEG decoder gets between two looks at the clock. Twelve bytes ask it to go over all pixels
# again, at about 0.3 ns a pixel: 2 s in the worst case. Other decoders do at most some work for every byte and pixel.
JPEG_PIECE = 2**36
# Exif fits one segment of a JPEG. Its tags may overlap, and a long one be read as many copies of itself.
MAX_EXIF = 2**16

# What Pillow's decoders raise on damaged files, besides OSError (truncated) and its own subclasses of it.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: a slug; those of this module are "unreadable_image", "too_many_pixels", "too_many_bytes", "too_small",
            "aspect_ratio" and "decode_too_slow".
        detail: a sentence for the log.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class ImageLimits:
    """Bounds of an image.

    Attributes:
        max_pixels: width x height; larger ones are refused (the processor scales down to far less anyway).
        min_side: in pixels.
        max_aspect: longer side over shorter; Qwen's processors refuse 200 and more.
        max_bytes: of the file.
        decode_seconds: of processor time.
    """

    max_pixels: int = 2**26
    min_side: int = 8
    max_aspect: float = 199.0
    max_bytes: int = 2**28
    decode_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_pixels", "min_side", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.decode_seconds > 0:
            raise ValueError(f"decode_seconds must be positive, got {self.decode_seconds}")


def decode(source: Path | bytes, limits: ImageLimits, name: str | None = None) -> Image:
    """Return the first frame as RGB, upright, transparent pixels on white. Errors call the image `name`.

    Raises:
        BadImage: it is not an image, or not one within the limits.
    """
    from PIL import Image as PILImage

    PILImage.init()
    name = name or (str(source) if isinstance(source, Path) else f"{len(source)} bytes")
    try:
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        if size > limits.max_bytes:
            raise BadImage("too_many_bytes", f"{name} has {size} bytes, more than max_bytes = {limits.max_bytes}")
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            head = file.read(16)
            if _starts_like(head, ("TIFF", "AVIF")):
                return _decode_apart(source, limits, name)
            clocked = _ClockedFile(file, limits.decode_seconds)
            try:
                return decode_here(clocked, (*IN_PIECES, "WEBP"), limits, name)  # type: ignore[arg-type]
            except _TooLargeHere:
                return _decode_apart(source, limits, name)
            except _OutOfTime as error:
                raise _too_slow(name, limits) from error
    except OSError as error:
        raise BadImage("unreadable_image", f"{name}: {error}") from error


def decode_here(
    file: str | BinaryIO, formats: Sequence[str], limits: ImageLimits, name: str, webp: float = WEBP_HERE
) -> Image:
    """Decode in this process. A WebP of more than `webp` pixels raises _TooLargeHere."""
    from PIL import Image as PILImage
    from PIL import ImageFile

    try:
        image: Any = PILImage.open(file, formats=[f for f in formats if f in PILImage.OPEN])
    except PILImage.DecompressionBombError as error:  # Pillow's own limit, which max_pixels cannot lift
        raise BadImage("too_many_pixels", f"{name}: {error}") from error
    except _DECODER_ERRORS as error:
        raise BadImage("unreadable_image", f"{name}: {error}") from error
    with image:
        check_size(image, limits, name)
        if image.format == "WEBP" and image.width * image.height > webp:
            raise _TooLargeHere
        if image.format in ("JPEG", "MPO"):
            image.decodermaxblock = min(ImageFile.MAXBLOCK, max(2**9, JPEG_PIECE // (image.width * image.height)))
        return to_rgb(image, name)


def check_size(image: Image, limits: ImageLimits, name: str) -> None:
    """Raise BadImage unless the sides are within the limits."""
    width, height = image.size
    if width * height > limits.max_pixels:
        detail = f"{name} has {width} x {height} pixels, more than max_pixels = {limits.max_pixels}"
        raise BadImage("too_many_pixels", detail)
    if min(width, height) < limits.min_side:
        raise BadImage("too_small", f"{name} has {width} x {height} pixels, min_side is {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        detail = f"{name} has {width} x {height} pixels, sides further apart than max_aspect = {limits.max_aspect}"
        raise BadImage("aspect_ratio", detail)


def to_rgb(image: Image, name: str) -> Image:
    """Decode, turn as the camera was held, put transparent pixels on white and deeper grey on 8 bits (`_grey`)."""
    from PIL import Image as PILImage
    from PIL import ImageOps

    try:
        image.load()
        if len(image.info.get("exif", b"")) > MAX_EXIF:
            raise BadImage("unreadable_image", f"{name}: Exif data of more than {MAX_EXIF} bytes")
        sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _grey(image, sixteen_bits)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = PILImage.new("RGBA", image.size, "white")
            return PILImage.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except BadImage:
        raise
    except _DECODER_ERRORS as error:
        raise BadImage("unreadable_image", f"{name}: {error}") from error


def _grey(image: Image, sixteen_bits: bool) -> Image:
    """Return an image of 16-bit, 32-bit or float grey in 8 bits, as `convert` would not: it cuts at 255.

    Where the format does not say how deep pixels are, the largest one does: at most 1 in float is white at 1, at most
    255 is 8 bits, at most 65,535 is 16, more is 31. Negative pixels and NaN are black.
    """
    import numpy as np
    from PIL import Image as PILImage

    values: Any = np.nan_to_num(np.asarray(image.convert("I") if sixteen_bits else image, dtype=np.float32))
    top = float(values.max(initial=0))
    if sixteen_bits or 255 < top <= 65535:
        values = values / 256
    elif top > 65535:
        values = values / 2**23
    elif image.mode == "F" and top <= 1:
        values = values * 255
    return PILImage.fromarray(values.clip(0, 255).astype(np.uint8))


class _OutOfTime(Exception):
    """Raised past decoders, which would take an error they know for a damaged file."""


class _TooLargeHere(Exception):
    pass


class _ClockedFile:
    """A file whose `read` raises once this thread has worked for `seconds` since it was made.

    Processor time: a busy machine or slow storage must not change which examples a run uses. Without a `fileno`, so
    that no decoder goes around it.
    """

    def __init__(self, file: BinaryIO, seconds: float) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read
        self.end = time.thread_time() + seconds

    def read(self, count: int = -1) -> bytes:
        if time.thread_time() > self.end:
            raise _OutOfTime
        return self._read(count)


def _too_slow(name: str, limits: ImageLimits) -> BadImage:
    return BadImage("decode_too_slow", f"{name} takes more than decode_seconds = {limits.decode_seconds}")


def _starts_like(head: bytes, formats: Sequence[str]) -> bool:
    """Return True if Pillow takes a file with these first 16 bytes for one of `formats`."""
    from PIL import Image as PILImage

    accepts = [PILImage.OPEN[name][1] for name in formats if name in PILImage.OPEN]
    return any(accept is not None and accept(head) is True for accept in accepts)


# --- In another process -----------------------------------------------------------------------------------------------


@cache
def _worker() -> Worker:
    from vigos.sandbox import Worker

    return Worker(Path(__file__))


def _decode_apart(source: Path | bytes, limits: ImageLimits, name: str) -> Image:
    from PIL import Image as PILImage

    from vigos.sandbox import WorkerDied

    question: dict[str, Any] = {"limits": asdict(limits), "name": name}
    question |= {"path": str(source)} if isinstance(source, Path) else {"bytes": len(source)}
    payload = b"" if isinstance(source, Path) else source
    try:
        # The process ends itself in time; the clock is for one that got no processor, or no file from its disk.
        answer, pixels = _worker().ask(question, payload, timeout_s=60 + 10 * limits.decode_seconds)
    except TimeoutError as error:
        raise _too_slow(name, limits) from error
    except (WorkerDied, ImportError) as error:
        if isinstance(error, WorkerDied) and error.code == -signal.SIGPROF:
            raise _too_slow(name, limits) from error
        raise BadImage("unreadable_image", f"{name}: the process that decodes it died: {error}") from error
    if "reason" in answer:
        raise BadImage(answer["reason"], answer["detail"])
    return PILImage.frombytes("RGB", tuple(answer["size"]), pixels)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the input ends."""
    from PIL import AvifImagePlugin
    from PIL import Image as PILImage

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there may be many of this process already
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is doing
    PILImage.init()
    replies.write(b'{"ready": true}\n')
    replies.flush()
    while line := requests.readline():
        question = json.loads(line)
        limits = ImageLimits(**question["limits"])
        source = question["path"] if "path" in question else io.BytesIO(requests.read(question["bytes"]))
        bound_memory(memory_bytes(limits))
        signal.setitimer(signal.ITIMER_PROF, limits.decode_seconds)
        answer, pixels = _attempt(source, limits, question["name"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(answer).encode() + b"\n" + pixels)
        replies.flush()


def _attempt(source: str | BinaryIO, limits: ImageLimits, name: str) -> tuple[dict[str, Any], bytes]:
    try:
        image = decode_here(source, (*IN_PIECES, *AT_ONCE), limits, name, webp=math.inf)
        pixels = image.tobytes()
    except BadImage as error:
        return {"reason": error.reason, "detail": error.detail}, b""
    except MemoryError:
        detail = f"{name} takes more than {memory_bytes(limits)} bytes to decode"
        return {"reason": "unreadable_image", "detail": detail}, b""
    return {"size": image.size, "bytes": len(pixels)}, pixels


def memory_bytes(limits: ImageLimits) -> int:
    """Return the bytes that the other process may address: 1 GiB, and ten copies of 4 bytes a pixel."""
    return 2**30 + 40 * limits.max_pixels


def bound_memory(count: int) -> None:
    """Bound the memory that this process may address, on Linux alone: other systems ignore or refuse such a bound."""
    if sys.platform != "linux":
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (count if hard == resource.RLIM_INFINITY else min(count, hard), hard))


if __name__ == "__main__":
    import os

    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not look like a reply
    serve(sys.stdin.buffer, channel)
