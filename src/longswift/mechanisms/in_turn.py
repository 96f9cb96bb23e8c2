"""Few rows behind a cache, such as tokens that are checked together: chosen for as if decoded.

A choice for all of them looks at every key, one by one, for which ``k`` single rows need the
summaries of its pages only; and whoever checks a guess sees what decoding would have seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from longswift.core.hardware import decoded_rows
from longswift.core.mechanism import Call
from longswift.core.types import AttentionResult, AttentionStats

Forward = Callable[[Tensor, Tensor, Tensor, Call], AttentionResult]


def come_in_turn(q_len: int, block: int, k: Tensor, call: Call) -> bool:
    """Whether several rows behind keys ``k`` are few enough; complete blocks choose together."""
    few = 1 < q_len <= decoded_rows(k.device) and q_len < block
    return few and call.causal and call.summary is not None


def forward_in_turn(
    name: str, forward: Forward, q: Tensor, k: Tensor, v: Tensor, call: Call, exact_rows: int
) -> AttentionResult:
    """Causal attention of a mechanism to all keys up to each row's own, row by row.

    Args:
        name: Of the mechanism.
        forward: Its attention of an unpadded batch.
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        call: What was asked for, with page summaries of all keys.
        exact_rows: Leading rows that see everything, together.
    """
    assert call.summary is not None
    end = k.shape[2] - q.shape[2]
    parts = []
    for rows in q.split([exact_rows] * (exact_rows > 0) + [1] * (q.shape[2] - exact_rows), 2):
        end += rows.shape[2]
        own = replace(call, summary=call.summary.until(end))
        parts.append(forward(rows, k[:, :, :end], v[:, :, :end], own))
    stats = [part.stats for part in parts for _ in range(part.out.shape[2])]
    out, lse = (torch.cat(of, 2) for of in zip(*(part[:2] for part in parts), strict=True))
    return AttentionResult(out, lse, AttentionStats.over_batch(name, stats))
