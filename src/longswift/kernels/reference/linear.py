"""Quadratic oracles of linear attention: every weight is formed, every mask is explicit."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.softmax import accumulator_dtype
from longswift.core.states import (
    ExponentialResult,
    ExponentialState,
    FeatureMap,
    LinearResult,
    LinearState,
    has_weight,
)


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
    key = torch.arange(k_len, device=q.device)
    position = key[k_len - q.shape[2] :, None]
    seen = torch.ones(q.shape[2], k_len, dtype=torch.bool, device=q.device)
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
        fine = has_weight(normaliser)
        numerator = numerator / normaliser.where(fine, torch.ones_like(normaliser))[..., None]
        numerator = numerator * fine[..., None]
    return LinearResult(numerator, normaliser, LinearState(s, z))


def attend_exponential(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    per_feature: bool,
    chunk: int = 128,
    q_map: FeatureMap | None = None,
    k_map: FeatureMap | None = None,
    state: ExponentialState | None = None,
    key_mask: Tensor | None = None,
) -> ExponentialResult:
    """Every weight of every feature; ``chunk`` unused. See the eager kernel for the arguments."""
    acc, groups, k_len = accumulator_dtype(q.dtype), q.shape[1] // k.shape[1], k.shape[2]
    a, u = (x if f is None else f(x) for x, f in ((q.to(acc), q_map), (k.to(acc), k_map)))
    if key_mask is not None:
        u = u.masked_fill(~key_mask[:, None, :, None], float("-inf"))
    if state is None:
        shape = (*k.shape[:2], u.shape[3], v.shape[3])
        state = ExponentialState.empty(shape, u)
    # The state is one key more, with values of its own for each feature.
    u = torch.cat([u, state.log_z.unsqueeze(2)], 2)
    values = [torch.cat([v.to(acc), m.unsqueeze(2)], 2) for m in state.mean.unbind(2)]
    seen = torch.ones(q.shape[2], k_len + 1, dtype=torch.bool, device=q.device)
    seen[:, :k_len] = seen[:, :k_len].tril(k_len - q.shape[2]) if causal else True
    hidden = float("-inf")
    scores = [
        x.repeat_interleave(groups, 1)[:, :, None].masked_fill(~seen, hidden) for x in u.unbind(3)
    ]
    per_row = torch.stack([_logsumexp(x) for x in scores], 3)
    total = _logsumexp(a + per_row)
    share = a.log_softmax(3) - per_row if per_feature else a - total.unsqueeze(3)
    share = share.masked_fill(total.unsqueeze(3) == hidden, hidden)
    out = torch.zeros_like(total).unsqueeze(3)
    for r, (score, value) in enumerate(zip(scores, values, strict=True)):
        out = out + (share[..., r, None] + score).exp() @ value.repeat_interleave(groups, 1)
    log_z = _logsumexp(u.transpose(2, 3))
    weights = (u - torch.where(log_z == hidden, 0.0, log_z).unsqueeze(2)).exp()
    mean = torch.stack([(weights[:, :, None, :, r] @ x)[:, :, 0] for r, x in enumerate(values)], 2)
    log_normaliser = total.masked_fill(total > hidden, 0.0) if per_feature else total
    return ExponentialResult(out, log_normaliser, ExponentialState(mean, log_z))


def _logsumexp(x: Tensor) -> Tensor:
    """Over the last dimension; ``-inf`` with zero gradients where everything is ``-inf``."""
    nothing = (x == float("-inf")).all(-1)
    total = x.masked_fill(nothing.unsqueeze(-1), 0.0).logsumexp(-1)
    return total.masked_fill(nothing, float("-inf"))
