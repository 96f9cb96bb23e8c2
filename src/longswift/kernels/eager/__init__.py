"""Blockwise attention in plain torch: any device, O(n) memory forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.inputs import tracked
from longswift.core.once import Saved, once
from longswift.core.parallel import for_each
from longswift.core.pattern import BlockPattern
from longswift.core.softmax import accumulator_dtype
from longswift.core.summary import KeySummary
from longswift.core.types import Partial
from longswift.kernels.eager import band_gradients, whole
from longswift.kernels.eager import bands as band_kernel
from longswift.kernels.eager.exponential import attend_exponential
from longswift.kernels.eager.gathered import Gathered
from longswift.kernels.eager.landmarks import attend_landmarks
from longswift.kernels.eager.linear import attend_linear

__all__ = [
    "attend",
    "attend_bands",
    "attend_exponential",
    "attend_landmarks",
    "attend_linear",
    "verify",
]

Index = tuple[slice, slice]
Gradients = tuple[Tensor, Tensor, Tensor]
# fp32 or fp64 gradients of q, k and v; given these, the pattern, the scale, and `lse`, `delta` and
# `d_out` as for `band_gradients.add`.
ComputeGradients = Callable[
    [Tensor, Tensor, Tensor, BlockPattern, float, Tensor, Tensor, Tensor], Gradients
]


def verify(device: torch.device) -> tuple[bool, str]:
    """Always usable."""
    return True, f"plain torch on {device.type}"


@torch.no_grad()
def attend_bands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bias: ScoreBias | None = None,
) -> Partial:
    """Attention over the pattern's bands alone, without gradients."""
    return band_kernel.forward(q, k, v, pattern, scale, bias)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    *,
    bands: Partial | None = None,
    summary: KeySummary | None = None,
    bias: ScoreBias | None = None,
) -> Partial:
    """Attention of an unpadded batch under ``pattern``.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        pattern: Which keys are seen.
        scale: Factor on the scores.
        bands: The result of ``attend_bands`` for these inputs if the caller has it; overwritten.
        summary: Page summaries of ``k`` and ``v``, used for the remainder.
        bias: Additions to the scaled scores; a remainder column gets the mean over its tokens.

    Returns:
        ``out`` in the dtype of ``q`` and ``lse`` in the accumulator dtype, both differentiable.
    """
    found = _forward(q, k, v, pattern, scale, bands, summary, bias)
    if tracked(q, k, v) or bias is not None and bias.requires_grad:
        if bias is None and whole.takes(pattern, q, k, scale):
            return whole.with_gradients(q, k, v, found, pattern.causal, scale)
        return with_gradients(q, k, v, found, pattern, scale, bias)
    return found


def with_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: Partial,
    pattern: BlockPattern,
    scale: float,
    bias: ScoreBias | None = None,
    compute: ComputeGradients | None = None,
) -> Partial:
    """``found``, the result for q, k and v, as a function of them and of the bias.

    Without a bias gradients come from ``compute``, if there is such a thing.
    """
    values = None if bias is None else bias.values
    return Partial(*_Attend.apply(q, k, v, values, found, pattern, scale, bias, compute))


@torch.no_grad()
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bands: Partial | None,
    summary: KeySummary | None,
    bias: ScoreBias | None,
) -> Partial:
    if bands is None:
        bands = band_kernel.forward(q, k, v, pattern, scale, bias)
    if pattern.tokens is not None or pattern.pool is not None:
        bands = Partial(bands.out.to(accumulator_dtype(q.dtype)), bands.lse)
        bands = Gathered(q, k, v, pattern, scale, summary, bias).merge_into(bands)
    return Partial(bands.out.to(q.dtype), bands.lse)


