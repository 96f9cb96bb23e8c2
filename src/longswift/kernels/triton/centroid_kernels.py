"""Kernels of the choice by centroids: groups of similar rows, their means, and what keys are worth.

``choosing`` says what they are for. Scores and their log-sums are in units of log 2, and so is the
``scale`` of scores.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from longswift.kernels.triton.forward import load_rows


@triton.jit
def line_places(z, line, count, first_row, rows, q_b, q_h, q_l, HKV: tl.constexpr, G: tl.constexpr):
    """Where the rows of block ``z`` of ``[B, Hkv, count]`` begin, those of a group one by one."""
    problem = z // count
    batch, head = (problem // HKV).to(tl.int64), problem % HKV
    row = first_row + z % count * rows + line % rows
    query_head = head * G + line // rows
    return batch * q_b + query_head.to(tl.int64) * q_h + row.to(tl.int64) * q_l


@triton.jit
def _members(ORDER, lists, member, exists, MEMBERS: tl.constexpr, WHOLE: tl.constexpr):
    """Lines of members ``[groups, N]``; the last of an odd number of members comes twice."""
    index = tl.minimum(member, MEMBERS - 1)[None, :]
    if WHOLE:
        line = index + tl.zeros_like(lists).to(tl.int32)[:, None]
    else:
        line = tl.load(ORDER + lists[:, None] + index, mask=exists, other=0)
    return line


@triton.jit(do_not_specialize=("groups", "count", "first_row", "rows"))
def halve(
    Q,
    ORDER,
    HALVES,
    groups,
    count,
    first_row,
    rows,
    q_b,
    q_h,
    q_l,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MEMBERS: tl.constexpr,
    PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    STEP: tl.constexpr,
    WHOLE: tl.constexpr,
    SPARE: tl.constexpr,
):
    """Halves groups ``[Z, groups, MEMBERS]`` at the median of the channel that varies most.

    ``WHOLE``: the one group of a block is all of its rows. ``SPARE``: bits that all numbers share
    when they become fp32.
    """
    z = tl.program_id(0) // tl.cdiv(groups, AT_ONCE)
    group = tl.program_id(0) % tl.cdiv(groups, AT_ONCE) * AT_ONCE + tl.arange(0, AT_ONCE)
    HALF: tl.constexpr = (MEMBERS + 1) // 2
    lists = (z.to(tl.int64) * groups + group) * MEMBERS
    column = tl.arange(0, D_PAD)
    total = tl.zeros([AT_ONCE, D_PAD], tl.float32)
    squares = tl.zeros([AT_ONCE, D_PAD], tl.float32)
    for start in range(0, PAD, STEP):
        member = start + tl.arange(0, STEP)
        there = (group < groups)[:, None] & (member < 2 * HALF)[None, :]
        line = _members(ORDER, lists, member, there, MEMBERS, WHOLE)
        source = line_places(z, line, count, first_row, rows, q_b, q_h, q_l, HKV, G)
        inside = there[:, :, None] & (column < D)[None, None, :]
        x = tl.load(Q + source[:, :, None] + column[None, None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(x, 1)
        squares += tl.sum(x * x, 1)
    spread = squares - total * total / (2 * HALF)
    # What is no number spreads least, and is largest below: halves are equally long all the same.
    spread = tl.where((spread == spread) & (column < D)[None, :], spread, -1.0)
    widest = tl.minimum(tl.argmax(spread, 1), D - 1)
    index = tl.arange(0, PAD)
    exists = (group < groups)[:, None] & (index < 2 * HALF)[None, :]
    mine = _members(ORDER, lists, index, exists, MEMBERS, WHOLE)
    place = line_places(z, mine, count, first_row, rows, q_b, q_h, q_l, HKV, G)
    value = tl.load(Q + place + widest[:, None], mask=exists, other=0.0).to(tl.float32)
    bits = tl.where(value == value, value, float("inf")).to(tl.int32, bitcast=True)
    # Integers in the order of the numbers; -0 equals 0.
    level = tl.where(value == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    level = tl.where(exists, level, 0x7FFFFFFF) >> SPARE
    negative = tl.sum((level < 0).to(tl.int32), 1)
    median = tl.where(negative < HALF, 0, -0x80000000) >> SPARE
    for turn in range(0, 31 - SPARE):
        trial = median | (1 << (30 - SPARE - turn))
        below = tl.sum((level < trial[:, None]).to(tl.int32), 1)
        median = tl.where(below < HALF, trial, median)
    ties = HALF - tl.sum((level < median[:, None]).to(tl.int32), 1)
    tied = (level == median[:, None]).to(tl.int32)
    low = (level < median[:, None]) | ((tied != 0) & (tl.cumsum(tied, 1) <= ties[:, None]))
    lower = tl.cumsum(low.to(tl.int32), 1)
    slot = tl.where(low, lower - 1, HALF + index[None, :] - lower)
    tl.store(HALVES + 2 * HALF * (lists[:, None] // MEMBERS) + slot, mine, mask=exists)


@triton.jit(do_not_specialize=("total", "groups", "count", "first_row", "rows"))
def average(
    Q,
    ORDER,
    MEANS,
    total,
    groups,
    count,
    first_row,
    rows,
    q_b,
    q_h,
    q_l,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MEMBERS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Means of groups of rows, ``[Z * groups, D]``; ``LARGEST`` is what their dtype holds."""
    group = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    column = tl.arange(0, D_PAD)
    inside = (group < total)[:, None] & (column < D)[None, :]
    mean = tl.zeros([AT_ONCE, D_PAD], tl.float32)
    for member in range(0, MEMBERS):
        line = tl.load(ORDER + group * MEMBERS + member, mask=group < total, other=0)
        z = (group // groups).to(tl.int32)
        place = line_places(z, line, count, first_row, rows, q_b, q_h, q_l, HKV, G)
        x = tl.load(Q + place[:, None] + column[None, :], mask=inside, other=0.0)
        mean += x.to(tl.float32)
    mean = tl.minimum(tl.maximum(mean / MEMBERS, -LARGEST), LARGEST)
    tl.store(MEANS + group[:, None] * D + column[None, :], mean, mask=inside)


@triton.jit
def _centroid_edges(EDGES, block, count, head, first, blocks):
    """First and one-past-last key of the bands of blocks; nothing lies outside no block's."""
    at = (head * blocks + first + block) * 2
    start = tl.load(EDGES + at, mask=block < count, other=0)
    end = tl.load(EDGES + at + 1, mask=block < count, other=2147483647)
    return start, end


@triton.jit
def _outside(key, start, end, k_len, CAUSAL: tl.constexpr):
    """Which keys are candidates, ``[M, N]``."""
    outside = key[None, :] < start[:, None]
    if not CAUSAL:
        outside |= (key[None, :] >= end[:, None]) & (key < k_len)[None, :]
    return outside


@triton.jit
def best_of_each(scores, M: tl.constexpr, N: tl.constexpr, TOGETHER: tl.constexpr):
    """The largest of every ``TOGETHER`` columns, ``[M, N / TOGETHER]``."""
    return tl.max(tl.reshape(scores, [M, N // TOGETHER, TOGETHER]), 2)


@triton.jit
def add_to_sum(scores, top, mass):
    """Online log-sum over one more tile of scores."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    mass = mass * tl.exp2(top - pivot) + tl.sum(tl.exp2(scores - pivot[:, None]), 1)
    return new_top, mass


@triton.jit(do_not_specialize=("k_len", "groups", "count", "first", "blocks"))
def log_sums(
    MEANS,
    K,
    EDGES,
    SUMS,
    scale,
    k_len,
    groups,
    count,
    first,
    blocks,
    k_b,
    k_h,
    k_l,
    HKV: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    MANY: tl.constexpr,
    EVERY: tl.constexpr,
    FIRST: tl.constexpr,
    TOGETHER: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Log-sum-exp of each centroid's scores of the candidates, over a sample where they are many.

    The sample is the best of every ``TOGETHER`` keys of every ``EVERY``-th tile of ``N``.
    """
    problem = tl.program_id(1)
    batch, head = (problem // HKV).to(tl.int64), problem % HKV
    K += batch * k_b + head.to(tl.int64) * k_h
    line = tl.program_id(0) * M + tl.arange(0, M)
    block = line // groups
    MEANS += problem.to(tl.int64) * count * groups * D
    means = load_rows(MEANS, line, block < count, D, D, D_PAD)
    start, end = _centroid_edges(EDGES, block, count, head, first, blocks)
    candidates = start if CAUSAL else start + tl.maximum(k_len - end, 0)
    few = (candidates < MANY) & (block < count)
    reach = tl.max(start, 0) if CAUSAL else k_len
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    if tl.max(few.to(tl.int32), 0) == 0:
        for begin in range(FIRST * N, reach, EVERY * N):
            key = begin + tl.arange(0, N)
            k = load_rows(K, key, key < k_len, k_l, D, D_PAD)
            scores = tl.dot(means, tl.trans(k), input_precision=EXACT) * scale
            scores = tl.where(_outside(key, start, end, k_len, CAUSAL), scores, float("-inf"))
            top, mass = add_to_sum(best_of_each(scores, M, N, TOGETHER), top, mass)
    else:
        for begin in range(0, reach, N):
            key = begin + tl.arange(0, N)
            k = load_rows(K, key, key < k_len, k_l, D, D_PAD)
            scores = tl.dot(means, tl.trans(k), input_precision=EXACT) * scale
            # Blocks with many candidates keep to their sample.
            counted = few[:, None] & _outside(key, start, end, k_len, CAUSAL)
            in_sample = (begin // N % EVERY == FIRST) & (few == 0)
            sampled = in_sample[:, None] & _outside(key, start, end, k_len, CAUSAL)
            best = best_of_each(tl.where(sampled, scores, float("-inf")), M, N, TOGETHER)
            top, mass = add_to_sum(tl.where(counted, scores, float("-inf")), top, mass)
            top, mass = add_to_sum(best, top, mass)
    total = tl.where(mass > 0.0, top + tl.log2(mass), 0.0)
    tl.store(SUMS + problem.to(tl.int64) * count * groups + line, total, mask=block < count)


@triton.jit(do_not_specialize=("k_len", "count", "first", "blocks", "skip", "chunk"))
def rank_keys(
    MEANS,
    SUMS,
    K,
    EDGES,
    RANKS,
    scale,
    k_len,
    width,
    count,
    first,
    blocks,
    skip,
    chunk,
    k_b,
    k_h,
    k_l,
    HKV: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Largest share of each key among the centroids of a block, ``[Z, width]``.

    Its logarithm as fp16, whose bits are stored in the order of the numbers, from 0 on.

    Keys are the rows of a product, the centroids of one or several blocks its columns. Hidden are
    keys in the band and the first ``skip``.
    """
    BLOCKS: tl.constexpr = N // GROUPS if N > GROUPS else 1
    tiles = tl.cdiv(count, BLOCKS)
    tile, begin = tl.program_id(0) % tiles, tl.program_id(0) // tiles * chunk
    problem = tl.program_id(1)
    batch, head = (problem // HKV).to(tl.int64), problem % HKV
    K += batch * k_b + head.to(tl.int64) * k_h
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    start, end = _centroid_edges(EDGES, block, count, head, first, blocks)
    reach = tl.minimum(begin + chunk, width)
    if CAUSAL:
        reach = tl.minimum(reach, tl.max(start, 0))
    lines = (problem.to(tl.int64) * count + tile * BLOCKS) * GROUPS
    left = (count - tile * BLOCKS) * GROUPS
    RANKS += (problem.to(tl.int64) * count + block) * width
    if N >= GROUPS:
        line = tl.arange(0, N)
        means = load_rows(MEANS + lines * D, line, line < left, D, D, D_PAD)
        sums = tl.load(SUMS + lines + line, mask=line < left, other=0.0)
    for at in range(begin, reach, M):
        key = at + tl.arange(0, M)
        k = load_rows(K, key, key < k_len, k_l, D, D_PAD)
        if N >= GROUPS:
            scores = tl.dot(k, tl.trans(means), input_precision=EXACT) * scale - sums[None, :]
            best = tl.max(tl.reshape(scores, [M, BLOCKS, GROUPS]), 2)
        else:
            best = tl.full([M, 1], float("-inf"), tl.float32)
            for offset in range(0, GROUPS, N):
                line = offset + tl.arange(0, N)
                means = load_rows(MEANS + lines * D, line, line < left, D, D, D_PAD)
                sums = tl.load(SUMS + lines + line, mask=line < left, other=0.0)
                scores = tl.dot(k, tl.trans(means), input_precision=EXACT) * scale - sums[None, :]
                best = tl.maximum(best, tl.max(scores, 1)[:, None])
        shown = tl.trans(_outside(key, start, end, k_len, CAUSAL)) & (key >= skip)[:, None]
        best = tl.where(shown & (best == best), best, float("-inf"))
        bits = best.to(tl.float16).to(tl.int16, bitcast=True)
        stored = (key < width)[:, None] & (block < count)[None, :]
        # Integers in the order of the numbers, without a sign.
        level = bits ^ ((bits >> 15) & 0x7FFF) ^ -0x8000
        tl.store(RANKS[None, :] + key[:, None], level, mask=stored)
