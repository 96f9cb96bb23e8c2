"""Kernels that keep the best of many: by searching the threshold, so that nothing is sorted.

Ties go to what comes first, and what is kept stays in order.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _level(rank, exists):
    """Ranks of 16 bits as integers in the same order; -inf and nothing lie below 1,024."""
    bits = rank.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    level = tl.where(bits >= 0x8000, 0xFFFF - bits, bits | 0x8000)
    return tl.where(exists, level, 0)


@triton.jit(do_not_specialize=("width", "count", "first", "blocks", "most", "sinks", "slots"))
def pick_keys(
    RANKS,
    EDGES,
    INDEX,
    COUNT,
    width,
    count,
    first,
    blocks,
    most,
    sinks,
    slots,
    HKV: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The sinks outside the band and the ``most`` keys of the largest ranks, all ascending.

    int32 ``[Z, slots]``; the numbers of all and of sinks go to ``COUNT [Z, 2]``.
    """
    z = tl.program_id(0)
    head, block = z // count % HKV, z % count
    edge = (head * blocks + first + block) * 2
    start, end = tl.load(EDGES + edge), tl.load(EDGES + edge + 1)
    reach = tl.minimum(start, width) if CAUSAL else width
    RANKS += z.to(tl.int64) * width
    INDEX += z.to(tl.int64) * slots
    # The least level of a number; what lies below is hidden.
    threshold = tl.full([], 0x400, tl.int32)
    above = tl.full([], 0, tl.int32)
    if reach > most:
        threshold = tl.full([], 0, tl.int32)
        for turn in tl.static_range(8):
            shift = 14 - 2 * turn
            one = tl.zeros([N], tl.int32)
            two = tl.zeros([N], tl.int32)
            three = tl.zeros([N], tl.int32)
            for at in range(0, reach, N):
                key = at + tl.arange(0, N)
                rank = tl.load(RANKS + key, mask=key < reach, other=0.0)
                level = _level(rank, key < reach)
                one += (level >= threshold + (1 << shift)).to(tl.int32)
                two += (level >= threshold + (2 << shift)).to(tl.int32)
                three += (level >= threshold + (3 << shift)).to(tl.int32)
            reached = (tl.sum(one, 0) >= most).to(tl.int32)
            reached += (tl.sum(two, 0) >= most).to(tl.int32)
            reached += (tl.sum(three, 0) >= most).to(tl.int32)
            threshold += reached << shift
        threshold = tl.maximum(threshold, 0x400)
        more = tl.zeros([N], tl.int32)
        for at in range(0, reach, N):
            key = at + tl.arange(0, N)
            rank = tl.load(RANKS + key, mask=key < reach, other=0.0)
            more += (_level(rank, key < reach) > threshold).to(tl.int32)
        above = tl.sum(more, 0)
    ties_left = most - above
    taken = tl.full([], 0, tl.int32)
    leading = tl.full([], 0, tl.int32)
    for at in range(0, reach, N):
        key = at + tl.arange(0, N)
        rank = tl.load(RANKS + key, mask=key < reach, other=0.0)
        level = _level(rank, key < reach)
        tied = (level == threshold).to(tl.int32)
        chosen = (level > threshold) | ((tied != 0) & (tl.cumsum(tied, 0) <= ties_left))
        sink = (key < sinks) & (key < reach) & ((key < start) | (key >= end))
        chosen |= sink
        place = taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(INDEX + place, key, mask=chosen)
        ties_left -= tl.sum(tied, 0)
        taken += tl.sum(chosen.to(tl.int32), 0)
        leading += tl.sum(sink.to(tl.int32), 0)
    tl.store(COUNT + 2 * z, taken)
    tl.store(COUNT + 2 * z + 1, leading)


@triton.jit(do_not_specialize=("slots", "budget", "count", "first", "blocks"))
def pick_tokens(RANKS, INDEX, COUNT, TOKENS, slots, budget, count, first, blocks, N: tl.constexpr):
    """Of a block's proposals the ``budget`` of the largest ranks, ascending."""
    z = tl.program_id(0)
    found, sinks = tl.load(COUNT + 2 * z), tl.load(COUNT + 2 * z + 1)
    slot = sinks + tl.arange(0, N)
    at = z.to(tl.int64) * slots + slot
    rank = tl.load(RANKS + at, mask=slot < found, other=float("-inf"))
    bits = rank.to(tl.int32, bitcast=True)
    # In the order of the numbers, from 0 on.
    level = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
    level = tl.where(rank > float("-inf"), level, 0)
    threshold = tl.full([], 0, tl.int64)
    for turn in tl.static_range(32):
        trial = threshold + (1 << (31 - turn))
        reached = tl.sum((level >= trial).to(tl.int32), 0)
        threshold = tl.where(reached >= budget, trial, threshold)
    threshold = tl.maximum(threshold, 1)
    tied = (level == threshold).to(tl.int32)
    ties_left = budget - tl.sum((level > threshold).to(tl.int32), 0)
    chosen = (level > threshold) | ((tied != 0) & (tl.cumsum(tied, 0) <= ties_left))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    token = tl.load(INDEX + at, mask=slot < found, other=-1)
    line = (z // count * blocks + first + z % count).to(tl.int64) * budget
    tl.store(TOKENS + line + place, token, mask=chosen)
