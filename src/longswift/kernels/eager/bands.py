"""Contiguous windows: every tile of queries against one slice of keys, views and few copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.blocks import Workspace
from longswift.core.hardware import onednn_beats_blas
from longswift.core.parallel import for_each
from longswift.core.pattern import Band, BlockPattern
from longswift.core.products import factor_dtype
from longswift.core.rectangles import (
    Job,
    band_heads,
    by_rows,
    by_tiles,
    hidden_scores,
    jobs,
    tiles,
)
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import Partial
from longswift.kernels.eager import fused, unfused

# Query rows per fused call: enough to fill two cores, few enough to keep temporaries in cache.
_ROWS = 4096
# Query rows for which a dense bias is held at once.
_BIASED_ROWS = 256
# Rows of a tile whose scores are held at once, all heads of a group together.
_UNFUSED_ROWS = 256
# Score elements per unfused step: 2 MiB in fp32.
_SCORES = 1 << 19
_ACCELERATOR = 4
# Fewer scores than this are quicker in one fused call.
_FEW_SCORES = 1 << 18


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bias: ScoreBias | None = None,
) -> Partial:
    """Attention over the bands alone, ``out [B, Hq, Lq, Dv]`` in the dtype it was computed in."""
    if q.numel() == 0 or k.numel() == 0:
        # The fused kernel divides by these extents.
        return _nothing(q, v)
    if _fused_is_best(q, k, v):
        return _fused(q, k, v, pattern, scale, bias)
    return _unfused(q, k, v, pattern, scale, bias)


def _nothing(q: Tensor, v: Tensor) -> Partial:
    """The result of rows that see no key."""
    lse = torch.full(q.shape[:3], unfused.HIDDEN, dtype=accumulator_dtype(q.dtype), device=q.device)
    return Partial(lse.new_zeros(*q.shape[:3], v.shape[3]), lse)


def _results(q: Tensor, v: Tensor, pattern: BlockPattern) -> Partial:
    """Memory for the result; rows whose tile may hold no key already say so."""
    if any(band.right < 0 for band in pattern.bands):
        return _nothing(q, v)
    acc = accumulator_dtype(q.dtype)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=acc, device=q.device)
    return Partial(out, torch.empty(q.shape[:3], dtype=acc, device=q.device))


def _fused_is_best(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the fused kernel exists for these tensors and matrix products are not faster."""
    if q.device.type != "cpu" or q.shape[3] != v.shape[3]:
        return False
    if factor_dtype(q) == torch.float64 or not onednn_beats_blas():
        return True
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    return rows < _UNFUSED_ROWS // 2 or rows * k.shape[2] < _FEW_SCORES


