"""Key tokens by centroids, on the GPU: what ``mechanisms.selectors.centroids`` describes.

For runs of blocks whose ranks fit a buffer: groups of similar rows and their means (``halve``,
``average``), what each mean's softmax sums to (``log_sums``), the largest share of every key
(``rank_keys``), the keys proposed (``pick_keys``); then every row's sum over proposals
(``row_totals``), every proposal's largest share (``key_shares``) and the tokens (``pick_tokens``).

Ranks of keys are 16 bits wide, fp32 inputs are multiplied as TF32 for them and 16-bit inputs, where
the GPU can, as fp8 (e4m3), keys less the mean of the first of them, which moves all scores of a row
alike: they decide between near ties of proposals only. The second look is as exact as attention is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from longswift.core.blocks import BlockRun, block_runs
from longswift.core.pattern import Band, BlockPattern
from longswift.core.pools import block_edges, edges_on
from longswift.kernels.triton import centroid_kernels, exact_kernels, picking_kernels
from longswift.kernels.triton.launch import LOG2_E, is_roomy, padded, precision
from longswift.kernels.triton.limits import unit_stride

# Bytes of the ranks of a run of blocks.
_RANKS = 1 << 28
# Most proposals of a block: the last choice among them is made in registers.
_MOST = 16384
# Of many candidates every 8th tile of 64 keys, the first of them the fifth, stands for all in sums
# that only weigh centroids against each other, and the best of every 16 keys in it.
_MANY, _TILE, _EVERY, _FIRST, _TOGETHER = 4096, 64, 8, 4, 16
# Rows of tables are multiples of this, so that threads load several numbers at once.
_ALIGNED = 64
# Keys a program ranks.
_CHUNK = 4096
# Keys whose mean is taken off where keys become fp8; blocks before their end do without. And keys
# that become it at a time.
_CENTRE, _PIECE = 256, 1 << 16
# Numbers looked at in a step of a search, and the most steps: a thread counts them in ten bits.
_SEARCHED, _STEPS = 4096, 1023
# Numbers of rows looked at in a step, when groups are halved.
_HALVED = 16384
# Low bits of fp32 that tell nothing of numbers that were narrower.
_SPARE = {torch.bfloat16: 16, torch.float16: 13}


class Tile(NamedTuple):
    """Rows and columns of a product, warps, and steps ahead that are loaded."""

    rows: int
    columns: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """What a kernel is launched with."""
        sizes = {"M": self.rows, "N": self.columns}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


# Of each kernel: for rows of 256 bytes where shared memory allows, of 512, and wider ones.
_TILES = {
    "log_sums": (Tile(128, _TILE, 8, 3), Tile(64, _TILE, 4, 2), Tile(32, _TILE, 4, 1)),
    "rank_keys": (Tile(64, 256, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)),
    "row_totals": (Tile(256, 64, 8, 3), Tile(64, 32, 4, 2), Tile(32, 16, 4, 2)),
    "key_shares": (Tile(256, 64, 8, 3), Tile(64, 32, 4, 2), Tile(32, 16, 4, 2)),
}


@functools.lru_cache(maxsize=4)
def _starts(bands: tuple[Band, ...], block: int, q_len: int, k_len: int) -> list[int]:
    """Keys before the band of each block, the most of any head."""
    pattern = BlockPattern(causal=True, bands=bands, block=block)
    starts: list[int] = block_edges(pattern, q_len, k_len)[..., 0].amax(0).tolist()
    return starts


@functools.cache
def _ranks_in_fp8(device: torch.device) -> bool:
    """Whether products of fp8 are faster there than those of 16 bits."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def choose_by_bounds(
    q: Tensor,
    k: Tensor,
    band_lse: Tensor,
    pattern: BlockPattern,
    tokens: Tensor,
    *,
    scale: float,
    sinks: int,
    since: Tensor | None = None,
    centroid_rows: int | None = None,
    far: int = 1,
    candidates: int = 0,
    **bounds: Any,
) -> bool:
    """Chooses what ``Centroids`` describes for every block of queries.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        band_lse: ``[B, Hq, Lq]``.
        pattern: Bands and blocks.
        tokens: int32 ``[B, Hkv, N, budget]`` filled with -1, written to.
        scale: Factor on the scores, positive.
        sinks: Leading tokens never chosen.
        since: Not None for a strictly causal choice.
        centroid_rows: Most rows of a complete block that are scored as one, or None.
        far: Position from which on a centroid stands for twice as many rows; and again whenever
            it doubles.
        candidates: Keys proposed by centroids.
        bounds: What choosing by boxes takes.

    Returns:
        Whether the choice was made: not if it is strict, of a single query, by boxes, or among more
            than four million keys.
    """
    fits = 0 < candidates <= _MOST and max(q.shape[3], k.shape[3]) <= 256
    fits &= k.shape[2] <= _SEARCHED * _STEPS
    if centroid_rows is None or since is not None or q.shape[2] == 1 or not fits:
        return False
    if q.dtype == torch.float64:
        q, k = q.float(), k.float()
    q, k = unit_stride(q, k)
    call = _Call(
        q=q,
        k=k,
        band_lse=band_lse.float(),
        edges=edges_on(pattern.bands, pattern.block, q.shape[2], k.shape[2], q.device),
        tokens=tokens,
        pattern=pattern,
        scale=scale,
        sinks=sinks,
        candidates=candidates,
    )
    for run in block_runs(q.shape[2], k.shape[2], pattern.block, q.shape[2]):
        for part, rows in _equal_rows(run, pattern, k.shape[2], centroid_rows, far):
            call.choose(part, -(-rows * run.rows // pattern.block))
    return True


def _equal_rows(
    run: BlockRun, pattern: BlockPattern, k_len: int, rows: int, far: int
) -> Iterator[tuple[BlockRun, int]]:
    """Parts of a run whose centroids stand for equally many rows, and how many."""
    index = 0
    while index < run.count:
        position = run.position + index * run.rows if pattern.causal else k_len
        doubled = max(0, -(-position // far) - 1).bit_length()
        count = run.count - index
        if pattern.causal:
            # The last position of as many rows lies at a multiple of `far`.
            count = min(count, ((far << doubled) - position) // run.rows + 1)
            if position < _CENTRE:
                count = min(count, -(-(_CENTRE - position) // run.rows))
        row = run.row + index * run.rows
        yield run._replace(first=run.first + index, count=count, row=row), rows << doubled
        index += count


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of ``choose_by_bounds``; ``edges`` int32 ``[Hkv, N, 2]`` on the device."""

    q: Tensor
    k: Tensor
    band_lse: Tensor
    edges: Tensor
    tokens: Tensor
    pattern: BlockPattern
    scale: float
    sinks: int
    candidates: int

    @property
    def _problems(self) -> int:
        return self.k.shape[0] * self.k.shape[1]

    @property
    def _heads(self) -> dict[str, int]:
        kv_heads = self.k.shape[1]
        return {"HKV": kv_heads, "G": self.q.shape[1] // kv_heads}

    @property
    def _dims(self) -> dict[str, int]:
        return {"D": self.q.shape[3], "D_PAD": padded(self.q.shape[3])}

    @cached_property
    def _centred(self) -> Tensor:
        """Keys less a mean, as fp8."""
        mean = self.k[:, :, :_CENTRE].mean(2, keepdim=True, dtype=torch.float32).to(self.k.dtype)
        largest = torch.finfo(torch.float8_e4m3fn).max
        centred = torch.empty_like(self.k, dtype=torch.float8_e4m3fn)
        # Piece by piece, or differences would take twice the memory that is kept.
        for place, keys in zip(centred.split(_PIECE, 2), self.k.split(_PIECE, 2), strict=True):
            place.copy_((keys - mean).clamp_(-largest, largest))
        return centred

    def _ranked(self, run: BlockRun) -> Tensor:
        """The keys that centroids of a run are multiplied with."""
        late = not self.pattern.causal or run.position >= _CENTRE
        # Products of fp8 are 32 channels deep at least.
        fits = self.k.shape[2] >= _CENTRE and self._dims["D_PAD"] >= 32
        narrow = self.q.dtype.itemsize == 2 and fits and late
        return self._centred if narrow and _ranks_in_fp8(self.q.device) else self.k

    def _tile(self, kernel: str) -> Tile:
        row = self._dims["D_PAD"] * self.q.dtype.itemsize
        return _TILES[kernel][0 if row <= 256 and is_roomy(self.q.device) else 1 + (row > 512)]

    @property
    def _q_strides(self) -> tuple[int, ...]:
        return self.q.stride()[:3]

    @property
    def _k_strides(self) -> tuple[int, ...]:
        return self.k.stride()[:3]

    def choose(self, run: BlockRun, most: int) -> None:
        """Tokens for blocks whose centroids are of at most ``most`` rows."""
        k_len, causal = self.k.shape[2], self.pattern.causal
        starts = _starts(self.pattern.bands, self.pattern.block, self.q.shape[2], k_len)
        # Later blocks have no fewer candidates.
        width = starts[run.first + run.count - 1] if causal else k_len
        if width == 0:
            return
        together = max(1, _RANKS // (2 * self._problems * width))
        for index in range(0, run.count, together):
            count = min(together, run.count - index)
            part = run._replace(
                first=run.first + index, count=count, row=run.row + index * run.rows
            )
            width = starts[part.first + count - 1] if causal else k_len
            # A block without candidates keeps its empty slots.
            if width > 0:
                self._choose(part, most, -(-width // _ALIGNED) * _ALIGNED)

    def _choose(self, run: BlockRun, most: int, width: int) -> None:
        keys = self._ranked(run)
        means, groups = self._means(run, most, keys.dtype)
        ranks = self._ranks(run, keys, means, groups, width)
        problems = self._problems * run.count
        proposed = min(self.candidates, width)
        slots = -(-(proposed + self.sinks) // _ALIGNED) * _ALIGNED
        index = torch.empty(problems, slots, dtype=torch.int32, device=self.q.device)
        count = torch.empty(problems, 2, dtype=torch.int32, device=self.q.device)
        picking_kernels.pick_keys[(problems,)](
            *(ranks, self.edges, index, count, width, *self._blocks(run)),
            *(proposed, self.sinks, slots),
            HKV=self.k.shape[1],
            N=min(_SEARCHED, triton.next_power_of_2(width)),
            TILE=min(self._tile("rank_keys").rows, _ALIGNED),
            CAUSAL=self.pattern.causal,
            num_warps=8,
        )
        self._second_look(run, index, count, proposed)

    def _blocks(self, run: BlockRun) -> tuple[int, int, int]:
        return run.count, run.first, self.edges.shape[1]

    def _means(self, run: BlockRun, most: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Means ``[B * Hkv * count * groups, D]`` of similar rows, and ``groups``."""
        problems, members = self._problems * run.count, self._heads["G"] * run.rows
        order, groups = None, 1
        places = run.count, run.row, run.rows
        at_once = _HALVED // self._dims["D_PAD"]
        while members > most:
            half = (members + 1) // 2
            pad = triton.next_power_of_2(2 * half)
            together = max(1, min(groups, at_once // pad))
            halves = torch.empty(
                problems * groups * 2 * half, dtype=torch.int32, device=self.q.device
            )
            centroid_kernels.halve[(problems * triton.cdiv(groups, together),)](
                *(self.q, order, halves, groups, *places, *self._q_strides),
                **self._heads,
                **self._dims,
                MEMBERS=members,
                PAD=pad,
                AT_ONCE=together,
                STEP=min(at_once // together, pad),
                WHOLE=order is None,
                SPARE=_SPARE.get(self.q.dtype, 0),
                num_warps=8,
            )
            order, members, groups = halves, half, 2 * groups
        if order is None:
            order = torch.arange(members, dtype=torch.int32, device=self.q.device).repeat(problems)
        total = problems * groups
        means = torch.empty(total, self.q.shape[3], dtype=dtype, device=self.q.device)
        centroid_kernels.average[(triton.cdiv(total, 32),)](
            *(self.q, order, means, total, groups, *places, *self._q_strides),
            **self._heads,
            **self._dims,
            MEMBERS=members,
            AT_ONCE=32,
            LARGEST=torch.finfo(dtype).max,
        )
        return means, groups

    def _ranks(self, run: BlockRun, keys: Tensor, means: Tensor, groups: int, width: int) -> Tensor:
        """What keys are worth to blocks, int16 ``[B * Hkv * count, width]``."""
        sums = torch.empty(len(means), dtype=torch.float32, device=means.device)
        place = run.first, self.edges.shape[1]
        k_len, lines = self.k.shape[2], run.count * groups
        scale = self.scale * LOG2_E.value
        common = {"HKV": self.k.shape[1], "CAUSAL": self.pattern.causal, "EXACT": "tf32"}
        tile = self._tile("log_sums")
        centroid_kernels.log_sums[(triton.cdiv(lines, tile.rows), self._problems)](
            *(means, keys, self.edges, sums, scale, k_len, groups, run.count, *place),
            *keys.stride()[:3],
            **common,
            **self._dims,
            **tile.options(),
            MANY=_MANY,
            EVERY=_EVERY,
            FIRST=_FIRST,
            TOGETHER=_TOGETHER,
        )
        shape = self._problems * run.count, width
        ranks = torch.empty(shape, dtype=torch.int16, device=means.device)
        tile = self._tile("rank_keys")
        tiles = triton.cdiv(run.count, max(1, tile.columns // groups))
        centroid_kernels.rank_keys[(tiles * triton.cdiv(width, _CHUNK), self._problems)](
            *(means, sums, keys, self.edges, ranks, scale, k_len, width, run.count, *place),
            *(self.sinks, _CHUNK, *keys.stride()[:3]),
            **common,
            **self._dims,
            GROUPS=groups,
            **tile.options(),
        )
        return ranks

    def _second_look(self, run: BlockRun, index: Tensor, count: Tensor, proposed: int) -> None:
        """The tokens that any row of a block wants most, of ``proposed`` at most."""
        problems, slots = index.shape
        members = self._heads["G"] * run.rows
        totals = torch.empty(problems, members, dtype=torch.float32, device=index.device)
        tile = self._tile("row_totals")
        options: dict[str, Any] = {**self._heads, **self._dims, "EXACT": precision()}
        lines = triton.cdiv(members, tile.rows)
        exact_kernels.row_totals[(problems * lines,)](
            *(self.q, self.k, index, count, self.band_lse, totals, self.scale),
            *(slots, run.count, run.row, run.rows, *self._q_strides, *self._k_strides),
            *self.band_lse.stride(),
            **options,
            **tile.options(),
            TOGETHER=_TOGETHER,
        )
        ranks = torch.empty(problems, slots, dtype=torch.float32, device=index.device)
        tile = self._tile("key_shares")
        exact_kernels.key_shares[(problems * triton.cdiv(slots, tile.rows),)](
            *(self.q, self.k, index, count, totals, ranks, self.scale),
            *(slots, run.count, run.row, run.rows, *self._q_strides, *self._k_strides),
            **options,
            **tile.options(),
        )
        picking_kernels.pick_tokens[(problems,)](
            *(ranks, index, count, self.tokens, slots, self.tokens.shape[3]),
            *self._blocks(run),
            N=triton.next_power_of_2(proposed),
            num_warps=8,
        )
