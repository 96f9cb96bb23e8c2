"""Gathered tokens and the pooled remainder, in one kernel that goes on from the bands' result."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.blocks import block_count
from longswift.core.pattern import Band, BlockPattern
from longswift.core.pools import Pools, build_pools
from longswift.core.softmax import accumulator_dtype
from longswift.core.summary import KeySummary
from longswift.core.types import Partial
from longswift.kernels.triton.column_kernels import fill_columns
from longswift.kernels.triton.launch import accumulator, padded, precision, rows_of_tile
from longswift.kernels.triton.limits import unit_stride
from longswift.kernels.triton.rest_kernels import attend_outside

_WIDEST = 256
# Bytes of the columns that are written at once.
ROOM = 1 << 28


class Tile(NamedTuple):
    """A tile of ``attend_outside``.

    Attributes:
        lines: Most query lines.
        keys: Gathered tokens or columns of a step.
        warps: Warps of a program with more than 64 lines.
        stages: Of the pipeline over columns.
        registers: Most of a thread, or None: two programs of 8 warps fit a multiprocessor with 128.
    """

    lines: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# By bytes of a number, then by channels of a head.
TILES = {
    2: {64: Tile(128, 64, 4, 3), 128: Tile(128, 32, 8, 3, 128), 256: Tile(64, 32, 4, 2)},
    4: {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
}
# Columns, gathered tokens and warps of a tile of ``fill_columns``, likewise.
COLUMNS: dict[int, dict[int, tuple[int, int, int, int | None]]] = {
    2: {64: (32, 32, 4, 128), 128: (32, 32, 4, 168), 256: (32, 16, 4, None)},
    4: {64: (32, 32, 4, None), 128: (16, 32, 4, None), 256: (16, 16, 4, None)},
}
# Gathered tokens that are searched at once for those of a tile of columns.
SEARCHED = 512


class Geometry(NamedTuple):
    """What both kernels are told about a pattern over one batch.

    Attributes:
        bands: int32 ``[Hkv, 3]``: tile, left and right of each KV head.
        tokens: int32 ``[1 or B, Hkv, N, C]``, unit stride along C.
        q_len: ``Lq``.
        k_len: ``Lk``.
        blocks: ``N``.
        pattern: The pattern.
    """

    bands: Tensor
    tokens: Tensor
    q_len: int
    k_len: int
    blocks: int
    pattern: BlockPattern

    @classmethod
    def of(cls, q: Tensor, k: Tensor, pattern: BlockPattern) -> Geometry:
        """That of the queries ``[B, Hq, Lq, D]`` and keys ``[B, Hkv, Lk, D]`` of a call."""
        q_len, k_len = q.shape[2], k.shape[2]
        blocks = block_count(q_len, k_len, pattern.block)
        tokens = pattern.tokens
        if tokens is None:
            tokens = torch.empty(1, k.shape[1], blocks, 0, dtype=torch.int32, device=q.device)
        (tokens,) = unit_stride(tokens.to(q.device, torch.int32))
        return cls(_bands(pattern.bands, q.device), tokens, q_len, k_len, blocks, pattern)

    @property
    def slots(self) -> int:
        """Gathered tokens of a block."""
        return self.tokens.shape[3]

    def token_strides(self) -> tuple[int, ...]:
        """Of batch rows, which may share their lists, KV heads and blocks."""
        batch, head, block, _ = self.tokens.stride()
        return 0 if self.tokens.shape[0] == 1 else batch, head, block

    def columns(self, blocks: int) -> int:
        """Most columns of the first ``blocks`` blocks."""
        pool = self.pattern.pool
        if pool is None:
            return 0
        if not self.pattern.causal:
            return -(-self.k_len // pool) + 1
        offset = self.k_len - self.q_len
        position = max((offset // self.pattern.block + blocks - 1) * self.pattern.block, offset)
        starts = (position // b.tile * b.tile - b.left for b in set(self.pattern.bands))
        return max(0, -(-max(starts) // pool))


@functools.lru_cache(maxsize=64)
def _bands(bands: tuple[Band, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        numbers = [[band.tile, band.left, band.right] for band in bands]
        return torch.tensor(numbers, dtype=torch.int32, device=device)


def takes(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, bias: ScoreBias | None = None
) -> bool:
    """Whether ``attend_rest`` computes what a pattern has outside its bands.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        pattern: Which keys are seen.
        bias: Additions to the scaled scores.
    """
    gathers = pattern.tokens is not None and pattern.tokens.shape[3] > 0
    if bias is not None or pattern.by_row or not gathers and pattern.pool is None:
        return False
    return max(q.shape[3], v.shape[3]) <= _WIDEST


def attend_rest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bands: Partial,
    summary: KeySummary | None = None,
) -> Partial:
    """Attention to bands, gathered tokens and pools. Time ``O(Lq * (C + Lk / pool) * D)``.

    Args:
        q: ``[B, Hq, Lq, D]``, unit stride along D, like k and v.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        pattern: One that ``takes`` accepts.
        scale: Factor on the scores.
        bands: ``out [B, Hq, Lq, Dv]``, unit stride along Dv, and ``lse [B, Hq, Lq]`` over the
            bands; overwritten.
        summary: Page summaries of ``k`` and ``v``, used for the pools.

    Returns:
        ``bands``.
    """
    where = Geometry.of(q, k, pattern)
    batch, kv_heads = k.shape[:2]
    span = min(pattern.block, where.q_len)
    options = outside_options(q, k, v, span, pattern.causal)
    tiles = triton.cdiv(span, options["ROWS"])
    columns = None
    if pattern.pool is not None:
        columns = Columns(k, v, where, build_pools(k, v, pattern, summary), options["N"])
    # Bands that hold all keys of their rows' tiles leave no token after a row.
    compared = pattern.causal and any(b.right < 0 or b.reach is not None for b in pattern.bands)
    for first, count in _runs(where, columns):
        if columns is None:
            means: tuple[Any, ...] = (None, None, None, 0)
        else:
            means = columns.fill(first, count)
        attend_outside[(tiles * batch * kv_heads * count,)](
            q,
            k,
            v,
            *bands,
            where.tokens,
            where.bands,
            *means[:3],
            scale,
            where.q_len,
            where.k_len,
            pattern.block,
            first,
            count,
            batch,
            tiles,
            where.slots,
            pattern.pool or 1,
            means[3],
            *where.token_strides(),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *bands.out.stride()[:3],
            *bands.lse.stride(),
            **options,
            COMPARED=compared,
            POOLED=columns is not None,
        )
    return bands


def outside_options(q: Tensor, k: Tensor, v: Tensor, span: int, causal: bool) -> dict[str, Any]:
    """Options of ``attend_outside`` for blocks of ``span`` rows, but for what a pattern decides.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        span: Rows of a block.
        causal: Whether nothing after the band is seen.
    """
    groups = q.shape[1] // k.shape[1]
    tile = _choice(TILES, k, v)
    rows = rows_of_tile(tile.lines, groups, span)
    lines = rows * triton.next_power_of_2(groups)
    return {
        **_constants(k, v, causal),
        **_at_most(tile.registers if lines > 64 else None),
        "G": groups,
        "ROWS": rows,
        "M": lines,
        "N": tile.keys,
        "STAGES": tile.stages,
        "num_warps": tile.warps if lines > 64 else 4,
    }


def column_options(k: Tensor, v: Tensor, keys: int, causal: bool) -> dict[str, Any]:
    """Options of ``fill_columns`` for ``attend_outside`` with so many keys to a step.

    Args:
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        keys: Keys of a step.
        causal: Whether nothing after the band is seen.
    """
    wide, gathered, warps, registers = _choice(COLUMNS, k, v)
    tile = {"W": wide, "C": gathered, "S": SEARCHED, "N": keys, "num_warps": warps}
    return {**_constants(k, v, causal), **tile, **_at_most(registers)}


class Columns:
    """Memory for the columns of some blocks, which each run of blocks fills again."""

    def __init__(self, k: Tensor, v: Tensor, where: Geometry, pools: Pools, keys: int) -> None:
        self._k, self._v, self._where = k, v, where
        self._options = column_options(k, v, keys, where.pattern.causal)
        self._sums = unit_stride(*pools[:4])
        self._grain = pools.grain
        self._dims = padded(k.shape[3]), padded(v.shape[3])
        self._heads = k.shape[0] * k.shape[1]
        self._column = self._heads * sum(self._dims) * k.element_size()
        widest, acc = self.width(where.blocks), accumulator_dtype(k.dtype)
        shape = self._heads, max(widest, min(where.blocks * widest, ROOM // self._column))
        self._means = tuple(k.new_empty(*shape, dim) for dim in self._dims)
        self._log = torch.empty(shape, dtype=acc, device=k.device)

    def width(self, last: int) -> int:
        """Columns of a block before block ``last``, in whole tiles."""
        step = max(self._options["W"], self._options["N"])
        return triton.cdiv(self._where.columns(last), step) * step

    def most(self, last: int) -> int:
        """How many blocks before block ``last`` there is room for."""
        return min(last, max(1, ROOM // max(1, self._column * self.width(last))))

    def fill(self, first: int, count: int) -> tuple[Any, ...]:
        """Mean keys, mean values and binary logarithms of counts of some blocks, and their width.

        ``[B * Hkv, count, width, D or Dv]``, padded, and ``[B * Hkv, count, width]``.
        """
        where, width = self._where, self.width(first + count)
        tiles = triton.cdiv(width, self._options["W"])
        buffers = (*self._means, self._log)
        if not width:
            return *buffers, 0
        assert where.pattern.pool is not None
        fill_columns[(tiles * self._heads * count,)](
            self._k,
            self._v,
            where.tokens,
            where.bands,
            *self._sums,
            *buffers,
            where.k_len,
            where.k_len - where.q_len,
            where.pattern.block,
            first,
            count,
            self._k.shape[0],
            tiles,
            where.slots,
            where.pattern.pool,
            self._grain,
            width,
            *where.token_strides(),
            *self._k.stride()[:3],
            *self._v.stride()[:3],
            *(stride for sums in self._sums for stride in sums.stride()[:3]),
            **self._options,
        )
        return *buffers, width


def _runs(where: Geometry, columns: Columns | None) -> Iterator[tuple[int, int]]:
    """First block and number of blocks of every run, the last run first."""
    last = where.blocks
    while last:
        count = last if columns is None else columns.most(last)
        yield last - count, count
        last -= count


def _constants(k: Tensor, v: Tensor, causal: bool) -> dict[str, Any]:
    return {
        "HKV": k.shape[1],
        "D": k.shape[3],
        "DV": v.shape[3],
        "D_PAD": padded(k.shape[3]),
        "DV_PAD": padded(v.shape[3]),
        "CAUSAL": causal,
        "ACC": accumulator(k.dtype),
        "EXACT": precision(),
    }


def _at_most(registers: int | None) -> dict[str, int]:
    """The option that bounds registers of a thread, which AMD's compiler does not know."""
    return {} if registers is None or torch.version.hip else {"maxnreg": registers}


def _choice(table: dict[int, dict[int, Any]], k: Tensor, v: Tensor) -> Any:
    """The entry for the dtype and the channels of a head."""
    sizes = table[min(4, k.dtype.itemsize)]
    return next(sizes[most] for most in sizes if max(k.shape[3], v.shape[3]) <= most)
