"""The coarse remainder alone, as differentiable torch: a part that merges with any exact kernel.

With ``K``, ``V`` and ``B`` the sums of keys, values and position biases over a column of ``c``
tokens, less the gathered ones the row sees exactly, the column has score ``(q.K + B) / c + log c``
and value ``V / c``. Sums are shared by all rows (those of the bias are differences of running
sums); what a row takes out of them is a scatter over its few gathered tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longswift.core.bias import ScoreBias
from longswift.core.blocks import (
    BlockRun,
    block_runs,
    row_positions,
    stack_queries,
    unstack_queries,
)
from longswift.core.pattern import BlockPattern
from longswift.core.pools import (
    Pools,
    block_edges,
    build_pools,
    column_ranges,
    pool_columns,
    token_columns,
)
from longswift.core.softmax import accumulator_dtype
from longswift.core.summary import KeySummary
from longswift.core.types import Partial

# Score elements held at once: 64 MiB in fp32.
_SCORES = 1 << 24


def attend_remainder(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    summary: KeySummary | None = None,
    bias: ScoreBias | None = None,
) -> Partial:
    """Attention over the pooled columns of a pattern with ``pool`` set.

    Scores are recomputed a run of blocks at a time in the backward pass. Time
    ``O(Lq * (Lk / pool + C) * D)``, memory O(Lq + Lk).

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        pattern: Bands, gathered tokens and pools.
        scale: Factor on the scores.
        summary: Page summaries of ``k`` and ``v``; used when no gradients flow.
        bias: Additions to the scaled scores; a column gets their mean over its tokens.

    Returns:
        ``out [B, Hq, Lq, Dv]`` and ``lse [B, Hq, Lq]`` in the accumulator dtype.
    """
    assert pattern.pool is not None
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    tracked = tracked or bias is not None and bias.requires_grad
    pools = build_pools(k, v, pattern, None if tracked else summary)
    width = k.shape[2] // pattern.pool + 2
    if pattern.tokens is not None:
        width += pattern.tokens.shape[3]
    most = max(1, _SCORES // (q.shape[0] * q.shape[1] * pattern.block * width))
    edges = block_edges(pattern, q.shape[2], k.shape[2])
    slots = None if pattern.tokens is None else pattern.slots(q.device)
    tables: tuple[Tensor, ...] = () if bias is None else (bias.values, bias.sums())
    outs, lses = [], []
    for run in block_runs(q.shape[2], k.shape[2], pattern.block, most):

        def part(
            q: Tensor, k: Tensor, v: Tensor, *sums: Tensor, run: BlockRun = run
        ) -> tuple[Tensor, Tensor]:
            k_sum, v_sum, k_grain, v_grain, *tables = sums
            again = pools._replace(k_sum=k_sum, v_sum=v_sum, k_grain=k_grain, v_grain=v_grain)
            added = None
            if bias is not None:
                added = _Bias(replace(bias, values=tables[0]), tables[1], k.shape[1])
            return _attend_run(q, k, v, again, pattern, edges, slots, scale, run, added)

        inputs = (q, k, v, *pools[:4], *tables)
        if tracked:
            out, lse = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            out, lse = part(*inputs)
        outs.append(out)
        lses.append(lse)
    return Partial(torch.cat(outs, 2), torch.cat(lses, 2))


def _attend_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pools: Pools,
    pattern: BlockPattern,
    edges: Tensor,
    slots: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
    run: BlockRun,
    bias: _Bias | None,
) -> tuple[Tensor, Tensor]:
    """Blocks are problems ``Z = [B, Hkv, N]`` of ``R`` rows over ``P + 2`` columns."""
    kv_heads, heads = k.shape[1], q.shape[1]
    acc = accumulator_dtype(q.dtype)
    blocks = slice(run.first, run.first + run.count)
    edges = edges[:, blocks]
    columns = pool_columns(pools, pattern.causal, edges)
    rows = stack_queries(q, run, kv_heads).to(acc) * scale
    count = columns.count
    whole_k, whole_v = (x[:, :, None, : columns.pools] for x in (pools.k_sum, pools.v_sum))
    scores = torch.cat(
        [
            rows @ whole_k.to(acc).transpose(3, 4),
            rows @ columns.cut_k.transpose(3, 4),
        ],
        -1,
    )
    if bias is not None:
        first, last = column_ranges(edges, columns, pools)
        scores = scores + bias.between(first, last, run)
    taken = None
    if slots is not None:
        here = [x[:, :, blocks] for x in slots]
        column = token_columns(here[0].long(), columns, pools, edges.to(q.device))
        taken = _Taken(k, v, here, column, pattern.by_row, run, heads // kv_heads)
    if taken is not None:
        added = 0.0 if bias is None else bias.of(here[0].long(), run)
        scores = scores.scatter_add(4, taken.column_of(scores), -taken.scores(rows, added))
        count = count - taken.counts(columns.pools + 2, acc)
    share = count.clamp(min=1.0).reciprocal()
    scores = scores * share + count.log()
    nothing = (count <= 0).all(4, keepdim=True).expand(*scores.shape[:4], 1)
    scores = scores.masked_fill(nothing, 0.0)
    lse = torch.logsumexp(scores, 4).masked_fill(nothing[..., 0], float("-inf"))
    weights = torch.softmax(scores, 4).masked_fill(nothing, 0.0) * share
    out = weights[..., : columns.pools] @ whole_v.to(acc) + weights[..., columns.pools :] @ (
        columns.cut_v
    )
    if taken is not None:
        out = out - taken.values(weights.gather(4, taken.column_of(weights)))
    return unstack_queries(out, run, heads), unstack_queries(lse, run, heads)


class _Bias(NamedTuple):
    """A bias on the scores of a run's tokens, and its sums over their columns."""

    table: ScoreBias
    sums: Tensor  # [Hq, S + 1], the running sums of the table
    kv_heads: int

    def of(self, tokens: Tensor, run: BlockRun) -> Tensor:
        """The bias of every row and gathered token, ``[B, Hkv, N, R, C]``."""
        return self.table.at(tokens, row_positions(run, tokens.device))

    def between(self, first: Tensor, last: Tensor, run: BlockRun) -> Tensor:
        """Its sum over the tokens of every column, ``[1, Hkv, N, R, P + 2]``.

        Args:
            first: ``[Hkv, N, P + 2]``, first tokens.
            last: Likewise, one past the last tokens.
            run: The blocks.
        """
        length, device = self.table.values.shape[1], self.sums.device
        # The table of sums has one column more.
        starts = self.table.head_starts(self.kv_heads) // length * (length + 1)
        position = row_positions(run, device)[:, None, :, None]
        start, end = (
            torch.take(
                self.sums,
                starts
                + (self.table.zero + key.to(device)[:, :, None, None] - position).clamp(0, length),
            )
            for key in (first, last)
        )
        return (end - start).to(self.table.values.dtype).flatten(2, 3).unsqueeze(0)


