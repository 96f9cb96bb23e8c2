"""Pooled sums of everything a block of queries does not see exactly: the coarse remainder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.blocks import BlockRun
from longswift.core.pattern import BlockPattern
from longswift.core.softmax import accumulator_dtype
from longswift.core.summary import KeySummary


class Pools(NamedTuple):
    """Sums over pools and, inside each pool, over what precedes each grain.

    Attributes:
        k_sum: ``[B, Hkv, P, D]`` fp32 sums of the keys of each pool.
        v_sum: ``[B, Hkv, P, Dv]``.
        k_before: ``[B, Hkv, E + 1, D]``, entry ``e`` sums the keys of grain ``e``'s pool before it.
        v_before: ``[B, Hkv, E + 1, Dv]``.
        size: Tokens per pool.
        grain: Tokens per grain.
        k_len: Tokens in all.
    """

    k_sum: Tensor
    v_sum: Tensor
    k_before: Tensor
    v_before: Tensor
    size: int
    grain: int
    k_len: int


class PoolColumns(NamedTuple):
    """The remainder's columns for a run of blocks: ``P`` whole pools, then the two cut ones.

    Attributes:
        count: ``[1, Hkv, N, 1, P + 2]`` tokens of each column outside the band.
        cut_k: ``[B, Hkv, N, 2, D]`` key sums of the pools cut by the band's left and right edge.
        cut_v: ``[B, Hkv, N, 2, Dv]``.
        grain: ``[Hkv, N, 2]`` grain index of the two edges.
        right_pool: ``[Hkv, N]`` pool cut by the right edge.
        pools: ``P``, the whole pools that any block of the run can see.
    """

    count: Tensor  # type: ignore[assignment]
    cut_k: Tensor
    cut_v: Tensor
    grain: Tensor
    right_pool: Tensor
    pools: int


def _grain_sums(x: Tensor, grain: int, known: Tensor | None) -> Tensor:
    """fp32 sums of every ``grain`` tokens of ``[B, H, L, D]``, the incomplete last one included."""
    acc = accumulator_dtype(x.dtype)
    whole = x.shape[2] // grain
    if known is not None and known.shape[2] == whole:
        sums = [known]
    else:
        sums = [x[:, :, : whole * grain].unflatten(2, (whole, grain)).sum(3, dtype=acc)]
    if x.shape[2] % grain:
        sums.append(x[:, :, whole * grain :].sum(2, keepdim=True, dtype=acc))
    return torch.cat(sums, 2) if len(sums) > 1 else sums[0]


def build_pools(
    k: Tensor, v: Tensor, pattern: BlockPattern, summary: KeySummary | None = None
) -> Pools:
    """Pools of an unpadded batch, ``O(L * D)``, or ``O(L / page * D)`` from page summaries."""
    size, grain = pattern.pool, pattern.pool_grain
    assert size is not None
    known_k = known_v = None
    if summary is not None and grain % summary.page == 0:
        coarse = summary.coarsen(grain // summary.page)
        known_k, known_v = coarse.k_sum, coarse.v_sum

    def sums(x: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        grains = _grain_sums(x, grain, known)
        per_pool = size // grain
        missing = -grains.shape[2] % per_pool
        padded = torch.cat([grains, grains.new_zeros(*grains.shape[:2], missing, x.shape[3])], 2)
        padded = padded.unflatten(2, (-1, per_pool))
        before = padded.cumsum(3) - padded
        before = before.flatten(2, 3)[:, :, : grains.shape[2]]
        tail = before.new_zeros(*before.shape[:2], 1, before.shape[3])
        return padded.sum(3), torch.cat([before, tail], 2)

    k_sum, k_before = sums(k, known_k)
    v_sum, v_before = sums(v, known_v)
    return Pools(k_sum, v_sum, k_before, v_before, size, grain, k.shape[2])


def band_edges(pattern: BlockPattern, run: BlockRun, k_len: int) -> tuple[Tensor, Tensor]:
    """First and one-past-last key of the band, ``[Hkv, N]`` on CPU, for each block of a run.

    Constant over a block, because tiles are multiples of the block.
    """
    position = run.position + torch.arange(run.count) * run.rows
    edges = [band.bounds(position, k_len) for band in pattern.bands]
    return torch.stack([e[0] for e in edges]), torch.stack([e[1] for e in edges])


def pool_columns(pools: Pools, pattern: BlockPattern, run: BlockRun) -> PoolColumns:
    """Which columns the blocks of a run see, how many tokens each stands for, and the cut ones."""
    start, end = band_edges(pattern, run, pools.k_len)
    device = pools.k_sum.device
    size = pools.size
    left_pool = start // size
    total = pools.k_sum.shape[2]
    shown = int(left_pool.max()) if pattern.causal else total
    pool = torch.arange(shown)
    whole = pool < left_pool[..., None]
    right_pool = end // size
    right_cut = torch.zeros_like(end)
    if not pattern.causal:
        whole = whole | (pool * size >= end[..., None])
        cut = (end % size > 0) & (end < pools.k_len)
        right_cut = torch.where(cut, ((right_pool + 1) * size).clamp(max=pools.k_len) - end, 0)
    tokens = (pools.k_len - pool * size).clamp(max=size)
    count = torch.cat(
        [torch.where(whole, tokens, 0), (start % size)[..., None], right_cut[..., None]], -1
    )
    grain = torch.stack([start, end], -1).div(pools.grain, rounding_mode="floor")
    grain[..., 1] = torch.where(right_cut > 0, grain[..., 1], pools.k_before.shape[2] - 1)
    right_pool = right_pool.clamp(max=total - 1)
    heads = torch.arange(start.shape[0], device=device)[:, None]

    def cut_sums(total_sum: Tensor, before: Tensor) -> Tensor:
        left = before[:, heads, grain[..., 0].to(device)]
        right = (
            total_sum[:, heads, right_pool.to(device)] - before[:, heads, grain[..., 1].to(device)]
        )
        shown_right = (right_cut > 0).to(device)[None, ..., None]
        shown_left = (start % size > 0).to(device)[None, ..., None]
        return torch.stack([left * shown_left, right * shown_right], 3)

    return PoolColumns(
        count=count[None, :, :, None].to(device=device, dtype=pools.k_sum.dtype),
        cut_k=cut_sums(pools.k_sum, pools.k_before),
        cut_v=cut_sums(pools.v_sum, pools.v_before),
        grain=grain.to(device),
        right_pool=right_pool.to(device),
        pools=shown,
    )


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
