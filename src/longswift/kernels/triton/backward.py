"""Backward kernels: scores recomputed tile by tile, no atomic additions, same result every time.

Queries collect their own gradient over the keys they saw. Keys collect theirs over the rows whose
bands hold them, an interval of rows. For gathered tokens every block writes its share to a buffer
of ``[B, Hkv, N, C, D + Dv]``, O(n) memory, and each key then adds up its shares in the order of a
stable sort.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longswift.core.softmax import accumulator_dtype
from longswift.kernels.triton.forward import load_heads, load_rows, tile_rows
from longswift.kernels.triton.launch import Shape
from longswift.kernels.triton.tables import Tables


@triton.jit
def _score_gradients(
    q, k, v, d_out, lse, delta, seen, scale, ACC: tl.constexpr, EXACT: tl.constexpr
):
    """Probabilities and gradients of the scores before scaling, ``[M, N]``."""
    scores = tl.dot(q, tl.trans(k), input_precision=EXACT, out_dtype=ACC) * scale
    probs = tl.where(seen, tl.exp(scores - lse[:, None]), 0.0)
    d_probs = tl.dot(d_out, tl.trans(v), input_precision=EXACT, out_dtype=ACC)
    return probs, probs * (d_probs - delta[:, None]) * scale


@triton.jit
def _d_queries(
    Q,
    K,
    V,
    D_OUT,
    LSE,
    DELTA,
    D_Q,
    FIRST,
    END,
    TOKENS,
    SINCE,
    UNTIL,
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
):
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // HKV).to(tl.int64)
    head = (tl.program_id(1) % HKV).to(tl.int64)
    row, group, exists = tile_rows(tile, block, before, q_len, ROWS, M, G)
    K += batch * k_b + head * k_h
    V += batch * v_b + head * v_h
    q = load_heads(Q + batch * q_b + head * G * q_h, row, group, exists, q_h, q_l, D, D_PAD)
    # Outputs and what belongs to them are contiguous.
    line = ((batch * HKV + head) * G + group) * q_len + row
    d_out = load_rows(D_OUT, line, exists, DV, DV, DV_PAD)
    lse = tl.load(LSE + line, mask=exists, other=0.0)
    delta = tl.load(DELTA + line, mask=exists, other=0.0)
    d_q = tl.zeros([M, D_PAD], ACC)
    first = tl.load(FIRST + head * q_len + row, mask=exists, other=k_len)
    end = tl.load(END + head * q_len + row, mask=exists, other=0)
    last = tl.max(end, 0)
    for start in range(tl.min(first, 0), last, N):
        key = start + tl.arange(0, N)
        k = load_rows(K, key, key < last, k_l, D, D_PAD)
        v = load_rows(V, key, key < last, v_l, DV, DV_PAD)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        _, d_scores = _score_gradients(q, k, v, d_out, lse, delta, seen, scale, ACC, EXACT)
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=EXACT, out_dtype=ACC)
    position = row + (k_len - q_len)
    index = tile // tl.cdiv(block, ROWS)
    lists = (tl.program_id(1).to(tl.int64) * blocks + index) * slots
    for start in range(0, slots, N):
        slot = start + tl.arange(0, N)
        token = tl.load(TOKENS + lists + slot, mask=slot < slots, other=0)
        since = tl.load(SINCE + lists + slot, mask=slot < slots, other=k_len)
        until = tl.load(UNTIL + lists + slot, mask=slot < slots, other=0)
        k = load_rows(K, token, since < k_len, k_l, D, D_PAD)
        v = load_rows(V, token, since < k_len, v_l, DV, DV_PAD)
        shown = (since[None, :] <= position[:, None]) & (position[:, None] < until[None, :])
        seen = exists[:, None] & shown
        _, d_scores = _score_gradients(q, k, v, d_out, lse, delta, seen, scale, ACC, EXACT)
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=EXACT, out_dtype=ACC)
    column = tl.arange(0, D_PAD)
    inside = exists[:, None] & (column < D)[None, :]
    tl.store(D_Q + line[:, None] * D + column[None, :], d_q, mask=inside)


@triton.jit
def _d_band_keys(
    Q,
    K,
    V,
    D_OUT,
    LSE,
    DELTA,
    D_K,
    D_V,
    FIRST,
    END,
    ROW_FIRST,
    ROW_END,
    scale,
    q_len,
    k_len,
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
):
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // HKV).to(tl.int64)
    head = (tl.program_id(1) % HKV).to(tl.int64)
    Q += batch * q_b + head * G * q_h
    key = tile * N + tl.arange(0, N)
    k = load_rows(K + batch * k_b + head * k_h, key, key < k_len, k_l, D, D_PAD)
    v = load_rows(V + batch * v_b + head * v_h, key, key < k_len, v_l, DV, DV_PAD)
    d_k = tl.zeros([N, D_PAD], ACC)
    d_v = tl.zeros([N, DV_PAD], ACC)
    group = tl.arange(0, M) // ROWS
    bounds = head * tl.num_programs(0) + tile
    last = tl.load(ROW_END + bounds)
    for start in range(tl.load(ROW_FIRST + bounds), last, ROWS):
        row = start + tl.arange(0, M) % ROWS
        exists = (row < last) & (group < G)
        q = load_heads(Q, row, group, exists, q_h, q_l, D, D_PAD)
        line = ((batch * HKV + head) * G + group) * q_len + row
        d_out = load_rows(D_OUT, line, exists, DV, DV, DV_PAD)
        lse = tl.load(LSE + line, mask=exists, other=0.0)
        delta = tl.load(DELTA + line, mask=exists, other=0.0)
        first = tl.load(FIRST + head * q_len + row, mask=exists, other=k_len)
        end = tl.load(END + head * q_len + row, mask=exists, other=0)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        probs, d_scores = _score_gradients(q, k, v, d_out, lse, delta, seen, scale, ACC, EXACT)
        d_v += tl.dot(tl.trans(probs).to(d_out.dtype), d_out, input_precision=EXACT, out_dtype=ACC)
        d_k += tl.dot(tl.trans(d_scores).to(q.dtype), q, input_precision=EXACT, out_dtype=ACC)
    line = (batch * HKV + head) * k_len + key
    column = tl.arange(0, D_PAD)
    inside = (key < k_len)[:, None] & (column < D)[None, :]
    tl.store(D_K + line[:, None] * D + column[None, :], d_k, mask=inside)
    column = tl.arange(0, DV_PAD)
    inside = (key < k_len)[:, None] & (column < DV)[None, :]
    tl.store(D_V + line[:, None] * DV + column[None, :], d_v, mask=inside)


@triton.jit
def _d_slots(
    Q,
    K,
    V,
    D_OUT,
    LSE,
    DELTA,
    SHARES,
    TOKENS,
    SINCE,
    UNTIL,
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
):
    batch = (tl.program_id(1) // HKV).to(tl.int64)
    head = (tl.program_id(1) % HKV).to(tl.int64)
    pieces = tl.cdiv(slots, N)
    index = tl.program_id(0) // pieces
    slot = tl.program_id(0) % pieces * N + tl.arange(0, N)
    Q += batch * q_b + head * G * q_h
    lists = (tl.program_id(1).to(tl.int64) * blocks + index) * slots
    token = tl.load(TOKENS + lists + slot, mask=slot < slots, other=0)
    since = tl.load(SINCE + lists + slot, mask=slot < slots, other=k_len)
    until = tl.load(UNTIL + lists + slot, mask=slot < slots, other=0)
    k = load_rows(K + batch * k_b + head * k_h, token, since < k_len, k_l, D, D_PAD)
    v = load_rows(V + batch * v_b + head * v_h, token, since < k_len, v_l, DV, DV_PAD)
    d_k = tl.zeros([N, D_PAD], ACC)
    d_v = tl.zeros([N, DV_PAD], ACC)
    tiles = tl.cdiv(block, ROWS)
    for piece in range(0, tiles):
        row, group, exists = tile_rows(index * tiles + piece, block, before, q_len, ROWS, M, G)
        q = load_heads(Q, row, group, exists, q_h, q_l, D, D_PAD)
        line = ((batch * HKV + head) * G + group) * q_len + row
        d_out = load_rows(D_OUT, line, exists, DV, DV, DV_PAD)
        lse = tl.load(LSE + line, mask=exists, other=0.0)
        delta = tl.load(DELTA + line, mask=exists, other=0.0)
        position = row + (k_len - q_len)
        shown = (since[None, :] <= position[:, None]) & (position[:, None] < until[None, :])
        seen = exists[:, None] & shown
        probs, d_scores = _score_gradients(q, k, v, d_out, lse, delta, seen, scale, ACC, EXACT)
        d_v += tl.dot(tl.trans(probs).to(d_out.dtype), d_out, input_precision=EXACT, out_dtype=ACC)
        d_k += tl.dot(tl.trans(d_scores).to(q.dtype), q, input_precision=EXACT, out_dtype=ACC)
    at = (lists + slot)[:, None] * (D + DV)
    column = tl.arange(0, D_PAD)
    inside = (slot < slots)[:, None] & (column < D)[None, :]
    tl.store(SHARES + at + column[None, :], d_k, mask=inside)
    column = tl.arange(0, DV_PAD)
    inside = (slot < slots)[:, None] & (column < DV)[None, :]
    tl.store(SHARES + at + D + column[None, :], d_v, mask=inside)


@triton.jit
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


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tables,
    scale: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in the accumulator dtype.

    Args:
        q: ``[B, Hq, Lq, D]``; k, v, table and scale as in the forward pass.
        k: Keys.
        v: Values.
        table: The pattern.
        scale: Factor on the scores.
        out: Output of the forward pass.
        lse: Its log-sum-exp.
        d_out: Gradient of the output.
        d_lse: Gradient of the log-sum-exp.
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
    options = {**shape.constants(), "num_warps": shape.warps}
    _d_queries[shape.query_grid](
        *given, d_q, *table[:5], scale, *shape.sizes(), *strides, **options
    )
    row_first, row_end = _rows_of_tiles(table, shape)
    _d_band_keys[shape.key_grid](
        *given,
        d_k,
        d_v,
        table.first,
        table.end,
        row_first,
        row_end,
        scale,
        *shape.sizes()[:2],
        *strides,
        **options,
    )
    if shape.slots:
        lists = table.tokens.shape[:3]
        width = shape.dim + shape.v_dim
        shares = torch.empty(*lists, shape.slots, width, dtype=acc, device=q.device)
        _d_slots[shape.slot_grid](
            *given, shares, *table.slots, scale, *shape.sizes(), *strides, **options
        )
        _collect(shares, table, shape, d_k, d_v)
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


def _collect(shares: Tensor, table: Tables, shape: Shape, d_k: Tensor, d_v: Tensor) -> None:
    """Adds every block's shares to the keys they belong to."""
    k_len = table.k_len
    seen = table.since < k_len
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
