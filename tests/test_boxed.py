"""Boxes in text and bytes: which close, what they hold, and that a long text takes one pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vigos.method.boxed import boxes, fits_in_box, last_box


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so \\boxed{42}", "42"),
        ("\\boxed{1} or \\boxed{2}", "1, 2"),
        ("\\boxed{1}, then \\boxed{2}", "2"),
        ("\\boxed{A} \\text{ and } $\\boxed{C}$.", "A, C"),
        ("\\boxed{7}\n\n\\boxed{7}", "7"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{ red }", "red"),
        ("\\boxed{}", ""),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{\\}}", "\\}"),
        ("\\boxed{ż}", "ż"),
        ("\\\\boxed{5}", "5"),
        ("\\boxed 5", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_last_box(text, wanted):
    assert last_box(text) == wanted


def test_a_box_that_never_closes_hides_none_inside():
    assert boxes(r"\boxed{a \boxed{b} {c} \boxed{d}") == [(16, 17), (30, 31)]
    assert boxes(r"\boxed{a \boxed{b}}") == [(7, 18), (16, 17)]
    assert boxes(r"} { \boxed{a}") == [(11, 12)]
    assert boxes(r"\boxed{a} \boxed{b}", 3) == [(17, 18)]


def test_characters_beyond_latin_are_not_braces():
    for content in ("ż猫", "ŽŻ"):  # U+017B and U+017D end in the bytes of braces
        assert last_box(f"\\boxed{{{content}}}") == content
        assert boxes(f"\\boxed{{{content}}}".encode()) == [(7, 7 + len(content.encode()))]


@pytest.mark.parametrize(("text", "fits"), [("a{b}c", True), ("", True), ("{", False), ("}{", False), ("x\\", False),
                                            ("x\\\\", True), ("\\{", True), ("\\boxed{7}", True)])  # fmt: skip
def test_fits_in_box(text, fits):
    assert fits_in_box(text) == fits


@given(st.text(alphabet="\\boxed{} 7", max_size=40))
def test_text_and_bytes_agree(text):
    assert boxes(text) == boxes(text.encode())


def test_a_hundred_thousand_characters_are_one_pass():
    """Sixteen thousand open boxes: quadratic scanning would not end."""
    assert boxes("\\boxed{" * 100_000) == []
    assert last_box("\\boxed{" * 20_000 + "7}" + "{" * 100_000) == "7"
