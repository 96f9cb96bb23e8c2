"""A window with gaps: every ``dilation``-th key around the query.

Causal, ``window=3``, ``dilation=2`` (rows are queries)::

    x . . . . .
    . x . . . .
    x . x . . .
    . x . x . .
    x . x . x .
    . x . x . x

| | time | memory beyond inputs and output |
|---|---|---|
| forward, backward | O(L * window * D) | O(L) |

Positions that are equal modulo the dilation form sequences of their own in which the window has no
gaps; these are read as strided views. Longformer (Beltagy et al., 2020, arXiv 2004.05150) describes
dilated windows, with larger dilations in some of the heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.mechanism import Call, Mechanism
from longswift.core.pattern import BlockPattern
from longswift.core.types import AttentionResult, AttentionStats
from longswift.kernels import dispatch
from longswift.mechanisms.channels import filled_up
from longswift.mechanisms.patterned import dense_keys, keys_of_rows
from longswift.mechanisms.sliding_window import SlidingWindow


class _Residue(NamedTuple):
    """Positions ``key, key + dilation, ...``; the first query among them is query ``row``."""

    key: int
    row: int
    dilation: int
    queries: int
    keys: int


@dataclass(frozen=True, kw_only=True)
class DilatedWindow(Mechanism):
    """Each query sees ``window`` keys whose distance is a multiple of the dilation.

    Attributes:
        window: Causal: the query and the ``window - 1`` visible keys before it. Bidirectional:
            ``window // 2`` keys to either side.
        dilation: Distance between visible keys: one for all KV heads, or several that the KV heads
            take in turn.
    """

    name: ClassVar[str] = "dilated_window"
    supports_bias: ClassVar[bool] = True

    window: int = 256
    dilation: int | tuple[int, ...] = 4

    def __post_init__(self) -> None:
        check_positive("DilatedWindow", window=self.window)
        dilation = self.dilation
        if isinstance(dilation, Iterable):
            object.__setattr__(self, "dilation", tuple(dilation))
        if not self._dilations or any(type(d) is not int or d < 1 for d in self._dilations):
            raise ConfigError(
                problem(
                    "DilatedWindow.dilation",
                    expected="a positive integer, or several for the KV heads in turn",
                    got=repr(dilation),
                    fix="For example dilation=4 or dilation=(1, 4).",
                )
            )

    @property
    def _dilations(self) -> tuple[int, ...]:
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)

    @filled_up
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        name, backend = dispatch.resolve(call.backend, q.device, q, k, v, bias=call.bias)
        q_len, k_len, kv_heads = q.shape[2], k.shape[2], k.shape[1]
        turns = min(len(self._dilations), kv_heads)
        groups, q = q.shape[1] // kv_heads, q.unflatten(1, (kv_heads, -1))
        outs, lses, keys = [], [], 0.0
        for turn, dilation in enumerate(self._dilations[:turns]):
            heads = slice(turn, None, turns)
            q_own, k_own, v_own = q[:, heads].flatten(1, 2), k[:, heads], v[:, heads]
            bias = None
            if call.bias is not None:
                every = torch.arange(q.shape[1] * groups, device=q.device).view(-1, groups)
                bias = call.bias.heads(every[heads].flatten()).spaced(dilation)
            residues = list(_residues(q_len, k_len, dilation))
            rows = [torch.arange(r.row, q_len, dilation, device=q.device) for r in residues]
            pieces = zip(
                _strided(q_own, [r.row for r in residues], dilation),
                _strided(k_own, [r.key for r in residues], dilation),
                _strided(v_own, [r.key for r in residues], dilation),
                strict=True,
            )
            parts = []
            for residue, piece in zip(residues, pieces, strict=True):
                pattern = self._pattern(residue, k_own.shape[1], call.causal)
                parts.append(backend.attend(*piece, pattern, call.scale, bias=bias))
                seen = keys_of_rows(pattern, residue.queries, residue.keys)
                keys += float(seen.sum())
            place = torch.cat(rows).argsort()
            outs.append(torch.cat([p.out for p in parts], 2).index_select(2, place))
            lses.append(torch.cat([p.lse for p in parts], 2).index_select(2, place))
        keys /= q_len * kv_heads
        stats = AttentionStats(
            mechanism=self.name,
            backend=name,
            mode="static",
            keys_per_query=keys,
            density=keys / dense_keys(q_len, k_len, call.causal),
            dense_rows=0.0,
        )
        return AttentionResult(_in_turn(outs, kv_heads), _in_turn(lses, kv_heads), stats)

    def exact_part(self) -> Mechanism | None:
        return self

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        q_len, k_len, kv_heads = q.shape[2], k.shape[2], k.shape[1]
        seen = torch.zeros(1, kv_heads, q_len, k_len, dtype=torch.bool, device=q.device)
        for head in range(kv_heads):
            dilation = self._dilations[head % len(self._dilations)]
            for residue in _residues(q_len, k_len, dilation):
                pattern = self._pattern(residue, 1, call.causal)
                part = pattern.visible(residue.queries, residue.keys, 1, q.device)
                seen[0, head, residue.row :: dilation, residue.key :: dilation] = part[0, 0]
        return seen.repeat_interleave(q.shape[1] // kv_heads, 1)

    def _pattern(self, residue: _Residue, kv_heads: int, causal: bool) -> BlockPattern:
        window = SlidingWindow(window=self.window)
        return window.pattern(residue.queries, residue.keys, kv_heads, causal)


def _residues(q_len: int, k_len: int, dilation: int) -> Iterator[_Residue]:
    """The residue classes that hold a query; the last key of each is its last query."""
    offset = k_len - q_len
    for key in range(min(dilation, k_len)):
        row = (key - offset) % dilation
        if row < q_len:
            queries = -(-(q_len - row) // dilation)
            yield _Residue(key, row, dilation, queries, -(-(k_len - key) // dilation))


def _strided(x: Tensor, starts: list[int], step: int) -> Sequence[Tensor]:
    """``x[:, :, start::step]`` for every start."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return [x[:, :, start::step] for start in starts]
    # The gradient of a slice is as long as x, that of all pieces of a split together.
    places = [torch.arange(start, x.shape[2], step, device=x.device) for start in starts]
    return x.index_select(2, torch.cat(places)).split([len(p) for p in places], 2)


def _in_turn(parts: list[Tensor], kv_heads: int) -> Tensor:
    """Heads that were dealt out in turn, ``[B, heads * G, ...]`` each, back in their order."""
    if len(parts) == 1:
        return parts[0]
    turns = len(parts)
    by_head = [p.unflatten(1, (len(range(i, kv_heads, turns)), -1)) for i, p in enumerate(parts)]
    return torch.cat([by_head[h % turns][:, h // turns] for h in range(kv_heads)], 1)
