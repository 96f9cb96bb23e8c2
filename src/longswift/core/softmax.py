"""Merging attention over disjoint key sets by log-sum-exp, in fp32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.types import Partial


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def safe_exp_difference(lse: Tensor, total: Tensor) -> Tensor:
    """``exp(lse - total)`` with 0 where ``lse`` is ``-inf`` (even if ``total`` is, too)."""
    return torch.exp(lse - total).masked_fill(lse == float("-inf"), 0.0)


def hide_(scores: Tensor, shown: Tensor) -> Tensor:
    """Scores become ``-inf`` where not ``shown`` (bool, broadcastable); in place.

    ``masked_fill_`` says the same, several times slower on CPUs.
    """
    limit = shown.to(scores.dtype).sub_(0.5).mul_(float("inf"))
    return torch.minimum(scores, limit, out=scores)


def merge(*parts: Partial) -> Partial:
    """Attention over the union of disjoint key sets.

    Args:
        parts: ``out [..., L, Dv]`` normalised within each part, ``lse [..., L]`` (natural log).

    Returns:
        The normalised output over the union and its log-sum-exp; a row that saw no key in any
        part is exactly 0 with ``lse = -inf``, and its gradients are 0.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part.lse for part in parts])
    nothing = (lse == float("-inf")).all(0)
    # Infinite numbers have no second derivatives, and their differences not even first ones.
    lse = lse.clamp(min=torch.finfo(lse.dtype).min / 2)
    total = torch.logsumexp(lse.masked_fill(nothing, 0.0), 0)
    weights = torch.exp(lse - total).unsqueeze(-1)
    out = parts[0].out * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        out = out + part.out * weight
    return Partial(out, total.masked_fill(nothing, float("-inf")))


def softmax_partial(scores: Tensor, v: Tensor) -> Partial:
    """Attention from scores ``[..., L, K]`` (``-inf`` = hidden) over ``v [..., K, Dv]``."""
    lse = torch.logsumexp(scores, dim=-1)
    weights = safe_exp_difference(scores, lse.unsqueeze(-1))
    return Partial(weights @ v, lse)
