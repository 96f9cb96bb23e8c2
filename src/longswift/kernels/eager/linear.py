"""Linear attention over a feature map, chunk by chunk with carried sums.

Inside a chunk of C tokens weights are formed explicitly, everything before it is read from
``S = sum phi(k) v^T`` and ``z = sum phi(k)``: O(n (C + F) (F + Dv)) time, O(n) memory forward and
backward. Katharopoulos et al., 2020, arXiv 2006.16236.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.blocks import BlockRun, stack_queries, unstack_queries
from longswift.core.softmax import accumulator_dtype
from longswift.core.states import (
    FeatureMap,
    LinearResult,
    LinearState,
    check_own_chunk,
    has_weight,
)
from longswift.kernels.eager.scan import Piece, Step, plan, scan


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
        chunk: Tokens per chunk. With ``own_chunk`` it changes the speed, never the result.
        q_map: Features of a piece of q in fp32 or better, ``[..., D]`` to ``[..., F]``; applied
            chunk by chunk, so features are never held for the whole sequence. Gradients flow to q
            but not to parameters inside the map: apply a learned map first.
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
    """
    check_own_chunk(own_chunk, causal)
    step = _LinearStep(k.shape[1], q_map, k_map, own_chunk, normalise)
    if key_mask is not None:
        step.hide(key_mask)
    acc = accumulator_dtype(q.dtype)
    features = step.k_features(k[:, :, :0].to(acc)).shape[3]
    if state is None:
        shape = (k.shape[0], k.shape[1], features, v.shape[3])
        state = LinearState.empty(shape, k.new_empty(0, dtype=acc))
    pieces = plan(
        q.shape[2],
        k.shape[2],
        causal=causal,
        chunk=chunk,
        own_chunk=own_chunk,
        chunk_bytes=chunk_bytes(q, v, features, chunk),
    )
    out, normaliser, last = scan(step, pieces, q, k, v, tuple(x.to(acc) for x in state))
    return LinearResult(out, normaliser, LinearState(*last))


def chunk_bytes(q: Tensor, v: Tensor, features: int, chunk: int) -> int:
    """What one chunk of a run takes: features, weights inside the chunk, and a state."""
    per_row = chunk * (features + chunk + v.shape[3])
    per_state = v.shape[1] * features * v.shape[3]
    size = 8 if q.dtype == torch.float64 else 4
    return q.shape[0] * (q.shape[1] * per_row + per_state) * size


def attend_run(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, own_chunk: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A run of N chunks in which no query sees a later chunk.

    Args:
        q: Features ``[B, Hkv, N, G * rows, F]``.
        k: Features ``[B, Hkv, N, C, F]``.
        v: ``[B, Hkv, N, C, Dv]``.
        s: ``[B, Hkv, F, Dv]`` before the run.
        z: ``[B, Hkv, F]`` before the run.
        own_chunk: Queries see the keys of their own chunk up to their row.

    Returns:
        Numerator ``[B, Hkv, N, G * rows, Dv]``, normaliser without ``Dv``, and S and z after it.
    """
    s_before, s = _carry(s, k.transpose(3, 4) @ v)
    z_before, z = _carry(z, k.sum(3))
    if q.shape[3] == 0:
        return q.new_empty(*q.shape[:4], v.shape[4]), q.new_empty(q.shape[:4]), s, z
    numerator = q @ s_before
    normaliser = (q @ z_before.unsqueeze(4)).squeeze(4)
    if own_chunk and k.shape[3]:
        rows = k.shape[3]
        future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
        weights = q @ k.transpose(3, 4)
        weights = weights.masked_fill(future.repeat(q.shape[3] // rows, 1), 0.0)
        numerator = numerator + weights @ v
        normaliser = normaliser + weights.sum(4)
    return numerator, normaliser, s, z


def _carry(before: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Totals before each of N chunks ``[B, Hkv, N, ...]``, and after the last of them."""
    if sums.shape[2] == 1:
        return before.unsqueeze(2), before + sums[:, :, 0]
    totals = before.unsqueeze(2) + sums.cumsum(2)
    # A view would keep the totals of the whole run alive.
    return torch.cat([before.unsqueeze(2), totals[:, :, :-1]], 2), totals[:, :, -1].clone()


class _LinearStep(Step):
    def __init__(
        self,
        kv_heads: int,
        q_map: FeatureMap | None,
        k_map: FeatureMap | None,
        own_chunk: bool,
        normalise: bool,
    ) -> None:
        self._kv_heads = kv_heads
        self._q_map, self._k_map = q_map, k_map
        self._own_chunk, self._normalise = own_chunk, normalise
        self._real: Tensor | None = None

    def hide(self, key_mask: Tensor) -> None:
        self._real = key_mask[:, None, :, None]

    def k_features(self, k: Tensor) -> Tensor:
        return k if self._k_map is None else self._k_map(k)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        s, z = state
        heads, rows = q.shape[1], q.shape[2]
        features = q.to(s.dtype) if self._q_map is None else self._q_map(q.to(s.dtype))
        run = BlockRun(0, piece.chunks, 0, rows // piece.chunks, 0)
        queries = stack_queries(features, run, self._kv_heads)
        keys = self.k_features(k.to(s.dtype))
        if self._real is not None:
            keys = keys.masked_fill(~self._real[:, :, slice(*piece.keys)], 0.0)
        cut = (piece.chunks, k.shape[2] // piece.chunks)
        numerator, normaliser, s, z = attend_run(
            queries,
            keys.unflatten(2, cut),
            v.to(s.dtype).unflatten(2, cut),
            s,
            z,
            self._own_chunk,
        )
        if self._normalise:
            numerator = divide(numerator, normaliser)
        out, normaliser = (unstack_queries(x, run, heads) for x in (numerator, normaliser))
        return out, normaliser, (s, z)


def divide(numerator: Tensor, normaliser: Tensor) -> Tensor:
    """``numerator [..., Dv] / normaliser [...]``; exactly 0, without gradient, without weight."""
    fine = has_weight(normaliser)
    quotient = numerator / torch.where(fine, normaliser, 1.0).unsqueeze(-1)
    return torch.where(fine.unsqueeze(-1), quotient, 0.0)
