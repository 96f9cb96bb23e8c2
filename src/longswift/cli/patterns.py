"""``longswift patterns``: who sees whom, as pictures, or as words in a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option


def patterns(
    model: Annotated[
        str | None,
        Argument(help="With a model and --file: its choices in a text, as an HTML page."),
    ] = None,
    mechanism: Annotated[
        str | None, Option(help="Comma-separated names; default: all (a page: ms_swift).")
    ] = None,
    length: Annotated[
        int | None, Option(help="Tokens in the picture, 16 to 512; default: 64.")
    ] = None,
    config: Annotated[
        list[str] | None,
        Option(help="OPTION=VALUE, or NAME.OPTION=VALUE for several; repeat at will."),
    ] = None,
    bidirectional: Annotated[bool, Option(help="Attention without causal order.")] = False,
    file: Annotated[Path | None, Option(help="UTF-8 text the model reads.")] = None,
    query: Annotated[str | None, Option(help="Follows the text; its words ask.")] = None,
    position: Annotated[
        int | None, Option(help="Or the queries around this token; negative from the end.")
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="Default: results/patterns.png (or .svg), results/words.html for a text."),
    ] = None,
) -> None:
    """Draw which keys each query sees, and why."""
    from longswift.cli import render
    from longswift.eval import options, pattern_plots, words_page

    if model is None and file is None:
        options.check_unused(
            "patterns without a text",
            {"--query": query, "--position": position},
            fix="Give a model and --file, too.",
        )
        target = out or Path("results/patterns.png")
        shown = pattern_plots.draw(
            mechanism,
            target,
            length=64 if length is None else length,
            settings=config or (),
            causal=not bidirectional,
        )
        for line in pattern_plots.lines(shown):
            typer.echo(line)
        render.wrote(target)
        return
    options.check_unused(
        "patterns of a text",
        {"--length": length, "--bidirectional": bidirectional},
        fix="Both are for pictures without a model.",
    )
    page = words_page.Page(
        model=model,
        file=None if file is None else str(file),
        mechanism=mechanism or "ms_swift",
        settings=tuple(config or ()),
        query=query,
        position=position,
    )
    target = out or Path("results/words.html")
    for line in words_page.run(page, target):
        typer.echo(line)
    render.wrote(target)
