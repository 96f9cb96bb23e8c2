"""Hierarchical attention: one's own chunk token by token, every other chunk through one summary.

Causal, ``chunk=2`` (rows are queries; ``s`` is the summary of the two tokens it spans)::

    x . . . . .
    x x . . . .
    s s x . . .
    s s x x . .
    s s s s x .
    s s s s x x

A chunk of ``c`` tokens has the key ``sum_j a_j k_j`` and the value ``sum_j a_j v_j``, with weights
``a`` that sum to one and depend on the chunk's keys alone:

* ``"mean"``: ``1 / c``;
* ``"first"``: 1 for the first token, 0 for the others;
* ``"attention"``: ``softmax_j(scale * k_j . mean(k))``, the chunk asked with its own mean key.

With ``count_weighted`` a summary counts as ``c`` keys (``log c`` is added to its score), so that
chunks of equal keys and values give full attention exactly; without, it counts as one.

| | time | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(L * (chunk + L / chunk) * D) | O(L * D + (L / chunk)^2) |

A position bias is added to the summaries as its mean over the tokens of the chunk (``"mean"``) or
as that of the first token (``"first"``). ``"attention"`` refuses one: it weighs tokens by content.

The least time, O(L^1.5 * D), takes ``chunk`` near the root of ``L``. One level of the hierarchy in
Chalkidis et al., 2022 (arXiv 2210.05529), inside a single attention layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from longswift.core.bias import PositionBias
from longswift.core.errors import ConfigError, UnsupportedError, check_positive, problem
from longswift.core.mechanism import Call, Mechanism
from longswift.core.pattern import Band, BlockPattern
from longswift.core.softmax import accumulator_dtype, merge
from longswift.core.types import AttentionResult, AttentionStats, Partial
from longswift.kernels import dispatch
from longswift.mechanisms.channels import filled_up
from longswift.mechanisms.chunked import Chunked
from longswift.mechanisms.patterned import dense_keys, keys_of_rows

_POOLINGS = ("mean", "first", "attention")


@dataclass(frozen=True, kw_only=True)
class Hierarchical(Mechanism):
    """Each query sees its own chunk, and a summary of each earlier (or each other) chunk.

    Causal attention sees the summaries of the chunks before the query's own, which are complete.
    Bidirectional attention sees those of all other chunks, the last of which may be shorter.

    Attributes:
        chunk: Tokens per chunk, counted from the row's first real token.
        pooling: How a chunk is summarised: ``"mean"``, ``"first"`` or ``"attention"``.
        count_weighted: A summary weighs as many keys as it stands for, instead of one.
    """

    name: ClassVar[str] = "hierarchical"
    supports_bias: ClassVar[bool] = True

    chunk: int = 256
    pooling: str = "mean"
    count_weighted: bool = True

    def __post_init__(self) -> None:
        check_positive("Hierarchical", chunk=self.chunk)
        for field, fine, expected in (
            ("pooling", self.pooling in _POOLINGS, f"one of {', '.join(_POOLINGS)}"),
            ("count_weighted", isinstance(self.count_weighted, bool), "True or False"),
        ):
            if not fine:
                got = repr(getattr(self, field))
                fix = "Leave it at its default."
                raise ConfigError(
                    problem(f"Hierarchical.{field}", expected=expected, got=got, fix=fix)
                )

    @filled_up
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        name, backend = dispatch.resolve(call.backend, q.device, q, k, v, bias=call.bias)
        q_len, k_len = q.shape[2], k.shape[2]
        start = (k_len - q_len) // self.chunk * self.chunk
        own = self._own(k.shape[1], call.causal)
        parts = [
            backend.attend(q, k[:, :, start:], v[:, :, start:], own, call.scale, bias=call.bias)
        ]
        # The keys that only summaries stand for lie before the last query's chunk.
        complete = (k_len - 1 if call.causal else k_len) // self.chunk
        if complete:
            key, value = self._summaries(k, v, complete, call)
            parts.append(self._far(q, key, value, 0, self.chunk, start, k_len, call))
        rest = 0 if call.causal else k_len % self.chunk
        if rest and complete:
            key, value = self._pooled(k[:, :, None, -rest:], v[:, :, None, -rest:], call.scale)
            parts.append(self._far(q, key, value, complete, rest, start, k_len, call))
        out, lse = merge(*parts)
        keys = self._keys_per_query(own, q_len, k_len)
        stats = AttentionStats(
            mechanism=self.name,
            backend=name,
            mode="static",
            keys_per_query=keys,
            density=keys / dense_keys(q_len, k_len, call.causal),
            dense_rows=0.0 if complete else 1.0,
        )
        return AttentionResult(out.to(q.dtype), lse, stats)

    def _check_bias(self, bias: PositionBias) -> None:
        super()._check_bias(bias)
        if self.pooling == "attention":
            raise UnsupportedError(
                problem(
                    "Hierarchical.pooling",
                    expected="'mean' or 'first' with a position bias",
                    got="'attention', whose summaries weigh their tokens by content",
                    fix="Use another pooling, or no bias.",
                )
            )

    def exact_part(self) -> Mechanism | None:
        return Chunked(chunk=self.chunk, overlap=0)

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        own = self._own(k.shape[1], call.causal)
        return own.visible(q.shape[2], k.shape[2], q.shape[1] // k.shape[1], q.device)

    def _own(self, kv_heads: int, causal: bool) -> BlockPattern:
        return BlockPattern(causal=causal, bands=(Band(tile=self.chunk, left=0),) * kv_heads)

    def _far(
        self,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        first: int,
        count: int,
        start: int,
        k_len: int,
        call: Call,
    ) -> Partial:
        """Attention to summaries of ``count`` tokens each.

        Args:
            q: ``[B, Hq, Lq, D]``.
            key: ``[B, Hkv, T, D]``, of the chunks from ``first`` on.
            value: ``[B, Hkv, T, Dv]``.
            first: Index of the first summarised chunk.
            count: Tokens per summary.
            start: Position at which the chunk of the first query starts.
            k_len: Tokens in all.
            call: The call.
        """
        _, backend = dispatch.resolve(call.backend, q.device, q, key, value, bias=call.bias)
        kv_heads = key.shape[1]
        summaries = torch.arange(first, first + key.shape[2], device="cpu")
        chunk = torch.arange(start // self.chunk, -(-k_len // self.chunk), device="cpu")[:, None]
        seen = summaries < chunk if call.causal else summaries != chunk
        tokens = torch.where(seen, summaries - first, -1)
        # Queries keep their places on the grid of chunks if as many keys follow as they need.
        length = k_len - start
        length += max(0, -(-(key.shape[2] - length) // self.chunk)) * self.chunk
        filler = (0, 0, 0, length - key.shape[2])
        pattern = BlockPattern(
            causal=False,
            bands=(Band(tile=self.chunk, left=0, right=-self.chunk),) * kv_heads,
            block=self.chunk,
            tokens=tokens.expand(1, kv_heads, -1, -1),
        )
        bias = call.bias
        if bias is not None:
            # By the places of the chunks, for queries that the kernel takes to sit elsewhere.
            bias = bias.mean(count if self.pooling == "mean" else 1, self.chunk)
            bias = bias.moved(k_len - length - first * self.chunk)
        part = backend.attend(
            q, pad(key, filler), pad(value, filler), pattern, call.scale, bias=bias
        )
        if not self.count_weighted:
            return part
        return Partial(part.out, part.lse + math.log(count))

    def reads_summary(self, q_len: int, k: Tensor) -> bool:
        """See ``Mechanism``."""
        return self.pooling == "mean"

    def _summaries(self, k: Tensor, v: Tensor, complete: int, call: Call) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hkv, complete, *]`` that stand for the leading complete chunks."""
        pages = call.summary
        recorded = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        if pages is not None and self.pooling == "mean" and not recorded:
            factor, rest = divmod(self.chunk, pages.page)
            if rest == 0:
                sums = pages.coarsen(factor)
                key, value = (x[:, :, :complete] / self.chunk for x in (sums.k_sum, sums.v_sum))
                return key.to(k.dtype), value.to(v.dtype)
        size = (complete, self.chunk)
        kc, vc = (x[:, :, : complete * self.chunk].unflatten(2, size) for x in (k, v))
        return self._pooled(kc, vc, call.scale)

    def _pooled(self, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Summaries of chunks ``[B, Hkv, T, c, *]``, in the dtype of the input."""
        if self.pooling == "first":
            return k[:, :, :, 0], v[:, :, :, 0]
        acc = accumulator_dtype(k.dtype)
        if self.pooling == "mean":
            return k.mean(3, dtype=acc).to(k.dtype), v.mean(3, dtype=acc).to(v.dtype)
        ka = k.to(acc)
        weights = (ka @ ka.mean(3, keepdim=True).transpose(3, 4) * scale).softmax(3)
        key, value = ((weights * x).sum(3).to(x.dtype) for x in (k, v))
        return key.to(k.dtype), value.to(v.dtype)

    def _keys_per_query(self, own: BlockPattern, q_len: int, k_len: int) -> float:
        keys = keys_of_rows(own, q_len, k_len)
        chunk = torch.arange(k_len - q_len, k_len, device="cpu") // self.chunk
        summaries = chunk if own.causal else torch.full_like(chunk, (k_len - 1) // self.chunk)
        return float((keys + summaries).mean())
