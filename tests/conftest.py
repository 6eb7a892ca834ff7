"""Without a GPU the Triton kernels of this process run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before anything imports triton
