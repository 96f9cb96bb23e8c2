"""``BlockMask``s from block indices, on the device: never through a mask over queries and keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from longswift.core.pattern import Band, BlockPattern

# FlexAttention's own default: its tiles have to divide it.
BLOCK = 128

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Blocks = tuple[Tensor, Tensor]


def band_blocks(
    pattern: BlockPattern, q_len: int, k_len: int, groups: int, device: torch.device
) -> BlockMask:
    """The bands of a pattern, ``O(Hkv * (Lq + blocks listed))``.

    First and last key of a row never decrease along the rows. So the key blocks a block of queries
    touches are an interval, those it sees whole are an interval inside it, and the same holds the
    other way round for the backward pass.
    """
    first, end = pattern.intervals(q_len, k_len, device)
    q_blocks, k_blocks = -(-q_len // BLOCK), -(-k_len // BLOCK)
    top = torch.arange(q_blocks, device=device) * BLOCK
    bottom = (top + BLOCK).clamp(max=q_len) - 1
    heads = slice(None) if len(set(pattern.bands)) > 1 else slice(1)
    touched = first[heads, top] // BLOCK, -(end[heads, bottom] // -BLOCK)
    whole = -(first[heads, bottom] // -BLOCK), end[heads, top] // BLOCK
    span = max(_span(band, pattern.causal) for band in pattern.bands) // BLOCK + 2
    by_query = _listed(touched, whole, k_blocks, span)
    key_block = torch.arange(k_blocks, dtype=torch.int32, device=device)
    by_key = _listed(_crossed(touched, key_block), _crossed(whole, key_block), q_blocks, span)

    kv_head = _kv_heads(first.shape[0], groups, device)

    def inside(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        head = kv_head[h]
        return (k_index >= first[head, q_index]) & (k_index < end[head, q_index])

    repeats = groups if touched[0].shape[0] > 1 else 1
    tensors = [x.repeat_interleave(repeats, 0).unsqueeze(0) for x in (*by_query, *by_key)]
    return _assemble(tensors, (q_len, k_len), inside)


def gathered_blocks(since: Tensor, until: Tensor, rows: int, groups: int) -> BlockMask:
    """All of the gathered keys, each for a range of rows.

    Args:
        since: int32 ``[Z, Hkv, C]``, first of the ``rows`` rows that sees a key.
        until: Likewise, first that no longer does.
        rows: Queries of one problem.
        groups: Query heads per KV head.
    """
    keys = since.shape[2]
    q_blocks, k_blocks = -(-rows // BLOCK), -(-keys // BLOCK)

    kv_head = _kv_heads(since.shape[1], groups, since.device)

    def shown(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        head = kv_head[h]
        return (since[b, head, k_index] <= q_index) & (q_index < until[b, head, k_index])

    tensors = []
    for here, there in ((q_blocks, k_blocks), (k_blocks, q_blocks)):
        index = torch.arange(there, dtype=torch.int32, device=since.device)
        count = torch.full((1, 1, here), there, dtype=torch.int32, device=since.device)
        index = index.expand(1, 1, here, there).contiguous()
        # FlexAttention compiles another kernel where it is given no list of whole blocks.
        tensors += [count, index, torch.zeros_like(count), index]
    return _assemble(tensors, (rows, keys), shown)


def _kv_heads(kv_heads: int, groups: int, device: torch.device) -> Tensor:
    """KV head of each query head, int32 ``[Hq]``: a number in a mask would be a variable, too."""
    return torch.arange(kv_heads * groups, dtype=torch.int32, device=device) // groups


def _assemble(tensors: list[Tensor], lengths: tuple[int, int], mask_mod: MaskMod) -> BlockMask:
    """From four pairs of counts and indices: partial and whole by query, then by key."""
    by_query, by_key = tensors[:4], tensors[4:]
    return BlockMask(
        lengths,
        *(by_query[0], by_query[1], by_query[2], by_query[3]),
        *(by_key[0], by_key[1], by_key[2], by_key[3]),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=mask_mod,
    )


def _span(band: Band, causal: bool) -> int:
    """Most keys a block of queries can have between its first and its last."""
    ahead = 0 if causal else band.tile + band.right
    return BLOCK + band.tile + band.left + ahead


def _crossed(blocks: Blocks, other: Tensor) -> Blocks:
    """Intervals ``[start, end)`` over keys by query, as intervals over queries by key."""
    start, end = (x.contiguous() for x in blocks)
    other = other.expand(start.shape[0], -1).contiguous()
    return (
        torch.searchsorted(end, other, right=True, out_int32=True),
        torch.searchsorted(start, other, right=True, out_int32=True),
    )


def _listed(touched: Blocks, whole: Blocks, most: int, span: int) -> tuple[Tensor, ...]:
    """Counts ``[H, R]`` and indices ``[H, R, W]`` of the partial blocks, then of the whole ones."""
    width = min(most, span)
    start, end = touched
    nothing = whole[1] <= whole[0]
    whole_start, whole_end = (torch.where(nothing, end, x) for x in whole)
    before = (whole_start - start).clamp(min=0)
    after = (end - whole_end).clamp(min=0)
    slot = torch.arange(width, dtype=torch.int32, device=start.device)
    partial = torch.where(
        slot < before[..., None],
        start[..., None] + slot,
        whole_end[..., None] + slot - before[..., None],
    )
    full = whole_start[..., None] + slot
    counts = before + after, whole_end - whole_start
    indices = (x.clamp(0, most - 1) for x in (partial, full))
    return tuple(x.int().contiguous() for pair in zip(counts, indices, strict=True) for x in pair)
