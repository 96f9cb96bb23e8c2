"""The sparse pattern: which keys each block of queries sees.

A pattern describes an unpadded batch. Query ``i`` sits at key position ``offset + i`` with
``offset = Lk - Lq``; blocks and tiles lie on grids counted from key position 0.

Two kinds of keys, disjoint by construction:

* **Bands**: per KV head a contiguous window. Queries come in tiles of ``tile``; the tile starting
  at ``t`` sees keys ``[t - left, t + tile + right)``, clipped to the sequence, to the causal
  triangle and to ``reach``: with ``reach = (a, b)`` query ``p`` sees ``p - a <= j <= p + b``
  (both inclusive).
* **Gathered** keys: per KV head and block of ``block`` queries a list of single tokens outside the
  band, each for a range of query positions, and optionally the pooled remainder of everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Band:
    """Contiguous keys of one KV head.

    The tile of queries ``[t, t + tile)`` sees keys ``[t - left, t + tile + right)``;
    ``reach = (a, b)`` narrows it to ``p - a <= j <= p + b`` for the query at ``p``. With
    ``left = 0`` and ``right = -tile`` it holds no key at all.
    """

    tile: int
    left: int
    right: int = 0
    reach: tuple[int, int] | None = None

    def bounds(self, position: Tensor, k_len: int) -> tuple[Tensor, Tensor]:
        """First and one-past-last key of the tiles that hold ``position`` (reach not applied)."""
        start = position.div(self.tile, rounding_mode="floor") * self.tile
        first = (start - self.left).clamp(0, k_len)
        return first, (start + self.tile + self.right).clamp(0, k_len)

    def at(self, position: int, k_len: int) -> tuple[int, int]:
        """``bounds`` of one position; for single rows tensors would cost more than attention."""
        start = position // self.tile * self.tile
        first = min(max(start - self.left, 0), k_len)
        return first, min(max(start + self.tile + self.right, 0), k_len)


@dataclass(frozen=True, kw_only=True)
class BlockPattern:
    """Keys seen by each block of queries of an unpadded batch.

    Attributes:
        causal: Key ``j`` is visible to the query at ``p`` only if ``j <= p``.
        bands: One band per KV head.
        block: Query rows that share a gathered list.
        tokens: integers ``[B, Hkv, N, C]``, the gathered key positions of the ``N`` blocks that the
            queries touch (the first holds position ``offset``); -1 marks an empty slot. None when
            nothing is gathered. Never inside the band, never twice, never after the block.
        visible_from: integers like ``tokens``: first query position that may see the slot, or None
            when every row of the block sees it.
        visible_until: integers like ``tokens``: first query position that no longer sees the slot,
            or None. A token may fill two slots of a block if no row sees both.
        listed: integers ``[Hkv, N]`` on CPU, how many tokens each block gathers, where that is
            known without reading ``tokens``; for statistics.
        pool: Size of the remainder's pools, or None. A pool stands for its tokens outside the
            band and not gathered by the row (or its block), through their mean key and value
            plus the log of their count. Band edges lie on multiples of ``pool_grain``.
        pool_grain: Granularity of band edges when ``pool`` is set; divides ``pool`` and ``block``.
    """

    causal: bool
    bands: tuple[Band, ...]
    block: int = 64
    tokens: Tensor | None = None
    visible_from: Tensor | None = None
    visible_until: Tensor | None = None
    listed: Tensor | None = None
    pool: int | None = None
    pool_grain: int = 1

    def band_mask(self, q_len: int, k_len: int, device: torch.device) -> Tensor:
        """Keys inside each KV head's band, bool ``[1, Hkv, Lq, Lk]``; causality not applied."""
        position = torch.arange(k_len - q_len, k_len, device=device)
        key = torch.arange(k_len, device=device)
        heads = []
        for band in self.bands:
            first, last = band.bounds(position, k_len)
            inside = (key >= first[:, None]) & (key < last[:, None])
            if band.reach is not None:
                distance = position[:, None] - key
                inside &= (distance <= band.reach[0]) & (distance >= -band.reach[1])
            heads.append(inside)
        return torch.stack(heads).unsqueeze(0)

    def intervals(self, q_len: int, k_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First and one-past-last key each row sees through its band, int32 ``[Hkv, Lq]``.

        Reach and causality are applied. Neither ever decreases along the rows; a row whose end does
        not lie after its first key sees nothing.
        """
        position = torch.arange(k_len - q_len, k_len, device=device)
        found: dict[Band, tuple[Tensor, Tensor]] = {}
        for band in set(self.bands):
            first, end = band.bounds(position, k_len)
            if band.reach is not None:
                first = torch.maximum(first, position - band.reach[0])
                end = torch.minimum(end, position + band.reach[1] + 1)
            if self.causal:
                end = torch.minimum(end, position + 1)
            found[band] = first, end.clamp(min=0)
        firsts, ends = zip(*(found[band] for band in self.bands), strict=True)
        return torch.stack(firsts).int(), torch.stack(ends).int()

    @property
    def by_row(self) -> bool:
        """Whether rows of one block may see different slots."""
        return self.visible_from is not None or self.visible_until is not None

    def slots(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Gathered positions, and the first and one-past-last query position that sees each.

        int32, shaped like ``tokens``; causality is applied. An empty slot points at key 0 and is
        seen by nobody: its range ends before it starts.
        """
        assert self.tokens is not None
        limits = torch.iinfo(torch.int32)
        tokens = as_int32(self.tokens.to(device))
        since = tokens if self.causal else torch.full_like(tokens, limits.min)
        if self.visible_from is not None:
            since = torch.maximum(since, as_int32(self.visible_from.to(device)))
        until = torch.full_like(tokens, limits.max)
        if self.visible_until is not None:
            until = as_int32(self.visible_until.to(device))
        return tokens.clamp(min=0), since, until.masked_fill(tokens < 0, limits.min)

    def gathered_mask(self, q_len: int, k_len: int, device: torch.device) -> Tensor:
        """Keys each row gathers, bool ``[B or 1, Hkv, Lq, Lk]``."""
        if self.tokens is None:
            return torch.zeros(1, len(self.bands), q_len, k_len, dtype=torch.bool, device=device)
        offset = k_len - q_len
        position = torch.arange(offset, k_len, device=device)
        row_block = position // self.block - offset // self.block
        slots = self.tokens[:, :, row_block].long()
        shown = slots >= 0
        if self.visible_from is not None:
            shown = shown & (self.visible_from[:, :, row_block] <= position[:, None])
        if self.visible_until is not None:
            shown = shown & (self.visible_until[:, :, row_block] > position[:, None])
        mask = torch.zeros(*slots.shape[:3], k_len + 1, dtype=torch.bool, device=device)
        return mask.scatter_(3, torch.where(shown, slots, k_len), True)[..., :k_len]

    def visible(self, q_len: int, k_len: int, groups: int, device: torch.device) -> Tensor:
        """Dense bool ``[B or 1, Hkv * groups, Lq, Lk]`` of exact keys; remainder not included.

        O(Lq * Lk) memory: for tests, pictures and short sequences.
        """
        mask = self.band_mask(q_len, k_len, device) | self.gathered_mask(q_len, k_len, device)
        if self.causal:
            key = torch.arange(k_len, device=device)
            mask = mask & (key <= torch.arange(k_len - q_len, k_len, device=device)[:, None])
        return mask.repeat_interleave(groups, dim=1)


def as_int32(x: Tensor) -> Tensor:
    """Positions as int32; "for ever", which lies beyond every position, stays beyond them."""
    if x.dtype == torch.int32:
        return x
    limits = torch.iinfo(torch.int32)
    return x.clamp(limits.min, limits.max).to(torch.int32)
