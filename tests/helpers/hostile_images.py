"""Files of images that ask for more time or memory than their size suggests; none of them is damaged."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def jpeg_of_scans(size: tuple[int, int], scans: int) -> bytes:
    """A progressive JPEG of one grey whose last scan comes `scans` times: each goes over the whole image again."""
    content = encoded(Image.new("L", size, 90), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def png_of_empty_chunks(size: tuple[int, int], count: int) -> bytes:
    """A PNG whose pixels come after `count` empty chunks of data."""
    content = encoded(Image.new("L", size, 90))
    first = content.index(b"IDAT") - 4
    return content[:first] + chunk(b"IDAT", b"") * count + content[first:]


def bmp_of_runs(size: tuple[int, int]) -> bytes:
    """A BMP that is compressed in runs of one pixel."""
    width, height = size
    pixels = (b"\x01\x05" * width + b"\0\0") * height + b"\0\1"
    palette = bytes(range(256)) * 4
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + palette + pixels


def tiff_of_scans(side: int, scans: int, copies: int) -> bytes:
    """A TIFF of `copies` strips, which are all one JPEG of `scans` scans: a small file, decoded in one call."""
    strip = jpeg_of_scans((side, side), scans)
    tags = [
        (256, 3, 1, side), (257, 4, 1, side * copies), (258, 3, 1, 8), (259, 3, 1, 7), (262, 3, 1, 1),
        (273, 4, copies, 0), (277, 3, 1, 1), (278, 4, 1, side), (279, 4, copies, 0),
    ]  # fmt: skip
    tables = 8 + 2 + 12 * len(tags) + 4
    at = tables + 8 * copies
    place = {273: tables, 279: tables + 4 * copies}
    entries = b"".join(struct.pack("<HHII", tag, *rest, place.get(tag, value)) for tag, *rest, value in tags)
    numbers = struct.pack(f"<{copies}I", *[at] * copies) + struct.pack(f"<{copies}I", *[len(strip)] * copies)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + numbers + strip
