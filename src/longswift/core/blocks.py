"""Walking over blocks of queries, gathering scattered tokens, and buffers that are reused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


class BlockRun(NamedTuple):
    """Consecutive query blocks with equally many rows.

    Attributes:
        first: Index of the first block among those the queries touch.
        count: Number of blocks.
        row: First query row.
        rows: Query rows per block.
        position: Key position of the first query row.
    """

    first: int
    count: int  # type: ignore[assignment]
    row: int
    rows: int
    position: int


def block_count(q_len: int, k_len: int, block: int) -> int:
    """Blocks of the key grid that the last ``q_len`` of ``k_len`` positions touch."""
    return (k_len - 1) // block - (k_len - q_len) // block + 1 if q_len else 0


def block_runs(q_len: int, k_len: int, block: int, most: int) -> Iterator[BlockRun]:
    """Blocks in order, in runs of at most ``most``; a cut first or last block is its own run.

    Blocks lie on a grid counted from key position 0; query ``i`` sits at ``k_len - q_len + i``.
    """
    offset = k_len - q_len
    position, index = offset, 0
    while position < k_len:
        block_end = (position // block + 1) * block
        if position % block or block_end > k_len:
            rows, count = min(block_end, k_len) - position, 1
        else:
            rows, count = block, min(most, (k_len - position) // block)
        yield BlockRun(index, count, position - offset, rows, position)
        position, index = position + rows * count, index + count


def equal_neighbours(values: Iterable[int]) -> Iterator[tuple[slice, int]]:
    """Stretches of equal values, and the value of each."""
    first = 0
    for value, same in groupby(values):
        end = first + len(list(same))
        yield slice(first, end), value
        first = end


def key_blocks_before(run: BlockRun, index: int, block: int, key_block: int) -> int:
    """Key blocks that begin before block ``index`` of a run does, whatever is seen of them."""
    return (run.position // block + index) * block // key_block


def entry_levels(
    run: BlockRun, block: int, key_block: int, blocks: int | None, levels: Callable[[int], int]
) -> Iterator[tuple[slice, int]]:
    """Blocks of a run that enter a tree of boxes around key blocks at one level, and the level.

    It depends on the position alone, so that the tree is entered alike in every chunk.

    Args:
        run: The run.
        block: Query rows of a complete block.
        key_block: Keys of a key block.
        blocks: Key blocks that every query may see, or None in causal attention.
        levels: Levels above so many key blocks at which their tree is entered.
    """
    return equal_neighbours(
        levels(key_blocks_before(run, index, block, key_block) if blocks is None else blocks)
        for index in range(run.count)
    )


def tokens_of_blocks(blocks: Tensor, block: int, k_len: int) -> Tensor:
    """Key positions, int32 ``[1, Hkv, N, C * block]``, of key blocks ``[Hkv, N, C]``.

    -1 marks an empty slot in both; the last block may be cut short.
    """
    tokens = blocks[..., None] * block + torch.arange(block, device=blocks.device)
    real = (blocks >= 0)[..., None] & (tokens < k_len)
    return torch.where(real, tokens, -1).flatten(2).unsqueeze(0).to(torch.int32)


def stack_queries(x: Tensor, run: BlockRun, kv_heads: int) -> Tensor:
    """Rows of a run by KV head and block: ``[B, Hq, Lq, *]`` to ``[B, Hkv, count, G * rows, *]``.

    Also serves per-row figures such as ``lse [B, Hq, Lq]``.
    """
    batch, heads = x.shape[:2]
    part = x[:, :, run.row : run.row + run.count * run.rows]
    tail = x.shape[3:]
    part = part.reshape(batch, kv_heads, heads // kv_heads, run.count, run.rows, *tail)
    return part.transpose(2, 3).reshape(
        batch, kv_heads, run.count, heads // kv_heads * run.rows, *tail
    )


def unstack_queries(x: Tensor, run: BlockRun, heads: int) -> Tensor:
    """Inverse of ``stack_queries``, to ``[B, Hq, count * rows, *]``."""
    batch, kv_heads = x.shape[:2]
    tail = x.shape[4:]
    part = x.reshape(batch, kv_heads, run.count, heads // kv_heads, run.rows, *tail)
    return part.transpose(2, 3).reshape(batch, heads, run.count * run.rows, *tail)


def row_positions(run: BlockRun, device: torch.device) -> Tensor:
    """Key position of every query row of a run, ``[count, rows]``."""
    position = torch.arange(run.count * run.rows, device=device) + run.position
    return position.view(run.count, run.rows)


class TokenTable:
    """Gathers rows of ``[B, H, L, D]`` by position without ever copying the whole tensor."""

    def __init__(self, x: Tensor) -> None:
        batch, heads, length, dim = x.shape
        strides = x.stride()
        if strides[3] != 1 or any(s % dim for s in strides[:3]) or x.storage_offset() % dim:
            x = x.contiguous()
            strides = x.stride()
        rows = sum((n - 1) * (s // dim) for n, s in zip(x.shape[:3], strides[:3], strict=True)) + 1
        self._rows = x.as_strided((rows, dim), (dim, 1))
        self._step = strides[2] // dim
        self._dim = dim
        b = torch.arange(batch, device=x.device) * (strides[0] // dim)
        h = torch.arange(heads, device=x.device) * (strides[1] // dim)
        self._base = (b[:, None] + h).view(batch, heads, 1)

    def gather(self, positions: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows at ``positions [B, H, ...]`` (all valid) as ``[B, H, ..., D]``."""
        shape = positions.shape
        flat = (positions.flatten(2) * self._step + self._base).flatten()
        if out is not None:
            torch.index_select(self._rows, 0, flat, out=out.view(-1, self._dim))
            return out
        return self._rows.index_select(0, flat).view(*shape, self._dim)


class Workspace:
    """Named buffers that are grown once and reused: fresh large temporaries cost page faults."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor; an earlier one of this name is overwritten."""
        size = 1
        for extent in shape:
            size *= extent
        key = (name, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=self._device)
            self._buffers[key] = buffer
        return buffer[:size].view(shape)
