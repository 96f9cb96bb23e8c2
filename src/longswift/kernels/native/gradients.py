"""Gradients of what the compiled kernels attend to, added up in fp32 in an order of their own."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.hardware import cpu_has_tile_unit
from longswift.core.pattern import BlockPattern
from longswift.kernels.eager import whole as eager_whole
from longswift.kernels.native.outside import Outside, with_whole_rows
from longswift.kernels.native.pieces import batches

Gradients = tuple[Tensor, Tensor, Tensor]

# Bytes of what blocks of queries add to the keys they have gathered, held at once, and most blocks
# of a head.
_SHARES = 8 << 20
_BLOCKS = 16
# Rows of full attention below which a call of torch's kernel is shorter.
_FEWEST = 64
# Most rows of full attention whose squares are remembered.
_KEPT = 4096
# Bytes of two large pages.
_LARGE = 4 << 20
# Keys are multiplied so many at a time.
_FEW = 16


def pattern_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    lse: Tensor,
    delta: Tensor,
    d_out: Tensor,
) -> Gradients:
    """fp32 gradients of q, k and v in attention under a pattern.

    Scores are recomputed, a square at a time. Sums have an order that no number of threads changes.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        pattern: The pattern of the forward pass.
        scale: Factor on the scores.
        lse: fp32 ``[B, Hq, Lq]`` of the forward pass, infinite for rows that saw nothing.
        delta: fp32 ``[B, Hq, Lq]``, ``sum(d_out * out) - d_lse``.
        d_out: ``[B, Hq, Lq, Dv]`` in the dtype of ``q``.
    """
    grads = _zeros(q, k, v)
    if q.numel() == 0 or k.numel() == 0:
        return grads
    q, k, v, d_out = with_whole_rows(q, k, v, d_out)
    given = q, k, v, lse.contiguous(), delta.contiguous(), d_out
    intervals = pattern.intervals(q.shape[2], k.shape[2], torch.device("cpu"))
    _add_squares(given, _Squares.of(*intervals, q.shape[0]), scale, grads)
    if pattern.tokens is not None or pattern.pool is not None:
        _add_outside(given, pattern, scale, grads)
    return grads


def whole_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
) -> Gradients:
    """Gradients of full attention, see ``kernels.eager.whole.gradients``."""
    if cpu_has_tile_unit(q.dtype) or q.shape[2] < _FEWEST:
        return eager_whole.gradients(q, k, v, causal, scale, out, lse, d_out, d_lse)
    delta = (d_out.float() * out.float()).sum(-1)
    if d_lse is not None:
        delta -= d_lse
    grads = _zeros(q, k, v)
    given = *with_whole_rows(q, k, v), lse, delta, *with_whole_rows(d_out)
    find = _whole if q.shape[2] <= _KEPT else _whole.__wrapped__
    _add_squares(given, find(q.shape[2], *k.shape[:3], causal), scale, grads)
    d_q, d_k, d_v = (x.to(q.dtype) for x in grads)
    return d_q, d_k, d_v


def _zeros(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Accumulators."""
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    for x in (d_q, d_k, d_v):
        if x.nbytes >= _LARGE:
            # Memory that is new costs more than what is added up in it.
            compiled.loaded().use_large_pages(x)
        x.zero_()
    return d_q, d_k, d_v


class _Squares(NamedTuple):
    """Squares of queries and keys, a diagonal at a time: these share neither rows nor keys.

    Attributes:
        first: int32 ``[Hkv, Lq]``, the first key that a row sees.
        end: Likewise, the one after the last.
        calls: What the kernel is given in each call, four numbers for a square.
    """

    first: Tensor
    end: Tensor
    calls: list[list[int]]

    @classmethod
    def of(cls, first: Tensor, end: Tensor, batch: int) -> _Squares:
        """Those in which any row sees a key."""
        side = compiled.loaded().gradient_square()
        q_len = first.shape[1]
        starts = first[:, ::side].tolist()
        last = torch.arange(side - 1, q_len + side - 1, side, device="cpu").clamp_(max=q_len - 1)
        ends = end[:, last].tolist()
        diagonals: dict[int, list[tuple[int, ...]]] = {}
        for head in range(first.shape[0]):
            for i, (start, stop) in enumerate(zip(starts[head], ends[head], strict=True)):
                for j in range(start // side, -(-stop // side)):
                    places = diagonals.setdefault(i - j, [])
                    places += [(b, head, i * side, j * side) for b in range(batch)]
        calls = [call for _, places in sorted(diagonals.items()) for call in batches(places)]
        return cls(first, end, calls)


@functools.lru_cache(maxsize=8)
def _whole(q_len: int, batch: int, kv_heads: int, k_len: int, causal: bool) -> _Squares:
    """Squares of full attention."""
    with torch.inference_mode(False):
        end = torch.arange(k_len - q_len + 1, k_len + 1, dtype=torch.int32, device="cpu")
        end = end if causal else torch.full_like(end, k_len)
        first = torch.zeros(kv_heads, q_len, dtype=torch.int32, device="cpu")
        return _Squares.of(first, end.repeat(kv_heads, 1), batch)


def _add_squares(
    given: tuple[Tensor, ...], squares: _Squares, scale: float, grads: Gradients
) -> None:
    """What rows see of the keys in their intervals."""
    for places in squares.calls:
        compiled.loaded().band_gradients(
            *(*given, *grads, squares.first, squares.end, places, scale)
        )


def _add_outside(
    given: tuple[Tensor, ...], pattern: BlockPattern, scale: float, grads: Gradients
) -> None:
    """The share of gathered tokens and of the remainder, some blocks of some heads at a time."""
    q, k, v = given[:3]
    outside = Outside.of(k, v, pattern, q.shape[2])
    sums = outside.sums
    d_sums = [torch.zeros_like(x) for x in sums]
    blocks, rows = outside.edges.shape[1], outside.tokens.shape[3] + sums[2].shape[2] + 2
    rows = -(-rows // _FEW) * _FEW
    width = k.shape[3] + v.shape[3]
    # Never a matter of threads: it is the order in which sums are added up.
    room = max(1, _SHARES // (4 * rows * width))
    places = [(b, head) for b in range(k.shape[0]) for head in range(k.shape[1])]
    together = min(len(places), -(-room // _BLOCKS))
    count = min(blocks, _BLOCKS, room)
    shares = torch.empty(together * count, rows, width, dtype=torch.float32, device=q.device)
    for first in range(0, len(places), together):
        for block in range(0, blocks, count):
            some = places[first : first + together]
            numbers = [n for place in some for n in (*place, block, min(count, blocks - block))]
            compiled.loaded().gathered_gradients(
                *(*given, *grads, *outside[:3], *sums, outside.edges, *d_sums),
                *(shares[: len(some) * count], numbers, outside.sizes, scale, pattern.causal),
            )
    if pattern.pool is not None:
        for grain, pool, target in zip(d_sums[:2], d_sums[2:], grads[1:], strict=True):
            _add_to_members(grain, pool, pattern.pool // pattern.pool_grain)
            _add_to_members(target, grain, pattern.pool_grain)


def _add_to_members(target: Tensor, sums: Tensor, size: int) -> None:
    """``target [B, H, L, D]`` gets the gradient of the sum of every ``size`` of its rows."""
    whole = min(target.shape[2] // size, sums.shape[2])
    target[:, :, : whole * size].unflatten(2, (whole, size)).add_(sums[:, :, :whole].unsqueeze(3))
    if sums.shape[2] > whole:
        target[:, :, whole * size :] += sums[:, :, whole:]
