"""The coverage guard: blocks whose keys hold too little of the attention are computed densely.

Two rows of every block of queries, evenly spaced, are scored exactly against all keys; the block's
coverage is the mean captured mass of these rows, of the worst query head of the GQA group. Where it
falls short of the target, the block is computed with every key for that KV head.

Cost: ``2 / block`` of full attention's scores for the probes (1/64 with blocks of 128), plus the
dense blocks. A call of one query is its own probe: exact, and as dear as dense scores.

What it cannot see: a row that is not probed. Where attention of a block differs strongly between
its rows, as for the one row that asks for a rare fact, the estimate says little about that row.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.blocks import block_count, block_runs
from longswift.core.errors import UnsupportedError, problem
from longswift.core.pattern import BlockPattern
from longswift.core.types import Partial
from longswift.mechanisms.coverage import captured
from longswift.mechanisms.patterned import full_pattern

PROBES = 2
# Rounding of a mass that is 1.
_ROUNDING = 1e-5


class Short(NamedTuple):
    """What the probes found.

    Attributes:
        dense: bool ``[B, Hkv, N]``, blocks that fall short.
        lowest: The smallest coverage of a block.
        lowest_after: The smallest of the blocks that do not fall short; 1 if all do.
        keys: Keys the probes scored per query, mean over the queries.
    """

    dense: Tensor
    lowest: float
    lowest_after: float
    keys: float


def short_blocks(
    q: Tensor,
    k: Tensor,
    pattern: BlockPattern,
    scale: float,
    target: float,
    bias: ScoreBias | None = None,
    *,
    strict: bool = False,
) -> Short:
    """Probe every block of an unpadded batch.

    Raises:
        UnsupportedError: The choice is strictly causal, and probes are later rows of a block.
    """
    if strict:
        raise UnsupportedError(
            problem(
                "MSSwift.min_coverage",
                expected="shared causality (probes are later rows of a block)",
                got="strict causality, the default while training",
                fix="Set min_coverage=None for training, or causality='shared'.",
            )
        )
    q_len, k_len = q.shape[2], k.shape[2]
    blocks, count = block_count(q_len, k_len, pattern.block), min(PROBES, q_len)
    starts = [
        (run.row + i * run.rows, run.rows)
        for run in block_runs(q_len, k_len, pattern.block, blocks)
        for i in range(run.count)
    ]
    probes = [row + size * (2 * i + 1) // (2 * count) for row, size in starts for i in range(count)]
    rows = torch.tensor(probes, device=q.device)
    mass = captured(q, k, rows, pattern, scale, q_len, bias).mass
    batch, kv_heads = k.shape[:2]
    coverage = mass.view(batch, kv_heads, -1, blocks, count).mean(-1).amin(2)
    scored = sum(row + k_len - q_len + 1 if pattern.causal else k_len for row in probes)
    dense = coverage < target - _ROUNDING
    return Short(
        dense=dense,
        lowest=float(coverage.min()),
        lowest_after=float(coverage.masked_fill(dense, 1.0).min()),
        keys=scored / q_len,
    )


def stretches(
    dense: Tensor, pattern: BlockPattern, q_len: int, k_len: int
) -> Iterator[tuple[int, int, slice]]:
    """Batch row, KV head and query rows of every stretch of neighbouring dense blocks."""
    first = (k_len - q_len) // pattern.block
    for b, by_head in enumerate(dense.tolist()):
        for head, blocks in enumerate(by_head):
            start = None
            for i, short in enumerate([*blocks, False]):
                if short and start is None:
                    start = i
                elif not short and start is not None:
                    row = (first + start) * pattern.block - (k_len - q_len)
                    end = (first + i) * pattern.block - (k_len - q_len)
                    yield b, head, slice(max(row, 0), min(end, q_len))
                    start = None


def fill_densely(
    part: Partial,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    dense: Tensor,
    backend: ModuleType,
    bias: ScoreBias | None = None,
) -> tuple[Partial, tuple[float, ...]]:
    """``part`` with the blocks in ``dense [B, Hkv, N]`` computed over every key.

    Returns:
        The result, and per KV head the keys this scored per query.
    """
    batch, kv_heads, k_len = k.shape[:3]
    q_len, groups = q.shape[2], q.shape[1] // kv_heads
    keys = [0.0] * kv_heads
    if not bool(dense.any()):
        return part, tuple(keys)
    out, lse = part
    if out.requires_grad:
        out, lse = out.clone(), lse.clone()
    for b, head, rows in stretches(dense, pattern, q_len, k_len):
        own, count = slice(head * groups, (head + 1) * groups), rows.stop - rows.start
        end = k_len - q_len + rows.stop if pattern.causal else k_len
        added = None
        if bias is not None:
            # The kernel takes these queries for the last ones.
            added = bias.heads(own).moved(k_len - q_len + rows.stop - end)
        exact = backend.attend(
            q[b : b + 1, own, rows],
            k[b : b + 1, head : head + 1, :end],
            v[b : b + 1, head : head + 1, :end],
            full_pattern(end, 1, pattern.causal, q_len=count),
            scale,
            bias=added,
        )
        out[b, own, rows], lse[b, own, rows] = exact.out[0], exact.lse[0]
        each = end - (count - 1) / 2 if pattern.causal else k_len
        keys[head] += each * count / (q_len * batch)
    return Partial(out, lse), tuple(keys)


def show_densely(part: Tensor, seen: Tensor, dense: Tensor, block: int) -> Tensor:
    """``part [B, Hq, Lq, Lk]``, what queries see, with all that those of dense blocks have seen."""
    q_len, k_len = part.shape[2:]
    groups = part.shape[1] // dense.shape[1]
    position = torch.arange(k_len - q_len, k_len, device=part.device)
    index = position // block - (k_len - q_len) // block
    whole = dense[:, :, index].repeat_interleave(groups, 1).unsqueeze(3)
    return torch.where(whole, seen, part)
