"""Gathered keys and the coarse remainder: what a block of queries sees outside its band.

Forward and backward share one structure. With scores ``s`` of the gathered tokens, a remainder
column of ``c`` tokens whose sums are ``K`` and ``V`` has the score
``(q.K - sum of s over its gathered tokens) / c + log c`` and the value
``(V - sum of its gathered values) / c``; so every row only needs products with shared sums, minus
a scatter over its few gathered tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.blocks import (
    BlockRun,
    TokenTable,
    Workspace,
    block_count,
    block_runs,
    stack_queries,
    unstack_queries,
)
from longswift.core.pattern import BlockPattern
from longswift.core.pools import (
    PoolColumns,
    Pools,
    band_edges,
    build_pools,
    pool_columns,
    token_columns,
)
from longswift.core.softmax import accumulator_dtype, safe_exp_difference
from longswift.core.summary import KeySummary
from longswift.core.types import Partial

# Bytes of scores per step: with the gathered keys beside them they stay in the shared cache.
_STEP_BYTES = 4 << 20
_HIDDEN = float("-inf")


class _Step(NamedTuple):
    """One run of blocks, gathered. ``Z = B * Hkv * N`` problems of ``R = G * rows`` queries."""

    run: BlockRun
    tokens: Tensor  # [B, Hkv, N, C] positions, empty slots point at key 0
    shown: Tensor  # [Z, R or 1, C]
    q: Tensor  # [Z, R, D], scaled
    k: Tensor  # [Z, C, D]
    v: Tensor  # [Z, C, Dv]
    columns: PoolColumns | None
    column_of: Tensor | None  # [Z, 1, C]
    count: Tensor | None  # [Z, R or 1, P + 2]


class Gathered:
    """The gathered part of a pattern over one batch; holds the tables both passes use."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: BlockPattern,
        scale: float,
        summary: KeySummary | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self.q, self.k, self.v, self.pattern, self.scale = q, k, v, pattern, scale
        self._acc = accumulator_dtype(q.dtype)
        self._keys, self._values = TokenTable(k), TokenTable(v)
        self._pools: Pools | None = None
        if pattern.pool is not None:
            self._pools = build_pools(k, v, pattern, summary)
        self._space = workspace or Workspace(q.device)

    def runs(self) -> list[BlockRun]:
        """Runs of blocks that see anything outside their band."""
        pattern, (q_len, k_len) = self.pattern, (self.q.shape[2], self.k.shape[2])
        groups = self.q.shape[1] // self.k.shape[1]
        width = 0 if pattern.tokens is None else pattern.tokens.shape[-1]
        if pattern.pool is not None:
            width += k_len // pattern.pool + 2
        per_block = self.q.shape[0] * self.k.shape[1] * groups * pattern.block * width * 4
        most = max(1, _STEP_BYTES // max(1, per_block))
        busy = self._busy_blocks()
        found = []
        for run in block_runs(q_len, k_len, pattern.block, most):
            if busy[run.first : run.first + run.count].any():
                found.append(run)
        return found

    def _busy_blocks(self) -> Tensor:
        """bool per block, on CPU: whether it gathers anything or leaves a remainder."""
        pattern, (q_len, k_len) = self.pattern, (self.q.shape[2], self.k.shape[2])
        offset = k_len - q_len
        blocks = torch.arange(block_count(q_len, k_len, pattern.block)) + offset // pattern.block
        busy = torch.zeros(len(blocks), dtype=torch.bool)
        if pattern.tokens is not None:
            busy |= (pattern.tokens >= 0).any(-1).flatten(0, 1).any(0).cpu()
        if pattern.pool is not None:
            position = (blocks * pattern.block).clamp(min=offset)
            for band in set(pattern.bands):
                start, end = band.bounds(position, k_len)
                busy |= start > 0
                if not pattern.causal:
                    busy |= end < k_len
        return busy

    def merge_into(self, bands: Partial) -> Partial:
        """Adds the gathered part to the bands' result, in place."""
        kv_heads = self.k.shape[1]
        for run in self.runs():
            out, lse = self._attend(self._load(run))
            shape = (self.k.shape[0], kv_heads, run.count, out.shape[1])
            out = unstack_queries(out.view(*shape, -1), run, self.q.shape[1])
            lse = unstack_queries(lse.view(shape), run, self.q.shape[1])
            rows = slice(run.row, run.row + run.count * run.rows)
            band_out, band_lse = bands.out[:, :, rows], bands.lse[:, :, rows]
            total = torch.logaddexp(band_lse, lse)
            band_out.mul_(safe_exp_difference(band_lse, total).unsqueeze(-1))
            band_out.addcmul_(out, safe_exp_difference(lse, total).unsqueeze(-1))
            band_lse.copy_(total)
        return bands

    def _load(self, run: BlockRun) -> _Step:
        """Gather what one run needs."""
        pattern, (batch, kv_heads) = self.pattern, self.k.shape[:2]
        q = stack_queries(self.q, run, kv_heads).flatten(0, 2).to(self._acc).mul(self.scale)
        problems = batch * kv_heads * run.count
        if pattern.tokens is None:
            slots = torch.empty(
                batch, kv_heads, run.count, 0, dtype=torch.long, device=self.q.device
            )
        else:
            slots = pattern.tokens[:, :, run.first : run.first + run.count].to(self.q.device)
            slots = slots.long().expand(batch, -1, -1, -1)
        real = slots >= 0
        tokens = slots.clamp(min=0)
        shown = real.reshape(problems, 1, -1)
        if pattern.visible_from is not None:
            since = pattern.visible_from[:, :, run.first : run.first + run.count, None]
            since = since.to(self.q.device)
            position = run.position + torch.arange(run.count * run.rows, device=self.q.device).view(
                1, 1, run.count, run.rows, 1
            )
            by_row = real[:, :, :, None] & (since <= position)
            groups = self.q.shape[1] // kv_heads
            shown = by_row.repeat(1, 1, 1, groups, 1).flatten(0, 2)
        k = self._gather(self._keys, "k", tokens)
        v = self._gather(self._values, "v", tokens)
        if self._pools is None:
            return _Step(run, tokens, shown, q, k, v, None, None, None)
        columns = pool_columns(self._pools, pattern, run)
        edges = torch.stack(band_edges(pattern, run, self.k.shape[2]), -1).to(self.q.device)
        column_of = token_columns(tokens, columns, self._pools, edges).view(problems, 1, -1)
        count = columns.count.expand(batch, -1, -1, -1, -1).flatten(0, 2)
        taken = torch.zeros(
            problems, shown.shape[1], count.shape[-1], dtype=self._acc, device=self.q.device
        )
        taken.scatter_add_(2, column_of.expand_as(shown), shown.to(self._acc))
        # A run holds heads with shorter windows too: columns they see exactly have no count.
        return _Step(run, tokens, shown, q, k, v, columns, column_of, count - taken)

    def _gather(self, table: TokenTable, name: str, tokens: Tensor) -> Tensor:
        dim = (self.k if name == "k" else self.v).shape[3]
        out = self._space.get(name, (*tokens.shape, dim), self.q.dtype)
        return table.gather(tokens, out).flatten(0, 2).to(self._acc)

    def _products(self, step: _Step, rows: Tensor, tokens: Tensor, sums: str) -> Tensor:
        """Products of ``rows [Z, R, *]`` with each column's ungathered sum over its count.

        Args:
            step: The run.
            rows: Queries (with keys) or output gradients (with values).
            tokens: ``[Z, R, C]`` products with the gathered tokens.
            sums: ``"k"`` or ``"v"``.
        """
        assert self._pools is not None and step.columns is not None and step.count is not None
        whole = self._pools.k_sum if sums == "k" else self._pools.v_sum
        cut = step.columns.cut_k if sums == "k" else step.columns.cut_v
        batch, kv_heads = whole.shape[:2]
        whole = whole[:, :, : step.columns.pools]
        stacked = rows.view(batch, kv_heads, -1, rows.shape[-1])
        total = torch.cat(
            [
                (stacked @ whole.transpose(2, 3)).view(*rows.shape[:2], -1),
                rows @ cut.flatten(0, 2).transpose(1, 2),
            ],
            -1,
        )
        assert step.column_of is not None
        total.scatter_add_(
            2, step.column_of.expand_as(tokens), tokens.masked_fill(~step.shown, 0.0).neg_()
        )
        return total.div_(step.count.clamp(min=1.0))

    def _scores(self, step: _Step) -> tuple[Tensor, Tensor | None]:
        """Scores of tokens ``[Z, R, C]`` and of remainder columns ``[Z, R, P + 2]``."""
        token_scores = torch.bmm(step.q, step.k.transpose(1, 2))
        column_scores = None
        if step.count is not None:
            column_scores = self._products(step, step.q, token_scores, "k")
            column_scores.add_(step.count.clamp(min=0.0).log())
        return token_scores.masked_fill_(~step.shown, _HIDDEN), column_scores

    def _weights(
        self, step: _Step, token_part: Tensor, column_part: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients on gathered tokens and on column sums, given weights per key and column."""
        if column_part is None or step.count is None or step.column_of is None:
            return token_part, None
        per_sum = column_part / step.count.clamp(min=1.0)
        taken_back = per_sum.gather(2, step.column_of.expand_as(token_part))
        return token_part - taken_back.masked_fill_(~step.shown, 0.0), per_sum

    def _combine(
        self, step: _Step, tokens: Tensor, columns: Tensor | None, values: Tensor, sums: str
    ) -> Tensor:
        """``tokens @ values + columns @ sums``, ``[Z, R, *]``."""
        result = torch.bmm(tokens, values)
        if columns is None or step.columns is None or self._pools is None:
            return result
        whole = self._pools.k_sum if sums == "k" else self._pools.v_sum
        cut = step.columns.cut_k if sums == "k" else step.columns.cut_v
        pools = step.columns.pools
        stacked = columns[..., :pools].reshape(*whole.shape[:2], -1, pools)
        result += (stacked @ whole[:, :, :pools]).view_as(result)
        return result.baddbmm_(columns[..., pools:], cut.flatten(0, 2))

    def _attend(self, step: _Step) -> Partial:
        token_scores, column_scores = self._scores(step)
        width = token_scores.shape[2]
        scores = token_scores
        if column_scores is not None:
            scores = torch.cat([token_scores, column_scores], 2)
        top = scores.amax(2, keepdim=True)
        nothing = top == _HIDDEN
        scores = scores.sub_(top.masked_fill(nothing, 0.0)).exp_()
        mass = scores.sum(2, keepdim=True)
        lse = (mass.log() + top).squeeze(2)
        scores.div_(mass.masked_fill_(nothing, 1.0))
        column_weights = None if column_scores is None else scores[..., width:]
        tokens, columns = self._weights(step, scores[..., :width], column_weights)
        return Partial(self._combine(step, tokens, columns, step.v, "v"), lse)

    def backward(
        self,
        lse: Tensor,
        delta: Tensor,
        d_out: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Adds this part's gradients to ``grads = (dq, dk, dv)``; arguments as for the bands."""
        d_q, d_k, d_v = grads
        pool_grads = None
        if self._pools is not None:
            pool_grads = [torch.zeros_like(x) for x in self._pools[:4]]
        kv_heads = self.k.shape[1]
        for run in self.runs():
            step = self._load(run)
            rows_of = [
                stack_queries(x, run, kv_heads).flatten(0, 2).to(self._acc)
                for x in (lse.unsqueeze(-1), delta.unsqueeze(-1), d_out)
            ]
            d_rows = self._backward_step(step, rows_of, d_k, d_v, pool_grads)
            shape = (self.k.shape[0], kv_heads, run.count, d_rows.shape[1], d_rows.shape[2])
            d_q[:, :, run.row : run.row + run.count * run.rows] += unstack_queries(
                d_rows.view(shape), run, self.q.shape[1]
            )
        if pool_grads is not None:
            _spread(pool_grads[0], pool_grads[2], d_k, self._pools)
            _spread(pool_grads[1], pool_grads[3], d_v, self._pools)

    def _backward_step(
        self,
        step: _Step,
        rows_of: list[Tensor],
        d_k: Tensor,
        d_v: Tensor,
        pool_grads: list[Tensor] | None,
    ) -> Tensor:
        """Gradient of the run's unscaled queries; the keys' and values' go to the accumulators."""
        lse, delta, d_out = rows_of
        token_scores, column_scores = self._scores(step)
        probs = token_scores.sub_(lse).exp_()
        d_probs = torch.bmm(d_out, step.v.transpose(1, 2))
        column_probs = d_columns = None
        if column_scores is not None:
            column_probs = column_scores.sub_(lse).exp_()
            d_columns = self._products(step, d_out, d_probs, "v").sub_(delta).mul_(column_probs)
        d_scores = d_probs.sub_(delta).mul_(probs)
        tokens, columns = self._weights(step, probs, column_probs)
        d_tokens, d_sums = self._weights(step, d_scores, d_columns)
        self._add_rows(d_v, step.tokens, torch.bmm(tokens.transpose(1, 2), d_out))
        self._add_rows(d_k, step.tokens, torch.bmm(d_tokens.transpose(1, 2), step.q))
        if pool_grads is not None and columns is not None and d_sums is not None:
            self._add_pools(step, columns, d_out, pool_grads[1], pool_grads[3])
            self._add_pools(step, d_sums, step.q, pool_grads[0], pool_grads[2])
        return self._combine(step, d_tokens, d_sums, step.k, "k").mul_(self.scale)

    def _add_rows(self, target: Tensor, tokens: Tensor, rows: Tensor) -> None:
        """``target [B, Hkv, Lk, *] += rows [Z, C, *]`` at ``tokens [B, Hkv, N, C]``."""
        batch, kv_heads, length = target.shape[:3]
        base = torch.arange(batch * kv_heads, device=tokens.device).view(batch, kv_heads, 1, 1)
        flat = (tokens + base * length).flatten()
        target.view(-1, target.shape[3]).index_add_(0, flat, rows.reshape(-1, rows.shape[2]))

    def _add_pools(
        self, step: _Step, columns: Tensor, rows: Tensor, whole: Tensor, before: Tensor
    ) -> None:
        """Gradient of the pool sums: ``columns^T @ rows``, cut pools through their grains."""
        assert step.columns is not None
        batch, kv_heads = whole.shape[:2]
        pools = step.columns.pools
        stacked = columns[..., :pools].reshape(batch, kv_heads, -1, pools)
        whole[:, :, :pools] += stacked.transpose(2, 3) @ rows.view(
            batch, kv_heads, -1, rows.shape[-1]
        )
        cut = (columns[..., pools:].transpose(1, 2) @ rows).view(
            batch, kv_heads, step.run.count, 2, -1
        )
        for head in range(kv_heads):
            grain = step.columns.grain[head]
            before[:, head].index_add_(1, grain[:, 0], cut[:, head, :, 0])
            before[:, head].index_add_(1, grain[:, 1], -cut[:, head, :, 1])
            whole[:, head].index_add_(1, step.columns.right_pool[head], cut[:, head, :, 1])


def _spread(whole: Tensor, before: Tensor, target: Tensor, pools: Pools | None) -> None:
    """Every token receives its pool's gradient plus that of the partial sums it is part of."""
    assert pools is not None
    per_pool = pools.size // pools.grain
    grains = before.shape[2] - 1
    padded = torch.cat(
        [
            before[:, :, :grains],
            before.new_zeros(*before.shape[:2], -grains % per_pool, before.shape[3]),
        ],
        2,
    ).unflatten(2, (-1, per_pool))
    after = padded.flip(3).cumsum(3).flip(3) - padded
    per_grain = (after + whole.unsqueeze(3)).flatten(2, 3)[:, :, :grains]
    length = target.shape[2]
    target += per_grain.repeat_interleave(pools.grain, 2)[:, :, :length]
