"""Linear attention as one problem: lines read keys, at once or as sums over chunks of them.

Lines with vectors ``x`` read keys with vectors ``y`` and ``u``: line ``l`` gets
``sum (x_l . y_m) u_m`` over the keys ``m`` below its limit. Complete chunks come as one matrix of
sums, the keys behind them one by one. Output and all gradients are this one problem: for dq the
gradient of the output reads values and keys; for dv and dk, from the last row to the first, keys
and values read queries and gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longswift.core.states import LinearState, least_weight
from longswift.kernels.triton import linear_kernels as kernels
from longswift.kernels.triton.launch import accumulator, padded, precision, rows_of_tile

# Lines, keys, channels summed over and channels written of a tile at most: products in three parts
# take the registers of larger tiles. And the numbers a program of the scan carries.
_LINES, _KEYS, _TALL, _WIDE, _SCANNED = 64, 32, 32, 64, 1024


class Sums(NamedTuple):
    """Sums over all lines before each chunk, and after the last.

    Attributes:
        packed: ``[B, Hkv, N + 1, F * (Dv + 1)]``: S, then z.
        features: ``F``.
        v_dim: ``Dv``.
        chunk: Lines of a chunk; the last may be shorter.
    """

    packed: Tensor
    features: int
    v_dim: int
    chunk: int

    @property
    def last(self) -> LinearState:
        """Sums over all lines, as tensors of their own."""
        split = self.features * self.v_dim
        s, z = self.packed[:, :, -1, :split], self.packed[:, :, -1, split:]
        return LinearState(s.unflatten(2, (self.features, self.v_dim)).clone(), z.clone())


class Extra(NamedTuple):
    """One more channel: a number per row ``[B, Hq, L]`` on one side, 1 on the other.

    Attributes:
        values: Contiguous, in the accumulator dtype.
        of_lines: The numbers belong to the lines that read; False: to the keys that are read.
    """

    values: Tensor
    of_lines: bool


def sums(
    y: Tensor,
    u: Tensor,
    before: LinearState,
    chunk: int,
    *,
    extra: Tensor | None = None,
    reverse: bool = False,
) -> Sums:
    """Sums of ``y u^T`` and of ``y`` before every chunk; O(L F Dv) time.

    Args:
        y: ``[B, H, L, F]``, unit stride along F, ``H`` a multiple of the KV heads.
        u: ``[B, H, L, Dv]``, likewise.
        before: What the sums start from; it says how many KV heads there are.
        chunk: Lines of a chunk.
        extra: Factors on y in the sum of y, ``[B, H, L]``, contiguous.
        reverse: From the last line to the first.
    """
    (batch, kv_heads, features, v_dim), length = before.s.shape, y.shape[2]
    chunks = triton.cdiv(length, chunk)
    size = features * (v_dim + 1)
    packed = before.s.new_empty(batch, kv_heads, chunks + 1, size)
    packed[:, :, 0] = torch.cat([before.s.flatten(2), before.z], 2)
    found = Sums(packed, features, v_dim, chunk)
    if chunks == 0:
        return found
    groups, acc = y.shape[1] // kv_heads, accumulator(y.dtype)
    rows = rows_of_tile(_KEYS, groups, min(chunk, length))
    tall, wide = min(_TALL, padded(features)), min(_WIDE, padded(v_dim))
    problems, blocks = batch * kv_heads, triton.cdiv(features, tall) * triton.cdiv(v_dim, wide)
    kernels.chunk_sums[(chunks, problems, blocks)](
        y,
        u,
        extra,
        packed,
        length,
        chunk,
        chunks,
        *y.stride()[:3],
        *u.stride()[:3],
        HKV=kv_heads,
        G=groups,
        F=features,
        DV=v_dim,
        BF=tall,
        BV=wide,
        ROWS=rows,
        N=rows * triton.next_power_of_2(groups),
        ACC=acc,
        EXACT=precision(),
        WEIGHTED=extra is not None,
        REVERSE=reverse,
    )
    grid = triton.cdiv(size, _SCANNED), problems
    kernels.scan[grid](packed, chunks, SIZE=size, N=_SCANNED, ACC=acc)
    return found


def read(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    states: Sums,
    limit: Tensor,
    *,
    extra: Extra | None = None,
    transposed: bool = False,
    reverse: bool = False,
) -> Tensor:
    """``sum (x_l . y_m) u_m`` over the keys below each line's limit, and those before all keys.

    O((chunk + Dx) Du) time per line.

    Args:
        x: ``[B, H, L, Dx]``, unit stride along the last dimension, like y and u.
        y: ``[B, H', K, Dx]``; the larger of ``H`` and ``H'`` is a multiple of the other.
        u: ``[B, H', K, Du]``.
        states: Sums over y and u, made with the same ``reverse``.
        limit: int32 ``[L]``, the keys each line sees; never decreasing in the order of reading.
        extra: One more channel of x and y; the sums are then multiplied by z.
        transposed: The sums are of ``u y^T``.
        reverse: Lines and keys are read from the last to the first, and so are limits.

    Returns:
        ``[B, H, L, Du]`` in the accumulator dtype.
    """
    return _launch(x, y, u, states, limit, extra, transposed, reverse, None, False)


def read_normalised(
    x: Tensor, y: Tensor, u: Tensor, states: Sums, limit: Tensor, *, divide: bool
) -> tuple[Tensor, Tensor]:
    """The same with the sum of weights ``[B, H, L]``, and divided by it where it is positive."""
    norm = states.packed.new_empty(x.shape[:3])
    return _launch(x, y, u, states, limit, None, False, False, norm, divide), norm


def _launch(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    states: Sums,
    limit: Tensor,
    extra: Extra | None,
    transposed: bool,
    reverse: bool,
    norm: Tensor | None,
    divide: bool,
) -> Tensor:
    (batch, heads, lines, x_dim), u_dim = x.shape, u.shape[3]
    kv_heads = states.packed.shape[1]
    out = states.packed.new_empty(batch, heads, lines, u_dim)
    if lines == 0:
        return out
    line_groups, key_groups = heads // kv_heads, y.shape[1] // kv_heads
    rows = rows_of_tile(_LINES, line_groups, lines)
    key_rows = rows_of_tile(_KEYS, key_groups, y.shape[2])
    tall, wide = min(_TALL, padded(x_dim)), min(_WIDE, padded(u_dim))
    grid = triton.cdiv(lines, rows), batch * kv_heads, triton.cdiv(u_dim, wide)
    kernels.read[grid](
        x,
        y,
        u,
        None if extra is None else extra.values,
        states.packed,
        limit,
        out,
        norm,
        lines,
        y.shape[2],
        states.chunk,
        states.packed.shape[2] - 1,
        *((1, states.v_dim) if transposed else (states.v_dim, 1)),
        *x.stride()[:3],
        *y.stride()[:3],
        *u.stride()[:3],
        HKV=kv_heads,
        LINE_G=line_groups,
        KEY_G=key_groups,
        SIZE=states.packed.shape[3],
        DX=x_dim,
        DU=u_dim,
        BX=tall,
        BU=wide,
        ROWS=rows,
        M=rows * triton.next_power_of_2(line_groups),
        KEY_ROWS=key_rows,
        N=key_rows * triton.next_power_of_2(key_groups),
        ACC=accumulator(x.dtype),
        EXACT=precision(),
        LEAST=least_weight(out.dtype),
        NORMED=norm is not None,
        DIVIDED=divide,
        OF_LINES=extra is not None and extra.of_lines,
        OF_KEYS=extra is not None and not extra.of_lines,
        REVERSE=reverse,
    )
    return out
