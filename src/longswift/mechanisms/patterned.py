"""What every mechanism that is a sparse pattern shares: dispatch, statistics, the dense oracle."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.mechanism import Call, Mechanism
from longswift.core.pattern import BlockPattern
from longswift.core.types import AttentionResult, AttentionStats
from longswift.kernels import dispatch


@dataclass(frozen=True, kw_only=True)
class Patterned(Mechanism):
    """Softmax attention over a ``BlockPattern`` that does not depend on content.

    Subclasses implement ``pattern``; ``mode`` names how it was chosen in the statistics.
    """

    mode: ClassVar[str] = "static"

    @abstractmethod
    def pattern(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> BlockPattern:
        """The keys each block of queries sees, in an unpadded batch."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        name, backend = dispatch.resolve(call.backend, q.device)
        pattern = self.pattern(q.shape[2], k.shape[2], k.shape[1], call.causal)
        part = backend.attend(q, k, v, pattern, call.scale)
        stats = pattern_stats(self.name, name, self.mode, pattern, q.shape[2], k.shape[2])
        return AttentionResult(part.out, part.lse, stats)

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        pattern = self.pattern(q.shape[2], k.shape[2], k.shape[1], call.causal)
        return pattern.visible(q.shape[2], k.shape[2], q.shape[1] // k.shape[1], q.device)


def dense_keys(q_len: int, k_len: int, causal: bool) -> float:
    """Mean number of keys a query sees under full attention."""
    return k_len - (q_len - 1) / 2 if causal else float(k_len)


def keys_per_query(pattern: BlockPattern, q_len: int, k_len: int, skip: int = 0) -> float:
    """Mean number of keys scored per query: band, gathered and remainder columns.

    Args:
        pattern: The pattern.
        q_len: Queries.
        k_len: Keys.
        skip: Leading queries left out of the mean.
    """
    position = torch.arange(k_len - q_len + skip, k_len, device="cpu")
    total = 0.0
    for band, heads in Counter(pattern.bands).items():
        first, last = band.bounds(position, k_len)
        if pattern.pool is not None:
            outside = first if pattern.causal else first + (k_len - last)
            total += heads * float((outside / pattern.pool).double().mean())
        if band.reach is not None:
            first = torch.maximum(first, position - band.reach[0])
            last = torch.minimum(last, position + band.reach[1] + 1)
        if pattern.causal:
            last = torch.minimum(last, position + 1)
        total += heads * float((last - first).double().mean())
    total /= len(pattern.bands)
    if pattern.tokens is not None:
        total += _gathered_pairs(pattern, q_len, k_len, skip) / len(position)
    return total


def _gathered_pairs(pattern: BlockPattern, q_len: int, k_len: int, skip: int) -> float:
    """Query-token pairs of the gathered lists, mean over batch rows and KV heads."""
    assert pattern.tokens is not None
    offset, block = k_len - q_len, pattern.block
    device = pattern.tokens.device
    blocks = pattern.tokens.shape[2]
    start = ((k_len - 1) // block - blocks + 1 + torch.arange(blocks, device=device)) * block
    first = start.clamp(min=offset + skip)[:, None]
    end = (start + block).clamp(max=k_len)[:, None]
    if pattern.visible_from is not None:
        first = torch.maximum(first, pattern.visible_from)
    pairs = (end - first).clamp(min=0) * (pattern.tokens >= 0)
    return float(pairs.sum((2, 3)).double().mean())


def pattern_stats(
    mechanism: str,
    backend: str,
    mode: str,
    pattern: BlockPattern,
    q_len: int,
    k_len: int,
    exact_rows: int = 0,
) -> AttentionStats:
    """Statistics of one unpadded call whose first ``exact_rows`` queries were computed exactly."""
    rest = q_len - exact_rows
    keys = 0.0
    if rest:
        keys = rest / q_len * keys_per_query(pattern, q_len, k_len, exact_rows)
    if exact_rows:
        last = k_len - rest if pattern.causal else k_len
        keys += exact_rows / q_len * dense_keys(exact_rows, last, pattern.causal)
    return AttentionStats(
        mechanism=mechanism,
        backend=backend,
        mode=mode,
        keys_per_query=keys,
        density=keys / dense_keys(q_len, k_len, pattern.causal),
        dense_rows=1.0 if mode == "dense" else exact_rows / q_len,
    )
