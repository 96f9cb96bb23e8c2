"""Random inputs of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def normal(seed: int, device: torch.device | str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A source of standard normal numbers by shape, the same from each start on a device.

    Args:
        seed: Of the numbers.
        device: Where they are drawn and stay: a CPU takes a minute for what a GPU takes in.
        dtype: Of the numbers; they are drawn in fp32.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)
