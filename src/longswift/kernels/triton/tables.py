"""A pattern as the integer tables the kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.pattern import BlockPattern

# Beyond every position: a slot nobody sees.
_NEVER = torch.iinfo(torch.int32).max


class Tables(NamedTuple):
    """int32 tables of one pattern over one batch.

    Attributes:
        first: ``[Hkv, Lq]``, first key of each row's band.
        end: ``[Hkv, Lq]``, one past its last.
        tokens: ``[B, Hkv, N, C]``, gathered positions, empty slots at 0.
        since: Like ``tokens``, first position that sees the slot.
        until: Like ``tokens``, first position that no longer sees it.
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

    @property
    def slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels read of every slot."""
        return self.tokens, self.since, self.until


def tables(
    pattern: BlockPattern, batch: int, q_len: int, k_len: int, device: torch.device
) -> Tables:
    """Tables for ``q_len`` queries; O(Hkv * Lq + slots)."""
    first, end = pattern.intervals(q_len, k_len, device)
    before = (k_len - q_len) % pattern.block
    blocks = -(-(before + q_len) // pattern.block)
    if pattern.tokens is None:
        slots = torch.zeros(batch, len(pattern.bands), blocks, 0, dtype=torch.int32, device=device)
    else:
        slots = pattern.tokens.to(device=device, dtype=torch.int32).expand(batch, -1, -1, -1)
    since = slots if pattern.causal else torch.zeros_like(slots)
    if pattern.visible_from is not None:
        since = torch.maximum(since, _position(pattern.visible_from, slots, k_len))
    until = torch.full_like(slots, k_len)
    if pattern.visible_until is not None:
        until = torch.minimum(until, _position(pattern.visible_until, slots, k_len))
    return Tables(
        first,
        end,
        slots.clamp(min=0).contiguous(),
        since.masked_fill(slots < 0, _NEVER).contiguous(),
        until.contiguous(),
        pattern.block,
        before,
        blocks,
        k_len,
    )


def _position(limit: Tensor, slots: Tensor, k_len: int) -> Tensor:
    """A limit of visibility in the type of ``slots``; "never" is a number that type lacks."""
    return limit.clamp(max=k_len).to(device=slots.device, dtype=slots.dtype)
