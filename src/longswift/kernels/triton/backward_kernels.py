"""Kernels of the backward pass: gradients of queries, of keys in bands, and of gathered tokens."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from longswift.kernels.triton.forward import (
    bias_places,
    biased,
    load_heads,
    load_rows,
    shown,
    tile_rows,
)
from longswift.kernels.triton.launch import LENGTHS, TABLE


@triton.jit
def _score_gradients(scores, v, d_out, lse, delta, seen, ACC: tl.constexpr, EXACT: tl.constexpr):
    """Probabilities and gradients of the scores, ``[M, N]``."""
    probs = tl.where(seen, tl.exp(scores - lse[:, None]), 0.0)
    d_probs = tl.dot(d_out, tl.trans(v), input_precision=EXACT, out_dtype=ACC)
    return probs, probs * (d_probs - delta[:, None])


@triton.jit(do_not_specialize=LENGTHS + TABLE)
def d_queries(
    Q,
    K,
    V,
    D_OUT,
    LSE,
    DELTA,
    D_Q,
    D_BIAS,
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
    BIASED: tl.constexpr,
    TRACKED: tl.constexpr,
):
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // HKV).to(tl.int64)
    head = (tl.program_id(1) % HKV).to(tl.int64)
    row, group, exists = tile_rows(tile, block, before, q_len, ROWS, M, G)
    position = row + (k_len - q_len)
    q_head = head * G + group
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
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT, out_dtype=ACC) * scale
        scores = biased(scores, seen, BIAS, q_head, key, position, span, zero, step, BIASED)
        _, d_scores = _score_gradients(scores, v, d_out, lse, delta, seen, ACC, EXACT)
        if TRACKED:
            places = bias_places(q_head, key, position, span, zero, step)
            tl.atomic_add(D_BIAS + places, d_scores, mask=seen)
        d_q += tl.dot((d_scores * scale).to(k.dtype), k, input_precision=EXACT, out_dtype=ACC)
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
        _, d_scores = _score_gradients(scores, v, d_out, lse, delta, seen, ACC, EXACT)
        if TRACKED:
            places = bias_places(q_head, token, position, span, zero, step)
            tl.atomic_add(D_BIAS + places, d_scores, mask=seen)
        d_q += tl.dot((d_scores * scale).to(k.dtype), k, input_precision=EXACT, out_dtype=ACC)
    column = tl.arange(0, D_PAD)
    inside = exists[:, None] & (column < D)[None, :]
    tl.store(D_Q + line[:, None] * D + column[None, :], d_q, mask=inside)


@triton.jit(do_not_specialize=LENGTHS + TABLE)
def d_band_keys(
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
    BIAS,
    span,
    zero,
    step,
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
    BIASED: tl.constexpr,
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
        position = row + (k_len - q_len)
        q = load_heads(Q, row, group, exists, q_h, q_l, D, D_PAD)
        q_head = head * G + group
        line = (batch * HKV * G + q_head) * q_len + row
        d_out = load_rows(D_OUT, line, exists, DV, DV, DV_PAD)
        lse = tl.load(LSE + line, mask=exists, other=0.0)
        delta = tl.load(DELTA + line, mask=exists, other=0.0)
        first = tl.load(FIRST + head * q_len + row, mask=exists, other=k_len)
        end = tl.load(END + head * q_len + row, mask=exists, other=0)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT, out_dtype=ACC) * scale
        scores = biased(scores, seen, BIAS, q_head, key, position, span, zero, step, BIASED)
        probs, d_scores = _score_gradients(scores, v, d_out, lse, delta, seen, ACC, EXACT)
        d_v += tl.dot(tl.trans(probs).to(d_out.dtype), d_out, input_precision=EXACT, out_dtype=ACC)
        d_scores = tl.trans(d_scores * scale).to(q.dtype)
        d_k += tl.dot(d_scores, q, input_precision=EXACT, out_dtype=ACC)
    line = (batch * HKV + head) * k_len + key
    column = tl.arange(0, D_PAD)
    inside = (key < k_len)[:, None] & (column < D)[None, :]
    tl.store(D_K + line[:, None] * D + column[None, :], d_k, mask=inside)
    column = tl.arange(0, DV_PAD)
    inside = (key < k_len)[:, None] & (column < DV)[None, :]
    tl.store(D_V + line[:, None] * DV + column[None, :], d_v, mask=inside)


@triton.jit(do_not_specialize=LENGTHS + TABLE)
def d_slots(
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
    BIASED: tl.constexpr,
):
    batch = (tl.program_id(1) // HKV).to(tl.int64)
    head = (tl.program_id(1) % HKV).to(tl.int64)
    pieces = tl.cdiv(slots, N)
    index = tl.program_id(0) // pieces
    slot = tl.program_id(0) % pieces * N + tl.arange(0, N)
    Q += batch * q_b + head * G * q_h
    lists = (tl.program_id(1).to(tl.int64) * blocks + index) * slots
    token = tl.load(TOKENS + lists + slot, mask=slot < slots, other=0)
    since = tl.load(SINCE + lists + slot, mask=slot < slots, other=0)
    until = tl.load(UNTIL + lists + slot, mask=slot < slots, other=0)
    k = load_rows(K + batch * k_b + head * k_h, token, since < until, k_l, D, D_PAD)
    v = load_rows(V + batch * v_b + head * v_h, token, since < until, v_l, DV, DV_PAD)
    d_k = tl.zeros([N, D_PAD], ACC)
    d_v = tl.zeros([N, DV_PAD], ACC)
    tiles = tl.cdiv(block, ROWS)
    for piece in range(0, tiles):
        row, group, exists = tile_rows(index * tiles + piece, block, before, q_len, ROWS, M, G)
        q = load_heads(Q, row, group, exists, q_h, q_l, D, D_PAD)
        q_head = head * G + group
        line = (batch * HKV * G + q_head) * q_len + row
        d_out = load_rows(D_OUT, line, exists, DV, DV, DV_PAD)
        lse = tl.load(LSE + line, mask=exists, other=0.0)
        delta = tl.load(DELTA + line, mask=exists, other=0.0)
        position = row + (k_len - q_len)
        seen = shown(since, until, position) & exists[:, None]
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT, out_dtype=ACC) * scale
        scores = biased(scores, seen, BIAS, q_head, token, position, span, zero, step, BIASED)
        probs, d_scores = _score_gradients(scores, v, d_out, lse, delta, seen, ACC, EXACT)
        d_v += tl.dot(tl.trans(probs).to(d_out.dtype), d_out, input_precision=EXACT, out_dtype=ACC)
        d_scores = tl.trans(d_scores * scale).to(q.dtype)
        d_k += tl.dot(d_scores, q, input_precision=EXACT, out_dtype=ACC)
    at = (lists + slot)[:, None] * (D + DV)
    column = tl.arange(0, D_PAD)
    inside = (slot < slots)[:, None] & (column < D)[None, :]
    tl.store(SHARES + at + column[None, :], d_k, mask=inside)
    column = tl.arange(0, DV_PAD)
    inside = (slot < slots)[:, None] & (column < DV)[None, :]
    tl.store(SHARES + at + D + column[None, :], d_v, mask=inside)
