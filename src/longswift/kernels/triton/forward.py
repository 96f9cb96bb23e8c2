"""Forward kernel: a tile of queries over its band and its gathered tokens.

A tile holds the same rows of every query head of a GQA group, so that each key is read once for the
group. Softmax is online (Milakov and Gimelshein, 2018, arXiv 1805.02867), sums are fp32 (fp64 for
fp64 inputs), and a row without keys ends as 0 with ``lse = -inf``.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import Partial
from longswift.kernels.triton.launch import LENGTHS, TABLE, Shape, bias_arguments, step_options
from longswift.kernels.triton.tables import Tables


@triton.jit
def tile_rows(tile, block, before, q_len, ROWS: tl.constexpr, M: tl.constexpr, G: tl.constexpr):
    """Query row and head in the group of each of the ``M`` lines of a tile, and which exist."""
    tiles = tl.cdiv(block, ROWS)
    line = tl.arange(0, M)
    inside = tile % tiles * ROWS + line % ROWS
    row = tile // tiles * block - before + inside
    group = line // ROWS
    exists = (inside < block) & (row >= 0) & (row < q_len) & (group < G)
    return row, group, exists


@triton.jit
def load_rows(X, row, exists, stride, D: tl.constexpr, D_PAD: tl.constexpr):
    """Lines of a matrix with unit stride along its ``D`` columns, zeros elsewhere."""
    column = tl.arange(0, D_PAD)
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(X + at, mask=exists[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def load_heads(X, row, group, exists, stride_h, stride_l, D, D_PAD: tl.constexpr):
    """Lines of several heads of ``[H, L, D]``."""
    column = tl.arange(0, D_PAD)
    at = group.to(tl.int64) * stride_h + row.to(tl.int64) * stride_l
    inside = exists[:, None] & (column < D)[None, :]
    return tl.load(X + at[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def shown(since, until, position):
    """Which lines see which gathered tokens, ``[M, N]``."""
    return (since[None, :] <= position[:, None]) & (position[:, None] < until[None, :])


@triton.jit
def bias_places(head, key, position, span, zero, step):
    """Where in the table of the bias every pair lies, ``[M, N]``."""
    column = zero + step * key[None, :] - position[:, None]
    # Keys that nobody sees may lie beyond the table.
    column = tl.minimum(tl.maximum(column, 0), span - 1)
    return head[:, None].to(tl.int64) * span + column


@triton.jit
def biased(scores, seen, BIAS, head, key, position, span, zero, step, BIASED: tl.constexpr):
    """Scores with the bias of the pairs that are seen."""
    if BIASED:
        places = bias_places(head, key, position, span, zero, step)
        scores += tl.load(BIAS + places, mask=seen, other=0.0)
    return scores


@triton.jit
def _accumulate(scores, v, seen, top, mass, acc, ACC: tl.constexpr, EXACT: tl.constexpr):
    """Online softmax over one more tile of keys."""
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet would subtract infinity from infinity.
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp(scores - pivot[:, None])
    kept = tl.exp(top - pivot)
    mass = mass * kept + tl.sum(weights, 1)
    part = tl.dot(weights.to(v.dtype), v, input_precision=EXACT, out_dtype=ACC)
    return new_top, mass, acc * kept[:, None] + part


@triton.jit(do_not_specialize=LENGTHS + TABLE)
def _forward(
    Q,
    K,
    V,
    OUT,
    LSE,
    FIRST,
    END,
    TOKENS,
    SINCE,
    UNTIL,
    BIAS,
    span,
    zero,
    step,
    scale,
    q_len,
    k_len,
    block,
    before,
    blocks,
    slots,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
    BAND: tl.constexpr,
    BIASED: tl.constexpr,
):
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // HKV).to(tl.int64)
    head = tl.program_id(1) % HKV
    row, group, exists = tile_rows(tile, block, before, q_len, ROWS, M, G)
    K += batch * k_b + head.to(tl.int64) * k_h
    V += batch * v_b + head.to(tl.int64) * v_h
    q = load_heads(
        Q + batch * q_b + head.to(tl.int64) * G * q_h, row, group, exists, q_h, q_l, D, D_PAD
    )
    q_head = head * G + group
    position = row + (k_len - q_len)
    top = tl.full([M], float("-inf"), ACC)
    mass = tl.zeros([M], ACC)
    acc = tl.zeros([M, DV_PAD], ACC)
    if BAND:
        first = tl.load(FIRST + head * q_len + row, mask=exists, other=k_len)
        end = tl.load(END + head * q_len + row, mask=exists, other=0)
        last = tl.max(end, 0)
        for start in range(tl.min(first, 0), last, N):
            key = start + tl.arange(0, N)
            k = load_rows(K, key, key < last, k_l, D, D_PAD)
            v = load_rows(V, key, key < last, v_l, DV, DV_PAD)
            seen = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
            scores = tl.dot(q, tl.trans(k), input_precision=EXACT, out_dtype=ACC) * scale
            scores = biased(scores, seen, BIAS, q_head, key, position, span, zero, step, BIASED)
            top, mass, acc = _accumulate(scores, v, seen, top, mass, acc, ACC, EXACT)
    index = tile // tl.cdiv(block, ROWS)
    lists = (tl.program_id(1).to(tl.int64) * blocks + index) * slots
    for start in range(0, slots, N):
        slot = start + tl.arange(0, N)
        token = tl.load(TOKENS + lists + slot, mask=slot < slots, other=0)
        since = tl.load(SINCE + lists + slot, mask=slot < slots, other=0)
        until = tl.load(UNTIL + lists + slot, mask=slot < slots, other=0)
        k = load_rows(K, token, since < until, k_l, D, D_PAD)
        v = load_rows(V, token, since < until, v_l, DV, DV_PAD)
        seen = shown(since, until, position) & exists[:, None]
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT, out_dtype=ACC) * scale
        scores = biased(scores, seen, BIAS, q_head, token, position, span, zero, step, BIASED)
        top, mass, acc = _accumulate(scores, v, seen, top, mass, acc, ACC, EXACT)
    nothing = mass == 0.0
    acc = acc / tl.where(nothing, 1.0, mass)[:, None]
    lse = tl.where(nothing, float("-inf"), top + tl.log(tl.where(nothing, 1.0, mass)))
    line = (batch * HKV * G + head * G + group) * q_len + row
    tl.store(LSE + line, lse, mask=exists)
    column = tl.arange(0, DV_PAD)
    inside = exists[:, None] & (column < DV)[None, :]
    tl.store(OUT + line[:, None] * DV + column[None, :], acc, mask=inside)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tables,
    scale: float,
    bias: ScoreBias | None = None,
    *,
    band: bool = True,
) -> Partial:
    """Attention over the gathered tokens and, with ``band``, over the bands.

    Args:
        q: ``[B, Hq, Lq, D]``, unit stride along D, like k and v.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        table: The pattern.
        scale: Factor on the scores.
        bias: Additions to the scaled scores.
        band: Whether the bands are seen.

    Returns:
        ``out`` and ``lse`` in the accumulator dtype.
    """
    shape = Shape.of(q, k, v, table)
    acc = accumulator_dtype(q.dtype)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=acc, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=acc, device=q.device)
    _forward[shape.query_grid](
        q,
        k,
        v,
        out,
        lse,
        *table[:5],
        *bias_arguments(bias),
        scale,
        *shape.sizes(),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        **shape.constants(),
        BAND=band,
        **step_options(bias, q.device),
        num_warps=shape.warps,
    )
    return Partial(out, lse)
