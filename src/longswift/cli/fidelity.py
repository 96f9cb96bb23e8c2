"""``longswift fidelity``: what did it cost in quality, on my text?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from longswift.cli import positions


def fidelity(
    model: Annotated[str, Argument(help="'tiny', a model directory or a hub name.")],
    file: Annotated[
        Path | None, Option(help="Your text, UTF-8; default: held-out Python documentation.")
    ] = None,
    attention: Annotated[str, Option(help="The mechanism to measure.")] = "ms_swift",
    settings: Annotated[
        list[str] | None, Option("--set", help="NAME.OPTION=VALUE of the mechanism.")
    ] = None,
    profile: Annotated[
        Path | None, Option(help="Measure a profile of longswift calibrate instead.")
    ] = None,
    length: Annotated[
        str | None, Option(help="Tokens of a document; default: all, at most 32k.")
    ] = None,
    documents: Annotated[int, Option(help="Pieces of the text to measure.")] = 1,
    max_length: positions.MaxLength = None,
    rope: positions.Rope = None,
    chunk: Annotated[int, Option(help="Tokens per forward pass.")] = 1024,
    exact_below: Annotated[
        str, Option(help="Longest document full attention reads; longer: sampled rows.")
    ] = "32k",
    dtype: Annotated[str, Option(help="A dtype, or 'auto' for the checkpoint's.")] = "auto",
    device: Annotated[str, Option(help="cpu, cuda, mps.")] = "cpu",
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Let the model run Python code of its own.")
    ] = False,
    json: Annotated[
        Path | None, Option(help="Write the result; an interrupted run resumes.")
    ] = None,
    fresh: Annotated[bool, Option(help="Ignore what an earlier run left.")] = False,
) -> None:
    """Measure what sparse attention costs in quality, against full attention."""
    from longswift.cli import render
    from longswift.eval import fidelity_runs as runs
    from longswift.eval import options

    asked = runs.FidelityRun(
        mechanism=runs.rival_of(
            attention, settings or (), None if profile is None else str(profile)
        ),
        model=model,
        file=None if file is None else str(file),
        length=None if length is None else options.length(length),
        documents=documents,
        **positions.extension(max_length, rope),
        chunk=chunk,
        exact_below=options.length(exact_below),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    result = runs.run(asked, json, fresh=fresh)
    typer.echo(result.summary["verdict"])
    render.table(*runs.end_table(result))
    render.table(*runs.head_table(result))
    render.wrote(json)
