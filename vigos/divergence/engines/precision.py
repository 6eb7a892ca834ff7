"""Matrix products of float32 in float32, whatever torch's switches for TF32 and bfloat16 products say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SWITCHES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_lock = threading.Lock()
_inside = 0
_before: list[str] = []


@contextmanager
def ieee_products() -> Iterator[None]:
    """Multiply float32 matrices in IEEE precision inside the block; the switches are put back by the last one out.

    They belong to the process: products of other threads meanwhile are exact too. The environment variable
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 stands above them.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = [switch.fp32_precision for switch in _SWITCHES]
            for switch in _SWITCHES:
                switch.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for switch, value in zip(_SWITCHES, _before, strict=True):
                    switch.fp32_precision = value
