"""The shape of every mechanism: a frozen dataclass that is its own configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from longswift.core.bias import PositionBias, ScoreBias
from longswift.core.errors import ConfigError, InputError, UnsupportedError, problem
from longswift.core.inputs import (
    RowGroup,
    check_finite,
    check_inputs,
    check_scale,
    check_summary,
    split_padding,
    under_autocast,
)
from longswift.core.observe import observed, tell
from longswift.core.softmax import accumulator_dtype
from longswift.core.summary import KeySummary
from longswift.core.types import AttentionResult, AttentionStats


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call asks for besides q, k, v; handed down whole.

    Attributes:
        causal: Bottom-right aligned causal attention.
        scale: Factor on the scores.
        backend: ``"auto"`` or an explicit backend name.
        training: True when the choice of keys must not depend on later rows.
        summary: Page summaries of ``k`` kept by a cache, or None.
        bias: Additions to the scaled scores by distance, or None.
    """

    causal: bool
    scale: float
    backend: str = "auto"
    training: bool = False
    summary: KeySummary | None = None
    bias: ScoreBias | None = None


@dataclass(frozen=True, kw_only=True)
class Mechanism(ABC):
    """Attention over a subset (or an approximation) of the keys.

    Subclasses set ``name``, say which of causal and bidirectional they support, and implement
    ``_forward`` (an unpadded batch) and ``reference`` (dense, the specification). Instances are
    immutable, hashable and serialisable: the configuration *is* the object.
    """

    name: ClassVar[str]
    supports_causal: ClassVar[bool] = True
    supports_bidirectional: ClassVar[bool] = True
    supports_cross: ClassVar[bool] = False
    supports_bias: ClassVar[bool] = False

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        backend: str = "auto",
        training: bool | None = None,
        summary: KeySummary | None = None,
        bias: PositionBias | None = None,
    ) -> AttentionResult:
        """Attend.

        Args:
            q: ``[B, Hq, Lq, D]``.
            k: ``[B, Hkv, Lk, D]``, ``Hq % Hkv == 0``.
            v: ``[B, Hkv, Lk, Dv]``.
            causal: Query ``i`` sits at key position ``Lk - Lq + i`` and sees nothing after it.
            key_mask: bool ``[B, Lk]``, True = real token, padding on either side (or anywhere).
                Positions count real tokens only. A query on a padded key returns 0.
            scale: Factor on the scores, ``D ** -0.5`` when None.
            backend: ``"auto"`` picks one; an explicit name never falls back.
            training: Content-based choices leak nothing from later rows of a block. None means
                "while gradients are recorded".
            summary: Page summaries of exactly these keys, from a cache (see ``KeySummary``).
            bias: Added to the scaled scores by query head and distance, with gradients to its
                parameters (see ``longswift.extend.bias``).

        Raises:
            InputError: Wrong shapes, dtypes (under autocast they may differ), devices, or NaN.
            UnsupportedError: The mechanism has no causal (or bidirectional) form, or no scores to
                add a bias to.
        """
        q, k, v = under_autocast(q, k, v)
        check_inputs(q, k, v, key_mask, causal)
        self._check_direction(causal, q.shape[2], k.shape[2])
        scale = check_scale(scale, q.shape[-1])
        if summary is not None:
            check_summary(summary, k)
            # The older keys of a cache were checked when they came in.
            new = slice(k.shape[2] - q.shape[2], None)
            check_finite(q=q, k=k[:, :, new], v=v[:, :, new])
        else:
            check_finite(q=q, k=k, v=v)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        added = self._bias_of(bias, q, k, causal)
        if training is None:
            training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
            training = training or added is not None and added.requires_grad
        call = Call(
            causal=causal,
            scale=scale,
            backend=backend,
            training=training,
            summary=summary,
            bias=added,
        )
        if torch.is_autocast_enabled(q.device.type):
            # Autocast would round scores and selections that the contract keeps in fp32.
            with torch.autocast(q.device.type, enabled=False):
                result = self._dispatch(q, k, v, key_mask, call)
        else:
            result = self._dispatch(q, k, v, key_mask, call)
        if observed():
            tell(
                self,
                q=q,
                k=k,
                v=v,
                causal=causal,
                key_mask=key_mask,
                scale=scale,
                training=training,
                bias=bias,
                result=result,
            )
        return result

    def visible(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        training: bool = False,
        bias: PositionBias | None = None,
    ) -> Tensor:
        """Exactly the keys each query sees, bool ``[B, Hq, Lq, Lk]``. O(Lq * Lk): small n only."""
        v = k
        check_inputs(q, k, v, key_mask, causal)
        self._check_direction(causal, q.shape[2], k.shape[2])
        batch, heads, q_len, _ = q.shape
        seen = torch.zeros(batch, heads, q_len, k.shape[2], dtype=torch.bool, device=q.device)
        call = Call(
            causal=causal,
            scale=check_scale(scale, q.shape[-1]),
            training=training,
            bias=self._bias_of(bias, q, k, causal),
        )
        if q.numel() == 0 or k.numel() == 0:
            return seen
        if key_mask is None:
            return self._visible(q, k, call).expand_as(seen).clone()
        for group in self._groups(q, k, key_mask, causal):
            qg, kg = _take(q, group.rows, group.queries), _take(k, group.rows, group.keys)
            if qg.shape[2] == 0 or kg.shape[2] == 0:
                continue
            part = self._visible(qg, kg, call).expand(len(group.rows), heads, -1, -1)
            rows = torch.tensor(group.rows, device=q.device)
            query = _indices(group.queries, q.device)
            keys = _indices(group.keys, q.device)
            seen[
                rows[:, None, None, None],
                torch.arange(heads, device=q.device)[None, :, None, None],
                query[None, None, :, None],
                keys[None, None, None, :],
            ] = part
        return seen

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        training: bool | None = None,
        bias: PositionBias | None = None,
    ) -> AttentionResult:
        """Dense specification in fp32/fp64: explicit masks over all pairs, O(Lq * Lk) memory.

        Mechanisms that are no softmax over a pattern override it.
        """
        return self(
            q,
            k,
            v,
            causal=causal,
            key_mask=key_mask,
            scale=scale,
            backend="reference",
            training=training,
            bias=bias,
        )

    def exact_part(self) -> Mechanism | None:
        """The mechanism restricted to the keys it sees one by one, whose ``lse`` is over those.

        None where the output is no softmax over a subset of the keys, so that "the attention mass
        it captures" has no meaning.
        """
        return None

    @abstractmethod
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        """Attention of a batch without padding."""

    @abstractmethod
    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """``visible`` of a batch without padding; broadcastable over the batch."""

    def to_dict(self) -> dict[str, Any]:
        """Name and every field, JSON-ready; ``longswift.from_dict`` is the inverse."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def _check_direction(self, causal: bool, q_len: int, k_len: int) -> None:
        if causal and not self.supports_causal or not causal and not self.supports_bidirectional:
            raise UnsupportedError(
                problem(
                    self.name,
                    expected="causal=False" if causal else "causal=True",
                    got=f"causal={causal}",
                    fix="This mechanism has no such form; choose another one.",
                )
            )
        if not causal and q_len != k_len and not self.supports_cross:
            raise UnsupportedError(
                problem(
                    self.name,
                    expected="Lq == Lk in bidirectional attention (windows need aligned positions)",
                    got=f"Lq={q_len}, Lk={k_len}",
                    fix="Use the 'full' mechanism for cross attention.",
                )
            )

    def _bias_of(
        self, bias: PositionBias | None, q: Tensor, k: Tensor, causal: bool
    ) -> ScoreBias | None:
        """The table of a bias for this call, if the mechanism can honour it."""
        if bias is None:
            return None
        if not isinstance(bias, PositionBias):
            raise InputError(
                problem(
                    "bias",
                    expected="a PositionBias such as ALiBi(), or None",
                    got=type(bias).__name__,
                    fix="See longswift.extend.bias; a dense matrix of biases is not taken.",
                )
            )
        if not causal and q.shape[2] != k.shape[2]:
            raise UnsupportedError(
                problem(
                    "bias",
                    expected="Lq == Lk in bidirectional attention (distances need positions)",
                    got=f"Lq={q.shape[2]}, Lk={k.shape[2]}",
                    fix="Cross attention has no distances; leave the bias out.",
                )
            )
        self._check_bias(bias)
        return bias.scores(q, k)

    def _check_bias(self, bias: PositionBias) -> None:
        """Raise ``UnsupportedError`` unless a bias is honoured."""
        if not self.supports_bias:
            raise UnsupportedError(
                problem(
                    self.name,
                    expected="no position bias",
                    got=f"bias {bias.name!r}",
                    fix="It has no scores to add one to; use a mechanism of the softmax family.",
                )
            )

    def _groups(self, q: Tensor, k: Tensor, key_mask: Tensor, causal: bool) -> list[RowGroup]:
        q_len, k_len = q.shape[2], k.shape[2]
        return split_padding(key_mask, q_len, k_len, aligned=causal or q_len == k_len)

    def _dispatch(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, call: Call
    ) -> AttentionResult:
        if q.numel() == 0 or k.numel() == 0:
            return self._nothing(q, k, v, call.bias)
        if key_mask is None or bool(key_mask.all()):
            return self._forward(q, k, v, call)
        return self._forward_padded(q, k, v, key_mask, call)

    def _forward_padded(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, call: Call
    ) -> AttentionResult:
        """Each group of rows with equal padding is attended as if the padding were not there."""
        batch, heads, q_len, _ = q.shape
        out = q.new_zeros(batch, heads, q_len, v.shape[-1])
        lse = torch.full(
            (batch, heads, q_len), float("-inf"), dtype=accumulator_dtype(q.dtype), device=q.device
        )
        all_stats: list[AttentionStats] = []
        for group in self._groups(q, k, key_mask, call.causal):
            qg = _take(q, group.rows, group.queries)
            kg, vg = (_take(x, group.rows, group.keys) for x in (k, v))
            if qg.shape[2] == 0 or kg.shape[2] == 0:
                continue
            summary = None
            if call.summary is not None and isinstance(group.keys, slice):
                summary = call.summary.rows(group.rows, group.keys)
            part = self._forward(qg, kg, vg, replace(call, summary=summary))
            rows = torch.tensor(group.rows, device=q.device)
            query = _indices(group.queries, q.device)
            place = (
                rows[:, None, None],
                torch.arange(heads, device=q.device)[None, :, None],
                query[None, None, :],
            )
            out = out.index_put(place, part.out)
            lse = lse.index_put(place, part.lse)
            all_stats.extend([part.stats] * len(group.rows))
        if not all_stats:
            return self._nothing(q, k, v, call.bias)
        return AttentionResult(out, lse, AttentionStats.over_batch(self.name, all_stats))

    def _nothing(
        self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None
    ) -> AttentionResult:
        """No query sees any key: zeros that still belong to the graph of the inputs."""
        # Sums of nothing: a sum of 16-bit values may overflow, and 0 times infinity is NaN.
        out = q.new_zeros(*q.shape[:3], v.shape[3]) + sum(x[..., :0].sum() for x in (q, k, v))
        if bias is not None:
            out = out + bias.values[..., :0].sum().to(out.dtype)
        acc = accumulator_dtype(q.dtype)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=acc, device=q.device)
        return AttentionResult(out, lse, AttentionStats.over_batch(self.name, []))


def _take(x: Tensor, rows: list[int], positions: slice | Tensor) -> Tensor:
    """Rows and positions of ``[B, H, L, D]``; a view when both are contiguous."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        x = x[rows[0] : rows[0] + len(rows)]
    else:
        x = x[rows]
    return x[:, :, positions.to(x.device) if isinstance(positions, Tensor) else positions]


def _indices(positions: slice | Tensor, device: torch.device) -> Tensor:
    if isinstance(positions, Tensor):
        return positions.to(device)
    return torch.arange(positions.start, positions.stop, device=device)


def check_count(owner: str, **values: int) -> None:
    """Raise ``ConfigError`` unless every value is an integer of at least 0."""
    for field_name, value in values.items():
        if type(value) is not int or value < 0:
            raise ConfigError(
                problem(
                    f"{owner}.{field_name}",
                    expected="an integer >= 0",
                    got=repr(value),
                    fix="Use 0 to turn it off.",
                )
            )


def check_positive(owner: str, **values: int) -> None:
    """Raise ``ConfigError`` unless every value is a positive integer."""
    for field_name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                problem(
                    f"{owner}.{field_name}",
                    expected="a positive integer",
                    got=repr(value),
                    fix="Give a whole number of at least 1.",
                )
            )
