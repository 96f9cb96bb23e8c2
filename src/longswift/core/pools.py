"""Pooled sums of everything a block of queries does not see exactly: the coarse remainder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.blocks import BlockRun
from longswift.core.pattern import Band, BlockPattern
from longswift.core.summary import KeySummary, group_sums

# Numbers of whole pools a run sees are multiples of this.
_WIDTHS = 32
# Blocks whose cut pools are summed at once.
_CUT_BLOCKS = 64


class Pools(NamedTuple):
    """Sums over pools, and over the grains they are made of.

    Attributes:
        k_sum: ``[B, Hkv, P, D]`` fp32 sums of the keys of each pool.
        v_sum: ``[B, Hkv, P, Dv]``.
        k_grain: ``[B, Hkv, E, D]`` sums of the keys of each grain.
        v_grain: ``[B, Hkv, E, Dv]``.
        size: Tokens per pool.
        grain: Tokens per grain; divides ``size``.
        k_len: Tokens in all.
    """

    k_sum: Tensor
    v_sum: Tensor
    k_grain: Tensor
    v_grain: Tensor
    size: int
    grain: int
    k_len: int


class PoolColumns(NamedTuple):
    """The remainder's columns of some blocks: ``P`` whole pools, then the two cut ones.

    Attributes:
        count: ``[1, Hkv, N, 1, P + 2]`` tokens of each column outside the band.
        cut_k: ``[B, Hkv, N, 2, D]`` key sums of the pools cut by the band's left and right edge.
        cut_v: ``[B, Hkv, N, 2, Dv]``.
        cut_grains: ``[Hkv, N, 2, E']`` grains of the two cut pools.
        cut_members: Like ``cut_grains``, 1.0 for grains outside the band, else 0.0.
        pools: ``P``, the whole pools that any of the blocks can see.
        left_pool: ``[Hkv, N]`` on CPU, the whole pools each block sees in causal attention, or
            None.
    """

    count: Tensor  # type: ignore[assignment]
    cut_k: Tensor
    cut_v: Tensor
    cut_grains: Tensor
    cut_members: Tensor
    pools: int
    left_pool: Tensor | None

    def of(self, run: BlockRun) -> PoolColumns:
        """The columns of a run of these blocks, as few as it needs."""
        blocks = slice(run.first, run.first + run.count)
        count, left_pool, shown = self.count[:, :, blocks], self.left_pool, self.pools
        if left_pool is not None:
            left_pool = left_pool[:, blocks]
            # Columns of no token cost little; a library that compiles every shape costs more.
            shown = min(-(-int(left_pool.max()) // _WIDTHS) * _WIDTHS, self.pools)
            count = torch.cat([count[..., :shown], count[..., -2:]], -1)
        return PoolColumns(
            count=count,
            cut_k=self.cut_k[:, :, blocks],
            cut_v=self.cut_v[:, :, blocks],
            cut_grains=self.cut_grains[:, blocks],
            cut_members=self.cut_members[:, blocks],
            pools=shown,
            left_pool=left_pool,
        )


def _grain_sums(
    x: Tensor, grain: int, known: Tensor | None, tail: bool, add: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """fp32 sums of every ``grain`` tokens of ``[B, H, L, D]``; ``tail``: of an incomplete last."""
    whole = x.shape[2] // grain
    sums = known if known is not None and known.shape[2] == whole else add(x, grain)
    if not tail or x.shape[2] % grain == 0:
        return sums
    last = x[:, :, whole * grain :].sum(2, keepdim=True, dtype=sums.dtype)
    return torch.cat([sums, last], 2)


def build_pools(
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    summary: KeySummary | None = None,
    add: Callable[[Tensor, int], Tensor] = group_sums,
) -> Pools:
    """Pools of an unpadded batch, ``O(L * D)``, or ``O(L / page * D)`` from page summaries.

    In causal attention the last tokens are always inside the band: incomplete grains and pools
    are left out. ``add`` is what sums every so many tokens.
    """
    size, grain = pattern.pool, pattern.pool_grain
    assert size is not None
    known_k = known_v = None
    if summary is not None and grain % summary.page == 0:
        coarse = summary.coarsen(grain // summary.page)
        known_k, known_v = coarse.k_sum, coarse.v_sum
    tail = not pattern.causal or k.shape[2] < grain

    def pooled(grains: Tensor) -> Tensor:
        per_pool = size // grain
        whole = grains.shape[2] // per_pool
        sums = grains[:, :, : whole * per_pool].unflatten(2, (whole, per_pool)).sum(3)
        if tail and grains.shape[2] % per_pool:
            last = grains[:, :, whole * per_pool :].sum(2, keepdim=True)
            sums = torch.cat([sums, last], 2)
        return sums

    k_grain = _grain_sums(k, grain, known_k, tail, add)
    v_grain = _grain_sums(v, grain, known_v, tail, add)
    ready = summary is not None and not tail and known_k is k_grain
    if ready and summary is not None and size % summary.page == 0:
        k_sum, v_sum = summary.pool_sums(size // summary.page)
    else:
        k_sum, v_sum = pooled(k_grain), pooled(v_grain)
    return Pools(k_sum, v_sum, k_grain, v_grain, size, grain, k.shape[2])


def block_edges(pattern: BlockPattern, q_len: int, k_len: int) -> Tensor:
    """First and one-past-last key of the band of every block, ``[Hkv, N, 2]`` on CPU.

    Constant over a block, because tiles are multiples of the block. Not to be written to.
    """
    return _edges(pattern.bands, pattern.block, q_len, k_len)


@functools.lru_cache(maxsize=4)
def edges_on(
    bands: tuple[Band, ...], block: int, q_len: int, k_len: int, device: torch.device
) -> Tensor:
    """``block_edges`` as int32 on a device; copied there once, as a copy waits for a GPU."""
    with torch.inference_mode(False):
        return _edges(bands, block, q_len, k_len).to(device, torch.int32).contiguous()


@functools.lru_cache(maxsize=4)
def _edges(bands: tuple[Band, ...], block: int, q_len: int, k_len: int) -> Tensor:
    offset = k_len - q_len
    with torch.inference_mode(False):
        if q_len == 1:
            return torch.tensor([[band.at(offset, k_len)] for band in bands], device="cpu")
        first, last = offset // block, (k_len - 1) // block
        position = (torch.arange(first, last + 1, device="cpu") * block).clamp_(min=offset)
        found = {band: torch.stack(band.bounds(position, k_len), -1) for band in set(bands)}
        return torch.stack([found[band] for band in bands])


def pool_columns(pools: Pools, causal: bool, edges: Tensor) -> PoolColumns:
    """Which columns blocks see, how many tokens each stands for, and the cut ones.

    Args:
        pools: The pools.
        causal: Whether nothing after the band is seen.
        edges: ``block_edges``.
    """
    start, end = edges.unbind(-1)
    device, size = pools.k_sum.device, pools.size
    left_pool, right_pool = start // size, end // size
    total = pools.k_sum.shape[2]
    shown = int(left_pool.max()) if causal else total
    pool = torch.arange(shown, device="cpu")
    whole = pool < left_pool[..., None]
    right_cut = torch.zeros_like(end)
    if not causal:
        whole = whole | (pool * size >= end[..., None])
        cut = (end % size > 0) & (end < pools.k_len)
        right_cut = torch.where(cut, ((right_pool + 1) * size).clamp(max=pools.k_len) - end, 0)
    tokens = (pools.k_len - pool * size).clamp(max=size)
    count = torch.cat(
        [torch.where(whole, tokens, 0), (start % size)[..., None], right_cut[..., None]], -1
    )
    per_pool, grains = size // pools.grain, pools.k_grain.shape[2]
    grain = torch.stack([left_pool, right_pool], -1)[..., None] * per_pool + torch.arange(
        per_pool, device="cpu"
    )
    edge = edges[..., None] // pools.grain
    before = grain[..., :1, :] < edge[..., :1, :]
    after = (grain[..., 1:, :] >= edge[..., 1:, :]) & (right_cut > 0)[..., None, None]
    members = torch.cat([before, after & (grain[..., 1:, :] < grains)], -2)
    members = members.to(device=device, dtype=pools.k_sum.dtype)
    grain = grain.clamp(max=grains - 1).to(device)
    heads = torch.arange(start.shape[0], device=device)[:, None, None, None]

    def cut_sums(sums: Tensor) -> Tensor:
        parts = [
            torch.einsum("bhnced,hnce->bhncd", sums[:, heads, index], member)
            for index, member in zip(
                grain.split(_CUT_BLOCKS, 1), members.split(_CUT_BLOCKS, 1), strict=True
            )
        ]
        return torch.cat(parts, 2)

    return PoolColumns(
        count=count[None, :, :, None].to(device=device, dtype=pools.k_sum.dtype),
        cut_k=cut_sums(pools.k_grain),
        cut_v=cut_sums(pools.v_grain),
        cut_grains=grain,
        cut_members=members,
        pools=shown,
        left_pool=left_pool if causal else None,
    )


def column_ranges(edges: Tensor, columns: PoolColumns, pools: Pools) -> tuple[Tensor, Tensor]:
    """First and one-past-last token of every column, ``[Hkv, N, P + 2]`` on CPU.

    Those of a column that stands for nothing are any.

    Args:
        edges: ``block_edges`` of the run.
        columns: Columns of the run.
        pools: The pools.
    """
    start, end = edges.unbind(-1)
    whole = torch.arange(columns.pools, device="cpu").expand(*start.shape, -1) * pools.size
    right_end = (end // pools.size + 1) * pools.size
    first = torch.cat([whole, (start // pools.size * pools.size)[..., None], end[..., None]], -1)
    last = torch.cat([whole + pools.size, start[..., None], right_end[..., None]], -1)
    return first, last.clamp(max=pools.k_len)


def token_columns(tokens: Tensor, columns: PoolColumns, pools: Pools, edges: Tensor) -> Tensor:
    """Column of the pool each gathered token belongs to, ``[B, Hkv, N, C]``.

    Args:
        tokens: Positions, valid ones.
        columns: Columns of the run.
        pools: The pools.
        edges: ``[Hkv, N, 2]`` first and one-past-last key of the band.
    """
    pool = tokens // pools.size
    start, end = edges[None, ..., :1], edges[None, ..., 1:]
    left = (tokens < start) & (pool == start // pools.size)
    right = (tokens >= end) & (pool == end // pools.size) & (end % pools.size > 0)
    column = torch.where(left, columns.pools, pool.clamp(max=max(columns.pools - 1, 0)))
    return torch.where(right, columns.pools + 1, column)
