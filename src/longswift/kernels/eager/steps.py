"""One run of blocks with everything its queries see outside their band, gathered.

With scores ``s`` of the gathered tokens, a remainder column of ``c`` tokens whose sums are ``K``
and ``V`` has the score ``(q.K - sum of s over its gathered tokens) / c + log c`` and the value
``(V - sum of its gathered values) / c``; so every row only needs products with shared sums, minus
a scatter over its few gathered tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.blocks import BlockRun, TokenTable, Workspace, row_positions, stack_queries
from longswift.core.pattern import BlockPattern
from longswift.core.pools import (
    PoolColumns,
    Pools,
    block_edges,
    build_pools,
    column_ranges,
    pool_columns,
    token_columns,
)
from longswift.core.products import bmm
from longswift.core.softmax import accumulator_dtype, hide_
from longswift.core.summary import KeySummary

HIDDEN = float("-inf")


class Step(NamedTuple):
    """One run of blocks, gathered. ``Z = B * Hkv * N`` problems of ``R`` queries."""

    run: BlockRun
    tokens: Tensor  # [B, Hkv, N, C] positions, empty slots point at key 0
    shown: Tensor  # [Z, R or 1, C]
    complete: bool  # every slot is shown to every row
    q: Tensor  # [Z, R, D], scaled
    k: Tensor  # [Z, C, D], in the dtype of the input if not widened
    v: Tensor  # [Z, C, Dv], likewise
    columns: PoolColumns | None
    column_of: Tensor | None  # [Z, 1, C]
    count: Tensor | None  # type: ignore[assignment]  # [Z, R or 1, P + 2]


class BiasGradient(NamedTuple):
    """Accumulators of a bias's gradient: of its values, and of the running sums of them."""

    values: Tensor  # [B, Hq, S]
    sums: Tensor  # [B, Hq, S + 1], in the dtype of the sums

    @classmethod
    def into(cls, values: Tensor, bias: ScoreBias) -> BiasGradient:
        """Accumulators for ``values``, zero sums."""
        empty = bias.sums().new_zeros(*values.shape[:2], values.shape[2] + 1)
        return cls(values, empty)

    def finish(self) -> None:
        """Carries the gradients of the sums over to the values: one is in every sum behind it."""
        behind = self.sums[..., 1:].flip(2).cumsum(2).flip(2)
        self.values.add_(behind.to(self.values.dtype))


