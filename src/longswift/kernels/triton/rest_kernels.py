"""Kernel of what blocks of queries see outside their bands: gathered tokens and pooled columns.

It overwrites the bands' result by its own merged with that. Columns are those ``fill_columns``
writes: pools left of the block's band, the last one up to the band, then pools right of it, the
first one from the band's end.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from longswift.kernels.triton.forward import load_rows
from longswift.kernels.triton.launch import LOG2_E

# Plain numbers to a kernel, or Triton would compile again for 1 and for multiples of 16.
SIZES = [*("q_len", "k_len", "offset", "block", "first", "blocks", "batch", "tiles", "slots")]
SIZES += ["pool", "grain", "width", "t_b", "t_h", "t_n", "l_b", "l_h"]


@triton.jit
def _rows(X, row, stride, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows that exist of a matrix with unit stride along its ``D`` columns, then zeros."""
    column = tl.arange(0, D_PAD)
    at = X + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(at) if D == D_PAD else tl.load(at, mask=(column < D)[None, :], other=0.0)


@triton.jit
def place(tiles, batch, blocks, HKV: tl.constexpr):
    """Tile, batch row times KV head, and block of a program.

    Tiles of a block run side by side, blocks with many columns first.
    """
    program = tl.program_id(0)
    pair = program // tiles
    return program % tiles, pair % (batch * HKV), blocks - 1 - pair // (batch * HKV)


@triton.jit
def band_keys(BANDS, head, position, k_len):
    """First and one-past-last key of the band of the block that begins at ``position``."""
    tile = tl.load(BANDS + head * 3)
    left = tl.load(BANDS + head * 3 + 1)
    right = tl.load(BANDS + head * 3 + 2)
    start = position // tile * tile
    begin = tl.minimum(tl.maximum(start - left, 0), k_len)
    return begin, tl.minimum(tl.maximum(start + tile + right, 0), k_len)


@triton.jit
def sides(begin, end, k_len, pool, CAUSAL: tl.constexpr):
    """Columns left and right of a band."""
    left = tl.cdiv(begin, pool)
    right = tl.where(end < k_len, tl.cdiv(k_len, pool) - end // pool, 0)
    return left, (left * 0 if CAUSAL else right)


@triton.jit
def _accumulate(scores, v, top, mass, acc, ACC: tl.constexpr, EXACT: tl.constexpr):
    """Online softmax over one more tile of keys, to the base of 2."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet would subtract infinity from infinity.
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - pivot[:, None])
    kept = tl.exp2(top - pivot)
    mass = mass * kept + tl.sum(weights, 1)
    acc = acc * kept[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=EXACT, out_dtype=ACC)
    return new_top, mass, acc


@triton.jit(do_not_specialize=SIZES)
def attend_outside(
    Q,
    K,
    V,
    OUT,
    LSE,
    TOKENS,
    BANDS,
    MEAN_K,
    MEAN_V,
    LOG,
    scale,
    q_len,
    k_len,
    block,
    first,
    blocks,
    batch,
    tiles,
    slots,
    pool,
    width,
    t_b,
    t_h,
    t_n,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    o_b,
    o_h,
    o_l,
    l_b,
    l_h,
    l_l,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    COMPARED: tl.constexpr,
    POOLED: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    EXACT: tl.constexpr,
):
    tile, pair, index = place(tiles, batch, blocks, HKV)
    offset = k_len - q_len
    position = tl.maximum((offset // block + first + index) * block, offset)
    last = tl.minimum((offset // block + first + index + 1) * block, k_len) - offset
    # A first or last block may be cut and have fewer tiles.
    if position - offset + tile * ROWS >= last:
        return
    line = tl.arange(0, M)
    row = position - offset + tile * ROWS + line % ROWS
    group = (line // ROWS).to(tl.int64)
    exists = (row < last) & (group < G)
    of_batch = (pair // HKV).to(tl.int64)
    head = (pair % HKV).to(tl.int64)
    Q += of_batch * q_b + head * G * q_h
    K += of_batch * k_b + head * k_h
    V += of_batch * v_b + head * v_h
    TOKENS += of_batch * t_b + head * t_h + (first + index).to(tl.int64) * t_n
    q = load_rows(Q, group * q_h + row.to(tl.int64) * q_l, exists, 1, D, D_PAD)
    to_two = tl.full([1], LOG2_E, ACC)
    factor = (scale * to_two)[None, :]
    top = tl.full([M], float("-inf"), ACC)
    mass = tl.zeros([M], ACC)
    acc = tl.zeros([M, DV_PAD], ACC)
    # Positions are loaded a stage before what lies there.
    for start in tl.range(0, slots, N, num_stages=STAGES + 1):
        slot = start + tl.arange(0, N)
        token = tl.load(TOKENS + slot, mask=slot < slots, other=-1)
        key = tl.maximum(token, 0)
        k = _rows(K, key, k_l, D, D_PAD)
        v = _rows(V, key, v_l, DV, DV_PAD)
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT, out_dtype=ACC) * factor
        scores += tl.where(token >= 0, 0.0, float("-inf"))[None, :]
        if COMPARED:
            seen = token[None, :] <= (row + offset)[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        top, mass, acc = _accumulate(scores, v, top, mass, acc, ACC, EXACT)
    if POOLED:
        begin, end = band_keys(BANDS, pair % HKV, position, k_len)
        left, right = sides(begin, end, k_len, pool, CAUSAL)
        base = (pair.to(tl.int64) * blocks + index) * width
        MEAN_K += base * D_PAD
        MEAN_V += base * DV_PAD
        LOG += base
        for start in tl.range(0, left + right, N, num_stages=STAGES):
            column = start + tl.arange(0, N)
            k = _rows(MEAN_K, column, D_PAD, D_PAD, D_PAD)
            v = _rows(MEAN_V, column, DV_PAD, DV_PAD, DV_PAD)
            scores = tl.dot(q, tl.trans(k), input_precision=EXACT, out_dtype=ACC) * factor
            scores += tl.load(LOG + column)[None, :]
            top, mass, acc = _accumulate(scores, v, top, mass, acc, ACC, EXACT)
    # Only now, or the addresses would take registers during the loops.
    places = LSE + of_batch * l_b + head * G * l_h + group * l_h + row.to(tl.int64) * l_l
    lse = tl.load(places, mask=exists, other=float("-inf")).to(ACC) * to_two
    new_top = tl.maximum(top, lse)
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    kept, share = tl.exp2(top - pivot), tl.exp2(lse - pivot)
    mass = mass * kept + share
    nothing = mass == 0.0
    mass = tl.where(nothing, 1.0, mass)
    column = tl.arange(0, DV_PAD)
    inside = exists[:, None] & (column < DV)[None, :]
    lines = group * o_h + row.to(tl.int64) * o_l
    outs = OUT + of_batch * o_b + head * G * o_h + lines[:, None] + column[None, :]
    out = tl.load(outs, mask=inside, other=0.0).to(ACC)
    # Threads that hold the same line load it each for itself, all before one of them overwrites it.
    tl.debug_barrier()
    tl.store(places, tl.where(nothing, float("-inf"), (pivot + tl.log2(mass)) / to_two), exists)
    out = acc * (kept / mass)[:, None] + out * (share / mass)[:, None]
    tl.store(outs, out, mask=inside)
