"""Page summaries of keys and values: what block bounds and pooled means are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longswift.core.inputs import take
from longswift.core.softmax import accumulator_dtype

# Caches keep pages of this many tokens, and decoding scores them.
PAGE = 16

# Tokens widened at once: summing 16-bit numbers into fp32 directly copies all of them first.
_WIDENED = 4096


def group_sums(x: Tensor, size: int) -> Tensor:
    """Sums of every ``size`` tokens of ``[B, H, L, D]`` in the accumulator dtype.

    An incomplete last group is left out.
    """
    batch, heads, length, dim = x.shape
    acc, groups = accumulator_dtype(x.dtype), length // size
    whole = x[:, :, : groups * size]
    tracked = torch.is_grad_enabled() and x.requires_grad
    if x.dtype == acc or x.device.type != "cpu" or tracked:
        return whole.unflatten(2, (groups, size)).sum(3, dtype=acc)
    out = torch.empty(batch, heads, groups, dim, dtype=acc, device=x.device)
    step = max(1, _WIDENED // size)
    for sums, part in zip(out.split(step, 2), whole.split(step * size, 2), strict=True):
        torch.sum(part.to(acc).unflatten(2, (-1, size)), 3, out=sums)
    return out


class PoolSums:
    """Sums over pools of pages, kept while a cache grows: a token completes a pool rarely."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._of_rows: dict[tuple[int, ...], PoolSums] = {}

    def of_rows(self, rows: Sequence[int]) -> PoolSums:
        """The sums of some batch rows, which complete their pools at times of their own."""
        return self._of_rows.setdefault(tuple(rows), PoolSums())

    def of(self, summary: KeySummary, factor: int) -> tuple[Tensor, Tensor]:
        """Key and value sums ``[B, Hkv, P // factor, *]`` of every ``factor`` complete pages."""
        wanted = summary.k_sum.shape[2] // factor
        known = self._known.get(factor)
        done = 0 if known is None else known[0].shape[2]
        if known is None or done < wanted:
            pages = slice(done * factor, wanted * factor)
            sums = (x[:, :, pages] for x in (summary.k_sum, summary.v_sum))
            k, v = (x.unflatten(2, (wanted - done, factor)).sum(3) for x in sums)
            if known is not None:
                k, v = torch.cat([known[0], k], 2), torch.cat([known[1], v], 2)
            self._known[factor] = known = k, v
        return known[0][:, :, :wanted], known[1][:, :, :wanted]

    def crop(self, pages: int) -> None:
        """Forget what reaches beyond the first ``pages`` pages of any row."""
        for factor, (k, v) in self._known.items():
            kept = pages // factor
            self._known[factor] = k[:, :, :kept], v[:, :, :kept]
        for sums in self._of_rows.values():
            sums.crop(pages)

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        self._of_rows.clear()


@dataclass(frozen=True, kw_only=True)
class KeySummary:
    """Per-page extremes of the keys and sums of keys and values.

    Pages of ``page`` tokens lie on a grid counted from the first real token, so that a padded row
    has the pages of the same row alone. Only complete pages are summarised.

    Attributes:
        page: Tokens per page.
        start: First real position of each batch row (0 without left padding).
        k_min: ``[B, Hkv, P, D]`` channel-wise minimum of the keys, in the dtype of the keys.
        k_max: ``[B, Hkv, P, D]`` channel-wise maximum.
        k_sum: ``[B, Hkv, P, D]`` fp32 (fp64 for fp64 keys).
        v_sum: ``[B, Hkv, P, Dv]`` likewise.
        pools: Sums over pools that a cache remembers for these pages, or None. Rows that start at
            different positions have none in common, see ``rows``.
        part_of: The summary of all KV heads of which these are some, and which; None if it
            remembers no sums.
    """

    page: int
    start: tuple[int, ...]
    k_min: Tensor
    k_max: Tensor
    k_sum: Tensor
    v_sum: Tensor
    pools: PoolSums | None = None
    part_of: tuple[KeySummary, slice | list[int]] | None = None

    @classmethod
    def build(cls, k: Tensor, v: Tensor, page: int) -> KeySummary:
        """Summaries of the complete pages of unpadded ``k [B, Hkv, L, D]`` and ``v``. O(L * D)."""
        pages = k.shape[2] // page
        kp = k[:, :, : pages * page].unflatten(2, (pages, page))
        if pages:
            k_min, k_max = kp.amin(3), kp.amax(3)
        else:
            k_min = k_max = k.new_zeros(*k.shape[:2], 0, k.shape[3])
        return cls(
            page=page,
            start=(0,) * k.shape[0],
            k_min=k_min,
            k_max=k_max,
            k_sum=group_sums(k, page),
            v_sum=group_sums(v, page),
        )

    def rows(self, rows: list[int], keys: slice) -> KeySummary | None:
        """Summary of some batch rows restricted to ``keys``; None if the pages do not line up."""
        starts = {self.start[row] for row in rows}
        if starts != {keys.start}:
            return None
        pages = slice(0, (keys.stop - keys.start) // self.page)
        return KeySummary(
            page=self.page,
            start=(0,) * len(rows),
            k_min=take(self.k_min, rows, pages),
            k_max=take(self.k_max, rows, pages),
            k_sum=take(self.k_sum, rows, pages),
            v_sum=take(self.v_sum, rows, pages),
            pools=None if self.pools is None else self.pools.of_rows(rows),
        )

    def until(self, length: int) -> KeySummary:
        """Summary of the first ``length`` keys."""
        pages = max(0, length - min(self.start, default=0)) // self.page
        if pages >= self.k_min.shape[2]:
            return self
        return replace(
            self,
            part_of=self.part_of and (self.part_of[0].until(length), self.part_of[1]),
            k_min=self.k_min[:, :, :pages],
            k_max=self.k_max[:, :, :pages],
            k_sum=self.k_sum[:, :, :pages],
            v_sum=self.v_sum[:, :, :pages],
        )

    def heads(self, heads: slice | list[int]) -> KeySummary:
        """Summary of some KV heads."""
        return replace(
            self,
            pools=None,
            part_of=None if self.pools is None and self.part_of is None else (self, heads),
            k_min=self.k_min[:, heads],
            k_max=self.k_max[:, heads],
            k_sum=self.k_sum[:, heads],
            v_sum=self.v_sum[:, heads],
        )

    def pool_sums(self, factor: int) -> tuple[Tensor, Tensor]:
        """Key and value sums ``[B, Hkv, P // factor, *]`` of every ``factor`` complete pages."""
        if self.part_of is not None:
            every, heads = self.part_of
            k_sum, v_sum = every.pool_sums(factor)
            return k_sum[:, heads], v_sum[:, heads]
        # Rows that start elsewhere complete their pools at other times.
        kept = self.pools if len(set(self.start)) <= 1 else None
        return (kept or PoolSums()).of(self, factor)

    def coarsen(self, factor: int) -> KeySummary:
        """Summaries of pages ``factor`` times as long; a last incomplete one is dropped."""
        if factor == 1:
            return self
        pages = self.k_min.shape[2] // factor

        def grouped(x: Tensor) -> Tensor:
            return x[:, :, : pages * factor].unflatten(2, (pages, factor))

        return KeySummary(
            page=self.page * factor,
            start=self.start,
            k_min=grouped(self.k_min).amin(3),
            k_max=grouped(self.k_max).amax(3),
            k_sum=grouped(self.k_sum).sum(3),
            v_sum=grouped(self.v_sum).sum(3),
        )
