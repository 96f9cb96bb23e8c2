"""Finding for every KV head the cheapest windows and budgets that keep what attention sees.

Candidates are tried on the dense model's own queries, keys and values, on sampled blocks of query
rows, with the mechanism itself. Their cost is counted in keys attended to per query, the choosing
included; what full attention sees in the same rows is known exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longswift.core.mechanism import Mechanism
from longswift.core.observe import Observed
from longswift.core.summary import PAGE, KeySummary
from longswift.mechanisms.ms_swift import MSSwift
from longswift.mechanisms.profile import LayerProfile
from longswift.mechanisms.stretches import pool_size

CAPTURED, OUTPUT = "captured", "output"
CRITERIA = (CAPTURED, OUTPUT)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A scale and a budget for all heads alike."""

    scale: int
    key_tokens: int


def candidates(base: MSSwift, budgets: Sequence[int]) -> list[Candidate]:
    """Every scale of ``base`` with every budget."""
    return [
        Candidate(scale=scale, key_tokens=budget)
        for scale in range(len(base.windows))
        for budget in sorted(set(budgets))
    ]


def variant(base: MSSwift, candidate: Candidate, kv_heads: int) -> MSSwift:
    """``base`` with the candidate's setting in every head."""
    return replace(
        base,
        key_tokens=candidate.key_tokens,
        scale_of_head=(candidate.scale,) * kv_heads,
        dense_heads=(),
        min_coverage=None,
        collect=False,
    )


@dataclass
class Kept:
    """What one mechanism kept of full attention in the sampled blocks, per query head.

    Attributes:
        sums: ``[2, Hq]``: mass and rows, or squared error and squared output.
        keys: Keys attended to and choosing, summed over queries, ``[Hkv]``.
        queries: Query rows.
    """

    sums: Tensor
    keys: Tensor
    queries: int = 0

    def share(self, criterion: str) -> list[float]:
        """Per query head: captured mass, or 1 minus the relative error of the output."""
        found: list[float]
        if criterion == CAPTURED:
            found = (self.sums[0] / self.sums[1]).tolist()
        else:
            found = (1.0 - (self.sums[0] / self.sums[1].clamp(min=1e-300)).sqrt()).tolist()
        return found

    def cost(self) -> list[float]:
        """Keys per query of each KV head."""
        found: list[float] = (self.keys / self.queries).tolist()
        return found


class Tryout:
    """An observer that tries mechanisms on some blocks of what full attention computed.

    Args:
        mechanisms: What to try in a layer with so many KV heads, by name.
        block: Rows of a block.
        sample: The blocks to try in a layer, counted from the document's beginning.
        criterion: ``"captured"`` or ``"output"``.
    """

    def __init__(
        self,
        mechanisms: Callable[[int, int], dict[Any, Mechanism]],
        *,
        block: int,
        sample: Callable[[int], Collection[int]],
        criterion: str,
    ) -> None:
        self._mechanisms, self._block = mechanisms, block
        self._sample, self._criterion = sample, criterion
        self.kept: dict[int, dict[Any, Kept]] = {}
        self.dense: dict[int, list[float]] = {}

    def __call__(self, call: Observed) -> None:
        """Sample blocks of one call."""
        q_len, k_len = call.q.shape[2], call.k.shape[2]
        offset, layer = k_len - q_len, call.layer or 0
        for index in self._sample(layer):
            start, end = index * self._block, min((index + 1) * self._block, k_len)
            if offset <= start < k_len:
                self._try(call, layer, slice(start - offset, end - offset), end)

    def _try(self, call: Observed, layer: int, rows: slice, end: int) -> None:
        q, k, v = call.q[:, :, rows], call.k[:, :, :end], call.v[:, :, :end]
        kv_heads = k.shape[1]
        # With summaries a few rows would be taken for decoded ones.
        summary = KeySummary.build(k, v, PAGE) if q.shape[2] == self._block else None
        truth = call.result.out[:, :, rows].double(), call.result.lse[:, :, rows]
        kept = self.kept.setdefault(layer, {})
        for name, mechanism in self._mechanisms(layer, kv_heads).items():
            tried = mechanism
            if self._criterion == CAPTURED:
                exact = mechanism.exact_part()
                assert exact is not None
                tried = exact
            result = tried(q, k, v, scale=call.scale, summary=summary, bias=call.bias)
            if self._criterion == CAPTURED:
                mass = (result.lse - truth[1]).exp().clamp(max=1.0).double()
                sums = torch.stack([mass.sum((0, 2)), torch.ones_like(mass).sum((0, 2))])
            else:
                wrong = (result.out.double() - truth[0]).square().sum((0, 2, 3))
                sums = torch.stack([wrong, truth[0].square().sum((0, 2, 3))])
            one = kept.setdefault(
                name, Kept(torch.zeros_like(sums), torch.zeros(kv_heads, dtype=torch.double))
            )
            one.sums += sums
            one.queries += q.shape[2]
            whole = tried == mechanism
            one.keys += q.shape[2] * _keys(mechanism, result.stats, k, whole)
        visible = self.dense.setdefault(layer, [0.0, 0.0])
        visible[0] += q.shape[2] * (end - (q.shape[2] - 1) / 2)
        visible[1] += q.shape[2]


