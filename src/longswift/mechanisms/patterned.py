"""What every mechanism that is a sparse pattern shares: dispatch, statistics, the dense oracle."""

from __future__ import annotations

from abc import abstractmethod
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

    def exact_part(self) -> Mechanism | None:
        return self

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        pattern = self.pattern(q.shape[2], k.shape[2], k.shape[1], call.causal)
        return pattern.visible(q.shape[2], k.shape[2], q.shape[1] // k.shape[1], q.device)


def dense_keys(q_len: int, k_len: int, causal: bool) -> float:
    """Mean number of keys a query sees under full attention."""
    return k_len - (q_len - 1) / 2 if causal else float(k_len)


def keys_per_head(
    pattern: BlockPattern, q_len: int, k_len: int, skip: int = 0
) -> tuple[float, ...]:
    """Mean number of keys scored per query of each KV head: band, gathered, remainder columns.

    Args:
        pattern: The pattern.
        q_len: Queries.
        k_len: Keys.
        skip: Leading queries left out of the mean.
    """
    position = torch.arange(k_len - q_len + skip, k_len, device="cpu")
    found = []
    for band in pattern.bands:
        keys = 0.0
        first, last = band.bounds(position, k_len)
        if pattern.pool is not None:
            outside = first if pattern.causal else first + (k_len - last)
            keys += float((outside / pattern.pool).double().mean())
        if band.reach is not None:
            first = torch.maximum(first, position - band.reach[0])
            last = torch.minimum(last, position + band.reach[1] + 1)
        if pattern.causal:
            last = torch.minimum(last, position + 1)
        found.append(keys + float((last - first).double().mean()))
    if pattern.tokens is None:
        return tuple(found)
    pairs = _gathered_pairs(pattern, q_len, k_len, skip)
    return tuple(keys + pairs[head] / len(position) for head, keys in enumerate(found))


def _gathered_pairs(pattern: BlockPattern, q_len: int, k_len: int, skip: int) -> list[float]:
    """Query-token pairs of the gathered lists of each KV head, mean over batch rows."""
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
    counts: list[float] = pairs.sum((2, 3)).double().mean(0).tolist()
    return counts


def _head_density(
    pattern: BlockPattern,
    q_len: int,
    k_len: int,
    exact_rows: int = 0,
    more_keys: tuple[float, ...] = (),
) -> tuple[float, ...]:
    """Keys each KV head scores as a share of full attention's; arguments as ``pattern_stats``."""
    rest = q_len - exact_rows
    by_head = [0.0] * len(pattern.bands)
    if rest:
        by_head = [rest / q_len * x for x in keys_per_head(pattern, q_len, k_len, exact_rows)]
    if more_keys:
        by_head = [x + rest / q_len * more for x, more in zip(by_head, more_keys, strict=True)]
    exact = 0.0
    if exact_rows:
        last = k_len - rest if pattern.causal else k_len
        exact = exact_rows / q_len * dense_keys(exact_rows, last, pattern.causal)
    return tuple((keys + exact) / dense_keys(q_len, k_len, pattern.causal) for keys in by_head)


def pattern_stats(
    mechanism: str,
    backend: str,
    mode: str,
    pattern: BlockPattern,
    q_len: int,
    k_len: int,
    exact_rows: int = 0,
    more_keys: tuple[float, ...] = (),
) -> AttentionStats:
    """Statistics of one unpadded call whose first ``exact_rows`` queries were computed exactly.

    ``more_keys`` says what each KV head scored beyond the pattern, per query it was made for.
    """
    by_head = _head_density(pattern, q_len, k_len, exact_rows, more_keys)
    density = sum(by_head) / len(by_head)
    return AttentionStats(
        mechanism=mechanism,
        backend=backend,
        mode=mode,
        keys_per_query=density * dense_keys(q_len, k_len, pattern.causal),
        density=density,
        dense_rows=1.0 if mode == "dense" else exact_rows / q_len,
        density_by_head=by_head,
    )
