"""Full attention: every query sees every key, or every key up to its own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.inputs import tracked
from longswift.core.types import Partial
from longswift.kernels.eager.whole import with_gradients


def attend_whole(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Partial | None:
    """Attention of tensors on a CPU that nobody has checked; gradients are the fused kernel's.

    Returns:
        None for what breaks the layout contract or holds NaN or infinity, for few rows (to pack
        the keys would cost more than to read them), and beyond 8,192 keys.
    """
    if not tracked(q, k, v):
        out, lse, done = _operator()(q, k, v, scale, causal)
        return Partial(out, lse) if done > 0 else None
    with torch.no_grad():
        found = attend_whole(q, k, v, causal=causal, scale=scale)
    return found and with_gradients(q, k, v, found, causal, scale)


@functools.cache
def _operator() -> Any:
    # Asked for by its overload: the packet of all of them takes a microsecond to choose one.
    return compiled.loaded().whole.default
