"""Pools of the remainder that grow with the position of the queries, so that few are scored.

A block of queries that begins at position ``p`` uses the smallest of the sizes ``pool * 2**j`` for
which ``p`` lies before the end of pool ``MOST_POOLS``. That depends on the block alone, not on the
call: chunks, decoding and a whole text agree. Queries with equal pools are a stretch. Stretches
double in length, so that a call has few, and each is attended to the keys before its end.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.blocks import block_count
from longswift.core.inputs import tracked
from longswift.core.mechanism import Call
from longswift.core.pattern import BlockPattern
from longswift.core.types import Partial

# Pools before a block of queries: 131,072 tokens with pools of 256.
MOST_POOLS = 512


class Stretch(NamedTuple):
    """Queries whose pools are equally large.

    Attributes:
        rows: Which queries.
        keys: Leading keys they may see.
        pattern: Their part of the pattern, with the size of their pools.
    """

    rows: slice
    keys: int
    pattern: BlockPattern


def pool_size(position: int, pool: int) -> int:
    """Tokens per pool for a block of queries that begins at ``position``."""
    return pool << (position // (MOST_POOLS * pool)).bit_length()


def stretches(pattern: BlockPattern, q_len: int, k_len: int) -> list[Stretch]:
    """The queries of a pattern by the size of their pools, of which ``pattern.pool`` is the least.

    Bidirectional queries all have what the last one has: they see as many keys.
    """
    pool, block = pattern.pool, pattern.block
    offset = k_len - q_len
    if pool is None or k_len <= MOST_POOLS * pool:
        return [Stretch(slice(0, q_len), k_len, pattern)]
    if not pattern.causal:
        coarse = replace(pattern, pool=pool_size(k_len - 1, pool))
        return [Stretch(slice(0, q_len), k_len, coarse)]
    found, start = [], offset
    while start < k_len:
        size = pool_size(start // block * block, pool)
        # A block that holds a limit begins before it.
        end = min(-(-MOST_POOLS * size // block) * block, k_len)
        rows = slice(start - offset, end - offset)
        found.append(_stretch(pattern, size, rows, end, offset))
        start = end
    return found


def _stretch(pattern: BlockPattern, pool: int, rows: slice, keys: int, offset: int) -> Stretch:
    first = (offset + rows.start) // pattern.block - offset // pattern.block
    blocks = slice(first, first + block_count(rows.stop - rows.start, keys, pattern.block))

    def own(slots: Tensor | None) -> Tensor | None:
        return None if slots is None else slots[:, :, blocks]

    part = replace(
        pattern,
        tokens=own(pattern.tokens),
        visible_from=own(pattern.visible_from),
        visible_until=own(pattern.visible_until),
        listed=None if pattern.listed is None else pattern.listed[:, blocks],
        pool=pool,
    )
    return Stretch(rows, keys, part)


def attend_by_stretch(
    backend: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    call: Call,
    bands: Partial | None,
) -> Partial:
    """``backend.attend`` with pools that grow.

    Args:
        backend: A backend's module.
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        pattern: Which keys are seen, with the smallest pools.
        call: Scale, summary and bias.
        bands: The result of ``attend_bands`` if the caller has it; overwritten, by the result where
            the backend leaves it there.
    """
    scale, bias = call.scale, call.bias
    parts = stretches(pattern, q.shape[2], k.shape[2])
    if len(parts) == 1:
        given = {"bands": bands, "summary": call.summary, "bias": bias}
        return backend.attend(q, k, v, parts[0].pattern, scale, **given)
    # Autograd would take what stretches write into one tensor for changes to each other.
    apart = tracked(q, k, v) or bias is not None and bias.requires_grad
    in_place = bands is not None and not apart
    found: list[Partial] = []
    for rows, keys, own in parts:
        part = None if bands is None else Partial(*(x[:, :, rows] for x in bands))
        if part is not None and apart:
            part = Partial(*(x.clone() for x in part))
        result: Partial = backend.attend(
            q[:, :, rows],
            k[:, :, :keys],
            v[:, :, :keys],
            own,
            scale,
            bands=part,
            summary=call.summary if keys == k.shape[2] else None,
            bias=bias,
        )
        in_place &= part is not None and result.out is part.out and result.lse is part.lse
        found.append(result)
    if bands is not None and in_place:
        return bands
    return Partial(*(torch.cat(of, 2) for of in zip(*found, strict=True)))
