"""Mean keys propose, exact probabilities choose.

1. A row's score of a key block is its score of the block's mean key. With ``variance`` half of
   ``q^2 . var`` is added, the second-order estimate of the log of the mean exponential score, with
   a diagonal covariance. Softmax over blocks, max over rows and GQA group; the best
   ``proposals * budget / key_block`` blocks are proposed.
2. The exact stage of ``two_stage``.

A mean says nothing about a single key that stands out of its block; the exact stage only finds what
was proposed. ``proposals=1`` is the classic choice of whole blocks, as in MoBA (Lu et al., 2025,
arXiv 2502.13189): everything proposed is taken.

Cost per query and head: ``D n / key_block`` multiply-adds, twice that with ``variance``, and
``proposals * budget * D`` for the exact stage. Decoding takes means from a cache's page summaries
when it has them; these hold no variances, which cost a pass over all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.blocks import BlockRun, Workspace
from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.products import bmm, factor_dtype
from longswift.core.softmax import accumulator_dtype
from longswift.core.summary import PAGE, group_sums
from longswift.mechanisms.selectors.base import Request, Selection, Selector
from longswift.mechanisms.selectors.two_stage import TwoStage, share_among_blocks

# Tokens widened at once for variances.
_WIDENED = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Pooled(Selector):
    """Mean keys, propose, re-rank exactly.

    Attributes:
        key_block: Keys per mean; a power of two.
        variance: Also count how far keys lie from their mean.
        proposals: Proposed tokens per token of the budget.
        most_proposals: The same for blocks of few rows; see ``Bounds``.
    """

    name: ClassVar[str] = "pooled"

    variance: bool = False
    proposals: int = 4
    most_proposals: int = 32

    def __post_init__(self) -> None:
        self._check_power(key_block=self.key_block)
        check_positive("Pooled", proposals=self.proposals, most_proposals=self.most_proposals)
        if not isinstance(self.variance, bool):
            raise ConfigError(
                problem(
                    "Pooled.variance",
                    expected="True or False",
                    got=repr(self.variance),
                    fix="Use True to count the spread of the keys in a block.",
                )
            )

    def grain(self, q_len: int) -> int:
        """Decoding scores a cache's pages where they fit, everything else blocks of its own."""
        return PAGE if q_len == 1 and PAGE % self.key_block == 0 else self.key_block

    def choosing_cost(self, budget: int, keys: float, dim: int) -> float:
        """One product for every block of keys, two with variances."""
        means = (1 + self.variance) * keys / self.key_block
        return (means + self.proposals * budget) / 2 if budget else 0.0

    def select(self, request: Request) -> Selection:
        """See the module docstring."""
        return _Pass(self, request).run()


class _Pass(TwoStage):
    """One selection: moments of key blocks."""

    def __init__(self, selector: Pooled, request: Request) -> None:
        size = request.key_block
        if selector.variance:
            # Squares leave the range of 16-bit numbers.
            moments = _means_and_variances(request, size)
        else:
            moments = _means(request, size).to(factor_dtype(request.k))
        super().__init__(request, selector.proposals, moments.shape[2], selector.most_proposals)
        self._variance = selector.variance
        self._moments = moments.flatten(0, 1)

    def _block_scores(
        self, q: Tensor, run: BlockRun, outside: Tensor, width: int, space: Workspace
    ) -> Tensor:
        """Softmax over candidate blocks of their estimates, ``[B, Hkv, N, G * rows, W]``."""
        rows = torch.cat([q, 0.5 * q.square()], -1) if self._variance else q
        rows = rows.flatten(2, 3).flatten(0, 1).to(self._moments.dtype)
        scores = space.get("estimates", (*rows.shape[:2], width), self._acc)
        bmm(rows, self._moments[:, :width].transpose(1, 2), out=scores)
        scores = scores.view(*q.shape[:4], width)
        return share_among_blocks(
            scores, outside, self._request.pattern.causal, self._request.strict
        )


def _has_tail(request: Request, size: int) -> bool:
    """Whether an incomplete last block is a candidate: in bidirectional attention only."""
    return not request.pattern.causal and request.k.shape[2] % size > 0


def _means(request: Request, size: int) -> Tensor:
    """Mean key of every candidate block, ``[B, Hkv, W, D]`` in the accumulator dtype."""
    k, summary = request.k, request.summary
    if summary is not None and size % summary.page == 0:
        sums = summary.coarsen(size // summary.page).k_sum
    else:
        sums = group_sums(k, size)
    means = sums / size
    if _has_tail(request, size):
        tail = k[:, :, k.shape[2] // size * size :].to(means.dtype)
        means = torch.cat([means, tail.mean(2, keepdim=True)], 2)
    return means


def _means_and_variances(request: Request, size: int) -> Tensor:
    """Channel-wise mean and variance of every candidate block, ``[B, Hkv, W, 2D]``."""
    k = request.k
    acc = accumulator_dtype(k.dtype)
    whole = k.shape[2] // size * size
    parts = list(k[:, :, :whole].split(max(1, _WIDENED // size) * size, 2)) if whole else []
    found = [_moments(part.to(acc).unflatten(2, (-1, size)), 3) for part in parts]
    if _has_tail(request, size):
        found.append(_moments(k[:, :, None, whole:].to(acc), 3))
    if not found:
        return k.new_zeros(*k.shape[:2], 0, 2 * k.shape[3], dtype=acc)
    return torch.cat(found, 2)


def _moments(keys: Tensor, dim: int) -> Tensor:
    variance, mean = torch.var_mean(keys, dim, correction=0)
    return torch.cat([mean, variance], -1)
