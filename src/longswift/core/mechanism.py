"""The shape of every mechanism: a frozen dataclass that is its own configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from longswift.core.bias import PositionBias, ScoreBias
from longswift.core.errors import InputError, UnsupportedError, problem
from longswift.core.inputs import (
    RowGroup,
    are_plain,
    check_finite,
    check_inputs,
    check_scale,
    check_summary,
    check_transform,
    indices,
    places,
    split_padding,
    take,
    tracked,
    under_autocast,
)
from longswift.core.observe import observed, tell
from longswift.core.softmax import accumulator_dtype
from longswift.core.summary import KeySummary
from longswift.core.tracing import untraced
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

    @untraced
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
        result, call = None, None
        if key_mask is None and bias is None and are_plain(q, k, v):
            result = self._at_once(q, k, v, causal, scale, backend, summary is not None)
        if result is None:
            q, k, v = under_autocast(q, k, v)
            call = self._checked(q, k, v, causal, key_mask, scale, backend, training, summary, bias)
            result = self._attended(q, k, v, key_mask, call)
        if observed():
            wanted = tracked(q, k, v) if training is None else training
            tell(
                self,
                q=q,
                k=k,
                v=v,
                causal=causal,
                key_mask=key_mask,
                scale=check_scale(scale, q.shape[-1]),
                training=wanted if call is None else call.training,
                bias=bias,
                result=result,
            )
        return result

    def _at_once(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float | None,
        backend: str,
        summarised: bool,
    ) -> AttentionResult | None:
        """A plain call by one kernel that checks inputs, too; None if it has anything to refuse."""
        return None

    def _checked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        key_mask: Tensor | None,
        scale: float | None,
        backend: str,
        training: bool | None,
        summary: KeySummary | None,
        bias: PositionBias | None,
    ) -> Call:
        """What is asked for, once everything has been checked."""
        check_transform(backend)
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
        added = self._bias_of(bias, q, k, causal)
        if training is None:
            training = tracked(q, k, v) or added is not None and added.requires_grad
        return Call(
            causal=causal,
            scale=scale,
            backend=backend,
            training=training,
            summary=summary,
            bias=added,
        )

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, call: Call
    ) -> AttentionResult:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        # Autocast would round scores and selections that the contract keeps in fp32.
        cast = torch.is_autocast_enabled(q.device.type)
        with torch.autocast(q.device.type, enabled=False) if cast else nullcontext():
            return self._dispatch(q, k, v, key_mask, call)

    def reads_summary(self, q_len: int, k: Tensor) -> bool:
        """Whether causal attention of ``q_len`` queries to ``k`` uses page summaries of ``k``.

        A cache keeps them up to date for whoever does.
        """
        return False

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
        check_inputs(q, k, k, key_mask, causal)
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
            qg, kg = take(q, group.rows, group.queries), take(k, group.rows, group.keys)
            if qg.shape[2] == 0 or kg.shape[2] == 0:
                continue
            part = self._visible(qg, kg, call).expand(len(group.rows), heads, -1, -1)
            rows, head, query = (x.unsqueeze(-1) for x in places(group, heads, q.device))
            seen[rows, head, query, indices(group.keys, q.device)] = part
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
        acc = accumulator_dtype(q.dtype)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=acc, device=q.device)
        all_stats: list[AttentionStats] = []
        for group in self._groups(q, k, key_mask, call.causal):
            qg = take(q, group.rows, group.queries)
            kg, vg = (take(x, group.rows, group.keys) for x in (k, v))
            if qg.shape[2] == 0 or kg.shape[2] == 0:
                continue
            summary = None
            if call.summary is not None and isinstance(group.keys, slice):
                summary = call.summary.rows(group.rows, group.keys)
            part = self._forward(qg, kg, vg, replace(call, summary=summary))
            place = places(group, heads, q.device)
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
