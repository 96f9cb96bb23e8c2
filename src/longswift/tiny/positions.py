"""Positions that leap, so that a model learns distances longer than the sequences it reads."""

from __future__ import annotations

import numpy as np

__all__ = ["draw"]

_MOST_CUTS = 8
# Sets these numbers apart from those that fill the rows of the same step.
_STREAM = 1


def draw(
    rows: int, length: int, *, reach: int, leaps: float, seed: int, step: int
) -> np.ndarray | None:
    """Draw the positions of a batch; the same arguments always give the same ones.

    As in PoSE (Zhu et al. 2023, arXiv 2309.10400) a sequence keeps its tokens in order and skips
    positions between some of them. Here one to eight cuts, at random places, share what the
    sequence lacks of a target that is log-uniform between its length and ``reach``, so that short
    and long distances are equally common. A cut before the first token moves the whole row.

    Args:
        rows: Sequences in the batch.
        length: Tokens per sequence.
        reach: Positions are below this; a sequence as long as that does not leap.
        leaps: Probability of a row to leap, from 0 to 1; the other rows count up from 0.
        seed: Seed of the whole run.
        step: Number of the step.

    Returns:
        Strictly increasing positions ``[rows, length]``, int64; None if every row counts up.
    """
    if length >= reach:
        return None
    rng = np.random.default_rng([seed, step, _STREAM])
    chosen = np.flatnonzero(rng.random(rows) < leaps)
    if not len(chosen):
        return None
    positions = np.tile(np.arange(length), (rows, 1))
    for row in chosen:
        target = max(length, int(np.exp(rng.uniform(np.log(length), np.log(reach)))))
        cuts = int(rng.integers(1, _MOST_CUTS + 1))
        places = rng.integers(0, length, cuts)
        shares = np.floor(rng.dirichlet(np.ones(cuts)) * (target - length)).astype(np.int64)
        leap: np.ndarray = np.zeros(length, dtype=np.int64)
        np.add.at(leap, places, shares)
        positions[row] += leap.cumsum()
    return positions
