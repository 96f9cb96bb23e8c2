"""``longswift bench diff``: two results of one benchmark as ratios."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def diff(
    before: Annotated[Path, typer.Argument(help="Result that a command wrote.")],
    after: Annotated[Path, typer.Argument(help="A newer one of the same kind.")],
    tolerance: Annotated[
        float, typer.Option(help="Share by which a figure may get worse.", min=0.0)
    ] = 0.1,
) -> None:
    """Compare two results; the exit code is 1 if a figure got worse by more than the tolerance."""
    from longswift.cli import render
    from longswift.eval import compare
    from longswift.eval.results import load

    old, new = load(before), load(after)
    changes = compare.compare(old, new, tolerance, files=(before, after))
    for difference in compare.differences(old, new):
        render.remark(f"note: {difference}")
    for figure in compare.alone(old, new, files=(before, after)):
        render.remark(f"note: {figure}")
    render.table(*compare.table(changes, tolerance))
    worse = sum(change.worse for change in changes)
    typer.echo(f"{worse} of {len(changes)} figures are worse by more than {tolerance:.0%}.")
    if worse:
        raise typer.Exit(1)
