"""Gradients of what the compiled kernels attend to, added up in fp32 in an order of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core import compiled
from longswift.core.pattern import BlockPattern
from longswift.kernels.eager.gathered import Gathered
from longswift.kernels.native.pieces import batches

Gradients = tuple[Tensor, Tensor, Tensor]


def add_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    lse: Tensor,
    delta: Tensor,
    d_out: Tensor,
    grads: Gradients,
) -> None:
    """Adds the gradients of attention under a pattern to ``grads = (dq, dk, dv)``.

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
        grads: fp32 accumulators shaped like q, k, v.
    """
    q, k, v, d_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, d_out))
    given = q, k, v, lse.contiguous(), delta.contiguous(), d_out
    _add_bands(given, pattern, scale, grads)
    if pattern.tokens is not None or pattern.pool is not None:
        Gathered(q, k, v, pattern, scale).backward(lse, delta, d_out, grads)


def _add_bands(
    given: tuple[Tensor, ...], pattern: BlockPattern, scale: float, grads: Gradients
) -> None:
    """The bands' share, a diagonal of squares at a time: these share neither rows nor keys."""
    q, k = given[:2]
    if q.numel() == 0 or k.numel() == 0:
        return
    operators = compiled.loaded()
    first, end = pattern.intervals(q.shape[2], k.shape[2], torch.device("cpu"))
    side = operators.gradient_square()
    starts = first[:, ::side].tolist()
    last = torch.arange(side - 1, q.shape[2] + side - 1, side).clamp_(max=q.shape[2] - 1)
    ends = end[:, last].tolist()
    diagonals: dict[int, list[tuple[int, ...]]] = {}
    for head in range(k.shape[1]):
        for i, (start, stop) in enumerate(zip(starts[head], ends[head], strict=True)):
            for j in range(start // side, -(-stop // side)):
                places = diagonals.setdefault(i - j, [])
                places += [(b, head, i * side, j * side) for b in range(k.shape[0])]
    for _, squares in sorted(diagonals.items()):
        for numbers in batches(squares):
            operators.band_gradients(*given, *grads, first, end, numbers, scale)
