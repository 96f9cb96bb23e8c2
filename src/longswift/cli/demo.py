"""``longswift demo``: one long document, read three ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option


def demo(
    file: Annotated[
        Path | None, Option(help="Text to read; default: held-out Python documentation.")
    ] = None,
    length: Annotated[str, Option(help="Tokens of the document, e.g. 32k or 131072.")] = "32768",
    documents: Annotated[
        int, Option(help="How often to read it, each time with other secrets.")
    ] = 6,
    secrets: Annotated[int, Option(help="How many to hide and ask per document.")] = 1,
    model: Annotated[str, Option(help="'tiny', a model directory or a hub name.")] = "tiny",
    settings: Annotated[
        list[str] | None, Option("--set", help="ms_swift.OPTION=VALUE; repeat at will.")
    ] = None,
    chunk: Annotated[int, Option(help="Tokens per forward pass.")] = 1024,
    seed: Annotated[int, Option(help="Seed of words, numbers and places.")] = 0,
    output: Annotated[Path, Option(help="Directory for demo.json and demo.png.")] = Path(
        "results/demo"
    ),
    fresh: Annotated[bool, Option(help="Measure again what an earlier run left.")] = False,
) -> None:
    """Read a long document with full attention, a window of equal cost, and MS-SWIFT."""
    from longswift.cli import render
    from longswift.eval import demo as shown
    from longswift.eval import options
    from longswift.eval.plots import plot_demo

    asked = shown.Demo(
        mechanism=options.mechanisms("ms_swift", settings or ())["ms_swift"].to_dict(),
        length=options.length(length),
        documents=documents,
        secrets=secrets,
        file=None if file is None else str(file),
        model=model,
        chunk=chunk,
        seed=seed,
    )
    result = shown.run(asked, output, fresh=fresh)
    typer.echo(result.summary["verdict"])
    render.table(*shown.table(result))
    if result.summary["reused"]:
        render.remark(
            f"{result.summary['reused']} of {len(result.rows)} readings are from an earlier run "
            "of the same options; --fresh measures them again"
        )
    render.wrote(output / "demo.json", plot_demo(result, output / "demo.png"))
