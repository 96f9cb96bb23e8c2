"""Keys and queries of few dimensions propose, exact probabilities choose.

1. Keys and queries are projected to ``rank`` dimensions: the leading eigenvectors of the second
   moment of the KV head's first keys. Every row scores every key there. Softmax over the largest
   scores of all blocks and the window, max over rows and GQA group; the best
   ``proposals * budget / key_block`` blocks are proposed.
2. The exact stage of ``two_stage``.

The directions a query block uses are fitted to keys before it: the largest power of two that fits,
``fit`` at most. They depend on nothing later and on no chunk; in bidirectional attention they are
fitted to the first ``fit`` keys.

Blocks of no more rows than dimensions, as when decoding, score the keys as they are: projecting
them would cost more.

Cost per query and head: ``rank n`` multiply-adds (1/4 of full attention's scores by default) and
``proposals * budget * D`` for the exact stage; per KV head once ``D rank n`` for projecting the
keys, which a call of ``Lq`` queries shares, and ``D^2 fit`` for the directions, on the CPU.
Memory ``rank n`` for the projected keys. Low-rank keys as a proxy: Loki (Singhania et al., 2024,
arXiv 2406.02542), which fits directions to other texts beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.blocks import BlockRun, Workspace, block_runs, stack_queries
from longswift.core.errors import check_positive
from longswift.core.products import bmm, factor_dtype
from longswift.mechanisms.selectors.base import STEP_SCORES, Request, Selection, Selector
from longswift.mechanisms.selectors.two_stage import TwoStage, share_among_blocks

_HIDDEN = float("-inf")
# Scores held at once on a CPU, 1 MiB in fp32: several passes over them stay in its cache.
_CACHED_SCORES = 1 << 18
# Directions that no key tells apart are told apart by their channels, so that rounding does not.
_TILT = 1e-4


@dataclass(frozen=True, kw_only=True)
class LowRank(Selector):
    """Score all keys in few dimensions, propose, re-rank exactly.

    Attributes:
        key_block: Keys per proposal; a power of two.
        rank: Dimensions of the scores, or None for a quarter of the head's.
        fit: Most keys the directions are fitted to.
        proposals: Proposed tokens per token of the budget.
        most_proposals: The same for blocks of few rows; see ``Bounds``.
    """

    name: ClassVar[str] = "lowrank"

    key_block: int = 8
    rank: int | None = None
    fit: int = 4096
    proposals: int = 4
    most_proposals: int = 32

    def __post_init__(self) -> None:
        self._check_power(key_block=self.key_block)
        counts = {name: getattr(self, name) for name in ("fit", "proposals", "most_proposals")}
        if self.rank is not None:
            counts["rank"] = self.rank
        check_positive("LowRank", **counts)

    def dimensions(self, dim: int) -> int:
        """Dimensions of the scores for heads of ``dim``."""
        return min(dim, max(1, dim // 4) if self.rank is None else self.rank)

    def choosing_cost(self, budget: int, keys: float, dim: int) -> float:
        """A product of few dimensions with every key."""
        share = self.dimensions(dim) / dim
        return (share * keys + self.proposals * budget) / 2 if budget else 0.0

    def select(self, request: Request) -> Selection:
        """See the module docstring."""
        return _Pass(self, request).run()


class _Pass(TwoStage):
    """One selection: keys in as many bases as the blocks of the call need."""

    def __init__(self, selector: LowRank, request: Request) -> None:
        pattern, k = request.pattern, request.k
        k_len, size = k.shape[2], request.key_block
        blocks = k_len // size if pattern.causal else -(-k_len // size)
        super().__init__(request, selector.proposals, blocks, selector.most_proposals)
        self._fit, self._rank = selector.fit, selector.dimensions(k.shape[3])
        dtype = factor_dtype(k)
        self._projected: dict[int, Tensor] = {}
        self._bases: dict[int, Tensor] = {}
        for run in block_runs(request.q.shape[2], k_len, pattern.block, k_len):
            for _, prefix in self._segments(run):
                if prefix in self._projected:
                    continue
                keys = k
                if prefix:
                    basis = principal_directions(k[:, :, :prefix], self._rank).to(self._acc)
                    self._bases[prefix] = basis = basis.to(k.device)
                    # Blocks that use an early basis see no key after twice its prefix.
                    end = 2 * prefix if pattern.causal and prefix < self._fit else k_len
                    keys = k[:, :, :end].to(dtype) @ basis.to(dtype)
                if not pattern.causal:
                    keys = torch.nn.functional.pad(keys, (0, 0, 0, -k_len % size))
                keys = keys[:, :, : keys.shape[2] // size * size].to(dtype)
                self._projected[prefix] = keys.flatten(0, 1).unflatten(1, (-1, size))

    def _segments(self, run: BlockRun) -> Iterator[tuple[slice, int]]:
        """Blocks of a run that share their directions, and the keys these are fitted to.

        0 for blocks that score the keys as they are.
        """
        request, block = self._request, self._request.pattern.block
        few = run.rows * request.groups <= self._rank and (run.rows < block or block == 1)
        if few and not request.strict:
            yield slice(0, run.count), 0
        elif not request.pattern.causal:
            yield slice(0, run.count), min(self._fit, request.k.shape[2])
        else:
            first, done = run.position // block, 0
            while done < run.count:
                start = max((first + done) * block, 1)
                prefix = min(1 << (start.bit_length() - 1), self._fit)
                end = run.count
                if prefix < self._fit:
                    # Blocks that start before twice as many keys have the same directions.
                    end = min(end, -(-2 * prefix // block) - first)
                yield slice(done, end), prefix
                done = end

    def _block_scores(
        self, q: Tensor, run: BlockRun, outside: Tensor, width: int, space: Workspace
    ) -> Tensor:
        """Largest estimated probability in every block, ``[B, Hkv, N, G * rows, W]``."""
        scores = space.get("largest_scores", (*q.shape[:4], width), self._acc)
        for part, prefix in self._segments(run):
            rows = q[:, :, part]
            if prefix:
                rows = rows @ self._bases[prefix].unsqueeze(2)
            self._largest_scores(rows, self._projected[prefix], scores[:, :, part], space)
        band = stack_queries(self._request.band_lse, run, q.shape[1])
        return share_among_blocks(
            scores, outside, self._request.pattern.causal, self._request.strict, band
        )

    def _largest_scores(self, rows: Tensor, keys: Tensor, out: Tensor, space: Workspace) -> None:
        """Largest score in every key block, a stretch of ``keys [B * Hkv, W, size, *]`` at a time.

        Fills ``out [B, Hkv, N, R, W]``.
        """
        width, size, rank = keys.shape[1:]
        width = min(out.shape[4], width)
        out[..., width:] = _HIDDEN
        factors = rows.flatten(2, 3).flatten(0, 1).to(keys.dtype)
        held = _CACHED_SCORES if rows.device.type == "cpu" else STEP_SCORES
        step = max(1, held // (factors.shape[:2].numel() * size))
        beyond = -self._request.k.shape[2] % size
        for first in range(0, width, step):
            last = min(first + step, width)
            # The tokens of a block lie apart, so that their maximum is one of long rows.
            part = keys[:, first:last].transpose(1, 2).reshape(len(keys), -1, rank)
            scores = space.get("estimates", (*factors.shape[:2], part.shape[1]), self._acc)
            bmm(factors, part.transpose(1, 2), out=scores)
            scores = scores.view(*rows.shape[:4], size, last - first)
            if last * size > self._request.k.shape[2]:
                scores[..., size - beyond :, -1] = _HIDDEN
            torch.amax(scores, 4, out=out[..., first:last])


def principal_directions(k: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of the second moment of ``k [B, H, L, D]``, ``[B, H, D, rank]``.

    In fp64 on the CPU, where they are returned, so that rounding does not turn them.
    """
    keys = k.detach().to("cpu", torch.float64)
    moment = keys.transpose(2, 3) @ keys
    dim = k.shape[3]
    mean = moment.diagonal(dim1=2, dim2=3).mean(-1, keepdim=True)
    tilt = torch.linspace(1.0, 0.0, dim, dtype=torch.float64) * (_TILT * mean)
    vectors: Tensor = torch.linalg.eigh(moment + torch.diag_embed(tilt)).eigenvectors
    return vectors[..., -rank:]