class _Taken:
    """The gathered tokens of a run: what its rows take out of the columns."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        slots: list[Tensor],
        column: Tensor,
        by_row: bool,
        run: BlockRun,
        groups: int,
    ) -> None:
        tokens, since, until = (x.expand(k.shape[0], -1, -1, -1) for x in slots)
        self._acc = accumulator_dtype(k.dtype)
        shown = (since < until).unsqueeze(3)
        if by_row:
            position = torch.arange(run.count * run.rows, device=k.device) + run.position
            position = position.view(run.count, run.rows, 1)
            shown = (since.unsqueeze(3) <= position) & (position < until.unsqueeze(3))
            shown = shown.repeat(1, 1, 1, groups, 1)
        self._shown = shown
        self._column = column.expand(k.shape[0], -1, -1, -1).unsqueeze(3)
        batch = torch.arange(k.shape[0], device=k.device).view(-1, 1, 1, 1)
        head = torch.arange(k.shape[1], device=k.device).view(-1, 1, 1)
        self._keys, self._values = (x[batch, head, tokens.long()].to(self._acc) for x in (k, v))

    def column_of(self, like: Tensor) -> Tensor:
        """Column of each token, ``[B, Hkv, N, R, C]``."""
        return self._column.expand(*like.shape[:4], -1)

    def scores(self, rows: Tensor, added: Tensor | float) -> Tensor:
        """Products with the tokens each row sees and what is added to them, else 0."""
        return (rows @ self._keys.transpose(3, 4) + added).masked_fill(~self._shown, 0.0)

    def values(self, weights: Tensor) -> Tensor:
        """Values of the tokens each row sees, weighted."""
        return weights.masked_fill(~self._shown, 0.0) @ self._values

    def counts(self, columns: int, dtype: torch.dtype) -> Tensor:
        """Tokens each row takes out of each column, ``[B, Hkv, N, R or 1, P + 2]``."""
        none = torch.zeros(*self._shown.shape[:4], columns, dtype=dtype, device=self._shown.device)
        return none.scatter_add(4, self._column.expand_as(self._shown), self._shown.to(dtype))
