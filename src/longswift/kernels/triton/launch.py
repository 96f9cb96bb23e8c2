"""Tile sizes, grids and the arguments every attention kernel shares."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.softmax import accumulator_dtype
from longswift.kernels.triton.tables import Tables

# Lengths are plain numbers to a kernel: Triton would compile again for 1 and for multiples of 16.
LENGTHS = ("q_len", "k_len", "block", "before", "blocks", "slots", "entries")
# Of a bias: columns, the one of distance 0, and positions from key to key.
TABLE = ("span", "zero", "step")

# A GPU computes powers of two: scores are kept in units of log 2.
LOG2_E = tl.constexpr(1.4426950408889634)
# tl.dot multiplies nothing smaller.
_LEAST = 16
# Most query lines and keys of a tile, and the bytes of such lines that fit shared memory.
_LINES, _KEYS = 128, 64
_BYTES = 16384
# Bytes of shared memory that larger tiles and more steps in flight take.
_ROOM = 160 << 10


class Shape(NamedTuple):
    """One problem cut into tiles.

    Attributes:
        batch: ``B``.
        kv_heads: ``Hkv``.
        groups: Query heads per KV head.
        q_len: ``Lq``.
        dim: ``D``.
        v_dim: ``Dv``.
        rows: Query rows of a tile, a power of two.
        lines: Rows times the group, rounded up to a power of two.
        keys: Keys of a tile.
        dtype: Of the inputs.
        table: The pattern.
    """

    batch: int
    kv_heads: int
    groups: int
    q_len: int
    dim: int
    v_dim: int
    rows: int
    lines: int
    keys: int
    dtype: torch.dtype
    table: Tables

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, table: Tables) -> Shape:
        """Tiles that fill a multiprocessor and waste few lines on short blocks."""
        groups = q.shape[1] // k.shape[1]
        width = padded(max(q.shape[3], v.shape[3])) * q.dtype.itemsize
        # fp32 products are split into three of lower precision, which need the space again.
        fitting = max(_LEAST, _BYTES // (width if q.dtype.itemsize == 2 else 2 * width))
        rows = rows_of_tile(min(_LINES, fitting), groups, table.block)
        return cls(
            batch=q.shape[0],
            kv_heads=k.shape[1],
            groups=groups,
            q_len=q.shape[2],
            dim=q.shape[3],
            v_dim=v.shape[3],
            rows=rows,
            lines=rows * triton.next_power_of_2(groups),
            keys=min(_KEYS, fitting),
            dtype=q.dtype,
            table=table,
        )

    @property
    def slots(self) -> int:
        """Gathered tokens of a block."""
        return self.table.tokens.shape[3]

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return 8 if self.lines > 64 else 4

    @property
    def query_grid(self) -> tuple[int, int]:
        """A program per tile of queries and KV head."""
        tiles = self.table.blocks * triton.cdiv(self.table.block, self.rows)
        return tiles, self.batch * self.kv_heads

    @property
    def key_grid(self) -> tuple[int, int]:
        """A program per tile of keys and KV head."""
        return triton.cdiv(self.table.k_len, self.keys), self.batch * self.kv_heads

    @property
    def slot_grid(self) -> tuple[int, int]:
        """A program per tile of a block's gathered tokens and KV head."""
        return self.table.blocks * triton.cdiv(self.slots, self.keys), self.batch * self.kv_heads

    def sizes(self) -> tuple[int, ...]:
        """Lengths, as every kernel takes them after its tensors."""
        table = self.table
        return self.q_len, table.k_len, table.block, table.before, table.blocks, self.slots

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments: a kernel is compiled per head shape and dtype, not per length."""
        return {
            "HKV": self.kv_heads,
            "G": self.groups,
            "D": self.dim,
            "DV": self.v_dim,
            "D_PAD": padded(self.dim),
            "DV_PAD": padded(self.v_dim),
            "ROWS": self.rows,
            "M": self.lines,
            "N": self.keys,
            "ACC": accumulator(self.dtype),
            "EXACT": precision(),
        }


def bias_arguments(bias: ScoreBias | None) -> tuple[Any, ...]:
    """Table, columns, zero and step of a bias, as the kernels take them."""
    if bias is None:
        return None, 1, 0, 1
    return bias.values.contiguous(), bias.values.shape[1], bias.zero, bias.step


def step_options(bias: ScoreBias | None, device: torch.device) -> dict[str, Any]:
    """Whether a kernel adds a bias, and how many steps of its loops a device has room for."""
    if bias is not None:
        # Values looked up in advance would take the shared memory of a tile of scores each.
        return {"BIASED": True, "num_stages": 1}
    return {"BIASED": False, **({} if is_roomy(device) else {"num_stages": 2})}


def precision() -> str:
    """How fp32 products are made: about as precise as fp32, never plain TF32."""
    return "ieee" if torch.version.hip else "tf32x3"


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums over inputs of a dtype are kept in."""
    return tl.float64 if accumulator_dtype(dtype) == torch.float64 else tl.float32


def rows_of_tile(lines: int, groups: int, length: int) -> int:
    """Rows of ``groups`` heads that fill at most ``lines`` lines, a power of two.

    No more than ``length`` needs, but enough for a product.
    """
    stacked = triton.next_power_of_2(groups)
    return int(max(1, _LEAST // stacked, min(lines // stacked, triton.next_power_of_2(length))))


def padded(dim: int) -> int:
    """Columns of the tile that holds ``dim`` channels."""
    return max(_LEAST, int(triton.next_power_of_2(dim)))


@functools.cache
def is_roomy(device: torch.device) -> bool:
    """Whether a program gets the shared memory of larger tiles and of more steps in flight."""
    if device.type == "cpu":
        return True
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= _ROOM
