"""A pattern as the integer tables the kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.pattern import BlockPattern


class Tables(NamedTuple):
    """int32 tables of one pattern over one batch.

    Attributes:
        first: ``[Hkv, Lq]``, first key of each row's band; ``[Hkv, 0]`` where bands are not read.
        end: ``[Hkv, Lq]``, one past its last.
        tokens: ``[B, Hkv, N, C]``, gathered positions, empty slots at 0.
        since: Like ``tokens``, first position that sees the slot.
        until: Like ``tokens``, first position that no longer does.
        block: Query rows that share a list.
        before: Rows missing at the start of the first block.
        blocks: ``N``.
        k_len: Keys.
    """

    first: Tensor
    end: Tensor
    tokens: Tensor
    since: Tensor
    until: Tensor
    block: int
    before: int
    blocks: int
    k_len: int


def tables(
    pattern: BlockPattern,
    batch: int,
    q_len: int,
    k_len: int,
    device: torch.device,
    *,
    band: bool = True,
) -> Tables:
    """Tables for ``q_len`` queries; O(Hkv * Lq + slots). Without ``band``, those of slots alone."""
    first = end = torch.empty(len(pattern.bands), 0, dtype=torch.int32, device=device)
    if band:
        first, end = pattern.intervals(q_len, k_len, device)
    before = (k_len - q_len) % pattern.block
    blocks = -(-(before + q_len) // pattern.block)
    if pattern.tokens is None:
        none = torch.zeros(batch, len(pattern.bands), blocks, 0, dtype=torch.int32, device=device)
        slots = none, none, none
    else:
        slots = pattern.slots(device)
    tokens, since, until = (x.expand(batch, -1, -1, -1).contiguous() for x in slots)
    return Tables(first, end, tokens, since, until, pattern.block, before, blocks, k_len)
