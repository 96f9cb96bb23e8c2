"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table for people: a title, headings, and cells row by row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """Plain text in aligned columns."""
        lines = [tuple(self.columns), *map(tuple, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *shown])


def megabytes(size: int | None) -> str:
    """Bytes as MiB, ``-`` when unknown."""
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


def size(count: int | None) -> str:
    """Bytes as KiB or MiB with three digits, ``-`` when unknown."""
    if count is None:
        return "-"
    return f"{plain(count / 2**20)} MiB" if count >= 2**20 else f"{plain(count / 2**10)} KiB"


def seconds(value: float) -> str:
    """Seconds with a unit that keeps three digits."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def tokens(n: float) -> str:
    """A short length: 4096 is ``4k``."""
    return f"{n / 1024:g}k" if n >= 1024 and n % 1024 == 0 else f"{n:g}"


def times_faster(ratio: float) -> str:
    """A ratio of times, in words."""
    return f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"


def rate(value: float, unit: str) -> str:
    """A rate with a decimal prefix: 2.5e11 is ``250 GFLOP/s`` for the unit ``FLOP/s``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{plain(value)} {unit}"


def plain(value: float) -> str:
    """A number without an exponent: three digits, or whole from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
