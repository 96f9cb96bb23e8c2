"""Pieces of work for threads: stretches of query blocks of one head."""

from __future__ import annotations

from torch import Tensor

# Blocks of a piece: enough to be worth a call, few enough to share out evenly.
_BLOCKS = 16


def pieces(k: Tensor, blocks: int, first: int = 0) -> list[list[int]]:
    """``[batch row, KV head, first block, count]`` of every piece, the longest contexts first."""
    batch, kv_heads = k.shape[:2]
    return [
        [b, head, start, min(_BLOCKS, first + blocks - start)]
        for start in reversed(range(first, first + blocks, _BLOCKS))
        for b in range(batch)
        for head in range(kv_heads)
    ]
