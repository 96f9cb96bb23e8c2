"""Bands as rectangles: congruent tiles of queries, each against one slice of keys."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longswift.core.pattern import Band, BlockPattern


class Job(NamedTuple):
    """``count`` congruent rectangles, each shifted by ``step`` along queries and keys.

    Rectangle ``i`` holds query rows ``[row + i*step, +rows)`` and keys ``[key + i*step, +width)``;
    ``shift`` is the position of its first query minus that of its first key.
    """

    row: int
    key: int
    step: int
    count: int  # type: ignore[assignment]
    rows: int
    width: int
    shift: int


@functools.lru_cache(maxsize=256)
def jobs(band: Band, q_len: int, k_len: int, causal: bool) -> tuple[Job, ...]:
    """Rectangles that cover the band, congruent neighbours merged, tiles without keys left out."""
    return tuple(_jobs(band, q_len, k_len, causal))


def _jobs(band: Band, q_len: int, k_len: int, causal: bool) -> Iterator[Job]:
    offset = k_len - q_len
    pending: Job | None = None
    for start in range(offset // band.tile * band.tile, k_len, band.tile):
        first_row, end_row = max(start, offset), min(start + band.tile, k_len)
        key = max(0, start - band.left)
        end_key = min(k_len, start + band.tile + band.right)
        if band.reach is not None:
            key = max(key, first_row - band.reach[0])
            end_key = min(end_key, end_row + band.reach[1])
        if causal:
            end_key = min(end_key, end_row)
        rows, width = end_row - first_row, end_key - key
        if width <= 0:
            continue
        job = Job(first_row - offset, key, band.tile, 1, rows, width, first_row - key)
        if (
            pending is not None
            and (pending.rows, pending.width, pending.shift) == (rows, width, job.shift)
            and pending.row + pending.count * band.tile == job.row
        ):
            pending = pending._replace(count=pending.count + 1)
            continue
        if pending is not None:
            yield pending
        pending = job
    if pending is not None:
        yield pending


def is_whole(pattern: BlockPattern, q_len: int, k_len: int) -> bool:
    """Whether the bands show every query every key, or every key up to its own."""
    for band in set(pattern.bands):
        found = jobs(band, q_len, k_len, pattern.causal)
        rows = sum(job.rows * job.count for job in found)
        if rows < q_len or band.reach is not None or any(job.width < k_len for job in found):
            return False
    return True


def allowed_mask(job: Job, band: Band, causal: bool, device: torch.device) -> Tensor | None:
    """bool ``[rows, width]``, or None when the whole rectangle is visible."""
    furthest_back = job.shift + job.rows - 1
    furthest_ahead = job.width - 1 - job.shift
    reach_back, reach_ahead = band.reach or (furthest_back, furthest_ahead)
    if causal:
        reach_ahead = min(0, reach_ahead)
    cut_back, cut_ahead = furthest_back > reach_back, furthest_ahead > reach_ahead
    if not cut_back and not cut_ahead:
        return None
    distance = (
        job.shift
        + torch.arange(job.rows, device=device)[:, None]
        - torch.arange(job.width, device=device)
    )
    allowed = torch.ones(job.rows, job.width, dtype=torch.bool, device=device)
    if cut_back:
        allowed &= distance <= reach_back
    if cut_ahead:
        allowed &= distance >= -reach_ahead
    return allowed


def empty_rows(job: Job, band: Band, causal: bool, device: torch.device) -> Tensor:
    """Rows that see no key of the rectangle, bool ``[rows]``."""
    behind, ahead = band.reach or (job.shift + job.rows, job.width - job.shift)
    ahead = min(0, ahead) if causal else ahead
    place = torch.arange(job.shift, job.shift + job.rows, device=device)
    return (place + ahead < 0) | (place - behind >= job.width)


def hidden_scores(
    job: Job, band: Band, causal: bool, dtype: torch.dtype, device: torch.device
) -> list[tuple[int, Tensor]]:
    """What ``allowed_mask`` hides, as additions to the scores: first key and 0 or ``-inf`` there.

    Two triangles at most, however wide the rectangle: what lies too far ahead and too far behind.
    """
    found = []
    behind, ahead = band.reach or (job.shift + job.rows, job.width - job.shift)
    ahead = min(0, ahead) if causal else ahead
    first = max(0, job.shift + ahead + 1)
    if first < job.width:
        shape = job.rows, job.width - first
        found.append((first, _triangle(*shape, job.shift + ahead + 1 - first, True, dtype, device)))
    end = min(job.width, job.shift + job.rows - 1 - behind)
    if end > 0:
        found.append((0, _triangle(job.rows, end, job.shift - behind - 1, False, dtype, device)))
    return found


@functools.lru_cache(maxsize=16)
def _triangle(
    rows: int, width: int, diagonal: int, upper: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``-inf`` on and above (or below) a diagonal, else 0; never written to."""
    with torch.inference_mode(False):
        full = torch.full((rows, width), -torch.inf, dtype=dtype, device=device)
        return full.triu_(diagonal) if upper else full.tril_(diagonal)


def band_heads(bands: tuple[Band, ...]) -> list[tuple[Band, list[int]]]:
    """KV heads by band, in order of first appearance."""
    groups: dict[Band, list[int]] = {}
    for head, band in enumerate(bands):
        groups.setdefault(band, []).append(head)
    return list(groups.items())


def tiles(x: Tensor, start: int, step: int, count: int, length: int) -> Tensor:
    """``[H, L, D]`` to overlapping slices ``[count, H, length, D]``, a view."""
    span = x[:, start : start + (count - 1) * step + length]
    if count == 1:
        return span.unsqueeze(0)
    return span.unfold(1, length, step).permute(1, 0, 3, 2)


def by_rows(found: Iterable[Job], most: int, causal: bool) -> Iterator[Job]:
    """Jobs of at most ``most`` rows; causal ones lose the keys that no row of theirs sees."""
    for job in found:
        for row in range(0, job.rows, most):
            rows = min(most, job.rows - row)
            width = min(job.width, job.shift + row + rows) if causal else job.width
            yield job._replace(row=job.row + row, rows=rows, width=width, shift=job.shift + row)


def by_tiles(found: Iterable[Job], most: int) -> Iterator[Job]:
    """Jobs of at most about ``most`` scores, by leaving tiles to another job."""
    for job in found:
        count = max(1, most // (job.rows * job.width))
        for first in range(0, job.count, count):
            move = first * job.step
            yield job._replace(
                row=job.row + move, key=job.key + move, count=min(count, job.count - first)
            )


def by_keys(found: Iterable[Job], most: int) -> Iterator[Job]:
    """Jobs of at most ``most`` scores a tile, by leaving keys to another job."""
    for job in found:
        step = max(1, min(job.width, most // job.rows))
        for key in range(0, job.width, step):
            width = min(step, job.width - key)
            yield job._replace(key=job.key + key, width=width, shift=job.shift - key)
