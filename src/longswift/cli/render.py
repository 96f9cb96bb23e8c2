"""Tables on stdout, remarks on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, figures: bool = True
) -> None:
    """Print a table.

    Args:
        title: Line above it.
        columns: Headings.
        rows: Cells.
        figures: Every column but the first holds figures, aligned to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if figures and i else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    # A pipe has no width; a table cut at 80 columns would lose figures.
    wide = Console() if sys.stdout.isatty() else Console(width=160)
    wide.print(grid)


def remark(message: str) -> None:
    """Say something on stderr that is no result."""
    print(message, file=sys.stderr)


def busy(what: str) -> AbstractContextManager[object]:
    """Say on stderr what is being done, for as long as the block lasts."""
    from rich.console import Console

    return Console(stderr=True).status(what)


def wrote(*files: Path | None) -> None:
    """Name the files that were written."""
    for file in files:
        if file is not None:
            remark(f"wrote {file}")
