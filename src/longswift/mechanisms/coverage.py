"""How much of full attention's mass lies on the keys a pattern shows: exact, for chosen rows.

``P`` rows cost ``O(P * Lk * D)``: a few dozen rows of a call, or one or two of every block, are
cheap beside the call itself. Memory is bounded by working through the rows in steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.pattern import BlockPattern
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import CapturedMass

# Score elements held at once: 16 MiB in fp32.
_SCORES = 1 << 22
# Rows of a call whose captured mass is measured; their mean has a standard error of 1/8 of the
# spread between rows.
SAMPLED_ROWS = 64


class Captured(NamedTuple):
    """Of each measured row.

    Attributes:
        mass: ``[B, Hq, P]`` share of full attention's mass on the keys seen one by one.
        lse: ``[B, Hq, P]`` log-sum-exp over all visible keys.
    """

    mass: Tensor
    lse: Tensor


class RowMass:
    """Full attention's probabilities of some query rows, summed up along the keys.

    Args:
        q: ``[B, Hq, P, D]``, the rows.
        k: ``[B, Hkv, Lk, D]`` in the accumulator dtype; keys behind the last row may be missing.
        position: ``[P]`` key position of each row.
        scale: Factor on the scores.
        causal: Whether later keys are hidden.
        bias: Additions to the scaled scores.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        position: Tensor,
        scale: float,
        causal: bool,
        bias: ScoreBias | None = None,
    ) -> None:
        batch, heads, rows, _ = q.shape
        self.position = position
        self._kv_heads = k.shape[1]
        stacked = (q.to(k.dtype) * scale).view(batch, self._kv_heads, -1, q.shape[3])
        scores = (stacked @ k.transpose(2, 3)).view(batch, heads, rows, k.shape[2])
        if bias is not None:
            scores += bias.rows(position, k.shape[2])
        if causal:
            later = torch.arange(k.shape[2], device=k.device) > position[:, None]
            scores.masked_fill_(later, float("-inf"))
        self.lse = torch.logsumexp(scores, -1)
        self._probs = scores.sub_(self.lse.unsqueeze(-1)).exp_()
        self._sums = self._probs.cumsum(-1)

    def captured(self, pattern: BlockPattern, q_len: int, k_len: int) -> Tensor:
        """Mass on the keys that ``pattern``, made for ``q_len`` queries, shows each row."""
        mass = self._of_bands(pattern, k_len)
        if pattern.tokens is not None and pattern.tokens.shape[-1]:
            mass = mass + self._of_tokens(pattern, k_len - q_len)
        return mass.clamp_(max=1.0)

    def _of_bands(self, pattern: BlockPattern, k_len: int) -> Tensor:
        edges = []
        for band in pattern.bands:
            first, last = band.bounds(self.position, k_len)
            if band.reach is not None:
                first = torch.maximum(first, self.position - band.reach[0])
                last = torch.minimum(last, self.position + band.reach[1] + 1)
            # Later keys may not be here at all; their mass is zero.
            last = last.clamp(max=self._sums.shape[-1])
            edges.append(torch.stack([first, torch.maximum(last, first)]))
        batch, heads, rows = self._sums.shape[:3]
        edge = torch.stack(edges).repeat_interleave(heads // self._kv_heads, 0)
        edge = edge.transpose(1, 2).expand(batch, heads, rows, 2)
        before = self._sums.gather(3, (edge - 1).clamp(min=0)).masked_fill_(edge == 0, 0.0)
        return before[..., 1] - before[..., 0]

    def _of_tokens(self, pattern: BlockPattern, offset: int) -> Tensor:
        assert pattern.tokens is not None
        batch, heads, rows = self._sums.shape[:3]
        block = self.position // pattern.block - offset // pattern.block
        slots = pattern.tokens[:, :, block.to(pattern.tokens.device)].to(self._sums.device)
        shown = slots >= 0
        if pattern.visible_from is not None:
            since = pattern.visible_from[:, :, block.to(pattern.tokens.device)]
            shown &= since.to(shown.device) <= self.position[:, None]
        slots = slots.long().clamp(min=0, max=self._probs.shape[-1] - 1)
        shape = (batch, self._kv_heads, heads // self._kv_heads, rows, slots.shape[-1])
        by_group = self._probs.view(*shape[:4], -1)
        found = by_group.gather(4, slots.unsqueeze(2).expand(shape))
        return found.mul_(shown.unsqueeze(2)).sum(4).view(batch, heads, rows)


@torch.no_grad()
def captured(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    pattern: BlockPattern,
    scale: float,
    q_len: int,
    bias: ScoreBias | None = None,
) -> Captured:
    """Captured mass of the query rows ``rows [P]``, ascending, of an unpadded batch.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        rows: Indices into the queries.
        pattern: Made for the last ``q_len`` of the queries, to which all rows belong.
        scale: Factor on the scores.
        q_len: Queries the pattern was made for.
        bias: Additions to the scaled scores.
    """
    k_len, offset = k.shape[2], k.shape[2] - q.shape[2]
    keys = k.to(accumulator_dtype(k.dtype))
    parts = []
    for start, end in _steps(len(rows), q.shape[0] * q.shape[1] * k_len):
        position = rows[start:end] + offset
        seen = int(position[-1]) + 1 if pattern.causal else k_len
        queries, causal = q[:, :, rows[start:end]], pattern.causal
        of = RowMass(queries, keys[:, :, :seen], position, scale, causal, bias)
        parts.append(Captured(of.captured(pattern, q_len, k_len), of.lse))
    mass, lse = (torch.cat([part[i] for part in parts], 2) for i in range(2))
    return Captured(mass, lse)


def _steps(rows: int, per_row: int) -> Iterator[tuple[int, int]]:
    step = max(1, _SCORES // max(1, per_row))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def sample_rows(q_len: int, k_len: int, count: int) -> list[int]:
    """``count`` of ``q_len`` rows, one at random from each of as many equal stretches.

    The same ones for the same lengths; every row when there are no more than ``count``.
    """
    if q_len <= count:
        return list(range(q_len))
    rng = random.Random(f"{q_len} {k_len}")
    edges = [i * q_len // count for i in range(count + 1)]
    return [rng.randrange(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def captured_mass(
    q: Tensor,
    k: Tensor,
    pattern: BlockPattern | None,
    scale: float,
    lse: Tensor,
    exact_rows: int,
    dense: Tensor | None,
    bias: ScoreBias | None = None,
) -> CapturedMass:
    """Captured mass of sampled rows, or of all of a short call.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        pattern: Made for the queries behind the first ``exact_rows``; None if there are none.
        scale: Factor on the scores.
        lse: ``[B, Hq, Lq]`` of the result, pooled means included.
        exact_rows: Leading queries that saw every key.
        dense: bool ``[B, Hkv, N]``, blocks of the pattern that saw every key all the same.
        bias: Additions to the scaled scores.
    """
    q_len, k_len, heads = q.shape[2], k.shape[2], q.shape[1]
    rows = sample_rows(q_len, k_len, SAMPLED_ROWS)
    mass = torch.ones(q.shape[0], heads, len(rows), dtype=lse.dtype, device=q.device)
    shadow = torch.zeros_like(mass)
    below = sum(row < exact_rows for row in rows)
    if pattern is not None and below < len(rows):
        row = torch.tensor(rows[below:], device=q.device)
        found = captured(q, k, row, pattern, scale, q_len - exact_rows, bias)
        share = (found.lse - lse[:, :, row].detach()).exp() * found.mass
        if dense is not None:
            first = (k_len - q_len + exact_rows) // pattern.block
            block = (row + (k_len - q_len)) // pattern.block - first
            whole = dense[:, :, block].repeat_interleave(heads // k.shape[1], 1)
            found.mass.masked_fill_(whole, 1.0)
            share.masked_fill_(whole, 1.0)
        mass[:, :, below:] = found.mass
        if pattern.pool is not None:
            shadow[:, :, below:] = 1.0 - share.clamp(max=1.0)
    return CapturedMass(
        basis="exact" if len(rows) == q_len else "sampled",
        rows=len(rows),
        mean=tuple(mass.mean((0, 2)).tolist()),
        lowest=tuple(mass.amin((0, 2)).tolist()),
        remainder=tuple(shadow.mean((0, 2)).tolist()),
    )
