"""Gradients of gathered tokens: every key adds up the shares of the blocks that gathered it.

In the order of a stable sort, without atomic additions: the same result every time.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longswift.kernels.triton.launch import LENGTHS, Shape
from longswift.kernels.triton.tables import Tables


@triton.jit(do_not_specialize=LENGTHS)
def _add_shares(
    SHARES,
    ORDER,
    STARTS,
    TARGET,
    entries,
    k_len,
    column,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds columns ``[column, column + WIDTH)`` of each key's shares to its row of the target."""
    problem = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * N + tl.arange(0, N)
    starts = STARTS + problem * (k_len + 1) + key
    begin = tl.load(starts, mask=key < k_len, other=0)
    count = tl.load(starts + 1, mask=key < k_len, other=0) - begin
    at = tl.arange(0, PAD)
    total = tl.zeros([N, PAD], ACC)
    for turn in range(0, tl.max(count, 0)):
        entry = tl.load(ORDER + problem * entries + begin + turn, mask=turn < count, other=0)
        line = problem * entries + entry
        inside = (turn < count)[:, None] & (at < WIDTH)[None, :]
        total += tl.load(
            SHARES + line[:, None] * STRIDE + column + at[None, :], mask=inside, other=0.0
        )
    place = TARGET + (problem * k_len + key)[:, None] * WIDTH + at[None, :]
    inside = (count > 0)[:, None] & (at < WIDTH)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def collect(shares: Tensor, table: Tables, shape: Shape, d_k: Tensor, d_v: Tensor) -> None:
    """Adds every block's shares ``[B, Hkv, N, C, D + Dv]`` to the keys they belong to."""
    k_len = table.k_len
    seen = table.since < table.until
    keys = torch.where(seen, table.tokens, k_len).flatten(2).flatten(0, 1)
    keys, order = keys.sort(dim=1, stable=True)
    edge = torch.arange(k_len + 1, dtype=torch.int32, device=keys.device)
    starts = torch.searchsorted(keys, edge.expand(len(keys), -1).contiguous(), out_int32=True)
    constants = shape.constants()
    order = order.int()
    for column, target, pad in ((0, d_k, "D_PAD"), (shape.dim, d_v, "DV_PAD")):
        _add_shares[(triton.cdiv(k_len, 16), shape.batch * shape.kv_heads)](
            shares,
            order,
            starts,
            target,
            keys.shape[1],
            k_len,
            column,
            WIDTH=target.shape[3],
            STRIDE=shares.shape[4],
            PAD=constants[pad],
            N=16,
            ACC=constants["ACC"],
        )
