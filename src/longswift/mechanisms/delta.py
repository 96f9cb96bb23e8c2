"""Delta correction: the error of a sparse result at some exact rows is added to those that follow.

Every ``stride``-th row is computed exactly; the difference between its exact and its sparse output
is added to that row and the rows before the next such row (Delta Attention, Willette et al., 2025,
arXiv 2505.11254). Rows behind no exact row of the same call stay as they are.

Cost: ``1 / stride`` of full attention. O(n) memory, also for gradients: they are recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from longswift.core.bias import ScoreBias
from longswift.core.softmax import accumulator_dtype
from longswift.core.types import Partial

# Scores held at once: 16 MiB in fp32.
_SCORES = 1 << 22


def add_delta(
    part: Partial,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int,
    causal: bool,
    scale: float,
    bias: ScoreBias | None = None,
) -> tuple[Partial, float]:
    """The corrected output; ``lse`` stays that of the sparse result.

    Args:
        part: Sparse result of ``q``.
        q: ``[B, Hq, Lq, D]``, an unpadded batch.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        stride: Positions divisible by it are exact.
        causal: Query ``i`` sits at position ``Lk - Lq + i`` and sees nothing after it.
        scale: Factor on the scores.
        bias: Additions to the scaled scores.

    Returns:
        The result, and the keys the exact rows scored, per query.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    first = -(k_len - q_len) % stride
    positions = range(k_len - q_len + first, k_len, stride)
    if not positions:
        return part, 0.0
    acc = accumulator_dtype(q.dtype)
    keys, values = k.to(acc), v.to(acc)
    step = max(1, _SCORES // (q.shape[:2].numel() * k_len))
    exact = []
    for start in range(0, len(positions), step):
        some = positions[start : start + step]
        rows = q[:, :, first + start * stride :: stride][:, :, : len(some)].to(acc) * scale
        last = some[-1] + 1 if causal else k_len
        place = torch.tensor(some, device=q.device)
        inputs = rows, keys[:, :, :last], values[:, :, :last], place, causal, bias
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if tracked or bias is not None and bias.requires_grad:
            exact.append(
                checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            exact.append(_attend(*inputs))
    error = torch.cat(exact, 2) - part.out[:, :, first::stride].to(acc)
    error = error.repeat_interleave(stride, 2)[:, :, : q_len - first]
    out = part.out.to(acc) + pad(error, (0, 0, first, 0))
    scored = sum(position + 1 if causal else k_len for position in positions)
    return Partial(out.to(part.out.dtype), part.lse), scored / q_len


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    causal: bool,
    bias: ScoreBias | None,
) -> Tensor:
    """Softmax attention of scaled rows at ``position [R]``, ``[B, Hq, R, Dv]``."""
    by_head = q.unflatten(1, (k.shape[1], -1))
    scores = by_head.flatten(2, 3) @ k.transpose(2, 3)
    scores = scores.view(*by_head.shape[:4], -1)
    if bias is not None:
        scores = scores + bias.rows(position, k.shape[2]).unflatten(0, (k.shape[1], -1))
    if causal:
        hidden = torch.arange(k.shape[2], device=q.device) > position[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.softmax(scores, -1).flatten(2, 3) @ v
    return out.view(*by_head.shape[:4], -1).flatten(1, 2)
