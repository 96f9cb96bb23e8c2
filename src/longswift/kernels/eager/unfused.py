"""Attention of dense rectangles by matrix products, where those beat torch's fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.blocks import Workspace
from longswift.core.products import bmm, mm
from longswift.core.softmax import merge
from longswift.core.types import Partial

HIDDEN = float("-inf")
# Keys whose scores are held at once.
_KEYS = 4096


def softmax_(scores: Tensor, empty: bool = True) -> Tensor:
    """Softmax over the last dimension in place; returns the log-sum-exp.

    Args:
        scores: ``[..., K]``.
        empty: Whether a row may see nothing; it becomes 0 with ``-inf``.
    """
    top = scores.amax(-1)
    torch.softmax(scores, -1, out=scores)
    # The largest probability is exp(top - lse): cheaper than another pass of exponentials.
    lse = top - scores.amax(-1).log_()
    if empty:
        nothing = top == HIDDEN
        if bool(nothing.any()):
            scores.masked_fill_(nothing.unsqueeze(-1), 0.0)
            lse.masked_fill_(nothing, HIDDEN)
    return lse


def weigh(probs: Tensor, v: Tensor, space: Workspace) -> Tensor:
    """``probs [Z, R, K] @ v [Z, K, Dv]``; 16-bit values are met by rounded probabilities."""
    if v.dtype == probs.dtype:
        return bmm(probs, v)
    low = space.get("probs", tuple(probs.shape), v.dtype).copy_(probs)
    return torch.bmm(low, v).to(probs.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    hidden: list[tuple[int, Tensor]],
    space: Workspace,
    biased: tuple[ScoreBias, int] | None = None,
) -> Partial:
    """Softmax attention of tiles of queries that share their keys; not differentiable.

    Args:
        q: ``[N, G, R, D]``.
        k: ``[N, K, D]`` in the accumulator dtype.
        v: ``[N, K, Dv]`` in the accumulator dtype or that of ``q``.
        scale: Factor on the scores.
        hidden: First key and ``[R, *]`` of 0 and ``-inf``, added to the scores from that key on.
        space: Buffers of this thread.
        biased: The bias of the ``G`` heads, and the position of a tile's first query minus that of
            its first key.

    Returns:
        ``out [N, G, R, Dv]``, ``lse [N, G, R]``, in the accumulator dtype.
    """
    shape, width = q.shape[:3], k.shape[1]
    queries = space.get("queries", tuple(q.shape), k.dtype).copy_(q).mul_(scale).flatten(1, 2)
    parts = []
    for first in range(0, width, _KEYS):
        keys, values = k, v
        if width > _KEYS:
            keys, values = (x[:, first : first + _KEYS] for x in (k, v))
        size = keys.shape[1]
        if shape[0] == 1:
            scores = mm(queries[0], keys[0].t()).unsqueeze(0)
        else:
            scores = space.get("scores", (shape[0], queries.shape[1], size), k.dtype)
            bmm(queries, keys.transpose(1, 2), out=scores)
        by_row = scores.view(*shape, size)
        for start, limit in hidden:
            begin, end = max(start, first), min(start + limit.shape[1], first + size)
            if begin < end:
                by_row[..., begin - first : end - first] += limit[:, begin - start : end - start]
        if biased is not None:
            bias, shift = biased
            by_row += bias.rectangle(first - shift, shape[2], size)
        lse = softmax_(scores, empty=bool(hidden))
        parts.append(Partial(weigh(scores, values, space), lse))
    out, lse = merge(*parts)
    return Partial(out.view(*shape, -1), lse.view(shape))
