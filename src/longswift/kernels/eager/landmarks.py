"""Landmark attention: every query sees every key through a few segment means.

``softmax(Q K~^T) Z softmax(Q~ K^T) V`` with the m segment means ``Q~, K~`` and
``Z ~ softmax(Q~ K~^T)^+``. The outer factors are attention over m keys and by m queries, which
torch's fused kernel computes in O(n) memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longswift.core.softmax import accumulator_dtype


def attend_landmarks(
    q: Tensor, k: Tensor, v: Tensor, *, landmarks: int, scale: float, iterations: int | None
) -> Tensor:
    """Attention of an unpadded bidirectional batch, ``[B, Hq, L, Dv]`` in fp32 (fp64 for fp64).

    Args:
        q: ``[B, Hq, L, D]``.
        k: ``[B, Hkv, L, D]``.
        v: ``[B, Hkv, L, Dv]``.
        landmarks: Segments (m); no more than tokens.
        scale: Factor on the scores.
        iterations: Steps towards the pseudo-inverse, or None for the exact one.
    """
    groups = q.shape[1] // k.shape[1]
    # The inverse amplifies rounding, and m x m numbers are cheap.
    fine = torch.float32 if q.device.type == "mps" else torch.float64
    q_mean, k_mean = (segment_means(x.to(fine), landmarks) for x in (q, k))
    k_mean = k_mean.repeat_interleave(groups, 1)
    between = (q_mean @ k_mean.transpose(2, 3) * scale).softmax(3)
    inverse = pseudo_inverse(between, iterations)
    acc = accumulator_dtype(q.dtype)
    qa, ka, va = (x.to(acc) for x in (q, k, v))
    read = F.scaled_dot_product_attention(
        q_mean.to(acc), ka, va, scale=scale, enable_gqa=groups > 1
    )
    values = (inverse @ read.to(fine)).to(acc)
    return F.scaled_dot_product_attention(qa, k_mean.to(acc), values, scale=scale)


def segment_means(x: Tensor, count: int) -> Tensor:
    """Means of ``min(count, L)`` consecutive segments of ``[B, H, L, D]``, as equal as can be."""
    length = x.shape[2]
    count = min(count, length)
    segment = torch.arange(length, device=x.device) * count // length
    sums = x.new_zeros(*x.shape[:2], count, x.shape[3]).index_add(2, segment, x)
    return sums / torch.bincount(segment, minlength=count).unsqueeze(1)


def pseudo_inverse(a: Tensor, iterations: int | None) -> Tensor:
    """Pseudo-inverse of each matrix ``[..., m, m]``, exact or by a third-order iteration.

    The start ``A^T / (|A|_1 |A|_inf)`` takes the norms of each matrix alone, so that no matrix
    depends on its neighbours in the batch. Razavi et al., 2014.
    """
    if iterations is None:
        return torch.linalg.pinv(a)
    rows, columns = a.abs().sum(-1).amax(-1), a.abs().sum(-2).amax(-1)
    z = a.transpose(-1, -2) / (rows * columns)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z
