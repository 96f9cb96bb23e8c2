"""Boxes around blocks of keys and around groups of query rows, as they meet in products."""

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


def row_boxes(q: Tensor, heads: int, size: int) -> tuple[Tensor, Tensor]:
    """Centres and radii of every ``size`` rows of each head, ``[B, Hkv, N, groups, D]``.

    Args:
        q: ``[B, Hkv, N, heads * rows, D]``.
        heads: Query heads of a KV head.
        size: Rows of a group; the last row of a head fills its last group up.
    """
    by_head = q.unflatten(3, (heads, -1))
    missing = -by_head.shape[4] % size
    if missing:
        last = by_head[..., -1:, :].expand(*by_head.shape[:4], missing, -1)
        by_head = torch.cat([by_head, last], 4)
    boxes = by_head.unflatten(4, (-1, size))
    low, high = boxes.amin(5), boxes.amax(5)
    return ((low + high) / 2).flatten(3, 4), ((high - low) / 2).flatten(3, 4)
