"""What every mechanism that is a sparse pattern shares: dispatch, statistics, the dense oracle."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
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

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        training: bool | None = None,
    ) -> AttentionResult:
        """Dense specification: explicit masks over all pairs, O(Lq * Lk) memory."""
        return self(
            q,
            k,
            v,
            causal=causal,
            key_mask=key_mask,
            scale=scale,
            backend="reference",
            training=training,
        )

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


def keys_per_query(pattern: BlockPattern, q_len: int, k_len: int) -> float:
    """Mean number of key slots scored per query: band, gathered and remainder columns."""
    position = torch.arange(k_len - q_len, k_len)
    total = 0.0
    for band in pattern.bands:
        first, last = band.bounds(position, k_len)
        if band.reach is not None:
            first = torch.maximum(first, position - band.reach[0])
            last = torch.minimum(last, position + band.reach[1] + 1)
        if pattern.causal:
            last = torch.minimum(last, position + 1)
        total += float((last - first).double().mean())
        if pattern.pool is not None:
            outside = first if pattern.causal else first + (k_len - last)
            total += float((outside / pattern.pool).double().mean())
    total /= len(pattern.bands)
    if pattern.tokens is not None:
        total += float((pattern.tokens >= 0).sum(-1).double().mean())
    return total


def pattern_stats(
    mechanism: str, backend: str, mode: str, pattern: BlockPattern, q_len: int, k_len: int
) -> AttentionStats:
    """Statistics of one unpadded call."""
    keys = keys_per_query(pattern, q_len, k_len)
    return AttentionStats(
        mechanism=mechanism,
        backend=backend,
        mode=mode,
        keys_per_query=keys,
        density=keys / dense_keys(q_len, k_len, pattern.causal),
        dense_rows=1.0 if mode == "dense" else 0.0,
    )


def blend_stats(stats: AttentionStats, dense_rows: int, q_len: int, k_len: int) -> AttentionStats:
    """Statistics of the last rows of a causal call, blended with ``dense_rows`` exact ones."""
    if dense_rows == 0:
        return stats
    share = dense_rows / q_len
    exact = dense_keys(dense_rows, k_len - q_len + dense_rows, True)
    keys = share * exact + (1 - share) * stats.keys_per_query
    return replace(
        stats,
        keys_per_query=keys,
        density=keys / dense_keys(q_len, k_len, True),
        dense_rows=share,
    )
