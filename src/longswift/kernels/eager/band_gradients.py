"""Gradients of the bands: scores are recomputed, a rectangle at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.pattern import BlockPattern
from longswift.core.products import bmm, factor_dtype
from longswift.core.rectangles import (
    Job,
    band_heads,
    by_keys,
    by_rows,
    by_tiles,
    hidden_scores,
    jobs,
    tiles,
)
from longswift.core.softmax import accumulator_dtype

# Score elements per step: 8 MiB in fp32.
_SCORES = 1 << 21
_ROWS = 256


def gradient_jobs(found: Iterable[Job], causal: bool) -> Iterator[Job]:
    """Jobs cut along rows, then keys, then tiles until a rectangle's scores fit in cache."""
    return by_tiles(by_keys(by_rows(found, _ROWS, causal), _SCORES), _SCORES)


def add(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    lse: Tensor,
    delta: Tensor,
    d_out: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    bias: ScoreBias | None = None,
    d_bias: ScoreBias | None = None,
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
        bias: Additions to the scaled scores.
        d_bias: Accumulators ``[B, Hq, S]`` for its gradient.
    """
    batch, heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    for band, band_kv in band_heads(pattern.bands):
        for job in gradient_jobs(jobs(band, q_len, k_len, pattern.causal), pattern.causal):
            hidden = hidden_scores(job, band, pattern.causal, lse.dtype, q.device)
            for head in band_kv:
                query_heads = slice(head * groups, (head + 1) * groups)
                for b in range(batch):
                    biases = None
                    if bias is not None and d_bias is not None:
                        biases = bias.heads(query_heads), d_bias.heads((b, query_heads))
                    _backward_job(
                        (q[b, query_heads], k[b, head], v[b, head]),
                        job,
                        hidden,
                        scale,
                        (lse[b, query_heads], delta[b, query_heads], d_out[b, query_heads]),
                        (grads[0][b, query_heads], grads[1][b, head], grads[2][b, head]),
                        biases,
                    )


def _backward_job(
    qkv: tuple[Tensor, Tensor, Tensor],
    job: Job,
    hidden: list[tuple[int, Tensor]],
    scale: float,
    rows_of: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    biases: tuple[ScoreBias, ScoreBias] | None,
) -> None:
    """One KV head and its ``G`` query heads: ``q [G, Lq, D]``, ``k, v [Lk, *]``."""
    acc = accumulator_dtype(qkv[0].dtype)
    groups = qkv[0].shape[0]

    def by_tile(x: Tensor) -> Tensor:
        part = tiles(x.unsqueeze(-1) if x.dim() == 2 else x, job.row, job.step, job.count, job.rows)
        return part.to(acc).reshape(job.count, groups * job.rows, part.shape[-1])

    def keys_by_tile(x: Tensor) -> Tensor:
        return tiles(x.unsqueeze(0), job.key, job.step, job.count, job.width)[:, 0].to(acc)

    q, (lse, delta, d_out) = by_tile(qkv[0]), (by_tile(x) for x in rows_of)
    k, v = keys_by_tile(qkv[1]), keys_by_tile(qkv[2])
    probs = bmm(q, k.transpose(1, 2)).mul_(scale).sub_(lse)
    by_row = probs.view(job.count, groups, job.rows, job.width)
    for first, limit in hidden:
        by_row[..., first : first + limit.shape[1]] += limit
    if biases is not None:
        by_row += biases[0].rectangle(-job.shift, job.rows, job.width)
    probs.exp_()
    d_scores = bmm(d_out, v.transpose(1, 2)).sub_(delta).mul_(probs)
    if biases is not None:
        biases[1].add_rectangle_(-job.shift, d_scores.view_as(by_row).sum(0))
    d_scores.mul_(scale)
    # 16-bit inputs get 16-bit gradients: so may the factors of the last products be.
    dtype = factor_dtype(qkv[0])
    probs, d_scores, q, k, d_out = (x.to(dtype) for x in (probs, d_scores, q, k, d_out))
    _overlap_add(grads[2], bmm(probs.transpose(1, 2), d_out), job)
    _overlap_add(grads[1], bmm(d_scores.transpose(1, 2), q), job)
    d_q = bmm(d_scores, k).view(job.count, groups, job.rows, -1)
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
