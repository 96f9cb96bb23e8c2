"""Linear attention over features ``exp(u)``, without overflow, underflow or a look at the future.

A common shift of all keys would have to be their maximum: a future key could then push the present
ones below the smallest float. Here every run of chunks is shifted, feature by feature, to what its
first row has seen, so that a row's own sums are at least 1. A run in which some key exceeds that by
more than ``exp(40)`` is halved until it fits, down to single rows if need be.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from longswift.core.blocks import BlockRun, stack_queries, unstack_queries
from longswift.core.softmax import accumulator_dtype
from longswift.core.states import ExponentialResult, ExponentialState, FeatureMap
from longswift.kernels.eager.linear import attend_run, chunk_bytes, divide
from longswift.kernels.eager.scan import Piece, Step, plan, scan

# exp(40) times the longest run times the number of features is far from the largest fp32.
_REACH = 40.0


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
    """A mean of values over keys, through features ``exp(a)`` of queries and ``exp(u)`` of keys.

    With one normaliser per row, weights are ``sum_r exp(a_ir + u_jr)`` over their sum (Performer).
    With one per feature they are ``sum_r softmax_r(a_ir) softmax_j(u_jr)``, the second over the
    keys that row i sees (Efficient Attention).

    Args:
        q: ``[B, Hq, Lq, D]``, mapped to ``a [..., F]`` by ``q_map`` (itself when None).
        k: ``[B, Hkv, Lk, D]``, mapped to ``u [..., F]`` by ``k_map``.
        v: ``[B, Hkv, Lk, Dv]``.
        causal: Query i sits at key ``Lk - Lq + i``.
        per_feature: Which of the two normalisers.
        chunk: Tokens per chunk; changes the speed, never the result.
        q_map: Applied piece by piece, in fp32 or better; no gradients to what it closes over.
        k_map: Likewise.
        state: Keys seen before these, or None. Gradients flow into it.
        key_mask: bool ``[B, Lk]``; a masked key has no weight at all.

    Returns:
        Output, log of the normaliser (``-inf`` and output 0 where no key is seen) and the state.
    """
    kind = _PerFeature if per_feature else _PerRow
    step = kind(k.shape[1], q_map, k_map, key_mask)
    acc = accumulator_dtype(q.dtype)
    features = step.log_features(k[:, :, :0].to(acc)).shape[3]
    if state is None:
        shape = (k.shape[0], k.shape[1], features, v.shape[3])
        state = ExponentialState.empty(shape, k.new_zeros(0, dtype=acc))
    pieces = plan(
        q.shape[2],
        k.shape[2],
        causal=causal,
        chunk=chunk,
        own_chunk=True,
        chunk_bytes=chunk_bytes(q, v, features, chunk),
    )
    out, log_normaliser, last = scan(step, pieces, q, k, v, tuple(x.to(acc) for x in state))
    return ExponentialResult(out, log_normaliser, ExponentialState(*last))


class _ExponentialStep(Step):
    def __init__(
        self,
        kv_heads: int,
        q_map: FeatureMap | None,
        k_map: FeatureMap | None,
        key_mask: Tensor | None,
    ) -> None:
        self._kv_heads = kv_heads
        self._q_map, self._k_map = q_map, k_map
        self._key_mask = key_mask
        self._checked: tuple[Piece, Tensor] | None = None

    def log_features(self, k: Tensor, real: Tensor | None = None) -> Tensor:
        u = k if self._k_map is None else self._k_map(k)
        return u if real is None else u.masked_fill(~real[:, None, :, None], float("-inf"))

    def _real(self, piece: Piece) -> Tensor | None:
        return None if self._key_mask is None else self._key_mask[:, slice(*piece.keys)]

    @torch.no_grad()
    def _shift(self, u: Tensor, piece: Piece, log_z: Tensor) -> Tensor:
        """What the first row that sees anything has seen, ``[B, Hkv, F]``."""
        if u.shape[2] == 0:
            seen = log_z
        elif piece.queries[1] == piece.queries[0]:
            seen = torch.maximum(log_z, u.amax(2))
        else:
            seen = torch.logaddexp(log_z, u[:, :, 0])
            real = self._real(piece)
            if real is not None:
                # Rows ahead of the first real key see nothing and need no shift.
                rows = torch.arange(u.shape[0], device=u.device)
                first = u[rows, :, real.int().argmax(1)]
                seen = torch.where(seen == float("-inf"), first, seen)
        return seen.masked_fill(seen == float("-inf"), 0.0)

    @torch.no_grad()
    def fits(self, k: Tensor, piece: Piece, state: tuple[Tensor, ...]) -> bool:
        if k.shape[2] <= 1 or piece.queries[1] == piece.queries[0]:
            return True
        log_z = state[1]
        u = self.log_features(k.to(log_z.dtype), self._real(piece))
        self._checked = piece, u
        return bool((u.amax(2) - self._shift(u, piece, log_z)).max() <= _REACH)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        mean, log_z = state
        if self._checked is not None and self._checked[0] is piece and not k.requires_grad:
            u = self._checked[1]
        else:
            u = self.log_features(k.to(mean.dtype), self._real(piece))
        self._checked = None
        shift = self._shift(u, piece, log_z)
        cut = (piece.chunks, k.shape[2] // piece.chunks)
        keys = (u - shift.unsqueeze(2)).exp().unflatten(2, cut)
        values = v.to(mean.dtype).unflatten(2, cut)
        seen = (log_z - shift).exp()
        run = BlockRun(0, piece.chunks, 0, q.shape[2] // piece.chunks, 0)
        a = q.to(mean.dtype) if self._q_map is None else self._q_map(q.to(mean.dtype))
        a = stack_queries(a, run, self._kv_heads)
        queries, top = self._queries(a, shift, keys, seen)
        s = mean * seen.unsqueeze(3)
        numerator, total, s, z = attend_run(queries, keys, values, s, seen, own_chunk=True)
        out, log_total = self._results(numerator, total, top)
        out, log_total = (unstack_queries(x, run, q.shape[1]) for x in (out, log_total))
        return out, log_total, (divide(s, z), shift + _log(z))

    @abstractmethod
    def _queries(
        self, a: Tensor, shift: Tensor, keys: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of queries against the shifted keys, and the log of what they lack."""

    @abstractmethod
    def _results(self, numerator: Tensor, total: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-normaliser."""


class _PerRow(_ExponentialStep):
    def _queries(
        self, a: Tensor, shift: Tensor, keys: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        a = a + shift[:, :, None, None]
        top = a.detach().amax(4, keepdim=True)
        return (a - top).exp(), top.squeeze(4)

    def _results(self, numerator: Tensor, total: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        return divide(numerator, total), top + _log(total)


class _PerFeature(_ExponentialStep):
    def _queries(
        self, a: Tensor, shift: Tensor, keys: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, own = a.shape[3], keys.shape[3]
        totals = seen[:, :, None, None]
        if rows and own:
            totals = totals + keys.flatten(2, 3).cumsum(2).unflatten(2, keys.shape[2:4])
            totals = totals.repeat(1, 1, 1, rows // own, 1)
        share = a.softmax(4) / torch.where(totals > 0, totals, 1.0)
        return torch.where(totals > 0, share, 0.0), totals

    def _results(self, numerator: Tensor, total: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        # A row's weights add up to 1, or to 0 if it saw nothing.
        return numerator, torch.where(total.detach() > 0.5, 0.0, float("-inf"))


def _log(total: Tensor) -> Tensor:
    """Logarithm, ``-inf`` at 0 with finite gradients."""
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1.0).log(), float("-inf"))
