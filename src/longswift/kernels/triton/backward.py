"""Backward kernels: scores recomputed tile by tile.

Queries collect their own gradient over the keys they saw. Keys collect theirs over the rows whose
bands hold them, an interval of rows. For gathered tokens every block writes its share to a buffer
of ``[B, Hkv, N, C, D + Dv]``, O(n) memory, and each key then adds up its shares (``shares``). These
gradients are the same every time. That of a position bias is added up atomically, by the queries:
its last bits are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.softmax import accumulator_dtype
from longswift.kernels.triton import backward_kernels as kernels
from longswift.kernels.triton.launch import Shape, bias_arguments, step_options
from longswift.kernels.triton.shares import collect
from longswift.kernels.triton.tables import Tables


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tables,
    scale: float,
    bias: ScoreBias | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
    d_values: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in the accumulator dtype.

    Args:
        q: ``[B, Hq, Lq, D]``; k, v, table and scale as in the forward pass.
        k: Keys.
        v: Values.
        table: The pattern.
        scale: Factor on the scores.
        bias: Additions to the scaled scores.
        out: Output of the forward pass.
        lse: Its log-sum-exp.
        d_out: Gradient of the output.
        d_lse: Gradient of the log-sum-exp.
        d_values: Zeros ``[Hq, S]`` to add the gradient of the bias to, or None.
    """
    shape = Shape.of(q, k, v, table)
    acc = accumulator_dtype(q.dtype)
    delta = (d_out * out).sum(-1) - d_lse
    # A row that saw nothing has weights exp(s - inf) = 0 everywhere.
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    d_q = torch.empty(q.shape, dtype=acc, device=q.device)
    d_k = torch.empty(k.shape, dtype=acc, device=q.device)
    d_v = torch.empty(v.shape, dtype=acc, device=q.device)
    given = (q, k, v, d_out.to(q.dtype).contiguous(), lse, delta.contiguous())
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    options = {**shape.constants(), **step_options(bias, q.device), "num_warps": shape.warps}
    added = bias_arguments(bias)
    kernels.d_queries[shape.query_grid](
        *given,
        d_q,
        d_values,
        *table[:5],
        *added,
        scale,
        *shape.sizes(),
        *strides,
        **options,
        TRACKED=d_values is not None,
    )
    row_first, row_end = _rows_of_tiles(table, shape)
    kernels.d_band_keys[shape.key_grid](
        *given,
        d_k,
        d_v,
        table.first,
        table.end,
        row_first,
        row_end,
        *added,
        scale,
        *shape.sizes()[:2],
        *strides,
        **options,
    )
    if shape.slots:
        lists = table.tokens.shape[:3]
        width = shape.dim + shape.v_dim
        shares = torch.empty(*lists, shape.slots, width, dtype=acc, device=q.device)
        kernels.d_slots[shape.slot_grid](
            *given, shares, *table[2:5], *added, scale, *shape.sizes(), *strides, **options
        )
        collect(shares, table, shape, d_k, d_v)
    return d_q, d_k, d_v


def _rows_of_tiles(table: Tables, shape: Shape) -> tuple[Tensor, Tensor]:
    """Interval of rows whose bands touch each tile of keys, int32 ``[Hkv, tiles]`` each."""
    tiles = shape.key_grid[0]
    start = torch.arange(tiles, dtype=torch.int32, device=table.first.device) * shape.keys
    start = start.expand(shape.kv_heads, -1).contiguous()
    stop = (start + shape.keys).clamp(max=table.k_len)
    return (
        torch.searchsorted(table.end, start, right=True, out_int32=True),
        torch.searchsorted(table.first, stop, out_int32=True),
    )
