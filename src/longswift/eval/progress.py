"""A progress bar on stderr for long work; stdout stays clean for results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """What measuring code tells about its progress."""

    def __call__(self, advance: float = 0, text: str | None = None) -> None:
        """Advance by some units and, if given, say what comes next."""


def silent(advance: float = 0, text: str | None = None) -> None:
    """A bar that shows nothing."""


@contextmanager
def bar(total: float, text: str, *, shown: bool = True, timed: bool = False) -> Iterator[Bar]:
    """Show a bar while the work inside runs.

    Args:
        total: Units of work.
        text: What is being done.
        shown: False for a silent bar.
        timed: Draw the bar only when it is told something: a thread that draws all the time takes
            turns with what is being timed.
    """
    # Off a terminal a bar is noise in a log file.
    if not shown or not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, auto_refresh=not timed) as progress:
        task = progress.add_task(text, total=total)

        def step(advance: float = 0, text: str | None = None) -> None:
            if text is None:
                progress.update(task, advance=advance)
            else:
                progress.update(task, advance=advance, description=text)
            if timed:
                progress.refresh()

        yield step


class Share:
    """A bar for one part of the work, whose share of the whole is used up whatever stops early.

    Args:
        step: The bar of the whole.
        share: Units of this part.
    """

    def __init__(self, step: Bar, share: float) -> None:
        self._step, self._left = step, share

    def __call__(self, advance: float = 0, text: str | None = None) -> None:
        """See ``Bar``."""
        advance = min(advance, self._left)
        self._left -= advance
        self._step(advance, text)

    def finish(self) -> None:
        """Use up what is left."""
        self._step(self._left)
