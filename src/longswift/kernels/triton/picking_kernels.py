"""Kernels that keep the best of many: by searching the threshold, so that nothing is sorted.

Ties go to what comes first, and what is kept stays in order.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _levels(RANKS, at, padded, N: tl.constexpr):
    """Ranks as integers from 0 on; what is hidden or missing lies below those of numbers."""
    key = at + tl.arange(0, N)
    # Triton fills a word with two 16-bit numbers wrongly if they are negative.
    return tl.load(RANKS + key, mask=key < padded, other=0).to(tl.int32) & 0xFFFF


@triton.jit(do_not_specialize=("count", "first", "blocks", "most", "sinks"))
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
    TILE: tl.constexpr,
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
    # As far as ranks are written; a multiple, so that a thread loads several at once.
    padded = tl.minimum(tl.cdiv(reach, TILE) * TILE, width)
    RANKS += z.to(tl.int64) * width
    INDEX += z.to(tl.int64) * slots
    # -65504, the least of all numbers; what lies below is hidden.
    threshold = tl.full([], 0x400, tl.int32)
    above = tl.full([], 0, tl.int32)
    if reach > most:
        threshold = tl.full([], 0, tl.int32)
        for turn in range(0, 8):
            one = threshold + (1 << (14 - 2 * turn))
            two = threshold + (2 << (14 - 2 * turn))
            three = threshold + (3 << (14 - 2 * turn))
            # Three counts of ten bits each: a step counts once.
            counts = tl.zeros([N], tl.int32)
            for at in range(0, reach, N):
                level = _levels(RANKS, at, padded, N)
                counts += (level >= one).to(tl.int32)
                counts += (level >= two).to(tl.int32) << 10
                counts += (level >= three).to(tl.int32) << 20
            ones, twos = tl.sum(counts & 1023, 0), tl.sum((counts >> 10) & 1023, 0)
            threes = tl.sum(counts >> 20, 0)
            # As many lie above the threshold as reach the first trial that too few reach.
            above = tl.where(threes < most, threes, above)
            above = tl.where(twos < most, twos, above)
            above = tl.where(ones < most, ones, above)
            threshold = tl.where(ones < most, threshold, tl.where(twos < most, one, two))
            threshold = tl.where(threes < most, threshold, three)
        if threshold < 0x400:
            threshold = tl.full([], 0x400, tl.int32)
            above = tl.full([], 0, tl.int32)
    ties_left = most - above
    taken = tl.full([], 0, tl.int32)
    leading = tl.full([], 0, tl.int32)
    for at in range(0, reach, N):
        key = at + tl.arange(0, N)
        level = _levels(RANKS, at, padded, N)
        sink = (key < sinks) & (key < reach) & ((key < start) | (key >= end))
        sure = (level > threshold) | sink
        tied = level == threshold
        # Two counts in one.
        flags = sure.to(tl.int32) + (tied.to(tl.int32) << 16)
        counts = tl.cumsum(flags, 0)
        ties = tl.minimum(counts >> 16, ties_left)
        chosen = sure | (tied & ((counts >> 16) <= ties_left))
        tl.store(INDEX + taken + (counts & 0xFFFF) + ties - 1, key, mask=chosen)
        total = tl.sum(flags, 0)
        more = tl.minimum(total >> 16, ties_left)
        ties_left -= more
        taken += (total & 0xFFFF) + more
        leading += tl.sum(sink.to(tl.int32), 0)
    tl.store(COUNT + 2 * z, taken)
    tl.store(COUNT + 2 * z + 1, leading)


@triton.jit(do_not_specialize=("budget", "count", "first", "blocks"))
def pick_tokens(RANKS, INDEX, COUNT, TOKENS, slots, budget, count, first, blocks, N: tl.constexpr):
    """Of a block's proposals the ``budget`` of the largest ranks, ascending."""
    z = tl.program_id(0)
    found, sinks = tl.load(COUNT + 2 * z), tl.load(COUNT + 2 * z + 1)
    slot = sinks + tl.arange(0, N)
    at = z.to(tl.int64) * slots + slot
    rank = tl.load(RANKS + at, mask=slot < found, other=float("-inf"))
    bits = rank.to(tl.int32, bitcast=True)
    # Integers in the order of the numbers, the least of them for those that are hidden.
    level = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    level = tl.where(rank > float("-inf"), level, -0x80000000)
    threshold = tl.where(tl.sum((level >= 0).to(tl.int32), 0) >= budget, 0, -0x80000000)
    for turn in range(0, 31):
        trial = threshold | (1 << (30 - turn))
        reached = tl.sum((level >= trial).to(tl.int32), 0)
        threshold = tl.where(reached >= budget, trial, threshold)
    threshold = tl.maximum(threshold, -0x7FFFFFFF)
    tied = (level == threshold).to(tl.int32)
    ties_left = budget - tl.sum((level > threshold).to(tl.int32), 0)
    chosen = (level > threshold) | ((tied != 0) & (tl.cumsum(tied, 0) <= ties_left))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    token = tl.load(INDEX + at, mask=slot < found, other=-1)
    line = (z // count * blocks + first + z % count).to(tl.int64) * budget
    tl.store(TOKENS + line + place, token, mask=chosen)
