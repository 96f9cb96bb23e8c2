"""Bounds propose, exact probabilities choose.

1. Keys in blocks of ``key_block`` have per-channel centre ``kc`` and radius ``kr``, query rows in
   groups of ``row_group`` likewise ``qc`` and ``qr``. Every score between a group and a block is at
   most ``qc.kc + (|qc| + qr).kr + qr.|kc|``: one matrix product of ``3D`` channels. Boxes are much
   larger than what is in them, so that radii are shrunk (``key_radius``, ``row_radius``); where
   groups shrink to their centres, ``2D`` channels are enough. Softmax over blocks, max over the
   query block's groups and the GQA group; the best ``proposals * budget / key_block`` blocks are
   proposed. A position bias enters with its maximum over the pairs of group and block.
2. The exact stage of ``two_stage``.

Rows of a block that is not complete, as when decoding or asking a short question, are few: they are
bounded one by one, and more blocks are proposed to them. Decoding uses pages of 16 keys, as in
Quest (Tang et al., 2024, arXiv 2406.10774), from a cache's incremental summaries when it has them.
The more pages there are, the more seem better than the right one, so that a share of them is
proposed: ``least_share * D n`` multiply-adds for a token's exact stage.

Cost per query and head: ``3 D n / (row_group * key_block)`` multiply-adds for the bounds (1/43 of
full attention's scores at 32 x 4) and ``proposals * budget * D`` for the exact stage. In strict
mode bounds are per row: ``2 D n / key_block``.

With ``tree`` key blocks are boxed in turn, ``tree`` at a time, and only the best boxes are opened
(``box_tree``): ``3 D / row_group`` multiply-adds for at most ``(levels + 4) * tree * kept`` boxes
with ``kept = beam * proposals * budget / key_block``, where ``levels`` grows with the logarithm of
``n / key_block / (tree * kept)``; four times ``tree * kept`` key blocks and fewer are all bounded.
Blocks of queries that are not complete, one at each end of a call at most, bound every key block,
and so does strict mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from longswift.core.bias import PositionBias, ScoreBias
from longswift.core.blocks import (
    BlockRun,
    Workspace,
    entry_levels,
    key_blocks_before,
    row_positions,
)
from longswift.core.errors import ConfigError, UnsupportedError, check_positive, problem
from longswift.core.products import bmm, factor_dtype
from longswift.core.summary import PAGE
from longswift.mechanisms.selectors.base import EMPTY, Request, Selection, Selector
from longswift.mechanisms.selectors.box_tree import WHOLE, descend, enclose, levels_above
from longswift.mechanisms.selectors.boxes import extremes, key_extremes, key_features, row_boxes
from longswift.mechanisms.selectors.two_stage import TwoStage, share_among_blocks, wanted_blocks

_WIDEST = 64  # Boxes that a backend opens together at most.


@dataclass(frozen=True, kw_only=True)
class Bounds(Selector):
    """Bound, propose, re-rank exactly.

    Attributes:
        key_block: Keys per bound; a power of two.
        row_group: Query rows per bound; a power of two.
        proposals: Proposed tokens per token of the budget.
        most_proposals: The same for blocks of few rows, as of a question; they propose as much as
            costs what a complete block's proposals cost, up to this. Not used in strict causality.
        key_radius: Share of a key block's radius that counts. No key is extreme in all channels at
            once, so that shares below 1, which make it an upper bound, rank blocks better.
        row_radius: Likewise for a group of rows; 0, its centre, saves a third of the products.
        page_radius: ``key_radius`` of the larger pages that decoding scores.
        least_share: Least share of the keys before it that is proposed to a single row of a block,
            as when decoding. Not used in strict causality.
        tree: Key blocks in a box of the next level, a power of two; None bounds every key block. 16
            is faster from some 200k tokens on; coarser boxes miss some of what finer ones find.
        beam: Boxes opened a level per proposed block.
    """

    name: ClassVar[str] = "bounds"
    supports_bias: ClassVar[bool] = True
    fills_budget: ClassVar[bool] = True

    key_block: int = 4
    row_group: int = 32
    proposals: int = 12
    most_proposals: int = 64
    key_radius: float = 0.5
    row_radius: float = 0.5
    page_radius: float = 0.75
    least_share: float = 0.125
    tree: int | None = None
    beam: int = 1

    def __post_init__(self) -> None:
        self._check_power(key_block=self.key_block, row_group=self.row_group)
        if self.tree is not None:
            self._check_power(tree=self.tree)
            if self.tree == 1:
                raise ConfigError(
                    problem(
                        "Bounds.tree",
                        expected="None or a power of two above 1",
                        got=self.tree,
                        fix="Use 4, 8 or 16, or None for no tree.",
                    )
                )
        counts = {name: getattr(self, name) for name in ("proposals", "most_proposals", "beam")}
        check_positive(type(self).__name__, **counts)
        self._check_share(
            key_radius=self.key_radius,
            row_radius=self.row_radius,
            page_radius=self.page_radius,
            least_share=self.least_share,
        )

    def grain(self, q_len: int) -> int:
        """Decoding scores a cache's pages where they fit, everything else blocks of its own."""
        return PAGE if q_len == 1 and PAGE % self.key_block == 0 else self.key_block

    def choosing_cost(self, budget: int, keys: float, dim: int) -> float:
        """Bounds are three products for every box of rows and block of keys."""
        boxes, opened = keys / self.key_block, 0.0
        if self.tree is not None:
            a_level = self.beam * self.proposals * budget / self.key_block * self.tree
            while boxes > WHOLE * a_level > 0:
                boxes, opened = boxes / self.tree, opened + a_level
        products = 3 * (boxes + opened) / self.row_group
        return (products + self.proposals * budget) / 2 if budget else 0.0

    def check_bias(self, bias: PositionBias | None) -> None:
        """Raise ``UnsupportedError`` for a bias in a tree, whose boxes are bounded without it."""
        super().check_bias(bias)
        if bias is not None and self.tree is not None:
            raise UnsupportedError(
                problem(
                    "Bounds.tree",
                    expected="None with a position bias",
                    got=self.tree,
                    fix="Bound every key block: tree=None.",
                )
            )

    def select(self, request: Request) -> Selection:
        """See the module docstring."""
        plain = request.coverage is None and request.bias is None and request.scale > 0.0
        if request.choose_by_bounds is None or not plain or (self.tree or 0) > _WIDEST:
            return self._select(request)
        return self._select_at_once(request, request.choose_by_bounds) or self._select(request)

    def _select(self, request: Request) -> Selection:
        return BoundsPass(self, request).run()

    def _options(self, request: Request) -> dict[str, Any]:
        """What a backend's kernel is told beyond the request."""
        options = {
            "row_group": self.row_group,
            "key_radius": self.radius_of_keys(request),
            "row_radius": self.row_radius,
        }
        if self.tree is None:
            return options
        rows = request.pattern.block
        opened = self.opened(wanted_blocks(request, self.proposals, self.most_proposals, rows))
        levels = partial(levels_above, branch=self.tree, kept=opened)
        return {**options, "branch": self.tree, "opened": opened, "levels": levels}

    def _select_at_once(self, request: Request, choose: Callable[..., bool]) -> Selection | None:
        """The same by the backend's kernel, if it makes such choices."""
        batch, kv_heads = request.k.shape[:2]
        shape = (batch, kv_heads, request.edges.shape[1], request.budget)
        tokens = torch.full(shape, EMPTY, dtype=torch.int32, device=request.k.device)
        since = torch.zeros_like(tokens) if request.strict else None
        chosen = choose(
            request.q,
            request.k,
            request.band_lse,
            request.pattern,
            tokens,
            scale=request.scale,
            key_block=request.key_block,
            proposed=partial(self.proposed, request),
            sinks=request.sinks,
            extremes=lambda: key_extremes(request, request.key_block),
            since=since,
            **self._options(request),
        )
        return Selection(tokens, since) if chosen else None

    def radius_of_keys(self, request: Request) -> float:
        """Share of the radius of a request's key blocks that counts."""
        return self.key_radius if request.key_block == self.key_block else self.page_radius

    def proposed(self, request: Request, run: BlockRun) -> int:
        """Key blocks proposed to each block of a run."""
        wanted = wanted_blocks(request, self.proposals, self.most_proposals, run.rows)
        if request.strict or run.rows > 1 or request.pattern.block == 1:
            return wanted
        # Of the keys before the row, however many follow: every chunk proposes alike.
        keys = run.position if request.pattern.causal else request.k.shape[2]
        return max(wanted, math.ceil(self.least_share * keys / request.key_block))

    def opened(self, wanted: int) -> int:
        """Boxes opened a level where ``wanted`` key blocks are proposed.

        Two may be opened unseen, one on each side of the window.
        """
        return max(2, self.beam * wanted)


