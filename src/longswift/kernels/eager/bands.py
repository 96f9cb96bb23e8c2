"""Contiguous windows: every tile of queries against one slice of keys, views and no copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longswift.core.parallel import for_each
from longswift.core.pattern import Band, BlockPattern
from longswift.core.softmax import accumulator_dtype, merge
from longswift.core.types import Partial
from longswift.kernels.eager.fused import compute_dtype, rectangle

# Rows per fused call: enough to fill two cores, few enough to keep temporaries in cache.
_ROWS = 4096
# Score elements per step of the backward pass: 8 MiB in fp32.
_SCORES = 1 << 21
_BACKWARD_ROWS = 256


class Job(NamedTuple):
    """``count`` congruent rectangles, each shifted by ``step`` along queries and keys.

    Rectangle ``i`` holds query rows ``[row + i*step, +rows)`` and keys ``[key + i*step, +width)``;
    ``shift`` is the position of its first query minus that of its first key.
    """

    row: int
    key: int
    step: int
    count: int  # type: ignore[assignment]
    rows: int
    width: int
    shift: int


def jobs(band: Band, q_len: int, k_len: int, causal: bool) -> Iterator[Job]:
    """Rectangles that cover the band, congruent neighbours merged."""
    offset = k_len - q_len
    pending: Job | None = None
    for start in range(offset // band.tile * band.tile, k_len, band.tile):
        first_row, end_row = max(start, offset), min(start + band.tile, k_len)
        key = max(0, start - band.left)
        end_key = min(k_len, start + band.tile + band.right)
        if band.reach is not None:
            key = max(key, first_row - band.reach[0])
            end_key = min(end_key, end_row + band.reach[1])
        if causal:
            end_key = min(end_key, end_row)
        rows, width = end_row - first_row, end_key - key
        job = Job(first_row - offset, key, band.tile, 1, rows, width, first_row - key)
        if (
            pending is not None
            and (pending.rows, pending.width, pending.shift) == (rows, width, job.shift)
            and pending.row + pending.count * band.tile == job.row
        ):
            pending = pending._replace(count=pending.count + 1)
            continue
        if pending is not None:
            yield pending
        pending = job
    if pending is not None:
        yield pending


def allowed_mask(job: Job, band: Band, causal: bool, device: torch.device) -> Tensor | None:
    """bool ``[rows, width]``, or None when the whole rectangle is visible."""
    furthest_back = job.shift + job.rows - 1
    furthest_ahead = job.width - 1 - job.shift
    reach_back, reach_ahead = band.reach or (furthest_back, furthest_ahead)
    if causal:
        reach_ahead = min(0, reach_ahead)
    cut_back, cut_ahead = furthest_back > reach_back, furthest_ahead > reach_ahead
    if not cut_back and not cut_ahead:
        return None
    distance = (
        job.shift
        + torch.arange(job.rows, device=device)[:, None]
        - torch.arange(job.width, device=device)
    )
    allowed = torch.ones(job.rows, job.width, dtype=torch.bool, device=device)
    if cut_back:
        allowed &= distance <= reach_back
    if cut_ahead:
        allowed &= distance >= -reach_ahead
    return allowed


def band_heads(bands: tuple[Band, ...]) -> list[tuple[Band, list[int]]]:
    """KV heads by band, in order of first appearance."""
    groups: dict[Band, list[int]] = {}
    for head, band in enumerate(bands):
        groups.setdefault(band, []).append(head)
    return list(groups.items())


def _tiles(x: Tensor, start: int, step: int, count: int, length: int) -> Tensor:
    """``[H, L, D]`` to overlapping slices ``[count, H, length, D]``, a view."""
    span = x[:, start : start + (count - 1) * step + length]
    if count == 1:
        return span.unsqueeze(0)
    return span.unfold(1, length, step).permute(1, 0, 3, 2)


class _Tile(NamedTuple):
    """Queries ``[N, H, rows, D]``, and keys and values ``[N, H or 1, width, *]``."""

    q: Tensor
    k: Tensor
    v: Tensor


def _attend_tile(tile: _Tile, job: Job, band: Band, causal: bool, scale: float) -> Partial:
    """One job, all of whose tiles are congruent."""
    q, heads = tile.q, tile.q.shape[1]

    def slice_of(x: Tensor, start: int, length: int) -> Tensor:
        return x[:, :, start : start + length].expand(-1, heads, -1, -1)

    def attend(start: int, length: int, **options: Any) -> Partial:
        k, v = slice_of(tile.k, start, length), slice_of(tile.v, start, length)
        return rectangle(q, k, v, scale=scale, **options)

    if causal and band.reach is None and job.width - job.shift == job.rows:
        # The fused kernel skips the upper triangle of a square, not of a rectangle.
        own = attend(job.shift, job.rows, causal=True)
        return own if job.shift == 0 else merge(own, attend(0, job.shift))
    return attend(0, job.width, allowed=allowed_mask(job, band, causal, q.device))


def _forward_job(
    q: Tensor, k: Tensor, v: Tensor, job: Job, band: Band, causal: bool, scale: float
) -> Partial:
    """One job for heads that share strides: ``q [H, Lq, D]``, ``k, v [H or 1, Lk, *]``."""
    dtype = compute_dtype(q)
    end = job.key + (job.count - 1) * job.step + job.width
    k, v = (
        _tiles(x[:, job.key : end].to(dtype), 0, job.step, job.count, job.width) for x in (k, v)
    )
    q = _tiles(q, job.row, job.step, job.count, job.rows).to(dtype)
    return _attend_tile(_Tile(q, k, v), job, band, causal, scale)


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float) -> Partial:
    """Attention over the bands alone, ``out [B, Hq, Lq, Dv]`` in the accumulator dtype."""
    batch, heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    acc = accumulator_dtype(q.dtype)
    if len(set(pattern.bands)) == 1:
        whole = list(jobs(pattern.bands[0], q_len, k_len, pattern.causal))
        if len(whole) == 1 and whole[0].count == 1:
            return _one_rectangle(q, k, v, whole[0], pattern, scale)
    out = torch.empty(batch, heads, q_len, v.shape[-1], dtype=acc, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=acc, device=q.device)
    pieces = [
        (band, job, heads_of, b)
        for band, band_kv in band_heads(pattern.bands)
        for job in _cut(jobs(band, q_len, k_len, pattern.causal))
        for heads_of in _head_slices(band_kv, groups)
        for b in range(batch)
    ]

    def attend(piece: tuple[Band, Job, tuple[slice, slice], int], _: None) -> None:
        band, job, (query_heads, key_heads), b = piece
        rows = slice(job.row, job.row + (job.count - 1) * job.step + job.rows)
        qkv = q[b, query_heads], k[b, key_heads], v[b, key_heads]
        part = _forward_job(*qkv, job, band, pattern.causal, scale)
        out[b, query_heads, rows] = part.out.transpose(0, 1).flatten(1, 2)
        lse[b, query_heads, rows] = part.lse.transpose(0, 1).flatten(1, 2)

    for_each(pieces, lambda: None, attend, q.device)
    return Partial(out, lse)


def _one_rectangle(
    q: Tensor, k: Tensor, v: Tensor, job: Job, pattern: BlockPattern, scale: float
) -> Partial:
    """A single tile, as in full attention: one fused call for the whole batch, no copies."""
    batch, heads, q_len, _ = q.shape
    groups = heads // k.shape[1]
    rows = q.unflatten(1, (-1, groups)).flatten(0, 1)
    keys, values = (
        x[:, :, job.key : job.key + job.width].flatten(0, 1).unsqueeze(1) for x in (k, v)
    )
    dtype = compute_dtype(q)
    tile = _Tile(rows.to(dtype), keys.to(dtype), values.to(dtype))
    part = _attend_tile(tile, job, pattern.bands[0], pattern.causal, scale)
    return Partial(
        part.out.view(batch, heads, q_len, v.shape[3]), part.lse.reshape(batch, heads, q_len)
    )


def _cut(found: Iterator[Job]) -> Iterator[Job]:
    """Jobs of at most about ``_ROWS`` query rows, so that temporaries stay small."""
    for job in found:
        most = max(1, _ROWS // job.rows)
        for first in range(0, job.count, most):
            shift = first * job.step
            yield job._replace(
                row=job.row + shift, key=job.key + shift, count=min(most, job.count - first)
            )


def _head_slices(kv: list[int], groups: int) -> Iterator[tuple[slice, slice]]:
    """Query and key heads that one strided call can serve.

    With one query head per KV head all evenly spaced heads go together; a group shares its KV
    head through a stride of 0, one KV head a call.
    """
    steps = {b - a for a, b in zip(kv, kv[1:], strict=False)}
    if groups == 1 and len(steps) <= 1:
        heads = slice(kv[0], kv[-1] + 1, steps.pop() if steps else 1)
        yield heads, heads
        return
    for head in kv:
        yield slice(head * groups, (head + 1) * groups), slice(head, head + 1)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    lse: Tensor,
    delta: Tensor,
    d_out: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Adds the bands' share of the gradients to ``grads = (dq, dk, dv)``, scores recomputed.

    Args:
        q: ``[B, Hq, Lq, D]``; k, v as in the forward pass.
        k: Keys.
        v: Values.
        pattern: The pattern of the forward pass.
        scale: Factor on the scores.
        lse: ``[B, Hq, Lq]`` over *all* keys, gathered ones included; finite.
        delta: ``[B, Hq, Lq]``, ``sum(d_out * out) - d_lse``.
        d_out: ``[B, Hq, Lq, Dv]``.
        grads: Accumulators shaped like q, k, v.
    """
    batch, heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    for band, band_kv in band_heads(pattern.bands):
        for job in _backward_jobs(jobs(band, q_len, k_len, pattern.causal), pattern.causal):
            allowed = allowed_mask(job, band, pattern.causal, q.device)
            for head in band_kv:
                query_heads = slice(head * groups, (head + 1) * groups)
                for b in range(batch):
                    _backward_job(
                        (q[b, query_heads], k[b, head], v[b, head]),
                        job,
                        allowed,
                        scale,
                        (lse[b, query_heads], delta[b, query_heads], d_out[b, query_heads]),
                        (grads[0][b, query_heads], grads[1][b, head], grads[2][b, head]),
                    )


