"""Full attention: every query sees every key, or every key up to its own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.inputs import check_scale, tracked
from longswift.core.types import Partial
from longswift.kernels.eager.whole import with_gradients
from longswift.kernels.native.gradients import whole_gradients

# Scores of a call, and the rows that are worth packing the keys again for.
_SCORES = 1 << 30
_FEWEST = 1024


def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """Attention of tensors on a CPU that nobody has checked, with gradients.

    Returns:
        Output and log-sum-exp; None for what breaks the layout contract or holds NaN or infinity,
        and beyond 8,192 keys, unless there are at most 2**31 scores and few rows, or the
        processor is AMD's or multiplies such inputs in 16 bits.
    """
    if not tracked(q, k, v):
        out, lse, done = _operator()(q, k, v, scale, causal)
        return (out, lse) if done > 0 else None
    with torch.no_grad():
        found = attend_whole(q, k, v, causal=causal, scale=scale)
    scale = check_scale(scale, q.shape[-1])
    return found and with_gradients(q, k, v, Partial(*found), causal, scale, whole_gradients)


def attend_by_rows(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> Partial | None:
    """``attend_whole``, some rows at a time where there are many: in between Ctrl-C is heard."""
    q_len, k_len = q.shape[2], k.shape[2]
    rows = max(_FEWEST, _SCORES // (q.shape[0] * q.shape[1] * k_len) // _FEWEST * _FEWEST)
    if q_len <= rows:
        found = attend_whole(q, k, v, causal, scale)
        return found and Partial(*found)
    whole: Partial | None = None
    for first in range(0, q_len, rows):
        end = min(first + rows, q_len)
        keys = k_len - q_len + end if causal else k_len
        part = attend_whole(q[:, :, first:end], k[:, :, :keys], v[:, :, :keys], causal, scale)
        if part is None:
            return None
        out, lse = part
        if whole is None:
            whole = Partial(out.new_empty(*q.shape[:3], v.shape[3]), lse.new_empty(q.shape[:3]))
        whole.out[:, :, first:end] = out
        whole.lse[:, :, first:end] = lse
    return whole


@functools.cache
def _operator() -> Any:
    # Asked for by its overload: the packet of all of them takes a microsecond to choose one.
    return compiled.loaded().whole.default
