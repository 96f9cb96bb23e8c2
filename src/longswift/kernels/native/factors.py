"""In which dtype the compiled kernels multiply."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longswift.core import compiled


def factors_of(x: Tensor) -> torch.dtype:
    """The dtype of ``x`` where the processor has a unit for it, else fp32."""
    return x.dtype if x.dtype == torch.float32 or _multiplies(x.dtype) else torch.float32


def ranking_dtype(x: Tensor) -> torch.dtype:
    """In what ``x`` is multiplied where products only rank: bf16 for fp32, too, where it is fast.

    It costs a score some thousandths of its factors' length, and saves four fifths of the products.
    """
    if x.dtype == torch.float32 and _multiplies(torch.bfloat16):
        return torch.bfloat16
    return factors_of(x)


@functools.cache
def ranks_in_bytes() -> bool:
    """Whether this processor multiplies bytes, and thereby ranks, faster than 16-bit numbers."""
    able: bool = compiled.loaded().multiplies_bytes()
    return able


def in_pairs(x: Tensor) -> Tensor:
    """``x``, or a copy whose 16-bit rows start an even number of values apart to move in pairs."""
    return x.contiguous() if x.element_size() == 2 and x.stride(2) % 2 else x


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    operators = compiled.loaded()
    able: bool = operators.multiplies(torch.empty(0, dtype=dtype, device="cpu"))
    return able
