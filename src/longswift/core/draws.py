"""Random numbers that are a function of where they are used: no state, no global generator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniform(seed: int, *at: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Numbers in ``[0, 1)`` that depend on ``seed`` and the integers ``at`` alone.

    Args:
        seed: Any integer.
        at: Coordinates, broadcast against one another.

    Returns:
        fp64 of the broadcast shape. Each coordinate is absorbed by the finaliser of SplitMix64
        (Steele, Lea, Flood, 2014), so that nothing depends on how many numbers are asked for.
    """
    state = _mix(np.asarray(seed % (1 << 64), dtype=np.uint64))
    for coordinate in at:
        state = _mix(state ^ np.asarray(coordinate, dtype=np.int64).astype(np.uint64))
    # A float holds 53 bits.
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = x + _GAMMA
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def distinct(
    count: int, population: NDArray[np.int64], seed: int, *at: NDArray[np.int64] | int
) -> NDArray[np.int64]:
    """``count`` different numbers below ``population``, all of them where there are fewer.

    Args:
        count: Numbers to draw.
        population: Sizes, ``[...]``.
        seed: As for ``uniform``.
        at: Coordinates that broadcast against ``population``.

    Returns:
        ``[..., count]``, -1 in empty places. Every subset is equally likely (Floyd's method).
    """
    shape = np.broadcast_shapes(population.shape, *(np.shape(c) for c in at))
    drawn = np.full((*shape, count), -1, dtype=np.int64)
    for turn in range(count):
        last = np.broadcast_to(population, shape) - count + turn
        guess = (uniform(seed, *at, turn) * (last + 1)).astype(np.int64)
        known = (drawn == guess[..., None]).any(-1)
        drawn[..., turn] = np.where(last < 0, -1, np.where(known, last, guess))
    return drawn
