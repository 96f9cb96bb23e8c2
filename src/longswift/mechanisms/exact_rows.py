"""Which queries of MS-SWIFT are attended exactly, because that is cheaper there or all the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from longswift.core.hardware import crossover, decoded_rows, row_crossover
from longswift.core.pattern import Band


def limit(dense_below: int | None, q_len: int, k: Tensor, *, summarised: bool) -> int:
    """Positions below which ``q_len`` queries are exact; see ``MSSwift.dense_below``.

    Args:
        dense_below: The setting.
        q_len: Queries.
        k: Keys ``[B, Hkv, Lk, D]``.
        summarised: Whether there are page summaries of the keys.
    """
    if dense_below is not None:
        return dense_below
    if q_len <= decoded_rows(k.device):
        return row_crossover(k, queries=q_len, summarised=summarised)
    return crossover(k.device)


def count_exact(
    bands: Sequence[Band],
    q_len: int,
    k_len: int,
    causal: bool,
    below: int,
    block: int,
    beside: int,
) -> int:
    """Leading queries that are below the limit, or have all keys in reach.

    Args:
        bands: Of every KV head.
        q_len: Queries.
        k_len: Keys.
        causal: Whether keys after a query are hidden.
        below: The limit.
        block: Queries that share a choice: they are exact together.
        beside: Keys that a block sees beside its band.
    """
    if not causal:
        reach = min(band.tile + 2 * band.left for band in bands) + beside
        return q_len if k_len < below or k_len <= reach else 0
    covered = min(((beside + band.left) // band.tile + 1) * band.tile for band in bands)
    whole = -(-below // block) * block
    return min(q_len, max(0, max(whole, covered) - (k_len - q_len)))
