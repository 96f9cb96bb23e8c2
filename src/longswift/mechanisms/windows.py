"""What window mechanisms share: a window around every query, and global tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from longswift.core.pattern import Band, BlockPattern
from longswift.mechanisms.patterned import Patterned

_BLOCK = 64
_NEVER = 1 << 62


@dataclass(frozen=True, kw_only=True)
class WindowAndGlobals(Patterned):
    """Every query sees the window around it and the global tokens.

    In bidirectional attention global tokens also see every key. In causal attention query ``i``
    sees global token ``g`` only if ``g <= i``, and the rows of global tokens are like any other.
    """

    @abstractmethod
    def reach(self, causal: bool) -> tuple[int, int]:
        """Keys seen before and after the query's own position."""

    @abstractmethod
    def globals_of(self, k_len: int) -> Tensor:
        """Ascending positions of the global tokens among ``k_len`` keys, on CPU."""

    def pattern(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> BlockPattern:
        before, after = self.reach(causal)
        span = before + after + 1
        tile = _BLOCK if span <= 2 * _BLOCK else min(256, span // _BLOCK * _BLOCK)
        bands = (Band(tile=tile, left=before, right=after, reach=(before, after)),) * kv_heads
        token = self.globals_of(k_len)
        if len(token) == 0:
            return BlockPattern(causal=causal, bands=bands, block=_BLOCK)
        first = (k_len - q_len) // _BLOCK
        start = torch.arange(first, (k_len - 1) // _BLOCK + 1, device="cpu")[:, None] * _BLOCK
        # Per row: a global token is gathered exactly where the window has moved past it ...
        since = token + before + 1
        until = torch.full_like(since, _NEVER)
        needed = since < start + _BLOCK
        if not causal:
            # ... or has not reached it yet.
            needed = torch.cat([needed, token - after > start], 1)
            since = torch.cat([since, torch.zeros_like(since)])
            until = torch.cat([until, token - after])
            token = torch.cat([token, token])
        width = int(needed.sum(1).max())
        slots = needed.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        shape = (1, kv_heads, *slots.shape)
        return BlockPattern(
            causal=causal,
            bands=bands,
            block=_BLOCK,
            tokens=torch.where(needed.gather(1, slots), token[slots], -1).expand(shape),
            visible_from=since[slots].expand(shape),
            visible_until=None if causal else until[slots].expand(shape),
        )

    def full_rows(self, k_len: int) -> Tensor | None:
        rows = self.globals_of(k_len)
        return rows if len(rows) else None
