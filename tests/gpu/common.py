"""What the tests on a GPU share: the device, how precise a result must be, problems to solve."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from longswift.core.pattern import Band, BlockPattern
from tests.kernels.test_patterns import Problem, gathered

DEVICE = torch.device("cuda")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Of the norm of the right answer: what may be added to the error of plain torch.
FLOORS = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 8e-4}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Head counts, widths and dtype: what a kernel is compiled for."""

    dtype: torch.dtype
    groups: int
    dim: int
    v_dim: int
    kv_heads: int = 2

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]}-{self.groups}x{self.dim}-{self.v_dim}"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Lengths, and which parts a pattern has.

    Attributes:
        q_len: Queries.
        k_len: Keys.
        causal: Whether keys after a query are hidden.
        slots: Tokens gathered by every block.
        by_row: Whether rows of a block see different ones of them.
        pool: Tokens of a pool of the remainder, or None.
        away: Bands lie before their queries, so that some rows see nothing.
    """

    q_len: int
    k_len: int
    causal: bool = True
    slots: int = 0
    by_row: bool = False
    pool: int | None = None
    away: bool = False

    def problem(self, heads: Heads, batch: int = 2) -> Problem:
        """Random inputs in fp64 whose values are those of the dtype of ``heads``, on the CPU."""
        generator = torch.Generator().manual_seed(self.q_len + self.k_len)
        pattern = self._pattern(heads.kv_heads, batch, generator)

        def tensor(count: int, length: int, width: int) -> Tensor:
            # As a model's projections lie in memory: the heads of a token are neighbours.
            x = torch.randn(batch, length, count, width, generator=generator).to(heads.dtype)
            return x.double().transpose(1, 2)

        return Problem(
            pattern=pattern,
            q=tensor(heads.kv_heads * heads.groups, self.q_len, heads.dim),
            k=tensor(heads.kv_heads, self.k_len, heads.dim),
            v=tensor(heads.kv_heads, self.k_len, heads.v_dim),
            scale=heads.dim**-0.5,
        )

    def _pattern(self, kv_heads: int, batch: int, generator: torch.Generator) -> BlockPattern:
        block, grain = 32, 16
        bands = tuple(
            Band(tile=block, left=0, right=-block)
            if self.away
            else Band(
                tile=block * (1 + head % 2),
                left=grain * (2 + head),
                right=0 if self.causal else grain,
            )
            for head in range(kv_heads)
        )
        tokens = since = until = None
        if self.slots:
            tokens, since = gathered(
                bands, batch, block, self.q_len, self.k_len, self.causal, self.slots, generator
            )
            tokens = tokens.int()
            if self.by_row:
                since = since.int()
                until = since + torch.randint(0, 2 * block, since.shape, generator=generator).int()
            else:
                since = None
        return BlockPattern(
            causal=self.causal,
            bands=bands,
            block=block,
            tokens=tokens,
            visible_from=since,
            visible_until=until,
            pool=self.pool,
            pool_grain=1 if self.pool is None else grain,
        )


LAYOUTS = {
    "bands": Layout(q_len=300, k_len=300),
    "gathered": Layout(q_len=201, k_len=333, slots=40),
    "by_row": Layout(q_len=170, k_len=190, slots=19, by_row=True),
    "remainder": Layout(q_len=257, k_len=257, slots=24, pool=64),
    "bidirectional": Layout(q_len=180, k_len=180, slots=16, causal=False, pool=32),
    "one_row": Layout(q_len=1, k_len=290, slots=40, pool=32),
    "short": Layout(q_len=7, k_len=9),
    "nothing": Layout(q_len=100, k_len=100, slots=5, away=True),
}


def on_device(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem on the GPU, in ``dtype``."""
    lists = {
        name: None if (x := getattr(problem.pattern, name)) is None else x.to(DEVICE)
        for name in ("tokens", "visible_from", "visible_until")
    }
    tensors = {name: getattr(problem, name).to(DEVICE, dtype) for name in ("q", "k", "v")}
    return replace(problem, pattern=replace(problem.pattern, **lists), **tensors)


def check(
    found: Tensor, usual: Tensor, right: Tensor, dtype: torch.dtype, times: float = 2.0
) -> None:
    """``found`` errs at most twice as much as ``usual``, plain torch's answer to the same inputs.

    Args:
        found: What is tested.
        usual: Like it.
        right: The answer in fp64, on the CPU.
        dtype: Of the inputs.
        times: Instead of twice.
    """
    found, usual = (x.detach().double().cpu() for x in (found, usual))
    finite = right.isfinite()
    assert torch.equal(found.isfinite(), finite)
    found, usual, right = (x.where(finite, 0.0) for x in (found, usual, right))
    wrong, fair = found - right, usual - right
    floor = FLOORS[dtype] * right.square().mean().sqrt()
    assert wrong.square().mean().sqrt() <= times * fair.square().mean().sqrt() + floor
    # A single number may be unlucky; one that is wrong errs by more than that.
    assert wrong.abs().max() <= 4 * times * fair.abs().max() + 30 * floor
