"""Some rows of a block score every key exactly and choose for all of them.

Anchors are every ``stride``-th row of a query block and its last one. The tokens with the largest
probability in any anchor and grouped head, normalised together with window and sinks, are taken.
No second stage: nothing is estimated, but a row that is no anchor has no say. Probing rows is how
MInference (Jiang et al., 2024, arXiv 2407.02490) and SampleAttention (Zhu et al., 2024, arXiv
2406.15486) choose.

In strict causality a cut block's last row is no anchor, as it would be none in a longer text, and
rows before an anchor see nothing of what it asked for.

Cost per query and head: ``(1 / stride + 1 / block) D n`` multiply-adds: 1/64 + 1/128 of full
attention's scores by default. Decoding scores every key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.blocks import BlockRun, Workspace, stack_queries
from longswift.core.errors import check_positive
from longswift.core.products import bmm, factor_dtype
from longswift.core.softmax import accumulator_dtype
from longswift.mechanisms.selectors.base import (
    EMPTY,
    Request,
    Selection,
    Selector,
    by_run,
    candidate_blocks,
    take_in_turn,
)
from longswift.mechanisms.selectors.two_stage import best_of, drop_needless, needed_by_row

_HIDDEN = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Anchor(Selector):
    """Tokens that some exact rows of a block ask for.

    ``coverage`` holds for the anchors.

    Attributes:
        key_block: Edges of windows and pools lie on multiples of this; a power of two.
        stride: Rows from one anchor to the next, counted from the block's first.
    """

    name: ClassVar[str] = "anchor"

    stride: int = 64

    def __post_init__(self) -> None:
        self._check_power(key_block=self.key_block)
        check_positive("Anchor", stride=self.stride)

    def choosing_cost(self, budget: int, keys: float, dim: int) -> float:
        """Exact scores of the anchors, without a block's last row."""
        return keys / self.stride / 2 if budget else 0.0

    def select(self, request: Request) -> Selection:
        """See the module docstring."""
        return _Pass(self, request).run()


class _Pass:
    """One selection."""

    def __init__(self, selector: Anchor, request: Request) -> None:
        self._request, self._stride = request, selector.stride
        self._key_block = request.key_block
        self._acc = accumulator_dtype(request.q.dtype)
        self._keys = request.k.to(factor_dtype(request.k)).flatten(0, 1)
        # Anchors of a complete block: a schedule must not depend on how many rows there are.
        block = request.pattern.block
        self._anchors = sum(self._is_anchor(row) for row in range(block))

    def _is_anchor(self, row: int) -> bool:
        """Whether a row of a complete block, counted from its first, is an anchor."""
        return row % self._stride == 0 or row == self._request.pattern.block - 1

    def run(self) -> Selection:
        """The selection."""
        request = self._request
        width = -(-request.k.shape[2] * self._anchors // request.pattern.block)
        return by_run(request, width, self._choose)

    def _rows(self, run: BlockRun) -> list[int]:
        """Rows of a run's blocks that are anchors."""
        start = run.position % self._request.pattern.block
        rows = [row for row in range(run.rows) if self._is_anchor(start + row)]
        last = run.rows - 1
        return rows if self._request.strict or last in rows else [*rows, last]

    def _choose(self, run: BlockRun, space: Workspace) -> Selection:
        """At most ``budget`` tokens a block and, if strict, where each is visible from."""
        request = self._request
        batch, kv_heads, k_len, _ = request.k.shape
        blocks, width = candidate_blocks(request, run, self._key_block)
        rows = torch.tensor(self._rows(run), dtype=torch.long, device=request.k.device)
        if not len(rows) or not bool(blocks.any()):
            nothing = rows.new_empty(batch, kv_heads, run.count, 0)
            return Selection(nothing, nothing if request.strict else None)
        outside = blocks.repeat_interleave(self._key_block, 2)[..., :k_len]
        probs = self._probabilities(run, rows, outside, space)
        allowed = outside.clone()
        allowed[..., : request.sinks] = False
        if request.strict:
            return self._in_turn(run, rows, probs, allowed)
        rank = probs[..., :-1].amax(3).masked_fill_(~allowed, float("-inf"))
        best, taken = best_of(rank, request.budget, ordered=request.coverage is not None)
        chosen = best.masked_fill(~taken, EMPTY)
        if request.coverage is not None:
            is_sink = torch.arange(probs.shape[4] - 1, device=probs.device) < request.sinks
            is_sink = is_sink.expand(*chosen.shape[:3], -1)
            chosen = drop_needless(chosen, best, probs.flatten(0, 2), is_sink, request.coverage)
        return Selection(chosen, None)

    def _probabilities(
        self, run: BlockRun, rows: Tensor, outside: Tensor, space: Workspace
    ) -> Tensor:
        """Of the leading keys and, last, the band: ``[B, Hkv, N, G * anchors, T + 1]``."""
        request = self._request
        kv_heads, groups = request.k.shape[1], request.groups

        def of_anchors(x: Tensor) -> Tensor:
            by_head = stack_queries(x, run, kv_heads).unflatten(3, (groups, run.rows))
            return by_head.index_select(4, rows).flatten(3, 4)

        q = of_anchors(request.q).to(self._acc) * request.scale
        band = of_anchors(request.band_lse)
        factors = q.flatten(2, 3).flatten(0, 1).to(self._keys.dtype)
        tokens = outside.shape[2]
        scores = space.get("scores", (*factors.shape[:2], tokens + 1), self._acc)
        bmm(factors, self._keys[:, :tokens].transpose(1, 2), out=scores[..., :-1])
        scores = scores.view(*q.shape[:4], tokens + 1)
        scores[..., :-1].masked_fill_(~outside[:, :, None], _HIDDEN)
        scores[..., -1] = band
        return torch.softmax(scores, -1, out=scores)

    def _in_turn(self, run: BlockRun, rows: Tensor, probs: Tensor, allowed: Tensor) -> Selection:
        """Every anchor adds what it wants to what earlier ones took."""
        request = self._request
        if request.coverage is not None:
            probs = needed_by_row(probs, request.coverage)
        wanted = probs[..., :-1].unflatten(3, (request.groups, -1)).amax(3)
        wanted = wanted * allowed.unsqueeze(2)
        index, owner, taken = take_in_turn(wanted.flatten(0, 2), request.budget, self._anchors)
        shape = (*wanted.shape[:3], index.shape[1])
        chosen = index.masked_fill(~taken, EMPTY).view(shape)
        first = run.position + torch.arange(run.count, device=rows.device) * run.rows
        return Selection(chosen, rows[owner].view(shape) + first[:, None])