def _keys(mechanism: Mechanism, stats: Any, k: Tensor, pools_counted: bool) -> Tensor:
    """Keys attended to per query of each KV head, and what choosing them cost."""
    _, kv_heads, end, dim = k.shape
    density = stats.density_by_head or (stats.density,) * kv_heads
    keys = torch.tensor(density, dtype=torch.double) * (stats.keys_per_query / stats.density)
    if isinstance(mechanism, MSSwift):
        budgets = mechanism.key_tokens
        budgets = (budgets,) * kv_heads if isinstance(budgets, int) else budgets
        selector: Any = mechanism.selector
        # Where only the exact part was run, the means are still part of the price.
        pool = mechanism.remainder
        means = 0.0 if pools_counted or pool is None else end / pool_size(end - 1, pool)
        for head, budget in enumerate(budgets):
            if head not in mechanism.dense_heads:
                keys[head] += means + selector.choosing_cost(budget, end, dim)
    return keys


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What every candidate kept and cost in one layer.

    Attributes:
        shares: ``[candidates][Hq]``.
        costs: ``[candidates][Hkv]``.
        dense: Keys full attention sees per query in the same rows.
    """

    shares: list[list[float]]
    costs: list[list[float]]
    dense: float


def cheapest(
    tried: Tried, found: Sequence[Candidate], kv_heads: int, target: float
) -> LayerProfile:
    """The cheapest candidate of each KV head whose every query head reaches the target.

    A head that no candidate serves is dense.
    """
    size = len(tried.shares[0]) // kv_heads
    scale, budget, dense = [], [], []
    for head in range(kv_heads):
        own = slice(head * size, (head + 1) * size)
        good = [
            (tried.costs[i][head], i)
            for i in range(len(found))
            if min(tried.shares[i][own]) >= target and tried.costs[i][head] < tried.dense
        ]
        _, best = min(good, default=(tried.dense, None))
        chosen = found[0] if best is None else found[best]
        scale.append(chosen.scale)
        budget.append(0 if best is None else chosen.key_tokens)
        dense.append(best is None)
    return LayerProfile(scale=tuple(scale), key_tokens=tuple(budget), dense=tuple(dense))


def most_kept(tried: Tried, kv_heads: int) -> list[float | None]:
    """The most any candidate keeps in the worst query head of each KV head.

    Candidates that cost no less than full attention do not count; None where none is cheaper.
    """
    size = len(tried.shares[0]) // kv_heads
    return [
        max(
            (
                min(shares[head * size : (head + 1) * size])
                for shares, costs in zip(tried.shares, tried.costs, strict=True)
                if costs[head] < tried.dense
            ),
            default=None,
        )
        for head in range(kv_heads)
    ]


def with_choice(
    tried: Tried, profile: LayerProfile, found: Sequence[Candidate]
) -> tuple[list[float], list[float]]:
    """What a choice keeps in each query head of a layer, and costs in each KV head."""
    size = len(tried.shares[0]) // len(profile.dense)
    shares: list[float] = []
    costs: list[float] = []
    for head, dense in enumerate(profile.dense):
        if dense:
            shares += [1.0] * size
            costs.append(tried.dense)
            continue
        chosen = Candidate(scale=profile.scale[head], key_tokens=profile.key_tokens[head])
        best = found.index(chosen)
        shares += tried.shares[best][head * size : (head + 1) * size]
        costs.append(tried.costs[best][head])
    return shares, costs
