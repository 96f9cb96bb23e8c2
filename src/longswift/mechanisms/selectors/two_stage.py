"""Two stages: something cheap proposes key blocks, exact probabilities choose tokens inside them.

Inside the proposals every row scores every key. Log-probabilities, normalised together with the
window and the sinks, are maximised over rows and GQA group; the best ``budget`` tokens win. The sum
they are normalised by takes the best of every 16 proposals, in order of position: the rest adds
little to what only weighs rows against each other, and its exponentials would cost as much as the
scores. Strictly causal choices, where each row takes for itself, use exact probabilities.

Where the processor multiplies 16-bit numbers fast, 16-bit queries and keys are multiplied as they
are (sums in fp32, each score rounded once): it decides between near ties only. Probabilities and
ranks are fp32 always. The compiled kernels go further, see ``longswift.kernels.native.rounding``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from longswift.core.blocks import BlockRun, TokenTable, Workspace, row_positions, stack_queries
from longswift.core.products import bmm, factor_dtype, mm
from longswift.core.softmax import accumulator_dtype, hide_
from longswift.mechanisms.selectors.base import (
    EMPTY,
    Request,
    Selection,
    by_run,
    candidate_blocks,
    take_in_turn,
)

_HIDDEN = float("-inf")
# Proposals of which the best takes part in sums.
TOGETHER = 16


class TwoStage(ABC):
    """One selection: the tables it needs; subclasses say what a key block is worth to a row.

    Args:
        request: The request.
        proposals: Proposed tokens per token of the budget.
        blocks: Key blocks that may be candidates.
        most_proposals: The same for blocks of few rows, as far as they cost no more than a
            complete block. Strict choices must not depend on how many
            rows there are, so that it does not hold for them.
    """

    def __init__(self, request: Request, proposals: int, blocks: int, most_proposals: int) -> None:
        self._request, self._proposals, self._blocks = request, proposals, blocks
        self._most_proposals = most_proposals
        self._key_block = request.key_block
        self._acc = accumulator_dtype(request.q.dtype)
        self._table = TokenTable(request.k)
        self._runs = None if request.bias is None else request.bias.beyond(self._key_block - 1)
        # Blocks that hold sinks are always proposed: each sink is normalised over exactly once.
        self._sink_blocks = min(-(-request.sinks // self._key_block), blocks)

    @abstractmethod
    def _block_scores(
        self, q: Tensor, run: BlockRun, outside: Tensor, width: int, space: Workspace
    ) -> Tensor:
        """What the candidate blocks are worth, ``[B, Hkv, N, rows or groups, W]``.

        Shares that sum to 1 if the choice is strictly causal, else numbers that only rank.

        Args:
            q: Scaled queries ``[B, Hkv, N, G * rows, D]``.
            run: The run.
            outside: Which blocks are candidates, bool ``[Hkv, N, W]``.
            width: ``W``.
            space: Buffers of this thread.
        """

    def _scored(self) -> int:
        """Block weights a query row holds while blocks are proposed."""
        return self._blocks

    def run(self) -> Selection:
        """The selection."""
        choose = self._strict if self._request.strict else self.choose
        return by_run(self._request, self.width(), choose)

    def width(self) -> int:
        """Scores a query row holds while choosing."""
        rows = self._request.pattern.block
        blocks = min(self._wanted_blocks(rows) + self._sink_blocks, self._blocks)
        return max(blocks * self._key_block + 1, self._scored())

    def _wanted_blocks(self, rows: int) -> int:
        """Blocks proposed to a block of ``rows`` query rows."""
        return wanted_blocks(self._request, self._proposals, self._most_proposals, rows)

    def _proposed(self, run: BlockRun) -> int:
        """Blocks proposed to each block of a run."""
        return self._wanted_blocks(run.rows)

    def choose(self, run: BlockRun, space: Workspace) -> Selection:
        """At most ``budget`` tokens for every block of a run, not strictly causal."""
        request = self._request
        batch, kv_heads = request.k.shape[:2]
        outside, width = candidate_blocks(request, run, self._key_block)
        if not bool(outside.any()):
            return Selection(self._nothing(run), None)
        q = stack_queries(request.q, run, kv_heads).to(self._acc) * request.scale
        proposed, valid = self._propose(q, run, outside, width, space)
        proposed, valid = in_order(*self._with_sink_blocks(proposed, valid, outside))
        tokens = self._tokens(proposed)
        if request.coverage is None and q.device.type == "cpu":
            rank = self._ranks(q, run, proposed, valid, space)
        else:
            scores = self._scores(q, run, proposed, valid, space)
            probs = torch.softmax(scores, -1)
            rank = log_shares(scores).amax(1)
        rank = rank.view(*proposed.shape[:3], -1)
        rank.masked_fill_(self._barred(tokens, valid), _HIDDEN)
        best, taken = best_of(rank, request.budget, ordered=request.coverage is not None)
        chosen = tokens.gather(3, best).masked_fill_(~taken, EMPTY)
        if request.coverage is not None:
            is_sink = tokens < request.sinks
            chosen = drop_needless(chosen, best, probs, is_sink, request.coverage)
        return Selection(chosen, None)

    def _propose(
        self, q: Tensor, run: BlockRun, outside: Tensor, width: int, space: Workspace
    ) -> tuple[Tensor, Tensor]:
        """Blocks worth most, and whether each is a real choice, ``[B, Hkv, N, M]``."""
        scores = self._block_scores(q, run, outside, width, space)
        rank = scores.amax(3).masked_fill_(~outside, _HIDDEN)
        rank[..., : self._sink_blocks] = _HIDDEN
        return best_of(rank, self._proposed(run))

    def _nothing(self, run: BlockRun) -> Tensor:
        batch, kv_heads = self._request.k.shape[:2]
        device = self._request.k.device
        return torch.empty(batch, kv_heads, run.count, 0, dtype=torch.long, device=device)

    def _with_sink_blocks(
        self, proposed: Tensor, valid: Tensor, outside: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Appends the blocks that hold sinks, as far as the band does not cover them."""
        sinks = min(self._sink_blocks, outside.shape[-1])
        block = torch.arange(sinks, device=proposed.device)
        shape = (*proposed.shape[:3], sinks)
        return (
            torch.cat([proposed, block.expand(shape)], 3),
            torch.cat([valid, outside[..., :sinks].expand(shape)], 3),
        )

    def _tokens(self, blocks: Tensor) -> Tensor:
        """Positions of every token of ``blocks [B, Hkv, N, M]``, ``[B, Hkv, N, M * key_block]``."""
        inside = torch.arange(self._key_block, device=blocks.device)
        return (blocks.unsqueeze(-1) * self._key_block + inside).flatten(3)

    def _barred(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Tokens that must not be chosen: sinks, invalid proposals, beyond the end."""
        barred = ~valid.repeat_interleave(self._key_block, 3)
        return barred | (tokens < self._request.sinks) | (tokens >= self._request.k.shape[2])

    def _keys(self, proposed: Tensor, space: Workspace, as_dtype: torch.dtype) -> Tensor:
        """Keys of the proposed tokens and a zero for the band, ``[Z, M + 1, D]``."""
        request = self._request
        tokens = self._tokens(proposed).clamp_(max=request.k.shape[2] - 1)
        problems, width = proposed.shape[:3].numel(), tokens.shape[3]
        dim, dtype = request.k.shape[3], request.k.dtype
        found = self._table.gather(tokens, space.get("gathered", (*tokens.shape, dim), dtype))
        keys = space.get("keys", (problems, width + 1, dim), as_dtype)
        keys[:, :width] = found.view(problems, width, dim)
        keys[:, width] = 0.0
        return keys

    def _bias(self, proposed: Tensor, run: BlockRun) -> Tensor | None:
        """Position bias of the proposed tokens, ``[Z, G * rows, M]``, or None."""
        if self._runs is None:
            return None
        position = row_positions(run, proposed.device)
        first = proposed * self._key_block
        return self._runs.at(first, position, self._key_block).flatten(0, 2)

    def _hidden(self, proposed: Tensor, valid: Tensor) -> Tensor | None:
        """0 or ``-inf`` for proposed tokens and the band, ``[Z, 1, M + 1]``; None if all count."""
        beyond = not self._request.pattern.causal and self._request.k.shape[2] % self._key_block
        if not beyond and bool(valid.all()):
            return None
        hidden = ~valid.repeat_interleave(self._key_block, 3)
        if beyond:
            hidden |= self._tokens(proposed) >= self._request.k.shape[2]
        bias = torch.zeros(hidden.shape, dtype=self._acc, device=hidden.device)
        bias.masked_fill_(hidden, _HIDDEN)
        return pad(bias, (0, 1)).view(-1, 1, bias.shape[3] + 1)

    def _scores(
        self, q: Tensor, run: BlockRun, proposed: Tensor, valid: Tensor, space: Workspace
    ) -> Tensor:
        """Exact scores of proposed tokens and, last, the band's lse, ``[Z, G * rows, M + 1]``."""
        keys = self._keys(proposed, space, self._acc)
        hidden = self._hidden(proposed, valid)
        q = q.flatten(0, 2)
        scores = space.get("scores", (*q.shape[:2], keys.shape[1]), self._acc)
        bmm(q, keys.transpose(1, 2), out=scores)
        lse = stack_queries(self._request.band_lse, run, self._request.k.shape[1])
        scores[..., -1] = lse.flatten(0, 2)
        bias = self._bias(proposed, run)
        if bias is not None:
            scores[..., :-1] += bias
        return scores if hidden is None else scores.add_(hidden)

    def _ranks(
        self, q: Tensor, run: BlockRun, proposed: Tensor, valid: Tensor, space: Workspace
    ) -> Tensor:
        """The largest of each proposed token's ``log_shares`` over the rows, ``[Z, M]``.

        One problem at a time, so that its scores never leave the cache.
        """
        dtype = factor_dtype(self._request.k)
        keys, hidden = self._keys(proposed, space, dtype), self._hidden(proposed, valid)
        lse = stack_queries(self._request.band_lse, run, self._request.k.shape[1]).flatten(0, 2)
        bias = self._bias(proposed, run)
        queries = q.flatten(0, 2).to(dtype)
        problems = zip(queries.unbind(), keys.transpose(1, 2).unbind(), lse, strict=True)
        ranks = space.get("ranks", (len(keys), keys.shape[1] - 1), self._acc)
        for index, (rows, columns, band) in enumerate(problems):
            scores = mm(rows, columns)
            if dtype != self._acc:
                scores = space.get("scores", tuple(scores.shape), self._acc).copy_(scores)
            scores[:, -1] = band
            if bias is not None:
                scores[:, :-1] += bias[index]
            if hidden is not None:
                scores += hidden[index]
            torch.amax(log_shares(scores), 0, out=ranks[index])
        return ranks

    def _strict(self, run: BlockRun, space: Workspace) -> Selection:
        """At most ``budget`` tokens a block and the query position each is visible from."""
        request = self._request
        kv_heads, block = request.k.shape[1], request.pattern.block
        outside, width = candidate_blocks(request, run, self._key_block)
        if not bool(outside.any()):
            nothing = self._nothing(run)
            return Selection(nothing, nothing)
        q = stack_queries(request.q, run, kv_heads).to(self._acc) * request.scale
        scores = self._block_scores(q, run, outside, width, space)
        # Without a candidate a block's softmax is 0 / 0; elsewhere hidden blocks are 0 already.
        wanted = self._best_of_group(scores).nan_to_num_(0.0)
        wanted[..., : self._sink_blocks] = 0.0
        most = self._wanted_blocks(block)
        index, owner, taken = take_in_turn(wanted.flatten(0, 2), most, block)
        shape = (*q.shape[:3], index.shape[1])
        proposed, valid = self._with_sink_blocks(index.view(shape), taken.view(shape), outside)
        owner = torch.cat([owner, owner.new_zeros(len(owner), valid.shape[3] - owner.shape[1])], 1)
        owner = owner.repeat_interleave(self._key_block, 1)
        rows = torch.arange(run.rows, device=q.device).repeat(request.groups)
        visible = owner[:, None] <= rows[:, None]
        tokens = self._tokens(proposed)
        scores = self._scores(q, run, proposed, valid, space)
        hide_(scores[..., :-1], visible)
        probs = torch.softmax(scores, -1, out=scores)
        if request.coverage is not None:
            probs = needed_by_row(probs, request.coverage)
        probs = probs[..., :-1].view(*q.shape[:4], -1)
        allowed = ~self._barred(tokens, valid).unsqueeze(3)
        wanted = self._best_of_group(probs).mul_(allowed.to(self._acc))
        index, owner, taken = take_in_turn(wanted.flatten(0, 2), request.budget, block)
        shape = (*q.shape[:3], index.shape[1])
        chosen = tokens.gather(3, index.view(shape)).masked_fill_(~taken.view(shape), EMPTY)
        first = run.position + torch.arange(run.count, device=q.device) * run.rows
        return Selection(chosen, owner.view(shape) + first[:, None])

    def _best_of_group(self, weights: Tensor) -> Tensor:
        """``[B, Hkv, N, G * rows, M]`` to ``[B, Hkv, N, rows, M]``, the largest of the group."""
        return weights.unflatten(3, (self._request.groups, -1)).amax(3)


def wanted_blocks(request: Request, proposals: int, most: int, rows: int) -> int:
    """Key blocks proposed to a block of ``rows`` query rows; see ``TwoStage`` for the others."""
    if not request.strict:
        as_costly = proposals * request.pattern.block // rows
        proposals = max(proposals, min(most, as_costly))
    return -(-proposals * request.budget // request.key_block)


def share_among_blocks(
    scores: Tensor, outside: Tensor, causal: bool, strict: bool, band_lse: Tensor | None = None
) -> Tensor:
    """Softmax over candidate blocks of ``scores [B, Hkv, N, rows, W]``, in place.

    Its logarithm unless ``strict``.

    Args:
        scores: Scores of key blocks; what blocks that are no candidates hold does not matter.
        outside: Which blocks are candidates, bool ``[Hkv, N, W]``.
        causal: Candidates form a prefix: only columns where some query block's end need a mask.
        band_lse: ``[B, Hkv, N, rows]``, what else takes part, or None.
    """
    common = int(outside.sum(-1).min()) if causal else 0
    rest = outside[..., common:]
    bias = torch.zeros(rest.shape, dtype=scores.dtype, device=scores.device)
    scores[..., common:] += bias.masked_fill_(~rest, _HIDDEN).unsqueeze(2)
    if band_lse is None:
        normalise = torch.softmax if strict else torch.log_softmax
        return normalise(scores, -1, out=scores)
    total = torch.logaddexp(scores.logsumexp(-1), band_lse)
    scores.sub_(total.unsqueeze(-1))
    return scores.exp_() if strict else scores


def log_shares(scores: Tensor) -> Tensor:
    """Scores of tokens less the log-sum-exp of the best of every 16 of them and the band, in place.

    Args:
        scores: ``[*, M + 1]``, the band's log-sum-exp last.

    Returns:
        ``[*, M]``.
    """
    tokens, band = scores[..., :-1], scores[..., -1]
    total = torch.logaddexp(best_of_each(tokens).logsumexp(-1), band)
    return tokens.sub_(total.masked_fill_(total == _HIDDEN, 0.0).unsqueeze(-1))


def best_of_each(scores: Tensor) -> Tensor:
    """The largest of every 16 of ``scores [*, M]``."""
    missing = -scores.shape[-1] % TOGETHER
    return pad(scores, (0, missing), value=_HIDDEN).unflatten(-1, (-1, TOGETHER)).amax(-1)


def in_order(blocks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks ``[*, M]`` in order of position, those that are no real choice last."""
    order = blocks.masked_fill(~valid, torch.iinfo(blocks.dtype).max).argsort(-1)
    return blocks.gather(-1, order), valid.gather(-1, order)


def best_of(rank: Tensor, most: int, ordered: bool = False) -> tuple[Tensor, Tensor]:
    """Indices of the largest ``rank [..., M]`` and whether each is a real choice, not ``-inf``."""
    value, index = rank.topk(min(most, rank.shape[-1]), dim=-1, sorted=ordered)
    return index, value > _HIDDEN


def drop_needless(
    chosen: Tensor, best: Tensor, probs: Tensor, is_sink: Tensor, coverage: float
) -> Tensor:
    """Empties the slots that no row needs to reach the coverage; the crossing token stays.

    Args:
        chosen: Tokens in falling order of rank, ``[B, Hkv, N, C]``, ``EMPTY`` where there is none.
        best: Their columns in ``probs``.
        probs: Of every row, the band last, ``[B * Hkv * N, rows, M + 1]``.
        is_sink: Columns that are seen anyway, bool ``[B, Hkv, N, M]``.
        coverage: Share of the probability.
    """
    problems, rows = probs.shape[:2]
    seen = is_sink.reshape(problems, 1, -1)
    known = probs[..., -1:] + probs[..., :-1].mul(seen).sum(-1, keepdim=True)
    picked = probs.gather(2, best.view(problems, 1, -1).expand(-1, rows, -1))
    picked = picked * (chosen > EMPTY).view(problems, 1, -1)
    before = known + picked.cumsum(2) - picked
    needed = (before < coverage).any(1).view(best.shape)
    return chosen.masked_fill(~needed, EMPTY)


def needed_by_row(probs: Tensor, coverage: float) -> Tensor:
    """Zeroes what a row does not need to reach the coverage by itself; the band comes last."""
    ordered, order = probs[..., :-1].sort(-1, descending=True)
    before = probs[..., -1:] + ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probs[..., :-1]).scatter_(-1, order, (before < coverage).to(probs))
    return torch.cat([probs[..., :-1] * kept, probs[..., -1:]], -1)
