"""Key tokens by bounds: complete blocks of queries, and the few rows of cut ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.blocks import BlockRun, block_runs, entry_levels
from longswift.core.pattern import BlockPattern
from longswift.core.pools import block_edges
from longswift.kernels.native.factors import in_pairs, ranking_dtype
from longswift.kernels.native.pieces import batches, pieces
from longswift.kernels.native.rounding import RoundedKeys

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
) -> bool:
    """Chooses what ``Bounds`` or ``Centroids`` describes for every block of queries; returns True.

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
    edges = block_edges(pattern, q.shape[2], k.shape[2])
    total = k.shape[2] // key_block if pattern.causal else -(-k.shape[2] // key_block)
    choice = _Choice(
        q=in_pairs(q),
        k=in_pairs(k),
        band_lse=band_lse.contiguous(),
        edges=edges,
        tokens=tokens,
        pattern=pattern,
        scale=scale,
        key_block=key_block,
        row_group=row_group,
        radii=(key_radius, row_radius),
        proposed=proposed,
        sinks=sinks,
        blocks=total,
    )
    runs = list(block_runs(q.shape[2], k.shape[2], pattern.block, q.shape[2]))
    if since is not None:
        choice.in_turn(runs, since)
        return True
    # Blocks of fewer rows are chosen for row by row.
    fewest = 2 if centroid_rows is not None else max(2, pattern.block)
    for run in (run for run in runs if run.rows >= fewest):
        if centroid_rows is not None:
            choice.by_centroids(run, centroid_rows, far, candidates)
        else:
            choice.by_boxes(run, branch, opened, levels)
    cut = [run for run in runs if run.rows < fewest]
    if cut:
        choice.for_few(cut, *extremes())
    return True


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """One call of ``choose_by_bounds``; ``blocks`` are the key blocks that may be candidates."""

    q: Tensor
    k: Tensor
    band_lse: Tensor
    edges: Tensor
    tokens: Tensor
    pattern: BlockPattern
    scale: float
    key_block: int
    row_group: int
    radii: tuple[float, float]
    proposed: Callable[[BlockRun], int]
    sinks: int
    blocks: int

    @property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.band_lse

    @property
    def _narrow(self) -> bool:
        return ranking_dtype(self.q) != torch.float32

    def _sizes(self, run: BlockRun) -> tuple[int, ...]:
        """What the kernels are told of the blocks of a run."""
        return (
            self.pattern.block,
            self.key_block,
            self.row_group,
            self.proposed(run),
            self.tokens.shape[3],
            self.sinks,
            min(-(-self.sinks // self.key_block), self.blocks),
        )

    def _reach(self, edges: Tensor) -> int:
        """Key blocks before the last of some bands, ``[Hkv, N, 2]``: those that are candidates."""
        if not self.pattern.causal:
            return self.blocks
        return min(int(edges[..., 0].max()) // self.key_block, self.blocks)

    def in_turn(self, runs: list[BlockRun], since: Tensor) -> None:
        """The strictly causal choice, the longest contexts first."""
        boxes = _boxes(self.k, self._reach(self.edges), self.key_block, 2)
        block = self.pattern.block
        turns = [
            (b, h, run.first + i, run.row + i * block, run.rows, run.position + i * block)
            for run in reversed(runs)
            for i in reversed(range(run.count))
            for b in range(self.k.shape[0])
            for h in range(self.k.shape[1])
        ]
        for places in batches(turns):
            compiled.loaded().choose_strict(
                *(*self._inputs, boxes, self.edges, self.tokens, since, places),
                *(self._sizes(runs[0]), self.scale, self.radii),
            )

    def by_centroids(self, run: BlockRun, rows: int, far: int, candidates: int) -> None:
        """Means of rows, against single keys."""
        budget = self.tokens.shape[3], self.sinks, self.sinks
        sizes = (self.pattern.block, 1, self.row_group, candidates, *budget)
        phases = self._rounded.phases(self.q, run, self.edges, self.pattern, self.scale)
        for part, *keys in phases:
            work = [(*piece, run.rows) for piece in _with_rows(part, run)]
            for places in batches(work):
                compiled.loaded().choose_centroids(
                    *(*self._inputs, self.edges, self.tokens, places, sizes),
                    *(self.scale, self.pattern.causal, rows, far, self._narrow),
                    *(*keys, run.first),
                )

    @cached_property
    def _rounded(self) -> RoundedKeys:
        return RoundedKeys(self.k)

    def by_boxes(
        self, run: BlockRun, branch: int, opened: int, levels: Callable[[int], int]
    ) -> None:
        """Boxes of rows, against all boxes of keys or down a tree of them."""
        block, every = self.pattern.block, None if self.pattern.causal else self.blocks
        for part, level in entry_levels(run, block, self.key_block, every, levels):
            pieces = _pieces(self.k, run, range(part.start, part.stop))
            self._descend(run, part, level, branch, opened, pieces)

    def _descend(
        self,
        run: BlockRun,
        part: slice,
        level: int,
        branch: int,
        opened: int,
        work: list[tuple[int, ...]],
    ) -> None:
        """The blocks of a run that enter the tree at one level."""
        reach = self._reach(self.edges[:, run.first + part.start : run.first + part.stop])
        numbers, size = 3 if self.radii[1] else 2, branch**level
        nodes = -(-reach // size)
        boxes = _boxes(self.k, nodes, self.key_block * size, numbers)
        # In panels of those that are opened together.
        below = [
            _boxes(self.k, nodes * size // branch**i, self.key_block * branch**i, numbers, branch)
            for i in range(level)
        ]
        sizes = self._sizes(run)
        how = (self.scale, self.radii, self.pattern.causal)
        for places in batches(work):
            rest = (self.edges, self.tokens, places, sizes, *how)
            if below:
                compiled.loaded().choose_tree(*self._inputs, boxes, below, *rest, opened)
            else:
                compiled.loaded().choose(*self._inputs, boxes, *rest)

    def for_few(self, runs: list[BlockRun], low: Tensor, high: Tensor) -> None:
        """Every row for itself, against the boxes ``[B, Hkv, W, D]`` of all key blocks."""
        for run in runs:
            few = [
                (b, head, run.first + index, run.row + index * run.rows, run.rows)
                for index in range(run.count)
                for b in range(self.k.shape[0])
                for head in range(self.k.shape[1])
            ]
            for places in batches(few):
                compiled.loaded().choose_few(
                    *(*self._inputs, low, high, self.edges, self.tokens, places),
                    *(self._sizes(run), self.scale, self.radii),
                    *(self.pattern.causal, self._narrow),
                )


def _pieces(k: Tensor, run: BlockRun, part: range) -> list[tuple[int, ...]]:
    """Pieces of work of some of a run's blocks, each with its first row."""
    return _with_rows(pieces(k, len(part), run.first + part.start), run)


def _with_rows(work: list[tuple[int, int, int, int]], run: BlockRun) -> list[tuple[int, ...]]:
    return [(*piece, run.row + (piece[2] - run.first) * run.rows) for piece in work]


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
