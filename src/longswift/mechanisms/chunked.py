"""Chunked attention: every chunk of queries sees its chunk and some of the neighbouring keys.

``chunk=3, overlap=1`` (rows are queries), bidirectional and causal::

    x x x x . . .        x . . . . . .
    x x x x . . .        x x . . . . .
    x x x x . . .        x x x . . . .
    . . x x x x x        . . x x . . .
    . . x x x x x        . . x x x . .
    . . x x x x x        . . x x x x .
    . . . . . x x        . . . . . x x

| | time | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(L * (chunk + overlap) * D) | O(L) |

This is what a layer computes when a long text is read in overlapping chunks; to run a whole encoder
that way see ``longswift.extend.chunks``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longswift.core.errors import check_count, check_positive
from longswift.core.pattern import Band, BlockPattern
from longswift.mechanisms.patterned import Patterned


@dataclass(frozen=True, kw_only=True)
class Chunked(Patterned):
    """The queries of ``[start, start + chunk)`` see keys from ``start - overlap`` on.

    Attributes:
        chunk: Queries per chunk; chunks are counted from the row's first real token.
        overlap: Keys before the chunk that it sees; in bidirectional attention after it, too.
    """

    name: ClassVar[str] = "chunked"

    chunk: int = 512
    overlap: int = 128

    def __post_init__(self) -> None:
        check_positive("Chunked", chunk=self.chunk)
        check_count("Chunked", overlap=self.overlap)

    def pattern(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> BlockPattern:
        right = 0 if causal else self.overlap
        band = Band(tile=self.chunk, left=self.overlap, right=right)
        return BlockPattern(causal=causal, bands=(band,) * kv_heads)
