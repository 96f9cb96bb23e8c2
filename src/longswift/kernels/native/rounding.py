"""Keys as bytes, for products that only rank: half the memory to read, half the products.

A channel becomes a whole multiple of a step, at most 127 of them. The largest number among the keys
that a block of queries may choose from sets the step, in powers of the fourth root of two: a choice
depends on no later key, and keys are rounded anew a few times only.

Rounding moves a score by about a step's share of it, which only turns around keys that a row wants
nearly alike. Where scores would move by more than .1 and by more than 4 % of how much they differ
(standard deviations), as where one channel is far larger than others, a block's keys are ranked
in 16 bits or more.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.blocks import BlockRun
from longswift.core.pattern import BlockPattern
from longswift.kernels.native.factors import ranks_in_bytes
from longswift.kernels.native.pieces import batches, cut

# Bytes of a row of a tile.
_TILE = 64
# Keys rounded by a thread at a time.
_KEYS = 4096
# Bytes that a thread keeps.
_KEPT = 1 << 25
# What the kernels take for no level.
NO_BYTES = -(2**31)
_mine = threading.local()


class RoundedKeys:
    """Keys ``k [B, Hkv, Lk, D]`` as bytes, on one step at a time."""

    def __init__(self, k: Tensor) -> None:
        self._k = k

    def phases(
        self, q: Tensor, run: BlockRun, edges: Tensor, pattern: BlockPattern, scale: float
    ) -> Iterator[tuple[list[tuple[int, int, int, int]], Tensor, Tensor]]:
        """A run's blocks in pieces (batch row, KV head, first block, count), bytes and levels.

        The bytes ``[B, Hkv, Lk, *]`` are right for the pieces they come with, until the next come;
        levels of steps are int32 ``[B, Hkv, N]``. Both are empty where nothing is ranked in bytes.
        """
        batch, kv_heads, length = self._k.shape[:3]
        heads = [(b, h) for b in range(batch) for h in range(kv_heads)]
        if not ranks_in_bytes():
            every = [(b, h, run.first, run.count) for b, h in heads]
            yield cut(every), self._k.new_empty(0), self._k.new_empty(0, dtype=torch.int32)
            return
        operators = compiled.loaded()
        levels = torch.empty(batch, kv_heads, run.count, dtype=torch.int32, device="cpu")
        where = [run.first, run.row, run.rows]
        of_keys = self._k, self._extents
        operators.find_levels(q, *of_keys, edges, levels, where, scale, pattern.causal)
        stretches = [
            [(b, h, *stretch) for stretch in _stretches(levels[b, h].tolist())] for b, h in heads
        ]
        for turn in range(max(map(len, stretches))):
            # Every head's longest contexts first.
            here = [of_head[-1 - turn] for of_head in stretches if turn < len(of_head)]
            work = []
            for b, h, level, _, end in here:
                if level != NO_BYTES:
                    last = run.first + end - 1
                    keys = min(length, int(edges[h, last, 0])) if pattern.causal else length
                    work += [
                        (b, h, start, min(start + _KEYS, keys), level)
                        for start in range(0, keys, _KEYS)
                    ]
            for places in batches(work):
                operators.round_keys(self._k, self._bytes, places)
            yield (
                cut([(b, h, run.first + first, end - first) for b, h, _, first, end in here]),
                self._bytes,
                levels,
            )

    @cached_property
    def _extents(self) -> Tensor:
        """What the kernels know of the keys up to every so many."""
        found: Tensor = compiled.loaded().extents(self._k)
        return found

    @cached_property
    def _bytes(self) -> Tensor:
        *shape, dim = self._k.shape
        return _room((*shape, -(-dim // _TILE) * _TILE))


def _room(shape: tuple[int, ...]) -> Tensor:
    """Memory for bytes; a moderate amount is kept, as fresh memory costs more than to fill it."""
    needed = math.prod(shape)
    kept: Tensor | None = getattr(_mine, "room", None)
    if kept is None or kept.numel() < needed:
        kept = torch.empty(needed, dtype=torch.int8, device="cpu")
        compiled.loaded().use_large_pages(kept)
        if needed <= _KEPT:
            _mine.room = kept
    return kept[:needed].view(shape)


def _stretches(levels: list[int]) -> list[tuple[int, int, int]]:
    """Level, first and end of stretches of blocks of one level; those of none join any."""
    found: list[tuple[int, int, int]] = []
    for block, level in enumerate(levels):
        if found and (level in (found[-1][0], NO_BYTES) or found[-1][0] == NO_BYTES):
            before, first, _ = found[-1]
            found[-1] = (before if level == NO_BYTES else level, first, block + 1)
        else:
            found.append((level, block, block + 1))
    return found
