"""Kernels of the second look at proposed keys: exact scores, weighed by what each row has seen.

Two products over the same proposals: the first for the log-sum of every row, the second, with keys
as its rows, for the largest share of every key. Nothing of rows times keys is stored.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from longswift.kernels.triton.centroid_kernels import add_to_sum, best_of_each, line_places
from longswift.kernels.triton.forward import load_rows
from longswift.kernels.triton.launch import LOG2_E


@triton.jit(do_not_specialize=("count", "first_row", "rows", "lse_b", "lse_h", "lse_l"))
def row_totals(
    Q,
    K,
    INDEX,
    COUNT,
    BAND_LSE,
    TOTALS,
    scale,
    slots,
    count,
    first_row,
    rows,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    lse_b,
    lse_h,
    lse_l,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TOGETHER: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Log-sum-exp of every row, in units of log 2, ``[Z, G * rows]``.

    Over the best of every ``TOGETHER`` sinks and proposals, and the band, whose own is given.
    """
    tiles = tl.cdiv(G * rows, M)
    z, line = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M + tl.arange(0, M)
    exists = line < G * rows
    problem = z // count
    batch, head = (problem // HKV).to(tl.int64), problem % HKV
    place = line_places(z, line, count, first_row, rows, q_b, q_h, q_l, HKV, G)
    q = load_rows(Q, place, exists, 1, D, D_PAD)
    K += batch * k_b + head.to(tl.int64) * k_h
    INDEX += z.to(tl.int64) * slots
    found = tl.load(COUNT + 2 * z)
    # In units of log 2.
    scale *= LOG2_E
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    for at in range(0, found, N):
        slot = at + tl.arange(0, N)
        key = tl.load(INDEX + slot, mask=slot < found, other=0)
        k = load_rows(K, key, slot < found, k_l, D, D_PAD)
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale
        scores = tl.where((slot < found)[None, :], scores, float("-inf"))
        top, mass = add_to_sum(best_of_each(scores, M, N, TOGETHER), top, mass)
    of_line = line_places(z, line, count, first_row, rows, lse_b, lse_h, lse_l, HKV, G)
    band = tl.load(BAND_LSE + of_line, mask=exists, other=0.0) * LOG2_E
    pivot = tl.maximum(band, top)
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
    mass = mass * tl.exp2(top - pivot) + tl.exp2(band - pivot)
    total = tl.where(mass > 0.0, pivot + tl.log2(mass), 0.0)
    tl.store(TOTALS + z.to(tl.int64) * (G * rows) + line, total, mask=exists)


@triton.jit(do_not_specialize=("count", "first_row", "rows"))
def key_shares(
    Q,
    K,
    INDEX,
    COUNT,
    TOTALS,
    RANKS,
    scale,
    slots,
    count,
    first_row,
    rows,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The largest share of every proposed key among the rows, its logarithm, ``[Z, slots]``."""
    tiles = tl.cdiv(slots, M)
    z, slot = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M + tl.arange(0, M)
    found = tl.load(COUNT + 2 * z)
    if tl.program_id(0) % tiles * M < found:
        problem = z // count
        batch, head = (problem // HKV).to(tl.int64), problem % HKV
        K += batch * k_b + head.to(tl.int64) * k_h
        key = tl.load(INDEX + z.to(tl.int64) * slots + slot, mask=slot < found, other=0)
        k = load_rows(K, key, slot < found, k_l, D, D_PAD)
        TOTALS += z.to(tl.int64) * (G * rows)
        scale *= LOG2_E
        best = tl.full([M], float("-inf"), tl.float32)
        for at in range(0, G * rows, N):
            line = at + tl.arange(0, N)
            exists = line < G * rows
            place = line_places(z, line, count, first_row, rows, q_b, q_h, q_l, HKV, G)
            q = load_rows(Q, place, exists, 1, D, D_PAD)
            total = tl.load(TOTALS + line, mask=exists, other=float("inf"))
            scores = tl.dot(k, tl.trans(q), input_precision=EXACT) * scale - total[None, :]
            best = tl.maximum(best, tl.max(scores, 1))
        best = tl.where(best == best, best, float("-inf"))
        tl.store(RANKS + z.to(tl.int64) * slots + slot, best, mask=slot < found)
