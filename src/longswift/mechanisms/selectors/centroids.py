"""Centroids of similar rows propose, exact probabilities choose.

1. The rows of a block of queries, those of the GQA group together, are halved at the median of the
   channel in which they differ most, until groups hold at most ``rows`` of them. A group's mean
   scores every key outside the window, one by one. Softmax over keys, max over groups; the best
   ``proposals * budget`` keys are proposed. Where there are many keys, the sums of the softmax take
   the best of every 16 of an eighth of them.
2. The exact stage of ``two_stage``.

Queries that lie close to each other attend alike, which bounds the error of attending with their
mean: clustered attention, and its exact second look at the keys a cluster wants most, are of Vyas
et al. (2020, arXiv 2007.04825). Here a mean serves the rows of one block, so that causality is that
of the block, and only proposes.

A block of fewer rows, such as a question, has groups of so many fewer: few rows are scored one by
one. Decoding, strict causality and position biases bound boxes of keys, as ``Bounds`` does, whose
options these are, but for ``tree``.

Cost per query and head: ``D n / rows`` multiply-adds for the means, which stand for twice as many
rows whenever ``n`` has doubled beyond ``far``, and ``proposals * budget * D`` for the exact stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from longswift.core.blocks import BlockRun, Workspace, equal_neighbours
from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.products import bmm, factor_dtype
from longswift.mechanisms.selectors.base import Request, Selection, by_run
from longswift.mechanisms.selectors.bounds import Bounds, BoundsPass
from longswift.mechanisms.selectors.two_stage import TOGETHER, TwoStage, best_of_each

# Of many candidates every 8th tile of 64 keys, the first of them the fifth, stands for all in sums
# that only weigh groups of rows against each other, and the best of every 16 keys in it.
_MANY, _TILE, _EVERY, _FIRST = 4096, 64, 8, 4
_HIDDEN = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Centroids(Bounds):
    """Means of similar rows, propose, re-rank exactly.

    Attributes:
        rows: Most rows that are scored as one.
        far: Positions beyond which twice as many rows are, four times as many beyond twice as far,
            and so on: what a block costs then grows no further.
    """

    name: ClassVar[str] = "centroids"

    rows: int = 2
    far: int = 32_768
    proposals: int = 16
    most_proposals: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("Centroids", rows=self.rows, far=self.far)
        if self.tree is not None:
            raise ConfigError(
                problem(
                    "Centroids.tree",
                    expected="None, as every key is scored",
                    got=self.tree,
                    fix=f"Descend a tree of boxes: selector=Bounds(tree={self.tree}).",
                )
            )

    def choosing_cost(self, budget: int, keys: float, dim: int) -> float:
        """A product for every group of rows and key."""
        means = keys / self.rows_at(int(keys))
        return (means + self.proposals * budget) / 2 if budget else 0.0

    def rows_at(self, position: int) -> int:
        """Most rows of a centroid, for a block at a position."""
        return self.rows << max(0, -(-position // self.far) - 1).bit_length()

    def _options(self, request: Request) -> dict[str, Any]:
        candidates = self.proposals * request.budget
        options = {"centroid_rows": self.rows, "far": self.far, "candidates": candidates}
        return super()._options(request) | options

    def _select(self, request: Request) -> Selection:
        if request.strict or request.bias is not None:
            return super()._select(request)
        single = _Pass(self, replace(request, key_block=1))
        alone = any(run.rows == 1 for run in request.runs(1))
        boxes = BoundsPass(self, request, complete=False) if alone else None

        def choose(run: BlockRun, space: Workspace) -> Selection:
            return (boxes if boxes is not None and run.rows == 1 else single).choose(run, space)

        return by_run(request, max(single.width(), boxes.width() if boxes else 0), choose)


class _Pass(TwoStage):
    """One selection for blocks of more than one row: every key for itself."""

    def __init__(self, selector: Centroids, request: Request) -> None:
        super().__init__(request, selector.proposals, request.k.shape[2], selector.proposals)
        self._selector = selector
        self._keys_of_head = request.k.to(factor_dtype(request.k)).flatten(0, 1)

    def _block_scores(
        self, q: Tensor, run: BlockRun, outside: Tensor, width: int, space: Workspace
    ) -> Tensor:
        """The groups' scores of keys, less the sum of each, ``[B, Hkv, N, groups, W]``."""
        block, end = self._request.pattern.block, self._request.k.shape[2]
        causal = self._request.pattern.causal
        positions = [run.position + n * block if causal else end for n in range(run.count)]
        parts = []
        for blocks, most in equal_neighbours(map(self._selector.rows_at, positions)):
            # A cut block has no more groups than a complete one.
            rows = -(-most * run.rows // block)
            parts.append(self._of_groups(q[:, :, blocks], rows, outside[:, blocks], width, space))
        if len(parts) == 1:
            return parts[0]
        # Groups that are no more score nothing.
        most = max(part.shape[3] for part in parts)
        missing = [most - part.shape[3] for part in parts]
        return torch.cat(
            [
                pad(x, (0, 0, 0, more), value=_HIDDEN)
                for x, more in zip(parts, missing, strict=True)
            ],
            2,
        )

    def _of_groups(
        self, q: Tensor, rows: int, outside: Tensor, width: int, space: Workspace
    ) -> Tensor:
        means = centroids(q, rows)
        factors = means.flatten(2, 3).flatten(0, 1).to(self._keys_of_head.dtype)
        scores = space.get(f"estimates {rows}", (*factors.shape[:2], width), self._acc)
        bmm(factors, self._keys_of_head[:, :width].transpose(1, 2), out=scores)
        scores = scores.view(*means.shape[:4], width)
        scores.masked_fill_(~outside.unsqueeze(2), _HIDDEN)
        many = outside.sum(-1) >= _MANY
        total = _log_sums(scores, many)
        # Without a candidate nothing is subtracted from nothing.
        return scores.sub_(total.masked_fill_(total == _HIDDEN, 0.0).unsqueeze(-1))


def _log_sums(scores: Tensor, many: Tensor) -> Tensor:
    """Log-sum-exp of ``scores [B, Hkv, N, groups, W]``, over a sample where ``many [Hkv, N]``."""
    if not bool(many.any()):
        return scores.logsumexp(-1)
    best = best_of_each(scores)
    tile = torch.arange(best.shape[-1], device=best.device) * TOGETHER // _TILE
    some = best[..., tile % _EVERY == _FIRST].logsumexp(-1)
    return some if bool(many.all()) else torch.where(many[:, :, None], some, scores.logsumexp(-1))


def centroids(q: Tensor, most: int) -> Tensor:
    """Means of groups of similar rows, ``[*, R, D]`` to ``[*, groups, D]``.

    Groups are halves of halves, of the rows in order of the channel in which they vary most, equal
    ones in order of their index, until there are at most ``most`` in a group. The last row of an
    odd number counts twice.
    """
    rows = q.shape[-2]
    order = torch.arange(rows, device=q.device).expand(q.shape[:-1]).unsqueeze(-2)
    while order.shape[-1] > most:
        if order.shape[-1] % 2:
            order = torch.cat([order, order[..., -1:]], -1)
        parts = _take(q, order)
        widest = parts.var(-2, correction=0).argmax(-1, keepdim=True)
        values = parts.gather(-1, widest.unsqueeze(-2).expand(*parts.shape[:-1], 1)).squeeze(-1)
        halves = values.sort(dim=-1, stable=True).indices.unflatten(-1, (2, -1))
        order = order.unsqueeze(-2).expand(halves.shape[:-1] + order.shape[-1:]).gather(-1, halves)
        order = order.sort(-1).values.flatten(-3, -2)
    return _take(q, order).mean(-2)


def _take(q: Tensor, order: Tensor) -> Tensor:
    """Rows ``[*, R, D]`` at ``order [*, groups, n]``, ``[*, groups, n, D]``."""
    flat = order.flatten(-2)
    found = q.gather(-2, flat.unsqueeze(-1).expand(*flat.shape, q.shape[-1]))
    return found.unflatten(-2, order.shape[-2:])
