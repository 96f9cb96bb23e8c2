"""Scoring key blocks by their bounds and keeping the best, without a score matrix in memory.

The bounds of a block of queries are one product of features; two passes over it give the softmax
of each row over the candidate blocks, and of that only the largest value per key block is written.
The best are then found by searching the bits of the threshold, so that the choice is exact, ties go
to the earlier block, and nothing is sorted.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longswift.kernels.triton.launch import precision

# Rows, key blocks and features of a tile; candidates a step of the search looks at.
_ROWS, _BLOCKS, _FEATURES, _CANDIDATES = 32, 64, 32, 1024
# Non-negative fp32 numbers are ordered like their 31 lower bits.
_BITS = 31


@triton.jit
def _bounds(
    ROWS,
    KEYS,
    row,
    block,
    rows,
    width,
    F: tl.constexpr,
    BF: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Products of row features and block features, fp32 ``[R, N]``."""
    total = tl.zeros([R, N], tl.float32)
    for start in range(0, F, BF):
        feature = start + tl.arange(0, BF)
        inside = feature[None, :] < F
        a = tl.load(
            ROWS + row[:, None] * F + feature[None, :],
            mask=(row < rows)[:, None] & inside,
            other=0.0,
        )
        b = tl.load(
            KEYS + block[:, None] * F + feature[None, :],
            mask=(block < width)[:, None] & inside,
            other=0.0,
        )
        total += tl.dot(a, tl.trans(b), input_precision=EXACT)
    return total


@triton.jit(do_not_specialize=("rows", "width", "runs", "skip"))
def _rank(
    ROWS,
    KEYS,
    OUTSIDE,
    RANK,
    rows,
    width,
    runs,
    skip,
    HKV: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    EXACT: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    problem = tl.program_id(2).to(tl.int64)
    row = piece * R + tl.arange(0, R)
    ROWS += (problem * runs + index) * rows * F
    KEYS += problem * width * F
    OUTSIDE += (problem % HKV * runs + index) * width
    top = tl.full([R], float("-inf"), tl.float32)
    mass = tl.zeros([R], tl.float32)
    for start in range(0, width, N):
        block = start + tl.arange(0, N)
        candidate = tl.load(OUTSIDE + block, mask=block < width, other=0) != 0
        bound = _bounds(ROWS, KEYS, row, block, rows, width, F, BF, R, N, EXACT)
        bound = tl.where(candidate[None, :], bound, float("-inf"))
        new_top = tl.maximum(top, tl.max(bound, 1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        mass = mass * tl.exp(top - pivot) + tl.sum(tl.exp(bound - pivot[:, None]), 1)
        top = new_top
    # Rows that do not exist, or have no candidate, weigh nothing.
    counted = (row < rows) & (mass > 0.0)
    pivot = tl.where(counted, top, 0.0)
    pivot += tl.log(tl.where(counted, mass, 1.0))
    RANK += ((problem * runs + index) * tl.num_programs(1) + piece) * width
    for start in range(0, width, N):
        block = start + tl.arange(0, N)
        candidate = tl.load(OUTSIDE + block, mask=block < width, other=0) != 0
        bound = _bounds(ROWS, KEYS, row, block, rows, width, F, BF, R, N, EXACT)
        bound = tl.where(candidate[None, :] & counted[:, None], bound, float("-inf"))
        # Shares of huge scores underflow; this keeps the order of their logarithms, and is not
        # negative.
        largest = 1.0 / (1.0 - tl.minimum(tl.max(bound - pivot[:, None], 0), 0.0))
        largest = tl.where(candidate & (block >= skip), largest, -1.0)
        tl.store(RANK + block, largest, mask=block < width)


@triton.jit(do_not_specialize=("width", "most"))
def _best(RANK, INDEX, COUNT, width, most, BITS: tl.constexpr, N: tl.constexpr):
    """Indices of the ``most`` largest non-negative ranks, in ascending order, and how many."""
    problem = tl.program_id(0).to(tl.int64)
    RANK += problem * width
    threshold = 0
    for bit in range(0, BITS):
        trial = threshold | (1 << (BITS - 1 - bit))
        reached = 0
        for start in range(0, width, N):
            block = start + tl.arange(0, N)
            rank = tl.load(RANK + block, mask=block < width, other=-1.0)
            reached += tl.sum((rank.to(tl.int32, bitcast=True) >= trial).to(tl.int32), 0)
        threshold = tl.where(reached >= most, trial, threshold)
    above = 0
    for start in range(0, width, N):
        block = start + tl.arange(0, N)
        rank = tl.load(RANK + block, mask=block < width, other=-1.0)
        above += tl.sum((rank.to(tl.int32, bitcast=True) > threshold).to(tl.int32), 0)
    ties_left = most - above
    taken = 0
    for start in range(0, width, N):
        block = start + tl.arange(0, N)
        rank = tl.load(RANK + block, mask=block < width, other=-1.0)
        bits = rank.to(tl.int32, bitcast=True)
        tied = (bits == threshold).to(tl.int32)
        chosen = (bits > threshold) | ((tied != 0) & (tl.cumsum(tied, 0) <= ties_left))
        place = taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(INDEX + problem * most + place, block.to(tl.int64), mask=chosen)
        ties_left -= tl.sum(tied, 0)
        taken += tl.sum(chosen.to(tl.int32), 0)
    tl.store(COUNT + problem, taken)


def best_blocks(
    rows: Tensor, keys: Tensor, outside: Tensor, skip: int, most: int
) -> tuple[Tensor, Tensor]:
    """The key blocks with the largest bounds, per KV head and block of queries.

    A block's rank is the largest, over rows, of its share of the softmax over candidate blocks.

    Args:
        rows: Features of query rows or groups of rows, ``[B, Hkv, N, R, F]``.
        keys: Features of key blocks, ``[B, Hkv, W, F]``; ``rows @ keys`` are the bounds.
        outside: bool ``[Hkv, N, W]``, the candidates.
        skip: Leading key blocks that count in the softmax but are never chosen.
        most: Blocks to choose, at most ``W``.

    Returns:
        ``index [B, Hkv, N, most]``, ascending, and which of them are real choices.
    """
    batch, kv_heads, runs, lines, features = rows.shape
    width, device = keys.shape[2], rows.device
    if most == 0:
        index = torch.zeros(batch, kv_heads, runs, 0, dtype=torch.long, device=device)
        return index, index.bool()
    pieces = triton.cdiv(lines, _ROWS)
    rank = torch.empty(batch, kv_heads, runs, pieces, width, dtype=torch.float32, device=device)
    _rank[(runs, pieces, batch * kv_heads)](
        rows.float().contiguous(),
        keys.float().contiguous(),
        outside.to(torch.int8).contiguous(),
        rank,
        lines,
        width,
        runs,
        skip,
        HKV=kv_heads,
        F=features,
        BF=_FEATURES,
        R=_ROWS,
        N=_BLOCKS,
        EXACT=precision(),
    )
    rank = rank.amax(3) if pieces > 1 else rank.squeeze(3)
    index = torch.zeros(batch, kv_heads, runs, most, dtype=torch.long, device=device)
    count = torch.empty(batch, kv_heads, runs, 1, dtype=torch.int32, device=device)
    problems = batch * kv_heads * runs
    _best[(problems,)](rank, index, count, width, most, BITS=_BITS, N=_CANDIDATES)
    return index, torch.arange(most, device=device) < count
