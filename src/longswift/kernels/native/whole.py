"""Full attention: every query sees every key, or every key up to its own."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from longswift.core import compiled
from longswift.core.pattern import BlockPattern
from longswift.core.rectangles import jobs
from longswift.core.types import Partial


def attend_whole(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Partial | None:
    """Attention of tensors on a CPU that nobody has checked; without gradients.

    Returns:
        None for what breaks the layout contract or holds NaN or infinity, for few rows (to pack
        the keys would cost more than to read them), and beyond 8,192 keys.
    """
    out, lse, done = _operator()(q, k, v, scale, causal)
    return Partial(out, lse) if done > 0 else None


@functools.cache
def _operator() -> Any:
    # Asked for by its overload: the packet of all of them takes a microsecond to choose one.
    return compiled.loaded().whole.default


def is_whole(pattern: BlockPattern, q_len: int, k_len: int) -> bool:
    """Whether the bands show every query every key, or every key up to its own."""
    for band in set(pattern.bands):
        found = jobs(band, q_len, k_len, pattern.causal)
        rows = sum(job.rows * job.count for job in found)
        if rows < q_len or band.reach is not None or any(job.width < k_len for job in found):
            return False
    return True
