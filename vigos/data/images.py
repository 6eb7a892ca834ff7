"""Open images as examples name them: a path, bytes, a base64 `data:` address, `datasets`' Image, a PIL image.

    ImageLoader(root=Path("data")).load("images/0001.png")  # PIL, RGB; or `BadImage`, which says why not

Examples are data of strangers. Paths stay inside the root, links in it included; web addresses are refused; decoding is
bounded (`vigos.data.decode`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigos.data.decode import BadImage, ImageLimits, check_size, decode, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BadImage", "ImageLimits", "ImageLoader", "short"]


@dataclass(frozen=True)
class ImageLoader:
    """Opens what an image column holds.

    Attributes:
        root: folder that paths are relative to and must stay in. None: there is none, and paths are refused.
        allow_outside_root: permit paths, and links, that lead out of it.
        limits: of every image.
    """

    root: Path | None = None
    allow_outside_root: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)

    def load(self, entry: Any) -> Image:
        """Return the decoded image as RGB. A PIL image was opened by the caller, so its decoding is not timed.

        Raises:
            BadImage: reasons of `vigos.data.decode`, "missing_image", "outside_root", "remote_image", "unknown_image".
        """
        from PIL import Image as PILImage

        if isinstance(entry, PILImage.Image):
            check_size(entry, self.limits, "an image object")
            return to_rgb(entry, "an image object")
        if isinstance(entry, Mapping):  # the Image feature of `datasets`, not decoded
            entry = entry["bytes"] if entry.get("bytes") is not None else entry.get("path")
        if isinstance(entry, bytes | bytearray | memoryview):
            return decode(bytes(entry), self.limits)
        if not isinstance(entry, str | Path):
            raise BadImage("unknown_image", f"an image must be a path, bytes or an image, got {short(entry)}")
        text = str(entry)
        if text.startswith("data:"):
            return decode(_data_uri(text), self.limits, "a data: image")
        if isinstance(entry, str) and "://" in text:
            raise BadImage(
                "remote_image",
                f"{short(text)} is an address, and nothing is downloaded here: save the images in a folder first "
                "(img2dataset does), name their paths in the data, and pass that folder as data_root",
            )
        return decode(self._path(text), self.limits, text)

    def _path(self, text: str) -> Path:
        if self.root is None and not self.allow_outside_root:
            raise BadImage("outside_root", f"image path {text!r} needs data_root: these examples come from no folder")
        try:
            path = (Path(text) if self.root is None else self.root / text).resolve()
            inside = self.root is not None and path.is_relative_to(self.root.resolve())
            if not inside and not self.allow_outside_root:
                detail = f"image path {text!r} leads out of {self.root}, which allow_outside_root permits"
                raise BadImage("outside_root", detail)
            if not path.is_file():
                raise BadImage("missing_image", f"no such file: {path}")
        except BadImage:
            raise
        # A name too long, a link to itself, a folder that may not be read; a null byte is a ValueError.
        except (OSError, ValueError, RuntimeError) as error:
            raise BadImage("missing_image", f"{short(text)}: {error}") from error
        return path


def _data_uri(text: str) -> bytes:
    head, comma, payload = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadImage("unreadable_image", f"only base64 data: images are read, got {short(head)}")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:  # binascii.Error, or letters beyond ASCII
        raise BadImage("unreadable_image", f"a data: image: {error}") from error


def short(value: Any) -> str:
    """Return the repr of `value`, cut to 80 characters for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…" + text[-1]
