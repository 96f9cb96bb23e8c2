"""Heads of one layer under different mechanisms: each group of KV heads is a call of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Call, Mechanism
from longswift.core.types import AttentionResult, AttentionStats, CapturedMass, counted
from longswift.mechanisms.full import Full

if TYPE_CHECKING:
    from longswift.mechanisms.ms_swift import MSSwift


class HeadGroup(NamedTuple):
    """KV heads, ascending, and what they run."""

    heads: tuple[int, ...]
    mechanism: Mechanism


@lru_cache(maxsize=1024)
def head_groups(mechanism: MSSwift, kv_heads: int) -> tuple[HeadGroup, ...]:
    """Groups of KV heads that need calls of their own."""
    budgets = mechanism.key_tokens
    if isinstance(budgets, int):
        budgets = (budgets,) * kv_heads
    if len(budgets) != kv_heads or any(head >= kv_heads for head in mechanism.dense_heads):
        raise ConfigError(
            problem(
                "MSSwift.key_tokens, MSSwift.dense_heads",
                expected=f"budgets and indices for {kv_heads} KV heads",
                got=f"{len(budgets)} budgets, dense heads {mechanism.dense_heads}",
                fix="Budgets belong to KV heads; a GQA group shares one.",
            )
        )
    windows = mechanism.window_of_head(kv_heads)
    groups: dict[int | None, list[int]] = {}
    for head, budget in enumerate(budgets):
        groups.setdefault(None if head in mechanism.dense_heads else budget, []).append(head)
    return tuple(
        HeadGroup(
            tuple(heads),
            Full()
            if budget is None
            else replace(
                mechanism,
                key_tokens=budget,
                dense_heads=(),
                scale_of_head=tuple(mechanism.windows.index(windows[h]) for h in heads),
            ),
        )
        for budget, heads in groups.items()
    )


def _index(heads: Sequence[int]) -> Any:
    """Evenly spaced heads are a slice, hence a view."""
    steps = {b - a for a, b in zip(heads, heads[1:], strict=False)}
    if len(steps) <= 1:
        return slice(heads[0], heads[-1] + 1, steps.pop() if steps else 1)
    return list(heads)


def _query_heads(heads: Sequence[int], size: int) -> list[int]:
    return [head * size + i for head in heads for i in range(size)]


def _restore(parts: list[Tensor], groups: Sequence[HeadGroup], size: int) -> Tensor:
    """The groups' ``[B, heads, ...]`` in the order of the heads."""
    order = [head for group in groups for head in _query_heads(group.heads, size)]
    together = torch.cat(parts, 1)
    if order == sorted(order):
        return together
    return together[:, torch.tensor(order, device=together.device).argsort()]


def attend_by_head(
    name: str, groups: Sequence[HeadGroup], q: Tensor, k: Tensor, v: Tensor, call: Call
) -> AttentionResult:
    """An unpadded batch, every group with its own mechanism; ``name`` is what the stats say."""
    size = q.shape[1] // k.shape[1]
    found = []
    for heads, mechanism in groups:
        own, query = _index(heads), _index(_query_heads(heads, size))
        summary = None if call.summary is None else call.summary.heads(own)
        bias = None if call.bias is None else call.bias.heads(query)
        part = replace(call, summary=summary, bias=bias)
        found.append(mechanism._forward(q[:, query], k[:, own], v[:, own], part))
    return AttentionResult(
        _restore([r.out for r in found], groups, size),
        _restore([r.lse for r in found], groups, size),
        _together(name, groups, [r.stats for r in found], size),
    )


def visible_by_head(groups: Sequence[HeadGroup], q: Tensor, k: Tensor, call: Call) -> Tensor:
    """``Mechanism._visible`` of the groups together."""
    size, batch = q.shape[1] // k.shape[1], q.shape[0]
    parts = []
    for heads, mechanism in groups:
        which = _index(_query_heads(heads, size))
        bias = None if call.bias is None else call.bias.heads(which)
        seen = mechanism._visible(q[:, which], k[:, _index(heads)], replace(call, bias=bias))
        parts.append(seen.expand(batch, len(heads) * size, -1, -1))
    return _restore(parts, groups, size)


def _together(
    name: str, groups: Sequence[HeadGroup], stats: list[AttentionStats], size: int
) -> AttentionStats:
    total = sum(len(group.heads) for group in groups)

    def mean(field: str) -> float:
        weighted = (len(g.heads) * getattr(s, field) for g, s in zip(groups, stats, strict=True))
        return sum(weighted) / total

    # Dense heads have little to tell; the sparsest group says what the mechanism did.
    telling = min(stats, key=lambda s: s.dense_rows)
    density = {
        head: s.density_by_head[i] if s.density_by_head else s.density
        for group, s in zip(groups, stats, strict=True)
        for i, head in enumerate(group.heads)
    }
    measured = [s.captured for s in stats if s.captured is not None]
    return replace(
        telling,
        mechanism=name,
        keys_per_query=mean("keys_per_query"),
        density=mean("density"),
        dense_rows=mean("dense_rows"),
        density_by_head=tuple(density[head] for head in sorted(density)),
        captured=_captured(groups, stats, measured, size) if measured else None,
        extra={**telling.extra, **counted(stats)},
    )


def _captured(
    groups: Sequence[HeadGroup],
    stats: list[AttentionStats],
    measured: list[CapturedMass],
    size: int,
) -> CapturedMass:
    by_head: dict[int, tuple[float, float, float]] = {}
    for group, one in zip(groups, stats, strict=True):
        for i, head in enumerate(_query_heads(group.heads, size)):
            found = one.captured
            # A dense group sees everything and measures nothing.
            by_head[head] = (1.0, 1.0, 0.0)
            if found is not None:
                by_head[head] = found.mean[i], found.lowest[i], found.remainder[i]
    mean, lowest, remainder = zip(*(by_head[head] for head in sorted(by_head)), strict=True)
    return CapturedMass(
        basis="exact" if all(m.basis == "exact" for m in measured) else "sampled",
        rows=min(m.rows for m in measured),
        mean=mean,
        lowest=lowest,
        remainder=remainder,
    )