class BoundsPass(TwoStage):
    """One selection: boxes around key blocks.

    Args:
        selector: The options.
        request: The request.
        complete: Whether complete blocks of queries, whose rows meet boxes in groups, are among
            those that will be chosen for.
    """

    def __init__(self, selector: Bounds, request: Request, *, complete: bool = True) -> None:
        low, high = key_extremes(request, request.key_block)
        super().__init__(request, selector.proposals, low.shape[2], selector.most_proposals)
        self._selector = selector
        block, k_len = request.pattern.block, request.k.shape[2]
        offset = k_len - request.q.shape[2]
        whole = complete and -(-offset // block) * block + block <= k_len and block > 1
        cut = bool(offset % block or k_len % block) or not whole
        # Bounds only propose, so 16-bit input may be bounded in 16 bits.
        dtype = factor_dtype(request.k)
        # Heads flattened once: a slice of blocks then stays a view.
        self._row_boxes: list[Tensor] = []
        self._group_boxes: list[list[Tensor]] = []
        if request.strict or cut or selector.row_radius == 0.0:
            self._row_boxes = extremes(low, high, dtype)
        levels = 1
        if whole and not request.strict:
            if selector.tree is not None:
                levels += levels_above(self._blocks, selector.tree, self._opened(block))
            for level in range(levels):
                if level:
                    assert selector.tree is not None
                    low, high = enclose(low, high, selector.tree)
                if selector.row_radius:
                    boxes = [key_features(low, high, dtype).flatten(0, 1)]
                else:
                    boxes = extremes(low, high, dtype) if level else self._row_boxes
                self._group_boxes.append(boxes)
        self._largest: dict[int, ScoreBias] = {}
        if request.bias is not None:
            size = self._key_block
            groups = {1} if self._row_boxes else set()
            groups |= {min(selector.row_group, block)} if self._group_boxes else set()
            for group in groups:
                self._largest[group] = request.bias.largest(size + group - 1, size)

    def _proposed(self, run: BlockRun) -> int:
        return self._selector.proposed(self._request, run)

    def _opened(self, rows: int) -> int:
        """Boxes opened a level of the tree."""
        return self._selector.opened(self._wanted_blocks(rows))

    def _scored(self) -> int:
        request, boxes = self._request, self._blocks
        gathered = 0
        if len(self._group_boxes) > 1:
            assert self._selector.tree is not None
            boxes = WHOLE * self._opened(request.pattern.block) * self._selector.tree
            gathered = 3 * boxes * request.k.shape[3] // (request.groups * request.pattern.block)
        rows = 1 if self._row_boxes else self._selector.row_group
        return max(-(-boxes // rows), gathered)

    def by_row(self, run: BlockRun) -> bool:
        """Whether rows are bounded alone: a cut block has few, and they may be what is decoded."""
        return self._request.strict or run.rows < self._request.pattern.block or run.rows == 1

    def _propose(
        self, q: Tensor, run: BlockRun, outside: Tensor, width: int, space: Workspace
    ) -> tuple[Tensor, Tensor]:
        parts = []
        pattern = self._request.pattern
        for part, level in self._parts(run):
            rows, candidates = q[:, :, part], outside[:, part]
            if level:
                if pattern.causal:
                    last = key_blocks_before(run, part.stop - 1, pattern.block, self._key_block)
                    candidates = candidates[..., :last]
                parts.append(self._descend(rows, run, candidates, level))
            else:
                parts.append(self._propose_from_all(rows, run, candidates, width, space))
        if len(parts) == 1:
            return parts[0]
        most = max(index.shape[3] for index, _ in parts)
        return (
            torch.cat([pad(index, (0, most - index.shape[3])) for index, _ in parts], 2),
            torch.cat([pad(valid, (0, most - valid.shape[3])) for _, valid in parts], 2),
        )

    def _parts(self, run: BlockRun) -> Iterable[tuple[slice, int]]:
        """Blocks of a run that start at the same level of the tree, and the level."""
        tree = self._selector.tree
        if tree is None or self.by_row(run):
            return [(slice(0, run.count), 0)]
        pattern, kept = self._request.pattern, self._opened(run.rows)
        return entry_levels(
            run,
            pattern.block,
            self._key_block,
            None if pattern.causal else self._blocks,
            partial(levels_above, branch=tree, kept=kept),
        )

    def _descend(
        self, q: Tensor, run: BlockRun, outside: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        """The best blocks that the tree leads to from a level."""
        assert self._selector.tree is not None
        return descend(
            self._row_factors(q, run),
            self._group_boxes[: level + 1],
            outside,
            branch=self._selector.tree,
            kept=self._opened(run.rows),
            most=self._wanted_blocks(run.rows),
            sinks=self._sink_blocks,
            leaves=None if self._request.pattern.causal else self._blocks,
        )

    def _propose_from_all(
        self, q: Tensor, run: BlockRun, outside: Tensor, width: int, space: Workspace
    ) -> tuple[Tensor, Tensor]:
        """The best blocks of all; the backend's kernel for it adds no bias."""
        if self._request.best_blocks is None or self._request.bias is not None:
            return super()._propose(q, run, outside, width, space)
        rows = torch.cat(self._row_factors(q, run), -1)
        keys = torch.cat(self._boxes(run), -1)[:, :width].to(self._acc)
        most = min(self._proposed(run), width)
        return self._request.best_blocks(
            rows, keys.unflatten(0, q.shape[:2]), outside, self._sink_blocks, most
        )

    def _boxes(self, run: BlockRun) -> list[Tensor]:
        """Key blocks as ``_row_factors`` meets them, ``[B * Hkv, W, *]``."""
        return self._row_boxes if self.by_row(run) else self._group_boxes[0]

    def _row_factors(self, q: Tensor, run: BlockRun) -> list[Tensor]:
        """What meets each of ``_boxes`` in a product, ``[B, Hkv, N, rows or groups, *]``."""
        by_row, kept = self.by_row(run), self._selector.row_radius
        if not by_row:
            centre, radius = row_boxes(q, self._request.groups, self._selector.row_group)
            if kept:
                return [self._group_features(centre, kept * radius)]
        # The largest q.k in a box: positive channels meet its maximum, negative its minimum; mixed
        # with the smallest one in proportion, it is the bound of a box of a smaller radius.
        rows = q if by_row else centre
        up, down = rows.clamp(min=0), rows.clamp(max=0)
        share = (1 + self._selector.radius_of_keys(self._request)) / 2
        return [torch.lerp(down, up, share), torch.lerp(up, down, share)]

    def _group_features(self, centre: Tensor, radius: Tensor) -> Tensor:
        """What boxes around rows meet ``key_features`` with, ``[..., 3D]``."""
        of_keys = self._selector.key_radius
        return torch.cat([centre, of_keys * (centre.abs() + radius), radius], -1)

    def _largest_bias(self, run: BlockRun, width: int) -> Tensor:
        """Maximum of the bias between rows (or groups) and blocks, ``[1, Hkv, N, rows, W]``."""
        request, group = self._request, 1
        position = row_positions(run, request.k.device)
        if not self.by_row(run):
            group = min(self._selector.row_group, run.rows)
            # The last row of a group is the farthest from the first key of a block.
            position = torch.minimum(position[:, ::group] + (group - 1), position[:, -1:])
        largest = self._largest[group]
        block = torch.arange(width, device=position.device)
        shape = 1, request.k.shape[1], 1, width
        return largest.at(block.expand(shape), position)

    def _block_scores(
        self, q: Tensor, run: BlockRun, outside: Tensor, width: int, space: Workspace
    ) -> Tensor:
        """Softmax over candidate blocks of the bounds, ``[B, Hkv, N, rows or groups, W]``."""
        factors = self._row_factors(q, run)
        batch, kv_heads, count, rows = factors[0].shape[:4]
        bound = space.get("bound", (batch * kv_heads, count * rows, width), self._acc)
        for index, (factor, boxes) in enumerate(zip(factors, self._boxes(run), strict=True)):
            factor, boxes = factor.flatten(2, 3).flatten(0, 1), boxes[:, :width].transpose(1, 2)
            product = space.get("product", tuple(bound.shape), self._acc) if index else bound
            bmm(factor.to(boxes.dtype), boxes, out=product)
            if index:
                bound += product
        bound = bound.view(batch, kv_heads, count, rows, width)
        if self._request.bias is not None:
            bound += self._largest_bias(run, width)
        return share_among_blocks(
            bound, outside, self._request.pattern.causal, self._request.strict
        )
