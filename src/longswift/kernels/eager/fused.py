"""Attention of dense rectangles through torch's fused CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.pattern import Band
from longswift.core.rectangles import Job, allowed_mask, empty_rows, hidden_scores
from longswift.core.softmax import accumulator_dtype, merge
from longswift.core.types import Partial

# Elements of a dense bias held at once: 8 MiB in fp32.
_BIASES = 1 << 21


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    job: Job,
    band: Band,
    causal: bool,
    scale: float,
    bias: ScoreBias | None = None,
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
        bias: Additions to the scaled scores of the ``H`` heads.

    Returns:
        ``out [N, H, rows, D]`` as the fused kernel rounds it or wider, ``lse [N, H, rows]`` in the
        accumulator dtype.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if scale <= 0.0:
        # The fused kernel hides scores before it scales them.
        q, scale = (q * -1.0, -scale) if scale < 0.0 else (torch.zeros_like(q), 1.0)
    if bias is not None:
        return _biased(q, k, v, job, band, causal, scale, bias)
    if causal and band.reach is None and job.width - job.shift == job.rows:
        if job.rows == 1:
            return _call(q, k, v, scale)
        # The fused kernel skips the upper triangle of a square, not of a rectangle.
        if job.shift == 0:
            return _call(q, k, v, scale, causal=True)
        (k_before, k_own), (v_before, v_own) = (
            (x[:, :, : job.shift], x[:, :, job.shift :]) for x in (k, v)
        )
        own = _call(q, k_own, v_own, scale, causal=True)
        return merge(own, _call(q, k_before, v_before, scale))
    allowed = allowed_mask(job, band, causal, q.device)
    if allowed is None:
        return _call(q, k, v, scale)
    mask = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device)
    mask.masked_fill_(~allowed, float("-inf"))
    return _call(q, k, v, scale, mask=mask, empty=~allowed.any(-1))


def _biased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    job: Job,
    band: Band,
    causal: bool,
    scale: float,
    bias: ScoreBias,
) -> Partial:
    """As many keys at a time as the kernel is given a dense bias for."""
    most = max(1, _BIASES // (bias.values.shape[0] * job.rows))
    parts = []
    for first in range(0, job.width, most):
        size = min(most, job.width - first)
        part = job._replace(width=size, shift=job.shift - first)
        mask = bias.rectangle(-part.shift, job.rows, size)
        hidden = hidden_scores(part, band, causal, mask.dtype, q.device)
        for start, limit in hidden:
            mask[..., start : start + limit.shape[1]] += limit
        empty = empty_rows(part, band, causal, q.device) if hidden else None
        keys, values = k[:, :, first : first + size], v[:, :, first : first + size]
        parts.append(_call(q, keys, values, scale, mask=mask.unsqueeze(0), empty=empty))
    return merge(*parts)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    empty: Tensor | None = None,
) -> Partial:
    """``mask`` is added to the scores, ``empty [rows]`` says which rows it leaves no key."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    lse = lse.to(accumulator_dtype(q.dtype))
    if empty is not None and empty.any():
        out = out.masked_fill(empty[:, None], 0.0)
        lse = lse.masked_fill(empty, float("-inf"))
    return Partial(out, lse)
