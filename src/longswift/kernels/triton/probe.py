"""Whether Triton's interpreter runs under the NumPy that is installed."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _count(TURNS: Any, OUT: Any) -> None:
    total = 0
    for _ in range(0, tl.load(TURNS)):
        total += 1
    tl.store(OUT, total)


@functools.cache
def interpreter_fails() -> str | None:
    """Why the interpreter cannot loop up to a number it has loaded, or None if it can.

    Triton 3.5 makes that number from an array of one element, which NumPy 2.4 refuses.
    """
    turns = torch.tensor([3], dtype=torch.int32, device="cpu")
    out = torch.zeros_like(turns)
    try:
        _count[(1,)](turns, out)
    except Exception as error:  # Whatever it is, kernels will fail with it.
        return f"Triton's interpreter fails ({error}); before Triton 3.6 it needs numpy<2.4"
    return None