class StepTable:
    """The tables of one batch from which steps are gathered; shared by both passes."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: BlockPattern,
        scale: float,
        summary: KeySummary | None = None,
        bias: ScoreBias | None = None,
    ) -> None:
        self.q, self.k, self.v, self.pattern, self.scale = q, k, v, pattern, scale
        self.bias = bias
        self.acc = accumulator_dtype(q.dtype)
        self._keys, self._values = TokenTable(k), TokenTable(v)
        self.pools: Pools | None = None
        self._columns: PoolColumns | None = None
        if pattern.pool is not None:
            self.pools = build_pools(k, v, pattern, summary)
            self._edges = block_edges(pattern, q.shape[2], k.shape[2])
            self._columns = pool_columns(self.pools, pattern.causal, self._edges)
            self._bias_sums = None if bias is None else bias.sums()

    def load(self, run: BlockRun, space: Workspace, widen: bool = True) -> Step:
        """Gather what one run needs, keys and values in the accumulator dtype if ``widen``."""
        pattern, (batch, kv_heads) = self.pattern, self.k.shape[:2]
        q = stack_queries(self.q, run, kv_heads).flatten(0, 2)
        q = space.get("queries", tuple(q.shape), self.acc).copy_(q).mul_(self.scale)
        problems = batch * kv_heads * run.count
        if pattern.tokens is None:
            slots = torch.empty(
                batch, kv_heads, run.count, 0, dtype=torch.long, device=self.q.device
            )
        else:
            slots = pattern.tokens[:, :, run.first : run.first + run.count].to(self.q.device)
            # Slots nobody in this run needs cost nothing: a coverage target saves real work.
            used = (slots >= 0).flatten(0, 2).any(0).nonzero()
            slots = slots[..., : int(used[-1]) + 1 if len(used) else 0]
            slots = slots.long().expand(batch, -1, -1, -1)
        real = slots >= 0
        tokens = slots.clamp(min=0)
        shown = real.reshape(problems, 1, -1)
        if pattern.by_row:
            limits = (pattern.visible_from, torch.le), (pattern.visible_until, torch.gt)
            position = run.position + torch.arange(run.count * run.rows, device=self.q.device).view(
                1, 1, run.count, run.rows, 1
            )
            own = slice(run.first, run.first + run.count)
            by_row = real[:, :, :, None]
            for limit, sees in limits:
                if limit is not None:
                    limit = limit[:, :, own, None, : slots.shape[-1]].to(self.q.device)
                    by_row = by_row & sees(limit, position)
            groups = self.q.shape[1] // kv_heads
            shown = by_row.repeat(1, 1, 1, groups, 1).flatten(0, 2)
        complete = bool(shown.all())
        k = self._gather(self._keys, "k", tokens, space)
        v = self._gather(self._values, "v", tokens, space)
        if widen:
            k, v = k.to(self.acc), v.to(self.acc)
        if self.pools is None or self._columns is None:
            return Step(run, tokens, shown, complete, q, k, v, None, None, None)
        columns = self._columns.of(run)
        edges = self._edges[:, run.first : run.first + run.count].to(self.q.device)
        column_of = token_columns(tokens, columns, self.pools, edges).view(problems, 1, -1)
        count = columns.count.expand(batch, -1, -1, -1, -1).flatten(0, 2)
        taken = torch.zeros(
            problems, shown.shape[1], count.shape[-1], dtype=self.acc, device=self.q.device
        )
        taken.scatter_add_(2, column_of.expand_as(shown), shown.to(self.acc))
        count = count - taken
        return Step(run, tokens, shown, complete, q, k, v, columns, column_of, count)

    def _gather(self, table: TokenTable, name: str, tokens: Tensor, space: Workspace) -> Tensor:
        dim = (self.k if name == "k" else self.v).shape[3]
        out = space.get(name, (*tokens.shape, dim), self.q.dtype)
        return table.gather(tokens, out).flatten(0, 2)

    def products(self, step: Step, rows: Tensor, tokens: Tensor, sums: str) -> Tensor:
        """Products of ``rows [Z, R, *]`` with each column's ungathered sum over its count.

        Args:
            step: The run.
            rows: Queries (with keys) or output gradients (with values).
            tokens: ``[Z, R, C]`` products with the gathered tokens.
            sums: ``"k"`` or ``"v"``.
        """
        assert self.pools is not None and step.columns is not None and step.count is not None
        whole = self.pools.k_sum if sums == "k" else self.pools.v_sum
        cut = step.columns.cut_k if sums == "k" else step.columns.cut_v
        batch, kv_heads = whole.shape[:2]
        whole = whole[:, :, : step.columns.pools]
        stacked = rows.reshape(batch, kv_heads, -1, rows.shape[2])
        total = torch.cat(
            [
                bmm(stacked.flatten(0, 1), whole.flatten(0, 1).transpose(1, 2)).view(
                    *rows.shape[:2], whole.shape[2]
                ),
                rows @ cut.flatten(0, 2).transpose(1, 2),
            ],
            -1,
        )
        if sums == "k" and self._bias_sums is not None:
            start, end = self._column_places(step)
            total += torch.take(self._bias_sums, end).sub_(torch.take(self._bias_sums, start))
        assert step.column_of is not None
        total.scatter_add_(
            2, step.column_of.expand_as(tokens), tokens * step.shown.to(self.acc).neg_()
        )
        return total.div_(step.count.clamp(min=1.0))

    def rows(self, step: Step) -> int:
        """Query rows of the run per KV head, its group's included."""
        return step.run.count * step.q.shape[1]

    def weights(
        self, step: Step, token_part: Tensor, column_part: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients on gathered tokens and on column sums, given weights per key and column."""
        if column_part is None or step.count is None or step.column_of is None:
            return token_part, None
        per_sum = column_part / step.count.clamp(min=1.0)
        taken_back = per_sum.gather(2, step.column_of.expand_as(token_part))
        return token_part - taken_back.mul_(step.shown.to(self.acc)), per_sum

    def combine(
        self, step: Step, tokens: Tensor, columns: Tensor | None, values: Tensor, sums: str
    ) -> Tensor:
        """``tokens @ values + columns @ sums``, ``[Z, R, *]``."""
        result = bmm(tokens, values)
        if columns is None or step.columns is None or self.pools is None:
            return result
        whole = self.pools.k_sum if sums == "k" else self.pools.v_sum
        cut = step.columns.cut_k if sums == "k" else step.columns.cut_v
        pools = step.columns.pools
        stacked = columns[..., :pools].reshape(*whole.shape[:2], self.rows(step), pools)
        whole = whole[:, :, :pools].flatten(0, 1)
        result += bmm(stacked.flatten(0, 1), whole).view_as(result)
        return result.baddbmm_(columns[..., pools:], cut.flatten(0, 2))

    def scores(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Scores of tokens ``[Z, R, C]`` and of remainder columns ``[Z, R, P + 2]``."""
        token_scores = bmm(step.q, step.k.transpose(1, 2))
        if self.bias is not None:
            positions = row_positions(step.run, self.q.device)
            token_scores += self.bias.at(step.tokens, positions).flatten(0, 2)
        column_scores = None
        if step.count is not None:
            column_scores = self.products(step, step.q, token_scores, "k")
            column_scores.add_(step.count.clamp(min=0.0).log())
        return token_scores if step.complete else hide_(token_scores, step.shown), column_scores

    def add_bias_gradient(
        self, step: Step, to: BiasGradient, d_tokens: Tensor, d_sums: Tensor | None
    ) -> None:
        """Adds the gradients of a step's scores to those of the bias.

        Args:
            step: The run.
            to: The accumulators.
            d_tokens: ``[Z, R, C]``, of the scores of gathered tokens.
            d_sums: ``[Z, R, P + 2]``, of the columns' sums of scores, or None.
        """
        assert self.bias is not None
        batch, heads, length = to.values.shape
        of_row = torch.arange(batch, device=d_tokens.device) * heads
        positions = row_positions(step.run, d_tokens.device)
        places = self.bias.places(step.tokens, positions).flatten(3, 4)
        places = places + (of_row * length).view(-1, 1, 1, 1, 1)
        to.values.view(-1).index_add_(0, places.flatten(), d_tokens.flatten())
        if d_sums is None:
            return
        base = (of_row * (length + 1)).view(-1, 1, 1)
        shape = (batch, -1, d_sums.shape[2])
        for place, sign in zip(self._column_places(step), (-1.0, 1.0), strict=True):
            at = (place.view(shape) + base).flatten()
            to.sums.view(-1).index_add_(0, at, d_sums.flatten().to(to.sums.dtype), alpha=sign)

    def _column_places(self, step: Step) -> tuple[Tensor, Tensor]:
        """Where the running sums of the bias start and end for each column, ``[Z, R, P + 2]``."""
        assert self.bias is not None and self.pools is not None and step.columns is not None
        run, device = step.run, self.q.device
        edges = self._edges[:, run.first : run.first + run.count]
        heads, length = self.bias.values.shape
        starts = self.bias.head_starts(self.k.shape[1])
        # The table of sums has one column more.
        starts = starts // length * (length + 1)
        position = row_positions(run, device)[:, None, :, None]
        found = []
        for key in column_ranges(edges, step.columns, self.pools):
            column = self.bias.zero + key.to(device)[None, :, :, None, None] - position
            place = starts + column.clamp(0, length)
            found.append(place.flatten(3, 4).expand(self.k.shape[0], -1, -1, -1, -1).flatten(0, 2))
        return found[0], found[1]
