"""``longswift bench recall``: looking up pairs by attention alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option


def recall(
    mechanism: Annotated[str, Option(help="Mechanisms, comma-separated.")] = "full,ms_swift",
    settings: Annotated[
        list[str] | None, Option("--set", help="NAME.OPTION=VALUE of a mechanism; repeat at will.")
    ] = None,
    length: Annotated[str, Option(help="Random tokens.")] = "16384",
    pairs: Annotated[int, Option(help="Key-value pairs among them.")] = 48,
    trials: Annotated[int, Option(help="Independent problems.")] = 2,
    seed: Annotated[int, Option(help="Seed of the problems.")] = 0,
    json: Annotated[Path | None, Option(help="Write the result.")] = None,
) -> None:
    """Look up random pairs by attention alone: the hardest case for a selection of keys."""
    from longswift.cli import render
    from longswift.eval import options
    from longswift.eval import recall as recalling
    from longswift.eval.results import writable

    asked = recalling.Recall(length=options.length(length), pairs=pairs, trials=trials, seed=seed)
    if json is not None:
        writable(json, kind="recall")
    result = recalling.run(asked, options.mechanisms(mechanism, settings or ()).items())
    render.table(*recalling.table(result))
    for sentence in recalling.sentences(result):
        typer.echo(sentence)
    if json is not None:
        result.save(json)
    render.wrote(json)
