"""Kernel that writes every block's columns to memory: mean keys and values, and their weight.

A column's weight is the binary logarithm of how many tokens it stands for. What a block gathers is
taken out of the sums over pools by a product with the keys and values that are gathered.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from longswift.kernels.triton.forward import load_rows
from longswift.kernels.triton.rest_kernels import SIZES, band_keys, place, sides


@triton.jit
def _with_cut(sums, here, X, first, last, stride, D: tl.constexpr, D_PAD: tl.constexpr):
    """``sums`` with those of the grains ``[first, last)`` added to the column that is ``here``."""
    total = tl.zeros([D_PAD], sums.dtype)
    for start in range(first, last, 16):
        grain = start + tl.arange(0, 16)
        total += tl.sum(load_rows(X, grain, grain < last, stride, D, D_PAD), 0)
    return sums + tl.where(here[:, None], total[None, :], 0.0)


@triton.jit
def _means(
    X,
    TOKENS,
    SUMS,
    GRAINS,
    MEANS,
    at,
    pools,
    since,
    until,
    nearest,
    farthest,
    lowest,
    highest,
    whole,
    left_cut,
    right_cut,
    begin,
    end,
    k_len,
    pool,
    grain,
    x_l,
    sums_l,
    grains_l,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Writes means over the tokens ``[since, until)`` not gathered, returns how many these are."""
    count = until - since
    taken = tl.zeros([W, D_PAD], ACC)
    for start in range(lowest, highest, C):
        slot = start + tl.arange(0, C)
        token = tl.load(TOKENS + slot, mask=slot < highest, other=-1)
        near = (token >= nearest) & (token < farthest)
        inside = (token[None, :] >= since[:, None]) & (token[None, :] < until[:, None])
        count -= tl.sum(inside.to(tl.int32), 1)
        x = load_rows(X, token, near, x_l, D, D_PAD)
        taken = tl.dot(inside.to(x.dtype), x, taken, input_precision=EXACT, out_dtype=ACC)
    sums = load_rows(SUMS, pools, whole, sums_l, D, D_PAD)
    if tl.max(left_cut.to(tl.int32), 0) > 0:
        first = begin // pool * (pool // grain)
        sums = _with_cut(sums, left_cut, GRAINS, first, begin // grain, grains_l, D, D_PAD)
    if tl.max(right_cut.to(tl.int32), 0) > 0:
        last = tl.minimum((end // pool + 1) * (pool // grain), tl.cdiv(k_len, grain))
        sums = _with_cut(sums, right_cut, GRAINS, end // grain, last, grains_l, D, D_PAD)
    means = (sums - taken) / tl.maximum(count, 1).to(ACC)[:, None]
    tl.store(MEANS + at[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :], means)
    return count


@triton.jit(do_not_specialize=SIZES)
def fill_columns(
    K,
    V,
    TOKENS,
    BANDS,
    K_SUM,
    V_SUM,
    K_GRAIN,
    V_GRAIN,
    MEAN_K,
    MEAN_V,
    LOG,
    k_len,
    offset,
    block,
    first,
    blocks,
    batch,
    tiles,
    slots,
    pool,
    grain,
    width,
    t_b,
    t_h,
    t_n,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    ks_b,
    ks_h,
    ks_l,
    vs_b,
    vs_h,
    vs_l,
    kg_b,
    kg_h,
    kg_l,
    vg_b,
    vg_h,
    vg_l,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
):
    tile, pair, index = place(tiles, batch, blocks, HKV)
    row = (pair // HKV).to(tl.int64)
    head = pair % HKV
    position = tl.maximum((offset // block + first + index) * block, offset)
    begin, end = band_keys(BANDS, head, position, k_len)
    left, right = sides(begin, end, k_len, pool, CAUSAL)
    # Columns are read ``N`` at a time: those behind the last one must be numbers.
    if tile * W >= tl.cdiv(left + right, N) * N:
        return
    column = tile * W + tl.arange(0, W)
    before = column < left
    pools = tl.where(before, column, column - left - right + tl.cdiv(k_len, pool))
    low, high = pools * pool, tl.minimum(pools * pool + pool, k_len)
    since = tl.where(before, low, tl.maximum(low, end))
    until = tl.where(before, tl.minimum(high, begin), high)
    exists = column < left + right
    whole = exists & (since == low) & (until == high)
    since, until = tl.where(exists, since, 0), tl.where(exists, until, 0)
    left_cut = exists & ~whole & before
    right_cut = exists & ~whole & ~before
    head = head.to(tl.int64)
    TOKENS += row * t_b + head * t_h + (first + index).to(tl.int64) * t_n
    # Lists in order have what lies in these columns side by side.
    nearest, farthest = tl.min(tl.where(exists, since, k_len), 0), tl.max(until, 0)
    lowest, highest = slots, slots * 0
    for start in range(0, slots, S):
        slot = start + tl.arange(0, S)
        token = tl.load(TOKENS + slot, mask=slot < slots, other=-1)
        near = (token >= nearest) & (token < farthest)
        lowest = tl.minimum(lowest, tl.min(tl.where(near, slot, slots), 0))
        highest = tl.maximum(highest, tl.max(tl.where(near, slot + 1, 0), 0))
    at = (pair.to(tl.int64) * blocks + index) * width + column
    _means(
        K + row * k_b + head * k_h,
        TOKENS,
        K_SUM + row * ks_b + head * ks_h,
        K_GRAIN + row * kg_b + head * kg_h,
        MEAN_K,
        at,
        pools,
        since,
        until,
        nearest,
        farthest,
        lowest,
        highest,
        whole,
        left_cut,
        right_cut,
        begin,
        end,
        k_len,
        pool,
        grain,
        k_l,
        ks_l,
        kg_l,
        D,
        D_PAD,
        W,
        C,
        ACC,
        EXACT,
    )
    count = _means(
        V + row * v_b + head * v_h,
        TOKENS,
        V_SUM + row * vs_b + head * vs_h,
        V_GRAIN + row * vg_b + head * vg_h,
        MEAN_V,
        at,
        pools,
        since,
        until,
        nearest,
        farthest,
        lowest,
        highest,
        whole,
        left_cut,
        right_cut,
        begin,
        end,
        k_len,
        pool,
        grain,
        v_l,
        vs_l,
        vg_l,
        DV,
        DV_PAD,
        W,
        C,
        ACC,
        EXACT,
    )
    log = tl.where(count > 0, tl.log2(tl.maximum(count, 1).to(ACC)), float("-inf"))
    tl.store(LOG + at, log)
