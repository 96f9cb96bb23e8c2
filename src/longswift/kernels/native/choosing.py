"""Key tokens by bounds: complete blocks of queries, and the few rows of cut ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.blocks import BlockRun, block_runs
from longswift.core.pattern import BlockPattern
from longswift.core.pools import block_edges
from longswift.kernels.native.factors import in_pairs, ranking_dtype
from longswift.kernels.native.pieces import batches, pieces

# Boxes of a panel: the columns of one product.
_WIDTH = 64


def choose_by_bounds(
    q: Tensor,
    k: Tensor,
    band_lse: Tensor,
    pattern: BlockPattern,
    tokens: Tensor,
    *,
    scale: float,
    key_block: int,
    row_group: int,
    key_radius: float,
    row_radius: float,
    proposed: Callable[[BlockRun], int],
    sinks: int,
    extremes: Callable[[], tuple[Tensor, Tensor]],
    since: Tensor | None = None,
    branch: int = 1,
    opened: int = 0,
    levels: Callable[[int], int] = lambda leaves: 0,
    centroid_rows: int | None = None,
    far: int = 1,
    candidates: int = 0,
) -> None:
    """Chooses what ``Bounds`` or ``Centroids`` describes for every block of queries.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        band_lse: fp32 ``[B, Hq, Lq]``.
        pattern: Bands and blocks.
        tokens: int32 ``[B, Hkv, N, budget]`` filled with -1, written to.
        scale: Factor on the scores.
        key_block: Keys per box.
        row_group: Query rows per box.
        key_radius: Share of a key box's radius that counts.
        row_radius: Share of a row box's radius that counts.
        proposed: Key blocks proposed to each block of a run.
        sinks: Leading tokens never chosen.
        extremes: Minimum and maximum of every candidate key block, ``[B, Hkv, W, D]``; asked for
            if a block of queries is cut, unless the choice is strictly causal.
        since: For a strictly causal choice: int32 like ``tokens``, written to, the first query
            position that sees each.
        branch: Boxes in one of the next level of a tree, at most 64. Complete blocks of queries
            descend it unless the choice is strictly causal.
        opened: Boxes opened a level.
        levels: Levels above so many key blocks at which their tree is entered; at level 0 every
            key block is looked at.
        centroid_rows: Most rows of a complete block that are scored as one, against single keys,
            and so many fewer of a cut one; None bounds boxes of rows and keys.
        far: Position from which on a centroid stands for twice as many rows; and again whenever
            it doubles.
        candidates: Keys proposed by centroids.
    """
    operators = compiled.loaded()
    q, k = in_pairs(q), in_pairs(k)
    block, q_len, k_len = pattern.block, q.shape[2], k.shape[2]
    edges = block_edges(pattern, q_len, k_len)
    band_lse = band_lse.contiguous()
    blocks = k_len // key_block if pattern.causal else -(-k_len // key_block)
    rest = (tokens.shape[3], sinks, min(-(-sinks // key_block), blocks))
    how = (scale, (key_radius, row_radius), pattern.causal)
    runs = list(block_runs(q_len, k_len, block, q_len))

    if since is not None:
        boxes = _boxes(k, min(int(edges[..., 0].max()) // key_block, blocks), key_block, 2)
        sizes = (block, key_block, row_group, proposed(runs[0]), *rest)
        turns = [
            (b, h, run.first + i, run.row + i * block, run.rows, run.position + i * block)
            for run in reversed(runs)
            for i in reversed(range(run.count))
            for b in range(k.shape[0])
            for h in range(k.shape[1])
        ]
        for places in batches(turns):
            operators.choose_strict(
                q, k, band_lse, boxes, edges, tokens, since, places, sizes, scale, how[1]
            )
        return

    narrow = ranking_dtype(q) != torch.float32
    for run in runs:
        if centroid_rows is not None and run.rows > 1:
            sizes = (block, 1, row_group, candidates, tokens.shape[3], sinks, sinks)
            work = [(*piece, run.rows) for piece in _pieces(k, run, range(run.count))]
            for places in batches(work):
                operators.choose_centroids(
                    *(q, k, band_lse, edges, tokens, places, sizes),
                    *(scale, pattern.causal, centroid_rows, far, narrow),
                )
            continue
        if run.rows < block or block == 1:
            continue
        sizes = (block, key_block, row_group, proposed(run), *rest)
        for part, level in _parts(run, pattern, key_block, blocks, levels):
            seen = edges[:, run.first + part.start : run.first + part.stop, 0]
            reach = min(int(seen.max()) // key_block, blocks) if pattern.causal else blocks
            numbers, size = 3 if row_radius else 2, branch**level
            nodes = -(-reach // size)
            boxes = _boxes(k, nodes, key_block * size, numbers)
            # In panels of those that are opened together.
            below = [
                _boxes(k, nodes * size // branch**i, key_block * branch**i, numbers, branch)
                for i in range(level)
            ]
            for places in batches(_pieces(k, run, part)):
                if below:
                    operators.choose_tree(
                        *(q, k, band_lse, boxes, below, edges, tokens, places, sizes),
                        *(*how, opened),
                    )
                else:
                    operators.choose(q, k, band_lse, boxes, edges, tokens, places, sizes, *how)

    alone = 1 if centroid_rows is not None else max(1, block - 1)
    cut = [run for run in runs if run.rows <= alone]
    if not cut:
        return
    low, high = extremes()
    for run in cut:
        sizes = (block, key_block, row_group, proposed(run), *rest)
        few = [
            (b, head, run.first + index, run.row + index * run.rows, run.rows)
            for index in range(run.count)
            for b in range(k.shape[0])
            for head in range(k.shape[1])
        ]
        for places in batches(few):
            operators.choose_few(
                q, k, band_lse, low, high, edges, tokens, places, sizes, *how, narrow
            )


def _pieces(k: Tensor, run: BlockRun, part: range) -> list[tuple[int, ...]]:
    """Pieces of work of some of a run's blocks, each with its first row."""
    return [
        (*piece, run.row + (piece[2] - run.first) * run.rows)
        for piece in pieces(k, len(part), run.first + part.start)
    ]


def _parts(
    run: BlockRun,
    pattern: BlockPattern,
    key_block: int,
    blocks: int,
    levels: Callable[[int], int],
) -> list[tuple[range, int]]:
    """Blocks of a run that enter the tree at the same level, and the level.

    It depends on the position alone, so that the tree is entered alike in every chunk.
    """
    first, per_block = run.position // pattern.block, pattern.block // key_block
    level_of = [
        levels((first + index) * per_block if pattern.causal else blocks)
        for index in range(run.count)
    ]
    parts = []
    for level, same in groupby(range(run.count), key=level_of.__getitem__):
        inside = list(same)
        parts.append((range(inside[0], inside[-1] + 1), level))
    return parts


def _boxes(k: Tensor, count: int, key_block: int, numbers: int, width: int = _WIDTH) -> Tensor:
    """Boxes around the first ``count`` blocks of keys, packed ``[B * Hkv, panels, *, width]``.

    Three numbers a channel (centre, radius, absolute centre) or two (maximum, minimum).
    """
    operators = compiled.loaded()
    batch, kv_heads, _, dim = k.shape
    panels = -(-count // width)
    shape = (batch * kv_heads, panels, numbers * dim, width)
    boxes = torch.empty(shape, dtype=ranking_dtype(k), device=k.device)
    operators.use_large_pages(boxes)
    work = [(b, h, p) for p in range(panels) for b in range(batch) for h in range(kv_heads)]
    for places in batches(work):
        operators.describe(k, boxes, places, key_block)
    return boxes
