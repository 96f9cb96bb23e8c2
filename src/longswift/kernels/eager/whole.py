"""Full attention with gradients through torch's fused CPU kernel, which skips what is hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from longswift.core.once import Saved, once
from longswift.core.pattern import BlockPattern
from longswift.core.rectangles import is_whole
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import Partial

# Query rows of one call for 16-bit inputs: the fused kernel rounds its sums to 16 bits every 256.
_ROWS = 4096

Gradients = tuple[Tensor, Tensor, Tensor]


class _Rows(NamedTuple):
    """Queries, and of the forward pass what belongs to them."""

    q: Tensor
    out: Tensor
    lse: Tensor
    d_out: Tensor


def takes(pattern: BlockPattern, q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether the pattern is full attention, and the fused kernel computes it for these inputs."""
    if q.device.type != "cpu" or pattern.tokens is not None or pattern.pool is not None:
        return False
    # The kernel hides scores before it scales them, and divides by the extents.
    usable = scale > 0.0 and q.numel() > 0 and k.numel() > 0
    return usable and is_whole(pattern, q.shape[2], k.shape[2])


def with_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: Partial,
    causal: bool,
    scale: float,
    compute: Callable[..., Gradients] | None = None,
) -> Partial:
    """``found``, the result of full attention of q, k and v, as a function of them.

    ``compute`` is called instead of ``gradients``.
    """
    return Partial(*_Attend.apply(q, k, v, found, causal, scale, compute or gradients))


class _Attend(torch.autograd.Function):
    """Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        found: Partial,
        causal: bool,
        scale: float,
        compute: Callable[..., Gradients],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, *found)
        ctx.set_materialize_grads(False)
        ctx.causal, ctx.scale, ctx.compute = causal, scale, compute
        return found.out, found.lse

    @staticmethod
    @once
    def backward(ctx: Any, saved: Saved, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_lse = grad_outputs
        q, k, v, out, lse = saved
        if d_out is None:
            d_out = torch.zeros_like(out)
        grads = ctx.compute(q, k, v, ctx.causal, ctx.scale, out, lse, d_out, d_lse)
        return *grads, None, None, None, None


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None = None,
) -> Gradients:
    """Gradients of q, k and v in their dtype. O(Lq * Lk * D) time, O(Lq + Lk) memory.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        causal: Bottom-right aligned, as everywhere.
        scale: Factor on the scores, above 0.
        out: ``[B, Hq, Lq, Dv]`` of the forward pass.
        lse: ``[B, Hq, Lq]`` of the forward pass.
        d_out: ``[B, Hq, Lq, Dv]``.
        d_lse: ``[B, Hq, Lq]``, or None for zeros.
    """
    width, value_width, groups = q.shape[3], v.shape[3], q.shape[1] // k.shape[1]
    dtype = q.dtype
    if d_lse is not None:
        # It may be larger, and is more precise, than 16 bits hold.
        q, k, v, out, d_out = (x.to(d_lse.dtype) for x in (q, k, v, out, d_out))
        # Its share of the scores' gradient, probs * d_lse, is that of one more channel: the kernel
        # subtracts sum(d_out * out), and values of 0 add nothing.
        v = pad(v, (0, 1))
        d_out = pad(d_out, (0, 1), value=1.0)
        out = torch.cat([out, -d_lse.unsqueeze(3)], 3)
    # The kernel knows one width.
    wide = max(width, v.shape[3])
    q, k, v, out, d_out = (_widened(x, wide) for x in (q, k, v, out, d_out))
    shape = q.shape
    if groups > 1:
        q, out, d_out = (x.unflatten(1, (-1, groups)).flatten(0, 1) for x in (q, out, d_out))
        lse = lse.unflatten(1, (-1, groups)).flatten(0, 1)
        k, v = (x.flatten(0, 1).unsqueeze(1) for x in (k, v))
    d_q, d_k, d_v = _by_rectangles(_Rows(q, out, lse, d_out), k, v, causal, scale)
    if groups > 1:
        d_q = d_q.reshape(shape)
        d_k, d_v = (x.view(shape[0], -1, *x.shape[2:]) for x in (d_k, d_v))
    if wide > min(width, value_width):
        d_q, d_k, d_v = d_q[..., :width], d_k[..., :width], d_v[..., :value_width]
    return d_q.to(dtype), d_k.to(dtype), d_v.to(dtype)


def _by_rectangles(of: _Rows, k: Tensor, v: Tensor, causal: bool, scale: float) -> Gradients:
    """``q [N, H, Lq, D]``, ``k, v [N, H or 1, Lk, D]``, gradients in that or wider."""
    q = of.q
    q_len, k_len, acc = q.shape[2], k.shape[2], accumulator_dtype(q.dtype)
    most = q_len if q.dtype == acc else _ROWS
    if q_len <= most and (not causal or q_len == k_len):
        return _call(of, k, v, causal, scale)
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k, v))
    for rows, keys, diagonal in _rectangles(q_len, k_len, causal, most):
        seen = k[:, :, keys], v[:, :, keys]
        some = _Rows(*(x[:, :, rows] for x in of))
        found = _call(some, *seen, diagonal, scale)
        for total, place, part in zip((d_q, d_k, d_v), (rows, keys, keys), found, strict=True):
            total[:, :, place] += part
    return d_q, d_k, d_v


def _call(of: _Rows, k: Tensor, v: Tensor, causal: bool, scale: float) -> Gradients:
    """Gradients of one rectangle, summed over heads that share keys and values."""
    q, out, lse, d_out = of
    shared = k.shape[1] < q.shape[1]
    if shared:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    grads: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    if not shared:
        return grads
    d_q, d_k, d_v = grads
    return d_q, d_k.sum(1, keepdim=True), d_v.sum(1, keepdim=True)


def _rectangles(
    q_len: int, k_len: int, causal: bool, most: int
) -> Iterator[tuple[slice, slice, bool]]:
    """Rows, their keys, and whether those are a causal square: all the kernel skips a half of."""
    step = -(-q_len // -(-q_len // most))
    for first in range(0, q_len, step):
        rows = slice(first, min(q_len, first + step))
        if not causal:
            yield rows, slice(0, k_len), False
            continue
        before = k_len - q_len
        if before + first:
            yield rows, slice(0, before + first), False
        yield rows, slice(before + first, before + rows.stop), True


def _widened(x: Tensor, width: int) -> Tensor:
    """With channels of 0 up to ``width``, channels next to each other."""
    if x.shape[3] < width:
        return pad(x, (0, width - x.shape[3]))
    return x if x.stride(3) == 1 else x.contiguous()