def _backward_jobs(found: Iterator[Job], causal: bool) -> Iterator[Job]:
    """Jobs cut along rows, then keys, then tiles until a rectangle's scores fit in cache."""
    for job in found:
        for row in range(0, job.rows, _BACKWARD_ROWS):
            rows = min(_BACKWARD_ROWS, job.rows - row)
            width = min(job.width, job.shift + row + rows) if causal else job.width
            key_step = max(1, min(width, _SCORES // rows))
            for key in range(0, width, key_step):
                part_width = min(key_step, width - key)
                most = max(1, _SCORES // (rows * part_width))
                for first in range(0, job.count, most):
                    move = first * job.step
                    yield Job(
                        job.row + row + move,
                        job.key + key + move,
                        job.step,
                        min(most, job.count - first),
                        rows,
                        part_width,
                        job.shift + row - key,
                    )


def _backward_job(
    qkv: tuple[Tensor, Tensor, Tensor],
    job: Job,
    allowed: Tensor | None,
    scale: float,
    rows_of: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """One KV head and its ``G`` query heads: ``q [G, Lq, D]``, ``k, v [Lk, *]``."""
    acc = accumulator_dtype(qkv[0].dtype)
    groups = qkv[0].shape[0]

    def by_tile(x: Tensor) -> Tensor:
        tiles = _tiles(
            x.unsqueeze(-1) if x.dim() == 2 else x, job.row, job.step, job.count, job.rows
        )
        return tiles.to(acc).reshape(job.count, groups * job.rows, tiles.shape[-1])

    def keys_by_tile(x: Tensor) -> Tensor:
        return _tiles(x.unsqueeze(0), job.key, job.step, job.count, job.width)[:, 0].to(acc)

    q, (lse, delta, d_out) = by_tile(qkv[0]), (by_tile(x) for x in rows_of)
    k, v = keys_by_tile(qkv[1]), keys_by_tile(qkv[2])
    probs = torch.baddbmm(-lse, q, k.transpose(1, 2), alpha=scale).exp_()
    if allowed is not None:
        probs.view(job.count, groups, job.rows, job.width).masked_fill_(~allowed, 0.0)
    _overlap_add(grads[2], probs.transpose(1, 2) @ d_out, job)
    d_scores = torch.bmm(d_out, v.transpose(1, 2)).sub_(delta).mul_(probs).mul_(scale)
    _overlap_add(grads[1], d_scores.transpose(1, 2) @ q, job)
    d_q = (d_scores @ k).view(job.count, groups, job.rows, -1)
    for tile in range(job.count):
        row = job.row + tile * job.step
        grads[0][:, row : row + job.rows] += d_q[tile]


def _overlap_add(target: Tensor, tiles: Tensor, job: Job) -> None:
    """Adds ``tiles [count, width, D]`` to ``target [Lk, D]`` at ``key + i * step``."""
    for start in range(0, job.width, job.step):
        length = min(job.step, job.width - start)
        first = job.key + start
        if job.count == 1:
            target[first : first + length] += tiles[0, start : start + length]
            continue
        view = target.as_strided(
            (job.count, length, target.shape[1]),
            (job.step * target.stride(0), target.stride(0), target.stride(1)),
            target.storage_offset() + first * target.stride(0),
        )
        view += tiles[:, start : start + length]
