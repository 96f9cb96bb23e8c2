"""Gathered keys and the coarse remainder: what a block of queries sees outside its band."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.blocks import (
    BlockRun,
    Workspace,
    block_count,
    block_runs,
    stack_queries,
    unstack_queries,
)
from longswift.core.parallel import for_each
from longswift.core.pools import Pools
from longswift.core.products import bmm, factor_dtype
from longswift.core.softmax import safe_exp_difference
from longswift.core.types import Partial
from longswift.kernels.eager.steps import HIDDEN, BiasGradient, Step, StepTable
from longswift.kernels.eager.unfused import softmax_, weigh

# Bytes of scores a thread holds per step.
_STEP_BYTES = 2 << 20


class Gathered(StepTable):
    """The gathered part of a pattern over one batch."""

    def runs(self) -> list[BlockRun]:
        """Runs of blocks that see anything outside their band."""
        pattern, (q_len, k_len) = self.pattern, (self.q.shape[2], self.k.shape[2])
        groups = self.q.shape[1] // self.k.shape[1]
        width = 0 if pattern.tokens is None else pattern.tokens.shape[-1]
        if pattern.pool is not None:
            width += k_len // pattern.pool + 2
        # A block of a few rows holds more gathered numbers than scores.
        rows = max(groups * pattern.block, self.k.shape[3])
        per_block = self.q.shape[0] * self.k.shape[1] * rows * width * 4
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
        blocks = (
            torch.arange(block_count(q_len, k_len, pattern.block), device="cpu")
            + offset // pattern.block
        )
        busy = torch.zeros(len(blocks), dtype=torch.bool, device="cpu")
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
        # Without per-row visibility or bias the remainder is the same for every row of a block.
        by_row = self.pattern.by_row or self.bias is not None
        attend = self._attend_by_row if by_row else self._attend

        def merge(run: BlockRun, space: Workspace) -> None:
            out, lse = attend(self.load(run, space, widen=by_row), space)
            shape = (self.k.shape[0], kv_heads, run.count, out.shape[1])
            out = unstack_queries(out.view(*shape, -1), run, self.q.shape[1])
            lse = unstack_queries(lse.view(shape), run, self.q.shape[1])
            rows = slice(run.row, run.row + run.count * run.rows)
            band_out, band_lse = bands.out[:, :, rows], bands.lse[:, :, rows]
            total = torch.logaddexp(band_lse, lse)
            band_out.mul_(safe_exp_difference(band_lse, total).unsqueeze(-1))
            band_out.addcmul_(out, safe_exp_difference(lse, total).unsqueeze(-1))
            band_lse.copy_(total)

        for_each(self.runs(), lambda: Workspace(self.q.device), merge, self.q.device)
        return bands

    def _attend(self, step: Step, space: Workspace) -> Partial:
        """Remainder columns as explicit mean keys and values beside the gathered tokens."""
        problems, tokens, dim = step.k.shape
        width = tokens + (0 if step.count is None else step.count.shape[2])
        keys = space.get("keys", (problems, width, dim), self.acc)
        values = space.get("values", (problems, width, step.v.shape[2]), factor_dtype(step.v))
        keys[:, :tokens] = step.k
        values[:, :tokens] = step.v
        bias = torch.zeros(problems, 1, width, dtype=self.acc, device=keys.device)
        if not step.complete:
            bias[..., :tokens].masked_fill_(~step.shown, HIDDEN)
        if step.count is not None:
            keys[:, tokens:] = self._means(step, keys[:, :tokens], "k", space)
            values[:, tokens:] = self._means(step, step.v.to(self.acc), "v", space)
            bias[..., tokens:] = step.count.log()
        first = 0 if not step.complete else tokens
        scores = space.get("scores", (problems, step.q.shape[1], width), self.acc)
        bmm(step.q, keys.transpose(1, 2), out=scores)
        scores[..., first:] += bias[..., first:]
        lse = softmax_(scores)
        return Partial(weigh(scores, values, space), lse)

    def _means(self, step: Step, gathered: Tensor, sums: str, space: Workspace) -> Tensor:
        """Mean key or value of what each column stands for, ``[Z, P + 2, *]``.

        Args:
            step: The run, every row of a block shown the same.
            gathered: ``[Z, C, *]`` in the accumulator dtype.
            sums: ``"k"`` or ``"v"``.
            space: Buffers.
        """
        assert self.pools is not None and step.columns is not None
        assert step.column_of is not None and step.count is not None
        whole = self.pools.k_sum if sums == "k" else self.pools.v_sum
        cut = step.columns.cut_k if sums == "k" else step.columns.cut_v
        if not step.complete:
            gathered = gathered * step.shown.transpose(1, 2)
        problems, columns = step.count.shape[0], step.count.shape[2]
        batch, kv_heads, _, dim = whole.shape
        means = space.get("mean_" + sums, (problems, columns, dim), self.acc)
        by_block = means.view(batch, kv_heads, -1, columns, dim)
        by_block[..., : step.columns.pools, :] = whole[:, :, None, : step.columns.pools]
        by_block[..., step.columns.pools :, :] = cut
        first = torch.arange(problems, device=means.device) * columns
        flat = (step.column_of.flatten(1) + first[:, None]).flatten()
        means.view(-1, dim).index_add_(0, flat, gathered.reshape(-1, dim), alpha=-1)
        return means.div_(step.count.transpose(1, 2).clamp(min=1.0))

    def _attend_by_row(self, step: Step, _: Workspace) -> Partial:
        """Remainder columns through products and a scatter, as each row has its own."""
        token_scores, column_scores = self.scores(step)
        width = token_scores.shape[2]
        scores = token_scores
        if column_scores is not None:
            scores = torch.cat([token_scores, column_scores], 2)
        lse = softmax_(scores)
        column_weights = None if column_scores is None else scores[..., width:]
        tokens, columns = self.weights(step, scores[..., :width], column_weights)
        return Partial(self.combine(step, tokens, columns, step.v, "v"), lse)

    def backward(
        self,
        lse: Tensor,
        delta: Tensor,
        d_out: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
        d_bias: ScoreBias | None = None,
    ) -> None:
        """Adds this part's gradients to ``grads = (dq, dk, dv)``; arguments as for the bands."""
        d_q, d_k, d_v = grads
        pool_grads = None
        if self.pools is not None:
            pool_grads = [torch.zeros_like(x) for x in self.pools[:4]]
        to_bias = None
        if d_bias is not None and self.bias is not None:
            to_bias = BiasGradient.into(d_bias.values, self.bias)
        kv_heads = self.k.shape[1]
        space = Workspace(self.q.device)
        for run in self.runs():
            step = self.load(run, space)
            rows_of = [
                stack_queries(x, run, kv_heads).flatten(0, 2).to(self.acc)
                for x in (lse.unsqueeze(-1), delta.unsqueeze(-1), d_out)
            ]
            d_rows = self._backward_step(step, rows_of, d_k, d_v, pool_grads, to_bias)
            shape = (self.k.shape[0], kv_heads, run.count, d_rows.shape[1], d_rows.shape[2])
            d_q[:, :, run.row : run.row + run.count * run.rows] += unstack_queries(
                d_rows.reshape(shape), run, self.q.shape[1]
            )
        if to_bias is not None:
            to_bias.finish()
        if pool_grads is not None:
            _spread(pool_grads[0], pool_grads[2], d_k, self.pools)
            _spread(pool_grads[1], pool_grads[3], d_v, self.pools)

    def _backward_step(
        self,
        step: Step,
        rows_of: list[Tensor],
        d_k: Tensor,
        d_v: Tensor,
        pool_grads: list[Tensor] | None,
        to_bias: BiasGradient | None,
    ) -> Tensor:
        """Gradient of the run's unscaled queries; the keys' and values' go to the accumulators."""
        lse, delta, d_out = rows_of
        token_scores, column_scores = self.scores(step)
        probs = token_scores.sub_(lse).exp_()
        d_probs = bmm(d_out, step.v.transpose(1, 2))
        column_probs = d_columns = None
        if column_scores is not None:
            column_probs = column_scores.sub_(lse).exp_()
            d_columns = self.products(step, d_out, d_probs, "v").sub_(delta).mul_(column_probs)
        d_scores = d_probs.sub_(delta).mul_(probs)
        tokens, columns = self.weights(step, probs, column_probs)
        d_tokens, d_sums = self.weights(step, d_scores, d_columns)
        if to_bias is not None:
            self.add_bias_gradient(step, to_bias, d_tokens, d_sums)
        self._add_rows(d_v, step.tokens, bmm(tokens.transpose(1, 2), d_out))
        self._add_rows(d_k, step.tokens, bmm(d_tokens.transpose(1, 2), step.q))
        if pool_grads is not None and columns is not None and d_sums is not None:
            self._add_pools(step, columns, d_out, pool_grads[1], pool_grads[3])
            self._add_pools(step, d_sums, step.q, pool_grads[0], pool_grads[2])
        return self.combine(step, d_tokens, d_sums, step.k, "k").mul_(self.scale)

    def _add_rows(self, target: Tensor, tokens: Tensor, rows: Tensor) -> None:
        """``target [B, Hkv, Lk, *] += rows [Z, C, *]`` at ``tokens [B, Hkv, N, C]``."""
        batch, kv_heads, length = target.shape[:3]
        base = torch.arange(batch * kv_heads, device=tokens.device).view(batch, kv_heads, 1, 1)
        flat = (tokens + base * length).flatten()
        target.view(-1, target.shape[3]).index_add_(0, flat, rows.reshape(-1, rows.shape[2]))

    def _add_pools(
        self, step: Step, columns: Tensor, rows: Tensor, whole: Tensor, grains: Tensor
    ) -> None:
        """Gradient of the pool sums: ``columns^T @ rows``, cut pools through their grains."""
        assert step.columns is not None
        batch, kv_heads = whole.shape[:2]
        pools = step.columns.pools
        stacked = columns[..., :pools].reshape(batch, kv_heads, self.rows(step), pools)
        whole[:, :, :pools] += stacked.transpose(2, 3) @ rows.reshape(
            batch, kv_heads, -1, rows.shape[-1]
        )
        cut = (columns[..., pools:].transpose(1, 2) @ rows).reshape(
            batch, kv_heads, step.run.count, 2, -1
        )
        spread = torch.einsum("bhncd,hnce->bhnced", cut, step.columns.cut_members)
        for head in range(kv_heads):
            index = step.columns.cut_grains[head].flatten()
            grains[:, head].index_add_(1, index, spread[:, head].flatten(1, 3))


def _spread(whole: Tensor, grains: Tensor, target: Tensor, pools: Pools | None) -> None:
    """Every token receives the gradient of its pool's sum and of its grain's."""
    assert pools is not None
    per_grain = whole.repeat_interleave(pools.size // pools.grain, 2)[:, :, : grains.shape[2]]
    grains[:, :, : per_grain.shape[2]] += per_grain
    per_token = grains.repeat_interleave(pools.grain, 2)[:, :, : target.shape[2]]
    target[:, :, : per_token.shape[2]] += per_token
