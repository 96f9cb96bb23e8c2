"""Sinks, the leading tokens that every query sees, as gathered tokens of each block of queries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longswift.core.pattern import BlockPattern
from longswift.core.pools import block_edges
from longswift.mechanisms.selectors.base import EMPTY


def sink_slots(
    pattern: BlockPattern, q_len: int, k_len: int, sinks: int, device: torch.device
) -> Tensor:
    """Sinks outside each block's band, int32 ``[1, Hkv, N, sinks]``. Not to be written to."""
    if q_len == 1 and all(start >= sinks for start in _starts(pattern, k_len)):
        return _every_sink(len(pattern.bands), sinks, device)
    return _slots(_bare(pattern), q_len, k_len, sinks, device)


def tokens_listed(pattern: BlockPattern, q_len: int, k_len: int, sinks: int, budget: int) -> Tensor:
    """How many tokens blocks gather if they find as many as there are, ``[Hkv, N]`` on CPU."""
    if q_len == 1 and pattern.causal:
        counts = [min(s, sinks) + min(max(s - sinks, 0), budget) for s in _starts(pattern, k_len)]
        return torch.tensor(counts, device="cpu").unsqueeze(1)
    return _listed(_bare(pattern), q_len, k_len, sinks, budget)


def _starts(pattern: BlockPattern, k_len: int) -> list[int]:
    """First keys of the bands of a last row."""
    return [band.at(k_len - 1, k_len)[0] for band in pattern.bands]


@functools.lru_cache(maxsize=4)
def _every_sink(kv_heads: int, sinks: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(sinks, dtype=torch.int32, device=device).repeat(1, kv_heads, 1, 1)


def _bare(pattern: BlockPattern) -> BlockPattern:
    """What of a pattern decides where its bands lie; it can be hashed."""
    return BlockPattern(causal=pattern.causal, bands=pattern.bands, block=pattern.block)


# Positions are made where they are used once per shape: copies to a GPU would wait for it.
@functools.lru_cache(maxsize=4)
def _slots(
    pattern: BlockPattern, q_len: int, k_len: int, sinks: int, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        start, end = block_edges(pattern, q_len, k_len)[..., None].unbind(-2)
        token = torch.arange(min(sinks, k_len), dtype=torch.int32, device="cpu")
        slots = torch.where((token < start) | (token >= end), token, EMPTY)
        return slots.to(device, torch.int32).unsqueeze(0)


@functools.lru_cache(maxsize=4)
def _listed(pattern: BlockPattern, q_len: int, k_len: int, sinks: int, budget: int) -> Tensor:
    with torch.inference_mode(False):
        start, end = block_edges(pattern, q_len, k_len).unbind(-1)
        seen, outside = start.clamp(max=sinks), start
        if not pattern.causal:
            seen, outside = seen + (sinks - end).clamp(min=0), start + k_len - end
        return seen + (outside - seen).clamp(max=budget)
