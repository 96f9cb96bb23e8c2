"""What blocks of queries see outside their bands, as the compiled kernels take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.pattern import BlockPattern, as_int32
from longswift.core.pools import Pools, block_edges, build_pools
from longswift.core.summary import KeySummary


class Outside(NamedTuple):
    """Gathered tokens and sums of pools.

    Attributes:
        tokens: int32 ``[1 or B, Hkv, N, C]``, -1 for none.
        since: Like ``tokens``: the first query position that sees each, or no numbers at all.
        until: Likewise, the first that no longer does.
        pools: Sums of the pattern's pools, or of none.
        edges: ``block_edges`` of the pattern.
        sizes: Queries of a block, tokens of a pool or 0, tokens of a grain.
    """

    tokens: Tensor
    since: Tensor
    until: Tensor
    pools: Pools
    edges: Tensor
    sizes: list[int]

    @classmethod
    def of(
        cls,
        k: Tensor,
        v: Tensor,
        pattern: BlockPattern,
        q_len: int,
        summary: KeySummary | None = None,
    ) -> Outside:
        """That of a pattern. O(L D), or O(L D / page) from page summaries."""
        edges = block_edges(pattern, q_len, k.shape[2])
        tokens = pattern.tokens
        if tokens is None:
            tokens = torch.empty(1, *edges.shape[:2], 0, dtype=torch.int32, device="cpu")
        if pattern.pool is not None:
            pools = build_pools(k, v, pattern, summary, _group_sums)
        else:
            nothing = torch.empty(1, k.shape[1], 0, 1, dtype=torch.float32, device="cpu")
            pools = Pools(nothing, nothing, nothing, nothing, 0, 1, k.shape[2])
        return cls(
            tokens=_whole_numbers(tokens),
            since=_whole_numbers(pattern.visible_from),
            until=_whole_numbers(pattern.visible_until),
            pools=pools,
            edges=edges,
            sizes=[pattern.block, pattern.pool or 0, pattern.pool_grain],
        )

    @property
    def sums(self) -> list[Tensor]:
        """Of keys and values, by grains, then by pools."""
        pools = self.pools
        # A cache's sums are part of a larger buffer: copies of all would be most of a token's work.
        return with_whole_rows(pools.k_grain, pools.v_grain, pools.k_sum, pools.v_sum)


def with_whole_rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose last dimension is contiguous: themselves if it is."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _whole_numbers(x: Tensor | None) -> Tensor:
    if x is None:
        return torch.empty(0, dtype=torch.int32, device="cpu")
    return as_int32(x).contiguous()


def _group_sums(x: Tensor, size: int) -> Tensor:
    """fp32 sums of every ``size`` tokens of ``[B, H, L, D]``, an incomplete last group left out."""
    operators = compiled.loaded()
    batch, heads, length, dim = x.shape
    out = torch.empty(batch, heads, length // size, dim, dtype=torch.float32, device="cpu")
    operators.sum_groups(x, out, size)
    return out
