"""Views of an example's images: what a role sees of them, made with Pillow.

view: blur              view: {crop: box}          view: {column: crops}        # in YAML

crop: COLUMN       the part of each image inside a box of the column, [x0, y0, x1, y1] in pixels
mask: COLUMN       the same part painted grey: the rest is seen
blur: SHARE        blurred by SHARE of the shorter side (0.15)
downscale: FACTOR  FACTOR (8) times fewer pixels a side, at the same size
blank              grey
shuffle: PIXELS    squares of so many pixels (32) in another order
other              the images of another example of the step
none               no image
column: COLUMN     images from another column
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

GREY = (127, 127, 127)
COLUMN, PLAIN = ("crop", "mask", "column"), ("blank", "other", "none")
NUMBER = {"blur": 0.15, "downscale": 8, "shuffle": 32}
KINDS = (*COLUMN, *NUMBER, *PLAIN)


class BadView(ValueError):
    """A view that an example does not allow; `reason` is a slug."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class View:
    """A view by its kind, with the column or the number that it takes."""

    kind: str
    value: Any = None

    @classmethod
    def read(cls, given: Any) -> View | None:
        """Return the view that YAML names, `kind` or `{kind: value}`; None for None.

        Raises:
            ValueError: an unknown kind, or a value that it does not take.
        """
        if given is None or isinstance(given, View):
            return given
        pair = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else (given, None)
        kind, value = pair
        if kind not in KINDS:
            near = get_close_matches(str(kind), KINDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"view must be one of {', '.join(KINDS)}, got {given!r}{hint}")
        if kind in COLUMN and not (isinstance(value, str) and value):
            raise ValueError(f"view {kind} must name a column, such as {{{kind}: box}}, got {value!r}")
        if kind in NUMBER:
            value = NUMBER[kind] if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"view {kind} must have a number above 0, got {value!r}")
        if kind in PLAIN and value is not None:
            raise ValueError(f"view {kind} takes no value, got {value!r}")
        return cls(kind, value)

    def __call__(
        self, images: Sequence[Image], columns: Mapping[str, Any], *, seed: str,
        others: Sequence[Image] | None = None, load: Callable[[Any], Image] | None = None,
    ) -> list[Image]:  # fmt: skip
        """Return the images as this view shows them.

        Args:
            columns: the example's other columns. seed: of what is drawn, such as the example's id.
            others: another example's images. load: opens an entry of an image column.

        Raises:
            BadView: the example lacks what the view needs.
        """
        if self.kind == "none":
            return []
        if self.kind == "other":
            if others is None:
                raise BadView("no_other_image", f"no other example of the step has {len(images)} image(s)")
            return list(others)
        if self.kind == "column":
            entries = self._column(columns)
            entries = list(entries) if isinstance(entries, list | tuple) else [entries]
            return [entry if load is None else load(entry) for entry in entries]
        if self.kind in ("crop", "mask"):
            boxes = _boxes(self._column(columns), images, self.value)
            return [self._boxed(image, box) for image, box in zip(images, boxes, strict=True)]
        rng = random.Random(f"{seed}/{self.kind}")
        return [self._changed(image, rng) for image in images]

    def _column(self, columns: Mapping[str, Any]) -> Any:
        value = columns.get(self.value)
        if value is None or value == []:
            raise BadView("missing_field", f"no field {self.value!r} for the view {self.kind}")
        return value

    def _boxed(self, image: Image, box: tuple[int, int, int, int]) -> Image:
        if self.kind == "crop":
            return image.crop(box)
        image = image.copy()
        image.paste(GREY, box)
        return image

    def _changed(self, image: Image, rng: random.Random) -> Image:
        from PIL import Image as Pillow
        from PIL import ImageFilter

        if self.kind == "blank":
            return Pillow.new("RGB", image.size, GREY)
        if self.kind == "blur":
            return image.filter(ImageFilter.GaussianBlur(self.value * min(image.size)))
        if self.kind == "downscale":
            small = image.resize([max(1, round(side / self.value)) for side in image.size])  # type: ignore[arg-type]
            return small.resize(image.size)
        side = int(self.value)
        boxes = [
            (x, y, x + side, y + side)
            for y in range(0, image.height - side + 1, side)
            for x in range(0, image.width - side + 1, side)
        ]
        out, moved = image.copy(), rng.sample(boxes, len(boxes))
        for box, source in zip(boxes, moved, strict=True):
            out.paste(image.crop(source), box)
        return out


def _boxes(value: Any, images: Sequence[Image], column: str) -> list[tuple[int, int, int, int]]:
    """Return a box for each image; the column holds one, or one an image."""
    value = [value] if isinstance(value, list | tuple) and len(value) == 4 and not isinstance(value[0], list) else value
    if not isinstance(value, list | tuple) or len(value) != len(images):
        raise BadView("bad_box", f"{column} must hold a box for each of {len(images)} image(s), got {value!r:.80}")
    found = []
    for box, image in zip(value, images, strict=True):
        try:
            x0, y0, x1, y1 = (round(float(x)) for x in box)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadView("bad_box", f"{column} must hold [x0, y0, x1, y1] in pixels, got {box!r:.80}") from error
        if not (0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height):
            raise BadView("bad_box", f"{column} {box!r:.80} is not inside the image, {image.width} x {image.height}")
        found.append((x0, y0, x1, y1))
    return found