def _unfused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bias: ScoreBias | None,
) -> Partial:
    """Tiles of a KV head and its group, cut so that their scores stay in cache."""
    batch, heads, q_len, _ = q.shape
    k_len, groups = k.shape[2], heads // k.shape[1]
    acc, value_dtype = accumulator_dtype(q.dtype), factor_dtype(v)
    out, lse = _results(q, v, pattern)
    # An accelerator wants fewer and larger products than a cache.
    larger = 1 if q.device.type == "cpu" else _ACCELERATOR
    rows = max(32, larger * _UNFUSED_ROWS // groups)
    pieces = []
    for band, band_kv in band_heads(pattern.bands):
        found = jobs(band, q_len, k_len, pattern.causal)
        cut = by_tiles(by_rows(found, rows, pattern.causal), larger**2 * _SCORES // groups)
        pieces += [(band, job, b, head) for job in cut for b in range(batch) for head in band_kv]
    # The widest first, so that no thread is left alone with them at the end.
    pieces.sort(key=lambda piece: -piece[1].count * piece[1].width)

    def attend(piece: tuple[Band, Job, int, int], space: Workspace) -> None:
        band, job, b, head = piece
        own = slice(head * groups, (head + 1) * groups)
        shape = job.step, job.count
        end = job.key + (job.count - 1) * job.step + job.width
        keys, values = (
            tiles(_dense(name, x[b, head, job.key : end], dtype, space), 0, *shape, job.width)[:, 0]
            for name, x, dtype in (("k", k, acc), ("v", v, value_dtype))
        )
        part = unfused.attend(
            tiles(q[b, own], job.row, *shape, job.rows),
            keys,
            values,
            scale,
            hidden_scores(job, band, pattern.causal, acc, q.device),
            space,
            None if bias is None else (bias.heads(own), job.shift),
        )
        tiles(out[b, own], job.row, *shape, job.rows).copy_(part.out)
        tiles(lse[b, own].unsqueeze(-1), job.row, *shape, job.rows).copy_(part.lse.unsqueeze(-1))

    for_each(pieces, lambda: Workspace(q.device), attend, q.device)
    return Partial(out, lse)


def _dense(name: str, x: Tensor, dtype: torch.dtype, space: Workspace) -> Tensor:
    """``[L, D]`` as ``[1, L, D]`` of a dtype with rows next to each other; a view if it is so."""
    if x.dtype != dtype or not x.is_contiguous():
        x = space.get(name, tuple(x.shape), dtype).copy_(x)
    return x.unsqueeze(0)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bias: ScoreBias | None,
) -> Partial:
    """Many tiles in one call of torch's kernel, through strided views."""
    batch, heads, q_len, _ = q.shape
    k_len, groups = k.shape[2], heads // k.shape[1]
    if bias is None and len(set(pattern.bands)) == 1:
        whole = jobs(pattern.bands[0], q_len, k_len, pattern.causal)
        if len(whole) == 1 and whole[0].rows == q_len:
            return _one_rectangle(q, k, v, whole[0], pattern, scale)
    out, lse = _results(q, v, pattern)
    pieces = [
        (band, job, heads_of, b)
        for band, band_kv in band_heads(pattern.bands)
        for job in _fused_jobs(band, q_len, k_len, pattern.causal, bias is not None)
        for heads_of in _head_slices(band_kv, groups, bias is not None)
        for b in range(batch)
    ]

    def attend(piece: tuple[Band, Job, tuple[slice, slice], int], space: Workspace) -> None:
        band, job, (query_heads, key_heads), b = piece
        rows = slice(job.row, job.row + (job.count - 1) * job.step + job.rows)
        end = job.key + (job.count - 1) * job.step + job.width
        spans = (
            ("q", q[b, query_heads, rows], job.rows),
            ("k", k[b, key_heads, job.key : end], job.width),
            ("v", v[b, key_heads, job.key : end], job.width),
        )
        rows_of, keys, values = (
            tiles(_widened(name, x, space), 0, job.step, job.count, length)
            for name, x, length in spans
        )
        own = None if bias is None else bias.heads(query_heads)
        part = fused.attend(rows_of, keys, values, job, band, pattern.causal, scale, own)
        out[b, query_heads, rows] = part.out.transpose(0, 1).flatten(1, 2)
        lse[b, query_heads, rows] = part.lse.transpose(0, 1).flatten(1, 2)

    for_each(pieces, lambda: Workspace(q.device), attend, q.device)
    return Partial(out, lse)


def _widened(name: str, x: Tensor, space: Workspace) -> Tensor:
    """``x``, or a copy in the dtype in which it is multiplied."""
    dtype = factor_dtype(x)
    return x if x.dtype == dtype else space.get(name, tuple(x.shape), dtype).copy_(x)


def _one_rectangle(
    q: Tensor, k: Tensor, v: Tensor, job: Job, pattern: BlockPattern, scale: float
) -> Partial:
    """A single tile, as in full attention: one fused call for the whole batch, no copies."""
    batch, heads, q_len, _ = q.shape
    groups = heads // k.shape[1]
    if job.width < k.shape[2]:
        k, v = (x[:, :, job.key : job.key + job.width] for x in (k, v))
    if groups > 1:
        q = q.unflatten(1, (-1, groups)).flatten(0, 1)
        k, v = (x.flatten(0, 1).unsqueeze(1) for x in (k, v))
    dtype = factor_dtype(q)
    if q.dtype != dtype:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    out, lse = fused.attend(q, k, v, job, pattern.bands[0], pattern.causal, scale)
    if groups == 1:
        return Partial(out, lse)
    return Partial(out.view(batch, heads, q_len, -1), lse.reshape(batch, heads, q_len))


def _fused_jobs(band: Band, q_len: int, k_len: int, causal: bool, biased: bool) -> Iterator[Job]:
    """Jobs of at most about ``_ROWS`` query rows, so that temporaries stay small."""
    found: Iterable[Job] = jobs(band, q_len, k_len, causal)
    if biased:
        found = by_rows(found, _BIASED_ROWS, causal)
    for job in found:
        most = max(1, _ROWS // job.rows)
        for first in range(0, job.count, most):
            shift = first * job.step
            yield job._replace(
                row=job.row + shift, key=job.key + shift, count=min(most, job.count - first)
            )


def _head_slices(kv: list[int], groups: int, biased: bool = False) -> Iterator[tuple[slice, slice]]:
    """Query and key heads that one strided call can serve.

    With one query head per KV head all evenly spaced heads go together, unless each needs a dense
    bias; a group shares its KV head through a stride of 0, one KV head a call.
    """
    steps = {b - a for a, b in zip(kv, kv[1:], strict=False)}
    if groups == 1 and len(steps) <= 1 and not biased:
        heads = slice(kv[0], kv[-1] + 1, steps.pop() if steps else 1)
        yield heads, heads
        return
    for head in kv:
        yield slice(head * groups, (head + 1) * groups), slice(head, head + 1)
