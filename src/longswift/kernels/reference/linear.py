"""Quadratic oracles of linear attention: every weight is formed, every mask is explicit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longswift.core.softmax import accumulator_dtype
from longswift.core.states import LinearResult, LinearState

FeatureMap = Callable[[Tensor], Tensor]


def attend_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    chunk: int = 128,
    q_map: FeatureMap | None = None,
    k_map: FeatureMap | None = None,
    state: LinearState | None = None,
    own_chunk: bool = True,
    normalise: bool = True,
    key_mask: Tensor | None = None,
) -> LinearResult:
    """``tril(phi(Q) phi(K)^T) V`` over the row sums; see the eager kernel for the arguments."""
    acc, groups, k_len = accumulator_dtype(q.dtype), q.shape[1] // k.shape[1], k.shape[2]
    fq, fk = (x if f is None else f(x) for x, f in ((q.to(acc), q_map), (k.to(acc), k_map)))
    if key_mask is not None:
        fk = fk * key_mask[:, None, :, None]
    vs = v.to(acc)
    position, key = torch.arange(k_len - q.shape[2], k_len)[:, None], torch.arange(k_len)
    seen = torch.ones(q.shape[2], k_len, dtype=torch.bool)
    if causal:
        seen = key <= position if own_chunk else key < position // chunk * chunk
    weights = fq @ fk.repeat_interleave(groups, 1).transpose(2, 3) * seen.to(q.device)
    numerator, normaliser = weights @ vs.repeat_interleave(groups, 1), weights.sum(3)
    kept = k_len if own_chunk else k_len // chunk * chunk
    s, z = fk[:, :, :kept].transpose(2, 3) @ vs[:, :, :kept], fk[:, :, :kept].sum(2)
    if state is not None:
        numerator = numerator + fq @ state.s.repeat_interleave(groups, 1)
        normaliser = normaliser + (fq * state.z.repeat_interleave(groups, 1)[:, :, None]).sum(3)
        s, z = s + state.s, z + state.z
    if normalise:
        fine = normaliser > torch.finfo(acc).tiny ** 0.8
        numerator = numerator / normaliser.where(fine, torch.ones_like(normaliser))[..., None]
        numerator = numerator * fine[..., None]
    return LinearResult(numerator, normaliser, LinearState(s, z))
