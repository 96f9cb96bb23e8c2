"""Attention of small dense rectangles, through torch's fused CPU kernel where it applies."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longswift.core.softmax import accumulator_dtype, merge, softmax_partial
from longswift.core.types import Partial

# Score elements held at once by the unfused path: 16 MiB in fp32.
_SCORES = 1 << 22
_KEYS = 2048


@functools.cache
def low_precision_is_fast() -> bool:
    """Whether this CPU multiplies 16-bit numbers faster than fp32 (AMX); otherwise we widen."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which ``x`` is multiplied: its own, or fp32 where low precision is the slow path."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        return x.dtype if low_precision_is_fast() else torch.float32
    return x.dtype


def rectangle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    allowed: Tensor | None = None,
) -> Partial:
    """Softmax attention of ``q [N, H, L, D]`` over ``k, v [N, H, K, *]``; not differentiable.

    Args:
        q: Queries; any strides with a contiguous last dimension, as for k and v.
        k: Keys.
        v: Values.
        scale: Factor on the scores.
        causal: ``L == K`` and query i sees keys ``<= i``.
        allowed: bool ``[L, K]``, the same for every batch entry and head.

    Returns:
        ``out [N, H, L, Dv]``, ``lse [N, H, L]``, both in the accumulator dtype.
    """
    acc = accumulator_dtype(q.dtype)
    if q.numel() == 0 or k.numel() == 0:
        # The fused kernel divides by these extents.
        lse = torch.full(q.shape[:3], float("-inf"), dtype=acc, device=q.device)
        return Partial(lse.new_zeros(*q.shape[:3], v.shape[3]), lse)
    if scale <= 0.0:
        # The fused kernel hides scores before it scales them.
        q, scale = (q * -1.0, -scale) if scale < 0.0 else (torch.zeros_like(q), 1.0)
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        mask = None
        if allowed is not None:
            mask = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device)
            mask.masked_fill_(~allowed, float("-inf"))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        out, lse = out.to(acc), lse.to(acc)
        if allowed is not None:
            empty = ~allowed.any(-1)
            if empty.any():
                out = out.masked_fill(empty[:, None], 0.0)
                lse = lse.masked_fill(empty, float("-inf"))
        return Partial(out, lse)
    return _unfused(q, k, v, scale, causal, allowed)


def _unfused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, allowed: Tensor | None
) -> Partial:
    """The same in plain torch, a slice of rows and keys at a time."""
    acc = accumulator_dtype(q.dtype)
    batch, heads, rows, _ = q.shape
    step = max(1, _SCORES // max(1, batch * heads * min(k.shape[2], _KEYS)))
    parts = []
    for row in range(0, rows, step):
        q_rows = q[:, :, row : row + step].to(acc) * scale
        pieces = []
        for key in range(0, min(k.shape[2], row + step) if causal else k.shape[2], _KEYS):
            scores = q_rows @ k[:, :, key : key + _KEYS].to(acc).transpose(-1, -2)
            if causal:
                position = torch.arange(row, row + q_rows.shape[2], device=q.device)
                ahead = (
                    torch.arange(key, key + scores.shape[3], device=q.device) > position[:, None]
                )
                scores = scores.masked_fill(ahead, float("-inf"))
            if allowed is not None:
                hidden = ~allowed[row : row + step, key : key + _KEYS]
                scores = scores.masked_fill(hidden, float("-inf"))
            pieces.append(softmax_partial(scores, v[:, :, key : key + _KEYS].to(acc)))
        parts.append(merge(*pieces))
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))
