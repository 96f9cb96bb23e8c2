"""``longswift patterns``: who sees whom, as pictures, or as words in a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option


def patterns(
    mechanism: Annotated[
        str | None, Option(help="Comma-separated names; default: a sheet of all.")
    ] = None,
    length: Annotated[int, Option(help="Tokens in the picture, 16 to 512.")] = 64,
    config: Annotated[
        list[str] | None,
        Option(help="OPTION=VALUE, or NAME.OPTION=VALUE for several; repeat at will."),
    ] = None,
    bidirectional: Annotated[bool, Option(help="Attention without causal order.")] = False,
    out: Annotated[Path, Option(help="Picture to write: .png or .svg.")] = Path(
        "results/patterns.png"
    ),
) -> None:
    """Draw which keys each query sees, and why."""
    from longswift.cli import render
    from longswift.eval import pattern_plots

    shown = pattern_plots.draw(
        mechanism, out, length=length, settings=config or (), causal=not bidirectional
    )
    for line in pattern_plots.lines(shown):
        typer.echo(line)
    render.wrote(out)
