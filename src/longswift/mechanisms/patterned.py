"""What every mechanism that is a sparse pattern shares: dispatch, statistics, the dense oracle."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.inputs import check_scale
from longswift.core.mechanism import Call, Mechanism
from longswift.core.pattern import Band, BlockPattern
from longswift.core.types import AttentionResult, AttentionStats, Partial
from longswift.kernels import dispatch
from longswift.mechanisms.channels import filled_up
from longswift.mechanisms.stretches import pool_size, stretches


@dataclass(frozen=True, kw_only=True)
class Patterned(Mechanism):
    """Softmax attention over a ``BlockPattern`` that does not depend on content.

    Subclasses implement ``pattern``, and ``full_rows`` if some queries see everything; ``mode``
    names how it was chosen in the statistics.
    """

    mode: ClassVar[str] = "static"
    supports_bias: ClassVar[bool] = True

    @abstractmethod
    def pattern(self, q_len: int, k_len: int, kv_heads: int, causal: bool) -> BlockPattern:
        """The keys each block of queries sees, in an unpadded batch."""

    def full_rows(self, k_len: int) -> Tensor | None:
        """Queries that see every key in bidirectional attention, by index; None for no such."""
        return None

    @filled_up
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionResult:
        name, backend = dispatch.resolve(call.backend, q.device, q, k, v, bias=call.bias)
        q_len, k_len, kv_heads = q.shape[2], k.shape[2], k.shape[1]
        pattern = self.pattern(q_len, k_len, kv_heads, call.causal)
        out, lse = backend.attend(q, k, v, pattern, call.scale, bias=call.bias)
        rows = None if call.causal else self.full_rows(k_len)
        if rows is not None:
            at = rows.to(q.device)
            full = attend_rows(backend, q, k, v, rows, call.scale, call.bias)
            out, lse = out.index_copy(2, at, full.out), lse.index_copy(2, at, full.lse)
        stats = pattern_stats(self.name, name, self.mode, pattern, q_len, k_len, full_rows=rows)
        return AttentionResult(out, lse, stats)

    def exact_part(self) -> Mechanism | None:
        return self

    def _visible(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        pattern = self.pattern(q.shape[2], k.shape[2], k.shape[1], call.causal)
        seen = pattern.visible(q.shape[2], k.shape[2], q.shape[1] // k.shape[1], q.device)
        rows = None if call.causal else self.full_rows(k.shape[2])
        return seen if rows is None else seen.index_fill(2, rows.to(q.device), True)


def attend_rows(
    backend: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    scale: float,
    bias: ScoreBias | None,
) -> Partial:
    """Bidirectional attention of the queries ``rows``, ascending on CPU, to every key."""
    at, k_len, kv_heads = rows.to(q.device), k.shape[2], k.shape[1]
    if bias is None:
        everything = full_pattern(k_len, kv_heads, causal=False)
        return backend.attend(q.index_select(2, at), k, v, everything, scale)
    # Distances need neighbouring rows: a stretch of them at a time.
    breaks = (rows.diff() != 1).nonzero().flatten() + 1
    parts = []
    for stretch in torch.tensor_split(rows, breaks):
        first, count = int(stretch[0]), len(stretch)
        pattern = full_pattern(k_len, kv_heads, causal=False, q_len=count)
        moved = bias.moved(first - q.shape[2] + count)
        part = backend.attend(q[:, :, first : first + count], k, v, pattern, scale, bias=moved)
        parts.append(part)
    return Partial(*(torch.cat(of, 2) for of in zip(*parts, strict=True)))


def attend_at_once(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    backend: str,
) -> AttentionResult | None:
    """A call of mechanism ``name`` that is full attention; see ``Mechanism._at_once``."""
    if scale is not None:
        scale = check_scale(scale, q.shape[-1])
    found = dispatch.attend_whole(backend, q, k, v, causal, scale)
    if found is None:
        return None
    ran, out, lse = found
    return AttentionResult(out, lse, _stats_at_once(name, ran, q.shape, k.shape, causal))


@lru_cache(maxsize=256)
def _stats_at_once(
    name: str, backend: str, q_shape: torch.Size, k_shape: torch.Size, causal: bool
) -> AttentionStats:
    # Shapes as they are: to take them apart costs short calls more than to look them up.
    return dense_stats(name, backend, q_shape[2], k_shape[2], k_shape[1], causal)


@lru_cache(maxsize=256)
def full_pattern(k_len: int, kv_heads: int, causal: bool, q_len: int = 0) -> BlockPattern:
    """One tile that sees every key; cross attention may have more queries than keys."""
    if causal:
        band = Band(tile=k_len, left=0)
    else:
        extent = max(q_len, k_len)
        band = Band(tile=extent, left=extent, right=extent)
    return BlockPattern(causal=causal, bands=(band,) * kv_heads)


def dense_keys(q_len: int, k_len: int, causal: bool) -> float:
    """Mean number of keys a query sees under full attention."""
    return k_len - (q_len - 1) / 2 if causal else float(k_len)


def keys_of_rows(pattern: BlockPattern, q_len: int, k_len: int) -> Tensor:
    """Keys each query scores: band, gathered and remainder columns.

    Returns:
        fp64 ``[Hkv, Lq]`` on CPU, the mean over batch rows.
    """
    total = _band_keys(pattern.bands, pattern.causal, pattern.pool, q_len, k_len)
    return total if pattern.tokens is None else total + _gathered_of_rows(pattern, q_len, k_len)


def _keys_in_all(pattern: BlockPattern, q_len: int, k_len: int) -> Tensor:
    """Sums of ``keys_of_rows`` over the rows, fp64 ``[Hkv]``."""
    total = torch.tensor(
        _band_keys_in_all(pattern.bands, pattern.causal, pattern.pool, q_len, k_len),
        dtype=torch.float64,
        device="cpu",
    )
    if pattern.tokens is None:
        return total
    if pattern.by_row:
        return total + _gathered_of_rows(pattern, q_len, k_len).sum(1)
    offset, block = k_len - q_len, pattern.block
    edges = torch.arange(offset // block, (k_len - 1) // block + 2, device="cpu") * block
    rows = edges.clamp(offset, k_len).diff().double()
    if pattern.listed is not None:
        return total + (pattern.listed * rows).sum(1)
    # Sums in the default of 64 bits take ten times as long.
    gathered = (pattern.tokens >= 0).sum(3, dtype=torch.int32).cpu().double().mean(0)
    return total + gathered @ rows


@lru_cache(maxsize=64)
def _band_keys_in_all(
    bands: tuple[Band, ...], causal: bool, pool: int | None, q_len: int, k_len: int
) -> tuple[float, ...]:
    return _numbers(_band_keys(bands, causal, pool, q_len, k_len).sum(1))


def _numbers(x: Tensor) -> tuple[float, ...]:
    """The values of ``x``; PyTorch 2.9's ``tolist`` does not see through torch.func's wrappers."""
    try:
        return tuple(x.tolist())
    except RuntimeError:
        return tuple(float(value) for value in x)


def _band_keys(
    bands: tuple[Band, ...], causal: bool, pool: int | None, q_len: int, k_len: int
) -> Tensor:
    """Keys of the band and columns of the remainder of each query, fp64 ``[Hkv, Lq]`` on CPU."""
    position = torch.arange(k_len - q_len, k_len, device="cpu")
    by_band = {}
    for band in set(bands):
        first, last = band.bounds(position, k_len)
        keys = torch.zeros(q_len, dtype=torch.float64, device="cpu")
        if pool is not None:
            outside = first if causal else first + (k_len - last)
            keys += outside / pool
        if band.reach is not None:
            first = torch.maximum(first, position - band.reach[0])
            last = torch.minimum(last, position + band.reach[1] + 1)
        if causal:
            last = torch.minimum(last, position + 1)
        by_band[band] = keys + (last - first).clamp(min=0)
    return torch.stack([by_band[band] for band in bands])


def _gathered_of_rows(pattern: BlockPattern, q_len: int, k_len: int) -> Tensor:
    """Gathered tokens each query sees, fp64 ``[Hkv, Lq]``, mean over batch rows."""
    assert pattern.tokens is not None
    offset, block = k_len - q_len, pattern.block
    index = torch.arange(offset // block, (k_len - 1) // block + 1, device="cpu")
    real = (pattern.tokens >= 0).cpu()
    if pattern.visible_from is None and pattern.visible_until is None:
        row_block = torch.arange(offset, k_len, device="cpu") // block - offset // block
        return real.sum(3).double().mean(0)[:, row_block]
    first = (index * block).clamp(min=offset)[:, None].expand_as(real)
    end = (index * block + block).clamp(max=k_len)[:, None].expand_as(real)
    if pattern.visible_from is not None:
        first = torch.maximum(first, pattern.visible_from.cpu())
    if pattern.visible_until is not None:
        end = torch.minimum(end, pattern.visible_until.cpu())
    shown = real & (first < end)
    heads = real.shape[1]
    head = torch.arange(heads, device="cpu")[:, None, None].expand_as(real)[shown]
    line = head * (q_len + 1) - offset
    change = torch.zeros(heads * (q_len + 1), dtype=torch.float64, device="cpu")
    for edge, step in ((first[shown], 1.0), (end[shown], -1.0)):
        change.index_add_(0, edge + line, change.new_full(edge.shape, step))
    return change.view(heads, -1).cumsum(1)[:, :q_len] / real.shape[0]


@lru_cache(maxsize=256)
def dense_stats(
    mechanism: str, backend: str, q_len: int, k_len: int, kv_heads: int, causal: bool
) -> AttentionStats:
    """Statistics of an unpadded call in which every query saw every key it may see."""
    return AttentionStats(
        mechanism=mechanism,
        backend=backend,
        mode="dense",
        keys_per_query=dense_keys(q_len, k_len, causal),
        density=1.0,
        dense_rows=1.0,
        density_by_head=(1.0,) * kv_heads,
    )


def pattern_stats(
    mechanism: str,
    backend: str,
    mode: str,
    pattern: BlockPattern,
    q_len: int,
    k_len: int,
    exact_rows: int = 0,
    full_rows: Tensor | None = None,
    more_keys: tuple[float, ...] = (),
) -> AttentionStats:
    """Statistics of one unpadded call.

    Args:
        mechanism: Name of the mechanism.
        backend: Backend that ran.
        mode: How the keys were chosen; ``"dense"`` where every query saw every key it may see.
        pattern: Keys of the queries from ``exact_rows`` on; pools grow as ``stretches`` says.
        q_len: Queries.
        k_len: Keys.
        exact_rows: Leading queries computed exactly.
        full_rows: Queries among the others that saw every key whatever the pattern says.
        more_keys: Keys that each KV head scored beyond the pattern, per query it was made for.
    """
    rest = q_len - exact_rows
    if mode == "dense":
        heads = len(pattern.bands)
        return dense_stats(mechanism, backend, q_len, k_len, heads, pattern.causal)
    dense = exact_rows + (0 if full_rows is None else len(full_rows))
    if q_len == 1 and rest and pattern.causal and pattern.listed is not None:
        more = more_keys or (0.0,) * len(pattern.bands)
        keys = tuple(k + m for k, m in zip(_keys_of_row(pattern, k_len), more, strict=True))
    else:
        keys = _keys_of_call(pattern, q_len, k_len, exact_rows, full_rows, more_keys)
    each = dense_keys(q_len, k_len, pattern.causal)
    by_head = tuple(of_head / each for of_head in keys)
    return AttentionStats(
        mechanism=mechanism,
        backend=backend,
        mode=mode,
        keys_per_query=sum(keys) / len(keys),
        density=sum(by_head) / len(by_head),
        dense_rows=dense / q_len,
        density_by_head=by_head,
    )


def _keys_of_row(pattern: BlockPattern, k_len: int) -> tuple[float, ...]:
    """Keys a single causal query scores, of each KV head: ``keys_of_rows`` without tensors."""
    assert pattern.listed is not None
    place = k_len - 1
    pool = pattern.pool and pool_size(place // pattern.block * pattern.block, pattern.pool)
    found = []
    for band, listed in zip(pattern.bands, pattern.listed.flatten().tolist(), strict=True):
        start, end = band.at(place, k_len)
        behind, ahead = band.reach or (place, 0)
        seen = min(end, place + 1 + min(ahead, 0)) - max(start, place - behind)
        found.append(max(seen, 0) + listed + (start / pool if pool else 0.0))
    return tuple(found)


def _keys_of_call(
    pattern: BlockPattern,
    q_len: int,
    k_len: int,
    exact_rows: int,
    full_rows: Tensor | None,
    more_keys: tuple[float, ...],
) -> tuple[float, ...]:
    """Mean keys a query scores, of each KV head; see ``pattern_stats``."""
    rest = q_len - exact_rows
    total = torch.zeros(len(pattern.bands), dtype=torch.float64, device="cpu")
    if rest:
        if full_rows is None:
            for rows, keys, part in stretches(pattern, rest, k_len):
                total += _keys_in_all(part, rows.stop - rows.start, keys)
        else:
            by_row = keys_of_rows(pattern, rest, k_len)
            by_row[:, full_rows] = k_len
            total += by_row.sum(1)
    if more_keys:
        total += rest * torch.tensor(more_keys, dtype=torch.float64, device="cpu")
    if exact_rows:
        last = k_len - rest if pattern.causal else k_len
        total += exact_rows * dense_keys(exact_rows, last, pattern.causal)
    return _numbers(total / q_len)
