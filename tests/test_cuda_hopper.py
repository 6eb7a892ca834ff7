"""Logits as pairs of 16-bit numbers, emulated: the wgmma product that leaves them, and the engine that reads them.

Swizzle, fragments and descriptors are as the PTX manual has them; that the chip agrees, only a GPU can say.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers.cuda_cases import LAYOUTS, product_is_right, rows_are_right
from helpers.divergence_cases import Case, Outcome, assert_same, case, error, run
from helpers.engines import configure, emulate

from vigos.divergence.engines import cuda
from vigos.divergence.engines.products import Chunks

BF16, F64 = torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return emulate(monkeypatch, request)


# Under, at and past a tile of 128 rows, 128 entries, 64 of K.
@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize(
    ("r", "d", "v", "dtype"), [(5, 8, 3, "float16"), (128, 64, 128, "float16"), (131, 328, 301, "bfloat16")]
)
def test_product(emulator: ModuleType, shared: bool, r: int, d: int, v: int, dtype: str) -> None:
    product_is_right(emulator, shared=shared, r=r, d=d, v=v, dtype=dtype)


@pytest.mark.parametrize("layout", [*LAYOUTS, "product"])
def test_no_order_of_threads_changes_a_bit(emulator: ModuleType, layout: str) -> None:
    """Seeds draw which threads sleep, how late copies and products come, and which clusters run at one time."""
    results = []
    for seed in (100, 200):
        emulator.set_seed(seed)
        if layout in LAYOUTS:
            results.append(rows_are_right(emulator, layout))
        else:
            results.append(product_is_right(emulator, r=5, d=328, v=390))
    assert torch.equal(*results)


def kept(
    c: Case, pairs: bool, dtype: torch.dtype = BF16, *, config: Chunks | None = None, **options: object
) -> Outcome:
    """Run impl="cuda" with logits as pairs or in fp32, in chunks of 16 rows."""
    with pytest.MonkeyPatch.context() as patch:
        configure(patch, "cuda", config or Chunks(chunk_bytes=1, waiting_chunks=1, stored_pairs=pairs))
        return run(c, "cuda", dtype, upstream="loss", **options)


# Teachers next to the student, at divergences from 1e-6 to 1, and far from it: unrelated rows, gaps of up to 60 nats,
# another head of another width.
REGIMES = {
    **{f"near {x}": case(9, 64, 390, near=x) for x in (0.004, 0.02, 0.1, 0.5)},
    "unrelated": case(9, 64, 390, m=9),
    "two heads": case(9, 64, 390, m=7, d_t=72),
    "options": case(9, 64, 390, near=0.1, temperature=0.7, scale=1.3, vocab_size=370, entry_clip=0.02, beta=0.3),
}


@pytest.mark.parametrize(
    ("regime", "dtype"),
    [*((name, BF16) for name in REGIMES), ("near 0.02", torch.float16), ("two heads", torch.float16)],
)
def test_error_of_the_gradient(regime: str, dtype: torch.dtype) -> None:
    """0.3 % against float64 with the same operands, all kinds: nearly all of it is the rounding of the results."""
    c = REGIMES[regime]
    got, exact = kept(c, True, dtype, train_head=False), run(c, None, dtype, upstream="loss", compute=F64)
    fp32 = kept(c, False, dtype, train_head=False)
    assert error(got.dhidden, exact.dhidden) < 3e-3
    assert error(got.dhidden, exact.dhidden) < 1.1 * error(fp32.dhidden, exact.dhidden) + 1e-3
    torch.testing.assert_close(got.divergence, exact.divergence, rtol=5e-3, atol=3e-7)


def test_gaps_beyond_fp16() -> None:
    """Logits and gaps past 65,504 are wrong, and finite."""
    c = case(6, 64, 300, m=6)
    c.student *= 8e3
    c.teacher *= 8e3
    got, fp32 = kept(c, True, train_head=False), kept(c, False, train_head=False)
    assert fp32.divergence.max() > 1e5
    assert torch.isfinite(got.divergence).all()
    assert torch.isfinite(got.dhidden).all()


def test_a_row_that_is_not_a_number() -> None:
    """Keeps to itself, and is seen."""
    c = case(8, 64, 300, near=0.1)
    before = kept(c, True, train_head=False)
    for side in (c.student, c.teacher):
        kept_row = side[3].clone()
        side[3, 5] = float("nan")
        after = kept(c, True, train_head=False)
        side[3] = kept_row
        others = torch.arange(8) != 3
        assert torch.equal(after.divergence[others], before.divergence[others])
        assert torch.equal(after.dhidden[others], before.dhidden[others])
        assert after.divergence[3].isnan()


def test_gradients_over_their_pairs() -> None:
    """The same bits in place of the pairs, in buffers of their own, and with several chunks a product."""
    c = case(19, 24, 260, near=0.1)
    results = []
    for room, waiting in ((700_000_000, 1), (0, 1), (0, 3)):
        config = Chunks(chunk_bytes=1, waiting_chunks=waiting, in_place_bytes=room)
        results.append(kept(c, True, config=config, train_head=False))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_what_is_kept_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason that `stores_pairs` names, and none of what it says goes either way."""
    seen = []
    monkeypatch.setattr(cuda, "stores_pairs", lambda *a, real=cuda.stores_pairs: seen.append(real(*a)) or seen[-1])
    for c, dtype, pairs in (
        (case(5, 16, 40), BF16, True), (case(5, 16, 40), torch.float16, True),
        (case(5, 16, 41, shared=False, temperature=2.0, scale=0.5, entry_clip=0.1, vocab_size=39), BF16, True),
        (case(5, 16, 40), torch.float32, False), (case(5, 12, 40), BF16, False),
        (case(5, 16, 40, bias=True), BF16, False), (case(5, 16, 40, softcap=5.0), BF16, False),
        (case(5, 16, 40, teacher={"scale": 2.0}), BF16, False),
    ):  # fmt: skip
        kept(c, True, dtype)
        assert seen.pop() is pairs, (c.options, dtype)
    kept(case(5, 16, 40), True, config=Chunks(stored_pairs=False))
    assert seen.pop() is False
    monkeypatch.setattr(cuda, "_has_wgmma", lambda device: False)
    kept(case(5, 16, 40), True)
    assert seen.pop() is False


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({}, "float32", "dtype must be float16 or bfloat16, got float32"),
        ({"d": 12, "d_t": 12}, "float16", "student_hidden must be of a width that is a multiple of 8"),
        ({"d_t": 24}, "float16", "d_t must be d where the head is shared, got 24"),
        ({"stride_student_weight": 20}, "float16", "student_weight must be of a row stride that is a multiple of 8"),
        ({"teacher_hidden": 4104}, "float16", "teacher_hidden must be aligned to 16 bytes, got address 4104"),
        ({"logical_vocab": 131}, "float16", r"logical_vocab must be in \[1, 130\], got 131"),
        ({"stride_pairs": 130}, "float16", "stride_pairs must be a multiple of 4, at least vocab rounded up to 128"),
        ({"stride_tops": 1}, "float16", "stride_tops must be at least vocab / 128, got 1"),
        ({"tops": 0}, "float16", "tops must be a device pointer, got null"),
    ],
)  # fmt: skip
def test_the_product_refuses(emulator: ModuleType, change: dict[str, int], dtype: str, message: str) -> None:
    """Before anything is launched: none of these addresses is one."""
    fields = {
        "student_hidden": 4096, "teacher_hidden": 4096, "student_weight": 4096, "pairs": 4096, "tops": 4096, "d": 16,
        "d_t": 16, "rows": 2, "vocab": 130, "logical_vocab": 130, "stride_student_hidden": 16,
        "stride_teacher_hidden": 16, "stride_student_weight": 16, "stride_pairs": 256, "stride_tops": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        emulator.cuda.pair_product(emulator.cuda.PairProductParams(**fields | change), dtype=dtype)