class _Attend(torch.autograd.Function):
    """Scores are recomputed a block at a time in the backward pass: memory O(n).

    Differentiable once; for second derivatives use ``Mechanism.reference``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        values: Tensor | None,
        found: Partial,
        pattern: BlockPattern,
        scale: float,
        bias: ScoreBias | None,
        compute: ComputeGradients | None,
    ) -> tuple[Tensor, Tensor]:
        """``values`` are those of ``bias``, named once more so that gradients reach them."""
        ctx.save_for_backward(q, k, v, values, *found)
        ctx.pattern, ctx.scale, ctx.compute = pattern, scale, compute
        ctx.place = (0, 1) if bias is None else (bias.zero, bias.step)
        return found.out, found.lse

    @staticmethod
    @once
    def backward(ctx: Any, saved: Saved, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_out, d_lse = grad_outputs
        q, k, v, values, out, lse = saved
        pattern, scale = ctx.pattern, ctx.scale
        acc = accumulator_dtype(q.dtype)
        delta = (d_out.to(acc) * out.to(acc)).sum(-1) - d_lse
        # A row that saw nothing has weights exp(s - inf) = 0 everywhere.
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        given = q, k, v, pattern, scale, lse, delta, d_out
        d_values = None
        if values is None and ctx.compute is not None:
            grads = ctx.compute(*given)
        else:
            grads = [torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k, v)]
            d_values = _add_gradients(*given, (grads[0], grads[1], grads[2]), values, *ctx.place)
        d_q, d_k, d_v = (x.to(q.dtype) for x in grads)
        return d_q, d_k, d_v, d_values, *(None,) * 5


def _add_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    lse: Tensor,
    delta: Tensor,
    d_out: Tensor,
    grads: Gradients,
    values: Tensor | None,
    zero: int,
    step: int,
) -> Tensor | None:
    """Adds to ``grads``; returns the gradient of ``values``, those of the bias."""
    # Batch rows have sums of their own: they may be added up on different threads.
    d_values = None if values is None else values.new_zeros(q.shape[0], *values.shape)

    def add(rows: Index, keys: Index, own: BlockPattern) -> None:
        qkv = q[rows], k[keys], v[keys]
        mine = grads[0][rows], grads[1][keys], grads[2][keys]
        given = lse[rows], delta[rows], d_out[rows]
        bias = d_bias = None
        if values is not None and d_values is not None:
            bias = ScoreBias(values=values[rows[1]], zero=zero, step=step)
            d_bias = ScoreBias(values=d_values[rows], zero=zero, step=step)
        with torch.autocast(q.device.type, enabled=False):
            band_gradients.add(*qkv, own, scale, *given, mine, bias, d_bias)
            if own.tokens is not None or own.pool is not None:
                Gathered(*qkv, own, scale, None, bias).backward(*given, mine, d_bias)

    if q.device.type != "cpu":
        everything = slice(None), slice(None)
        add(everything, everything, pattern)
    else:
        # KV heads share nothing: threads need no locks, and sums keep their order.
        for_each(
            list(_heads(pattern, k.shape[0], q.shape[1] // k.shape[1])),
            lambda: None,
            lambda head, _: add(*head),
            q.device,
            least=1,
        )
    return None if d_values is None else d_values.sum(0)


def _heads(
    pattern: BlockPattern, batch: int, groups: int
) -> Iterator[tuple[Index, Index, BlockPattern]]:
    """For each batch row and KV head: where its queries and keys lie, and its pattern."""
    for b in range(batch):
        for head in range(len(pattern.bands)):
            row = slice(b, b + 1)
            queries = row, slice(head * groups, (head + 1) * groups)
            yield queries, (row, slice(head, head + 1)), _pattern_of_head(pattern, b, head)


def _pattern_of_head(pattern: BlockPattern, b: int, head: int) -> BlockPattern:
    """The pattern of one batch row and KV head alone."""

    def own(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x[b if x.shape[0] > 1 else 0, head][None, None]

    return replace(
        pattern,
        bands=(pattern.bands[head],),
        tokens=own(pattern.tokens),
        visible_from=own(pattern.visible_from),
        visible_until=own(pattern.visible_until),
    )
