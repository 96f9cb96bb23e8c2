"""A small problem that kernels must choose key tokens for as centroids are defined."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.blocks import BlockRun, block_runs, stack_queries
from longswift.core.pattern import Band, BlockPattern
from longswift.core.pools import block_edges
from longswift.kernels import reference

# Near ties may fall either way: ranks are rounded, and so are products.
_LEAST = 0.85


class _Problem(NamedTuple):
    """Cut blocks, grouped heads, more candidates than proposals, and numbers that fill no tile."""

    q: Tensor
    k: Tensor
    lse: Tensor
    pattern: BlockPattern
    scale: float = 0.18
    sinks: int = 5
    budget: int = 16
    candidates: int = 96
    rows: int = 4


def agreement(module: ModuleType, device: torch.device) -> dict[str, Tensor]:
    """1 for each dtype in which a backend's ``choose_by_bounds`` chooses as defined, else less."""
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    return {
        f"choice in {dtype}".replace("torch.", ""): _agreement(module, _problem(device, dtype))
        for dtype in (torch.float32, half)
    }


def _problem(device: torch.device, dtype: torch.dtype) -> _Problem:
    generator = torch.Generator("cpu").manual_seed(0)
    q, k = (
        2.0
        * torch.randn(1, heads, length, 32, generator=generator, device="cpu", dtype=torch.float32)
        for heads, length in ((4, 300), (2, 700))
    )
    bands = Band(tile=64, left=32), Band(tile=128, left=128)
    pattern = BlockPattern(causal=True, bands=bands, block=64)
    q, k = q.to(dtype), k.to(dtype)
    lse = reference.attend_bands(q.float(), k.float(), k.float(), pattern, 0.18).lse
    return _Problem(q.to(device), k.to(device), lse.to(device), pattern)


def _agreement(module: ModuleType, problem: _Problem) -> Tensor:
    if module is reference:
        return torch.ones((), device="cpu")
    q, k, pattern = problem.q, problem.k, problem.pattern
    edges = block_edges(pattern, q.shape[2], k.shape[2])
    shape = (1, *edges.shape[:2], problem.budget)
    tokens = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    module.choose_by_bounds(
        q,
        k,
        problem.lse,
        pattern,
        tokens,
        scale=problem.scale,
        key_block=4,
        row_group=32,
        key_radius=0.5,
        row_radius=0.5,
        proposed=lambda run: problem.candidates // 4,
        sinks=problem.sinks,
        extremes=lambda: (k[:, :, :0], k[:, :, :0]),
        centroid_rows=problem.rows,
        far=1 << 20,
        candidates=problem.candidates,
    )
    same = 0
    for run in block_runs(q.shape[2], k.shape[2], pattern.block, q.shape[2]):
        for index in range(run.first, run.first + run.count):
            for head in range(k.shape[1]):
                chosen = set(tokens[0, head, index].tolist())
                start = int(edges[head, index, 0])
                if len(chosen) != problem.budget or not chosen <= {*range(problem.sinks, start)}:
                    return torch.zeros((), device="cpu")
                same += len(chosen & _definition(problem, run, index - run.first, head, start))
    share = same / tokens.numel()
    return torch.tensor(1.0 if share >= _LEAST else share, dtype=torch.float32, device="cpu")


def _definition(problem: _Problem, run: BlockRun, index: int, head: int, start: int) -> set[int]:
    """The tokens of one block, in fp32 on the CPU."""
    rows = stack_queries(problem.q, run, problem.k.shape[1])[0, head, index].float().cpu()
    rows *= problem.scale
    band = stack_queries(problem.lse, run, problem.k.shape[1])[0, head, index].cpu()
    keys = problem.k[0, head, :start].float().cpu()
    groups, most = [rows], -(-problem.rows * run.rows // problem.pattern.block)
    while len(groups[0]) > most:
        groups = [half for group in groups for half in _halves(group)]
    scores = torch.stack([group.mean(0) for group in groups]) @ keys.T
    rank = (scores - scores.logsumexp(1, keepdim=True)).amax(0)
    rank[: problem.sinks] = -torch.inf
    proposed = rank.topk(min(problem.candidates, start - problem.sinks)).indices
    listed = torch.cat([torch.arange(problem.sinks, device="cpu"), proposed]).sort().values
    exact = rows @ keys[listed].T
    together = torch.nn.functional.pad(exact, (0, -len(listed) % 16), value=-torch.inf)
    total = together.unflatten(1, (-1, 16)).amax(2).logsumexp(1).logaddexp(band)
    share = (exact - total[:, None]).amax(0)
    share[listed < problem.sinks] = -torch.inf
    return set(listed[share.topk(problem.budget).indices].tolist())


def _halves(group: Tensor) -> tuple[Tensor, Tensor]:
    """A group of rows halved at the median of its widest channel; the last may count twice."""
    if len(group) % 2:
        group = torch.cat([group, group[-1:]])
    order = group[:, group.var(0, correction=0).argmax()].sort(stable=True).indices
    low, high = (half.sort().values for half in order.chunk(2))
    return group[low], group[high]
