"""The dense oracle: explicit masks, explicit pools, O(Lq * Lk) memory. Slow on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.pattern import BlockPattern
from longswift.core.softmax import accumulator_dtype, softmax_partial
from longswift.core.summary import KeySummary
from longswift.core.types import Partial
from longswift.kernels.reference.landmarks import attend_landmarks
from longswift.kernels.reference.linear import attend_exponential, attend_linear

__all__ = [
    "attend",
    "attend_bands",
    "attend_exponential",
    "attend_landmarks",
    "attend_linear",
    "remainder_members",
    "verify",
]


def verify(device: torch.device) -> tuple[bool, str]:
    """Always usable, never fast."""
    return True, "dense oracle, quadratic memory"


def attend_bands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    bias: ScoreBias | None = None,
) -> Partial:
    """Attention over the pattern's bands alone."""
    bare = BlockPattern(causal=pattern.causal, bands=pattern.bands, block=pattern.block)
    return attend(q, k, v, bare, scale, bias=bias)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    scale: float,
    *,
    bands: Partial | None = None,
    summary: KeySummary | None = None,
    bias: ScoreBias | None = None,
) -> Partial:
    """Softmax over the visible keys and the remainder's columns; ``bands``, ``summary`` unused."""
    groups = q.shape[1] // k.shape[1]
    acc = accumulator_dtype(q.dtype)
    qa, ka, va = (x.to(acc) for x in (q, k, v))
    ka, va = ka.repeat_interleave(groups, 1), va.repeat_interleave(groups, 1)
    scores = qa @ ka.transpose(2, 3) * scale
    added = None
    if bias is not None:
        position = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        added = bias.rows(position, k.shape[2])
        scores = scores + added
    hidden = ~pattern.visible(q.shape[2], k.shape[2], groups, q.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    if pattern.pool is None:
        part = softmax_partial(scores, va)
        return Partial(part.out.to(q.dtype), part.lse)
    members = remainder_members(pattern, q.shape[2], k.shape[2], q.device)
    members = members.repeat_interleave(groups, 1).to(acc)
    count = members.sum(-1)
    mean_k, mean_v = (
        torch.einsum("bhrcl,bhld->bhrcd", members.expand(q.shape[0], -1, -1, -1, -1), x)
        / count.clamp(min=1.0).unsqueeze(-1)
        for x in (ka, va)
    )
    coarse = torch.einsum("bhrd,bhrcd->bhrc", qa, mean_k) * scale + count.log()
    if added is not None:
        total = torch.einsum("bhrcl,hrl->bhrc", members, added)
        coarse = coarse + total / count.clamp(min=1.0)
    every = torch.cat([scores, coarse], -1)
    lse = torch.logsumexp(every, -1)
    weights = torch.exp(every - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    out = weights[..., : k.shape[2]] @ va
    out = out + torch.einsum("bhrc,bhrcd->bhrd", weights[..., k.shape[2] :], mean_v)
    return Partial(out.to(q.dtype), lse)


def remainder_members(
    pattern: BlockPattern, q_len: int, k_len: int, device: torch.device
) -> Tensor:
    """Which tokens each remainder column stands for, bool ``[B or 1, Hkv, Lq, 2 * pools, Lk]``.

    Column ``2p`` holds pool ``p``'s tokens left of the band and not gathered by the row, column
    ``2p + 1`` those right of it (bidirectional only).
    """
    assert pattern.pool is not None
    position = torch.arange(k_len - q_len, k_len, device=device)
    key = torch.arange(k_len, device=device)
    edges = [band.bounds(position, k_len) for band in pattern.bands]
    left = torch.stack([key < first[:, None] for first, _ in edges])
    right = torch.stack([key >= last[:, None] for _, last in edges])
    if pattern.causal:
        right = torch.zeros_like(right)
    free = ~pattern.gathered_mask(q_len, k_len, device)
    pools = -(-k_len // pattern.pool)
    in_pool = torch.arange(pools, device=device)[:, None] == key // pattern.pool
    sides = torch.stack([left & free, right & free], 3)
    members = sides.unsqueeze(3) & in_pool[:, None]
    return members.flatten(3, 4)
