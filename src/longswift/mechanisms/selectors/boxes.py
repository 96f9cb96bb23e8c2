"""Boxes around blocks of keys, as groups of query rows meet them in products."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.softmax import accumulator_dtype
from longswift.mechanisms.selectors.base import Request

# Boxes of key blocks described at once.
_BOXES = 2048


def extremes(low: Tensor, high: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Maximum and minimum of boxes ``[B, H, W, D]`` as factors, ``[B * H, W, D]`` each."""
    return [x.to(dtype).flatten(0, 1) for x in (high, low)]


def key_features(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Centre, radius and absolute centre of boxes ``[B, Hkv, W, D]``, ``[B, Hkv, W, 3D]``."""
    acc = accumulator_dtype(low.dtype)
    features = torch.empty(*low.shape[:3], 3 * low.shape[3], dtype=dtype, device=low.device)
    # A piece at a time: temporaries as large as the boxes would be the peak of the whole call.
    for out, bottom, top in zip(*(x.split(_BOXES, 2) for x in (features, low, high)), strict=True):
        bottom, top = bottom.to(acc), top.to(acc)
        centre = (bottom + top) / 2
        out.copy_(torch.cat([centre, (top - bottom) / 2, centre.abs()], -1))
    return features


def key_extremes(request: Request, size: int) -> tuple[Tensor, Tensor]:
    """Channel-wise minimum and maximum of every candidate key block, ``[B, Hkv, W, D]``.

    The incomplete last block is a candidate in bidirectional attention only.
    """
    k, summary = request.k, request.summary
    if summary is not None and size % summary.page == 0:
        known = summary.coarsen(size // summary.page)
        low, high = known.k_min, known.k_max
    else:
        whole = k[:, :, : k.shape[2] // size * size].unflatten(2, (-1, size))
        # Two reductions: a fused aminmax over an inner dimension is several times slower.
        low, high = whole.amin(3), whole.amax(3)
    if k.shape[2] % size and not request.pattern.causal:
        tail = k[:, :, k.shape[2] // size * size :]
        low = torch.cat([low, tail.amin(2, keepdim=True)], 2)
        high = torch.cat([high, tail.amax(2, keepdim=True)], 2)
    return low, high
