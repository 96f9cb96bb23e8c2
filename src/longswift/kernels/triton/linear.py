"""Linear attention over a feature map by the kernels in ``sums``.

Feature maps are torch and run on the whole sequence: O(n F) memory for their output, in fp32, next
to O(n F Dv / chunk) for the sums before every chunk. Neither is kept for the backward pass, which
computes them again; it adds nothing atomically and gives the same result every time.
Katharopoulos et al., 2020, arXiv 2006.16236; in chunks: Yang et al., 2024, arXiv 2312.06635.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longswift.core.once import Saved, once
from longswift.core.softmax import accumulator_dtype
from longswift.core.states import (
    FeatureMap,
    LinearResult,
    LinearState,
    check_own_chunk,
    has_weight,
)
from longswift.kernels.triton.limits import checked, on_their_device, unit_stride


@on_their_device
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
    """``phi(q_i) S_i / (phi(q_i) . z_i)``, sums over the keys query i sees and those in ``state``.

    Args:
        q: ``[B, Hq, Lq, D]``, or features ``[B, Hq, Lq, F]`` when ``q_map`` is None.
        k: ``[B, Hkv, Lk, D]``, or features.
        v: ``[B, Hkv, Lk, Dv]``.
        causal: Query i sits at key ``Lk - Lq + i``.
        chunk: Tokens per chunk; sums are kept for each. With ``own_chunk`` it changes speed and
            memory, never the result.
        q_map: Features of q in fp32 or better, ``[..., D]`` to ``[..., F]``, token by token.
            Gradients flow to q but not to parameters inside the map.
        k_map: Likewise for k.
        state: Sums over keys before these, or None. Gradients flow into it.
        own_chunk: False: each query sees the state and the complete chunks before its own, on a
            grid counted from the first key; the state returned holds complete chunks only.
        normalise: Divide by the normaliser. A row whose normaliser is not positive (or so small
            that the quotient means nothing) is 0.
        key_mask: bool ``[B, Lk]``; a masked key adds nothing to S and nothing to z.

    Returns:
        Output, normaliser and the new state, all in fp32 or better.

    Raises:
        ConfigError: ``own_chunk=False`` without causal order.
        UnsupportedError: fp64 on a GPU.
    """
    check_own_chunk(own_chunk, causal)
    q, k, v = checked(q, k, v, kernel="attend_linear")
    k_len = k.shape[2]
    limit = _limits(q.shape[2], k_len, causal, chunk, own_chunk, q.device)
    hidden = None if key_mask is None else ~key_mask[:, None, :, None]
    if not own_chunk:
        # Nobody sees the rest, and the state does not hold it.
        k_len = k_len // chunk * chunk
        k, v = k[:, :, :k_len], v[:, :, :k_len]
        hidden = None if hidden is None else hidden[:, :, :k_len]
    call = _Call(limit, min(chunk, max(1, k_len)), q_map, k_map, hidden, normalise)
    if state is None:
        with torch.no_grad():
            features = call.k_features(k[:, :, :1]).shape[3]
        shape = k.shape[0], k.shape[1], features, v.shape[3]
        state = LinearState.empty(shape, k.new_empty(0, dtype=accumulator_dtype(q.dtype)))
    tensors = q, k, v, *(x.to(accumulator_dtype(q.dtype)) for x in state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        out, normaliser, s, z = _AttendLinear.apply(call, *tensors)
    else:
        with torch.no_grad():
            out, normaliser, s, z = call.forward(*tensors)
    return LinearResult(out, normaliser, LinearState(s, z))


def _limits(
    q_len: int, k_len: int, causal: bool, chunk: int, own_chunk: bool, device: torch.device
) -> Tensor:
    """How many keys each query sees, int32 ``[Lq]``."""
    if not causal:
        return torch.full((q_len,), k_len, dtype=torch.int32, device=device)
    position = torch.arange(k_len - q_len, k_len, dtype=torch.int32, device=device)
    return (position + 1 if own_chunk else position // chunk * chunk).clamp_(min=0)


@dataclass(frozen=True)
class _Call:
    """What a call computes besides its tensors.

    Attributes:
        limit: int32 ``[Lq]``, how many keys each query sees.
        chunk: Tokens per chunk.
        q_map: Features of q.
        k_map: Features of k.
        hidden: bool ``[B, 1, Lk, 1]``, the masked keys.
        normalise: Divide by the sum of weights.
    """

    limit: Tensor
    chunk: int
    q_map: FeatureMap | None
    k_map: FeatureMap | None
    hidden: Tensor | None
    normalise: bool

    def q_features(self, q: Tensor) -> Tensor:
        return q if self.q_map is None else self.q_map(q.to(accumulator_dtype(q.dtype)))

    def k_features(self, k: Tensor) -> Tensor:
        return k if self.k_map is None else self.k_map(k.to(accumulator_dtype(k.dtype)))

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Features of both, those of masked keys 0."""
        keys = self.k_features(k)
        if self.hidden is not None:
            keys = keys.masked_fill(self.hidden, 0.0)
        return unit_stride(self.q_features(q), keys)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, normaliser, and S and z after the last key."""
        from longswift.kernels.triton.sums import read_normalised, sums

        queries, keys = self.features(q, k)
        before = sums(keys, v, LinearState(s, z), self.chunk)
        out, norm = read_normalised(queries, keys, v, before, self.limit, divide=self.normalise)
        return out, norm, *before.last

    def backward(
        self,
        queries: Tensor,
        keys: Tensor,
        v: Tensor,
        state: LinearState,
        d_out: Tensor,
        d_norm: Tensor,
        d_state: LinearState,
    ) -> tuple[Tensor, Tensor, Tensor, LinearState]:
        """Gradients of features, values and state from those of the *undivided* output."""
        from longswift.kernels.triton.sums import Extra, read, sums

        d_out, d_norm = d_out.contiguous(), d_norm.contiguous()
        before = sums(keys, v, state, self.chunk)
        of_lines = Extra(d_norm, of_lines=True)
        d_q = read(d_out, v, keys, before, self.limit, extra=of_lines, transposed=True)
        after = sums(queries, d_out, d_state, self.chunk, extra=d_norm, reverse=True)
        # From the end, a key is seen by the rows that see more keys than lie before it.
        key = torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device)
        blind = torch.searchsorted(self.limit, key, right=True, out_int32=True)
        limit = (len(self.limit) - blind).flip(0)
        d_v = read(keys, queries, d_out, after, limit, reverse=True)
        of_keys = Extra(d_norm, of_lines=False)
        d_k = read(v, d_out, queries, after, limit, extra=of_keys, transposed=True, reverse=True)
        return d_q, d_k, d_v, after.last


class _AttendLinear(torch.autograd.Function):
    """Features and sums are computed again in the backward pass. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, norm, s_last, z_last = call.forward(q, k, v, s, z)
        ctx.save_for_backward(q, k, v, s, z, out, norm)
        ctx.call = call
        return out, norm, s_last, z_last

    @staticmethod
    @once
    def backward(ctx: Any, saved: Saved, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        q, k, v, s, z, out, norm = saved
        d_out, d_norm, d_s, d_z = grad_outputs
        if call.normalise:
            share = torch.where(has_weight(norm), norm, float("inf")).reciprocal()
            d_norm = d_norm - (d_out * out).sum(-1) * share
            d_out = d_out * share.unsqueeze(-1)
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        with torch.autocast(q.device.type, enabled=False):
            with torch.enable_grad():
                features = call.features(*leaves)
            queries, keys = (x.detach() for x in features)
            state, d_state = LinearState(s, z), LinearState(d_s, d_z)
            *found, d_v, d_state = call.backward(queries, keys, v, state, d_out, d_norm, d_state)
            given = [grad.to(x.dtype) for x, grad in zip(features, found, strict=True)]
            d_q, d_k = torch.autograd.grad(features, leaves, given)
        return None, d_q, d_k, d_v.to(v.dtype), *d_state
