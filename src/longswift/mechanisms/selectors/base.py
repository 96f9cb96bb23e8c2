"""The contract of a selector, and what every selector shares."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from longswift.core.bias import PositionBias, ScoreBias
from longswift.core.blocks import BlockRun, Workspace, block_runs
from longswift.core.errors import ConfigError, UnsupportedError, problem
from longswift.core.parallel import for_each
from longswift.core.pattern import BlockPattern
from longswift.core.pools import block_edges
from longswift.core.summary import KeySummary

# Score elements a selector's thread holds at once: 8 MiB in fp32.
STEP_SCORES = 1 << 21
# Widths of the scores of key blocks are multiples of this.
_WIDTHS = 256
EMPTY = -1


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a selector is asked for, in an unpadded batch.

    Attributes:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        scale: Factor on the scores.
        key_block: Keys are scored in blocks of this many; edges of bands lie on multiples of it.
        pattern: Bands and blocks; candidates lie outside the bands, in causal attention before.
        band_lse: ``[B, Hq, Lq]`` log-sum-exp over the band, part of every probability.
        sinks: Leading tokens that are seen anyway and never selected.
        budget: Most tokens per block.
        coverage: Stop earlier once every row's captured mass reaches this, or None.
        strict: Row i may only see what rows ``<= i`` asked for.
        summary: Page summaries of ``k``, or None.
        best_blocks: The backend's kernel for scoring key blocks by bounds and keeping the best, or
            None; ``kernels.triton.scoring`` says what it takes.
        choose_by_bounds: The backend's kernel that makes the whole choice of ``Bounds`` at once and
            says whether it did, or None; ``kernels.native.choosing`` says what it takes.
        bias: Additions to the scaled scores, part of ``band_lse``, or None.
    """

    q: Tensor
    k: Tensor
    scale: float
    key_block: int
    pattern: BlockPattern
    band_lse: Tensor
    sinks: int
    budget: int
    coverage: float | None
    strict: bool
    summary: KeySummary | None = None
    best_blocks: Callable[..., tuple[Tensor, Tensor]] | None = None
    choose_by_bounds: Callable[..., bool] | None = None
    bias: ScoreBias | None = None

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @functools.cached_property
    def edges(self) -> Tensor:
        """First and one-past-last key of every block's band, ``[Hkv, N, 2]`` on CPU."""
        return block_edges(self.pattern, self.q.shape[2], self.k.shape[2])

    def runs(self, width: int) -> list[BlockRun]:
        """Runs of blocks whose ``rows x width`` scores fit ``STEP_SCORES``."""
        per_block = self.q.shape[0] * self.q.shape[1] * self.pattern.block * max(width, 1)
        most = max(1, STEP_SCORES // per_block)
        return list(block_runs(self.q.shape[2], self.k.shape[2], self.pattern.block, most))


class Selection(NamedTuple):
    """Chosen tokens.

    Attributes:
        tokens: int32 ``[B, Hkv, N, C]`` positions, -1 for an empty slot.
        visible_from: int32 like ``tokens``, first query position that sees the slot, or None.
    """

    tokens: Tensor
    visible_from: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Selector(ABC):
    """Chooses tokens by content, per KV head and query block, shared by the GQA group.

    Attributes:
        key_block: Keys are scored in blocks of this many; edges of windows and pools lie on it.
    """

    name: ClassVar[str]
    # Whether every block gets as many tokens as its budget allows, if there are so many.
    fills_budget: ClassVar[bool] = False
    supports_bias: ClassVar[bool] = False

    key_block: int = 16

    def grain(self, q_len: int) -> int:
        """Granularity of window edges this selector needs for ``q_len`` queries."""
        return self.key_block

    @abstractmethod
    def select(self, request: Request) -> Selection:
        """Tokens for every block; O(n) memory, cost stated by each selector."""

    def choosing_cost(self, budget: int, keys: float, dim: int) -> float:
        """What choosing costs a query of ``dim`` channels that has ``keys`` keys to choose from.

        In keys attended to: a product with a key without its value counts half.
        """
        return keys / 2 if budget else 0.0

    def check_bias(self, bias: PositionBias | None) -> None:
        """Raise ``UnsupportedError`` unless the choice takes a bias into account."""
        if bias is not None and not self.supports_bias:
            raise UnsupportedError(
                problem(
                    f"selector {self.name!r}",
                    expected="no position bias (it would choose as if there were none)",
                    got="a position bias",
                    fix="Use selector='bounds', or key_tokens=0.",
                )
            )

    def to_dict(self) -> dict[str, Any]:
        """Name and fields, JSON-ready."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def _check_power(self, **values: int) -> None:
        for field_name, value in values.items():
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ConfigError(
                    problem(
                        f"{type(self).__name__}.{field_name}",
                        expected="a power of two",
                        got=repr(value),
                        fix="Use 1, 2, 4, 8, 16, 32, ...",
                    )
                )

    def _check_share(self, **values: float) -> None:
        for field_name, value in values.items():
            if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise ConfigError(
                    problem(
                        f"{type(self).__name__}.{field_name}",
                        expected="a number from 0 to 1",
                        got=repr(value),
                        fix="Leave it at its measured default.",
                    )
                )


def candidate_blocks(request: Request, run: BlockRun, key_block: int) -> tuple[Tensor, int]:
    """Key blocks outside the bands.

    Returns:
        bool ``[Hkv, N, W]`` on the device of ``q``, and ``W``, the number of leading key blocks
        that can matter.
    """
    k_len = request.k.shape[2]
    start, end = request.edges[:, run.first : run.first + run.count].unbind(-1)
    blocks = -(-k_len // key_block)
    width = blocks
    if request.pattern.causal:
        # A library that compiles a product for every shape meets few of them.
        width = -(-int(start.max()) // key_block // _WIDTHS) * _WIDTHS
        width = min(width, k_len // key_block)
    block = torch.arange(width, device="cpu")
    outside = block < (start // key_block)[..., None]
    if not request.pattern.causal:
        outside = outside | (block >= -(-end // key_block)[..., None])
    return outside.to(request.q.device), width


def by_run(
    request: Request, width: int, choose: Callable[[BlockRun, Workspace], Selection]
) -> Selection:
    """A selection made run by run, on several threads; ``choose`` returns at most ``budget`` slots.

    Args:
        request: The request.
        width: Scores a query row holds while choosing.
        choose: Tokens (and rows) of one run, in the buffers of its thread.
    """
    runs = request.runs(width)
    found: list[Selection | None] = [None] * len(runs)

    def piece(index: int, space: Workspace) -> None:
        found[index] = choose(runs[index], space)

    device = request.q.device
    for_each(range(len(runs)), lambda: Workspace(device), piece, device)
    done = [f for f in found if f is not None]
    tokens = torch.cat([fill(f.tokens, request.budget) for f in done], 2)
    if not request.strict:
        return Selection(tokens, None)
    since = [f.visible_from for f in done if f.visible_from is not None]
    return Selection(tokens, torch.cat([fill(s, request.budget) for s in since], 2))


def fill(tokens: Tensor, budget: int) -> Tensor:
    """Pads ``[..., C]`` to ``[..., budget]`` with empty slots, as int32."""
    missing = budget - tokens.shape[-1]
    tokens = tokens.to(torch.int32)
    return torch.nn.functional.pad(tokens, (0, missing), value=EMPTY) if missing else tokens


def take_in_turn(wanted: Tensor, budget: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fills a budget row by row, so that what a row sees depends on no later row.

    Row 0 takes a quarter of the budget, the rest is spread evenly; each row takes the keys it wants
    most among those not taken yet.

    Args:
        wanted: ``[Z, R, M]`` weight each row gives each key, ``<= 0`` for keys it must not take.
        budget: Keys in all.
        block: Rows of a complete block (the schedule must not depend on how many rows exist yet).

    Returns:
        ``index [Z, C]`` into ``M``, ``row [Z, C]`` that took it, ``taken [Z, C]`` False for slots
        left empty.
    """
    problems, rows, keys = wanted.shape
    free = torch.ones(problems, keys, dtype=wanted.dtype, device=wanted.device)
    index, owner, taken = [], [], []
    given, head_start = 0, max(1, budget // 4)
    for row in range(rows):
        due = head_start + (budget - head_start) * (row + 1) // block
        quota, given = min(due - given, keys), due
        if quota <= 0:
            continue
        weight, choice = (wanted[:, row] * free).topk(quota, dim=-1)
        # A key nobody wanted yet stays free for a later row.
        free.scatter_(1, choice, free.gather(1, choice).mul_(weight <= 0))
        index.append(choice)
        owner.append(row)
        taken.append(weight)
    if not index:
        none = torch.zeros(problems, 0, dtype=torch.long, device=wanted.device)
        return none, none, none.bool()
    chosen = torch.cat(index, 1)
    rows_of = torch.tensor(owner, device=wanted.device).repeat_interleave(
        torch.tensor([choice.shape[1] for choice in index], device=wanted.device)
    )
    return chosen, rows_of.expand_as(chosen), torch.cat(taken, 1) > 0
