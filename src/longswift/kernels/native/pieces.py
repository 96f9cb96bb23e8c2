"""Pieces of work for torch's threads, in batches short enough to be interrupted between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

# Blocks of a piece: enough to be worth a turn, few enough to share out evenly. Of many blocks more,
# which share what is read of the many keys before them.
_BLOCKS, _MOST = 16, 64
_TURNS = 64
# Pieces of a call.
_PIECES = 64


def pieces(k: Tensor, blocks: int, first: int = 0) -> list[tuple[int, int, int, int]]:
    """Batch row, KV head, first block and count of every piece, the longest contexts first."""
    batch, kv_heads = k.shape[:2]
    return cut([(b, head, first, blocks) for b in range(batch) for head in range(kv_heads)])


def cut(stretches: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """The same of the blocks of some stretches: batch row, KV head, first block and count."""
    found = []
    for b, head, first, count in stretches:
        size = min(max(_BLOCKS, count // _TURNS), _MOST)
        found += [
            (b, head, start, min(size, first + count - start))
            for start in range(first, first + count, size)
        ]
    return sorted(found, key=lambda piece: -piece[2])


def batches(work: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """The pieces one after the other as the kernels take them, some at a time."""
    for first in range(0, len(work), _PIECES):
        yield [number for piece in work[first : first + _PIECES] for number in piece]
