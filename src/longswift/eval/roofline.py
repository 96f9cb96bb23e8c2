"""How fast attention could be at best: work that has to be done, against measured ceilings.

A call needs so many floating-point operations and must move so many bytes at least; the processor
multiplies matrices at most so fast and copies memory at most so fast. The longer of the two times
is a bound below every implementation (Williams et al., 2009, "Roofline", CACM 52(4)), and the share
of it that was reached tells how much is left to gain without doing less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from longswift.core.products import factor_dtype, mm

# Sizes of the square products tried; the larger ones only where the smaller took a moment.
_SIZES = (512, 1024, 2048, 4096, 8192)
_ENOUGH_SECONDS = 0.2
# A GPU copies in no time, and reaches its clock after some runs.
_COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_RUNS = {"cpu": 3, "cuda": 20}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the processor does at most.

    Attributes:
        flops: Floating-point operations per second of the fastest matrix product.
        bytes: Bytes per second, reads and writes both counted, of the fastest large copy.
    """

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a call has to do whatever computes it.

    Attributes:
        flops: Floating-point operations of the products of queries, keys and values.
        bytes: Bytes of the tensors that must be read or written once.
    """

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The shortest time in which it can be done: arithmetic and traffic overlap perfectly."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)


def attention_work(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    queries: int,
    keys: int,
    keys_per_query: float,
    itemsize: int,
    backward: bool = False,
) -> Work:
    """Work of attention in which every query scores ``keys_per_query`` of ``keys`` keys.

    A scored key is a product with the query and one with its value, ``4 * head_dim`` operations.
    Queries, keys, values and output are moved once. Choosing keys is not counted: it is the price
    of a mechanism, not a part of attention. The backward pass takes four more products, and it
    reads those tensors and the output's gradient and writes three gradients: both figures treble.

    Args:
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
        queries: Queries of a sequence.
        keys: Keys of a sequence that are read at all.
        keys_per_query: Keys scored per query, mean over queries and heads.
        itemsize: Bytes of a number.
        backward: Gradients included.
    """
    passes = 3 if backward else 1
    flops = 4 * head_dim * keys_per_query * queries * heads * batch
    moved = 2 * head_dim * itemsize * batch * (heads * queries + kv_heads * keys)
    return Work(flops=passes * flops, bytes=passes * moved)


def measure_ceilings(dtype: torch.dtype, device: torch.device | str = "cpu") -> Ceilings:
    """The fastest matrix product and the fastest copy of some runs each, about a second in all.

    Args:
        dtype: Of the factors. Where the processor is slow at it, fp32 counts if it is faster.
        device: Where to measure.
    """
    place = torch.device(device)
    flops = 0.0
    for kind in {dtype, factor_dtype(torch.empty(0, dtype=dtype, device=place))}:
        flops = max(flops, _product_rate(kind, place))
    copied = _COPIED_BYTES.get(place.type, _COPIED_BYTES["cpu"])
    size = copied // dtype.itemsize
    source = torch.ones(size, dtype=dtype, device=place)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source), place)
    return Ceilings(flops=flops, bytes=2 * copied / seconds)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    rate = 0.0
    for size in _SIZES:
        a = torch.ones(size, size, dtype=dtype, device=device)
        seconds = min(_fastest(partial(multiply, a, a), device) for multiply in (torch.mm, mm))
        rate = max(rate, 2 * size**3 / seconds)
        # The next one takes eight times as long.
        if seconds * 8 > _ENOUGH_SECONDS:
            break
    return rate


@torch.no_grad()
def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some runs, the first not counted."""
    best = float("inf")
    for turn in range(_RUNS.get(device.type, _RUNS["cpu"]) + 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            best = min(best, time.perf_counter() - begin)
    return best
