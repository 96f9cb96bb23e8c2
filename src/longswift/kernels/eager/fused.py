"""Attention of dense rectangles through torch's fused CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.pattern import Band
from longswift.core.softmax import accumulator_dtype, merge
from longswift.core.types import Partial
from longswift.kernels.eager.jobs import Job, allowed_mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, job: Job, band: Band, causal: bool, scale: float
) -> Partial:
    """Softmax attention of one job's tiles; not differentiable.

    Args:
        q: ``[N, H, rows, D]``, any strides with a contiguous last dimension, as for k and v.
        k: ``[N, H or 1, width, D]``.
        v: ``[N, H or 1, width, D]``.
        job: The rectangles.
        band: The band they belong to.
        causal: Whether keys after the query are hidden.
        scale: Factor on the scores.

    Returns:
        ``out [N, H, rows, D]`` as the fused kernel rounds it or wider, ``lse [N, H, rows]`` in the
        accumulator dtype.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if scale <= 0.0:
        # The fused kernel hides scores before it scales them.
        q, scale = (q * -1.0, -scale) if scale < 0.0 else (torch.zeros_like(q), 1.0)
    if causal and band.reach is None and job.width - job.shift == job.rows:
        # The fused kernel skips the upper triangle of a square, not of a rectangle.
        if job.shift == 0:
            return _call(q, k, v, scale, causal=True)
        (k_before, k_own), (v_before, v_own) = (
            (x[:, :, : job.shift], x[:, :, job.shift :]) for x in (k, v)
        )
        own = _call(q, k_own, v_own, scale, causal=True)
        return merge(own, _call(q, k_before, v_before, scale))
    return _call(q, k, v, scale, allowed=allowed_mask(job, band, causal, q.device))


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
) -> Partial:
    """``allowed`` is bool ``[rows, width]``."""
    mask = None
    if allowed is not None:
        mask = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device)
        mask.masked_fill_(~allowed, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    lse = lse.to(accumulator_dtype(q.dtype))
    if allowed is not None:
        empty = ~allowed.any(-1)
        if empty.any():
            out = out.masked_fill(empty[:, None], 0.0)
            lse = lse.masked_fill(empty, float("-inf"))
    return Partial(out, lse)
