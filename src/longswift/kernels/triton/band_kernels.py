"""Kernel of bands alone: edges from a few numbers per head, masks only where keys are hidden.

A tile holds the same rows of every query head of a GQA group. Only steps at the edges of the band
hide keys: those between, every row of the tile sees whole. Scores are kept in powers of two,
``exp2`` being what a GPU computes.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from longswift.kernels.triton.forward import load_rows
from longswift.kernels.triton.launch import LOG2_E

# Plain numbers to a kernel: Triton would compile again for 1 and for multiples of 16.
NUMBERS = ("tile", "left", "right", "q_len", "k_len", "before", "batches")

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def edges(position, tile, left, right, k_len, CAUSAL: tl.constexpr):
    """First and one-past-last key of the queries at ``position``: ``Band.bounds``, and causality.

    Neither decreases with the position.
    """
    # Positions may be negative, where quotients would round towards zero.
    start = position - (position % tile + tile) % tile
    first = tl.minimum(tl.maximum(start - left, 0), k_len)
    end = tl.minimum(start + tile + right, k_len)
    if CAUSAL:
        end = tl.minimum(end, position + 1)
    return first, tl.maximum(end, 0)


@triton.jit
def load_keys(
    X,
    batch,
    head,
    start,
    end,
    stride,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Keys ``[start, start + N)``, unless ``DESCRIBED`` with zeros from ``end`` on."""
    if DESCRIBED:
        keys = X.load([batch, head, start, 0]).reshape(N, D_PAD)
    else:
        line = tl.arange(0, N)
        column = tl.arange(0, D_PAD)
        at = X + tl.cast(start, tl.int64) * stride + line[:, None] * stride + column[None, :]
        inside = (line < end - start)[:, None] & (column < D)[None, :]
        keys = tl.load(at, mask=inside, other=0.0)
    return keys


@triton.jit(do_not_specialize=NUMBERS)
def bands(
    Q,
    K,
    V,
    OUT,
    LSE,
    HEADS,
    scale,
    tile,
    left,
    right,
    q_len,
    k_len,
    before,
    batches,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    out_b,
    out_h,
    out_l,
    lse_b,
    lse_h,
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
    CAUSAL: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """A tile of rows over its band.

    ``HEADS [Hkv, 4]`` names heads in the order they are taken, with tile, left and right; without
    it all have those of the arguments. Keys and values are ``DESCRIBED`` by tensor descriptors of
    blocks of ``N`` keys, or pointers.
    """
    # The last rows see most, and a GPU that starts with them ends with short programs.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) % batches
    head = tl.program_id(1) // batches
    if HEADS is not None:
        line = HEADS + head * 4
        head = tl.load(line)
        tile = tl.load(line + 1)
        left = tl.load(line + 2)
        right = tl.load(line + 3)
    lines = tl.arange(0, M)
    group = lines // ROWS
    row_zero = index * ROWS - before
    row = row_zero + lines % ROWS
    exists = (row >= 0) & (row < q_len) & (group < G)
    # Lines that do not exist repeat a row that does: they widen no interval.
    offset = k_len - q_len
    lowest = tl.maximum(row_zero, 0)
    highest = tl.minimum(row_zero + ROWS, q_len) - 1
    position = offset + tl.minimum(tl.maximum(row, lowest), highest)
    # Every row sees the keys of [inner_start, inner_end), none one outside [start, stop).
    start, inner_end = edges(offset + lowest, tile, left, right, k_len, CAUSAL)
    inner_start, stop = edges(offset + highest, tile, left, right, k_len, CAUSAL)
    first, end = edges(position, tile, left, right, k_len, CAUSAL)
    q_at = batch.to(tl.int64) * q_b + (head * G + group).to(tl.int64) * q_h
    q_at += row.to(tl.int64) * q_l
    q = load_rows(Q, q_at, exists, 1, D, D_PAD)
    if not DESCRIBED:
        K += batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h
        V += batch.to(tl.int64) * v_b + head.to(tl.int64) * v_h
    factor = tl.cast(scale, ACC) * LOG2_E
    top = tl.full([M], float("-inf"), ACC)
    mass = tl.zeros([M], ACC)
    acc = tl.zeros([M, DV_PAD], ACC)
    for key in tl.range(start, stop, N):
        k = load_keys(K, batch, head, key, stop, k_l, D, D_PAD, N, DESCRIBED)
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT, out_dtype=ACC)
        if (key < inner_start) | (key + N > inner_end):
            at = key + tl.arange(0, N)
            seen = (at[None, :] >= first[:, None]) & (at[None, :] < end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        # A row that has seen nothing yet would subtract infinity from infinity.
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * factor - pivot[:, None])
        kept = tl.exp2(top - pivot)
        mass = mass * kept + tl.sum(weights, 1)
        v = load_keys(V, batch, head, key, stop, v_l, DV, DV_PAD, N, DESCRIBED)
        acc = acc * kept[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=EXACT, out_dtype=ACC)
        top = new_top
    nothing = mass == 0.0
    mass = tl.where(nothing, 1.0, mass)
    acc = acc / mass[:, None]
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(mass)) * _LN_2)
    q_head = (head * G + group).to(tl.int64)
    tl.store(LSE + batch.to(tl.int64) * lse_b + q_head * lse_h + row, lse, mask=exists)
    wide = tl.arange(0, DV_PAD)
    out_at = batch.to(tl.int64) * out_b + q_head * out_h + row.to(tl.int64) * out_l
    inside = exists[:, None] & (wide < DV)[None, :]
    tl.store(OUT + out_at[:, None] + wide[None, :], acc, mask=inside)
