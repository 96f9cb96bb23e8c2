"""``longswift calibrate``: settings of single heads from the user's own text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from longswift.cli import positions


def calibrate(
    model: Annotated[str, Argument(help="'tiny', a model directory or a hub name.")],
    file: Annotated[
        Path | None, Option(help="Your text, UTF-8; default: held-out Python documentation.")
    ] = None,
    target: Annotated[float, Option(help="What every head must keep, e.g. 0.99.")] = 0.99,
    criterion: Annotated[
        str, Option(help="captured: attention mass on chosen keys; output: 1 - relative error.")
    ] = "captured",
    out: Annotated[Path, Option(help="The profile.")] = Path("profile.json"),
    settings: Annotated[
        list[str] | None, Option("--set", help="ms_swift.OPTION=VALUE to start from.")
    ] = None,
    budgets: Annotated[
        str | None, Option(help="Key tokens to choose from; default: 0,64,128,...,2048.")
    ] = None,
    length: Annotated[
        str | None, Option(help="Tokens of a document; default: as the text allows, up to 32k.")
    ] = None,
    documents: Annotated[
        int | None,
        Option(help="Documents to read; default: as many as there are, from 2 to 8."),
    ] = None,
    blocks: Annotated[int, Option(help="Blocks tried per layer, document and half.")] = 8,
    max_length: positions.MaxLength = None,
    rope: positions.Rope = None,
    chunk: Annotated[int, Option(help="Tokens per forward pass.")] = 1024,
    seed: Annotated[int, Option(help="Chooses the blocks.")] = 0,
    dtype: Annotated[str, Option(help="A dtype, or 'auto' for the checkpoint's.")] = "auto",
    device: Annotated[str, Option(help="cpu, cuda, mps.")] = "cpu",
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Let the model run Python code of its own.")
    ] = False,
    fresh: Annotated[bool, Option(help="Ignore what an interrupted run left.")] = False,
) -> None:
    """Find the cheapest windows and budgets per head that keep what attention sees."""
    from longswift.cli import render
    from longswift.eval import calibration_runs as runs
    from longswift.eval import options
    from longswift.eval.calibration_summary import table

    asked = runs.Calibration(
        mechanism=options.mechanisms("ms_swift", settings or ())["ms_swift"].to_dict(),
        target=target,
        criterion=criterion,
        budgets=runs.BUDGETS if budgets is None else options.counts(budgets),
        model=model,
        file=None if file is None else str(file),
        length=None if length is None else options.length(length),
        documents=documents,
        blocks=blocks,
        **positions.extension(max_length, rope),
        chunk=chunk,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    profile, result = runs.run(asked, out, fresh=fresh)
    typer.echo(result.summary["verdict"])
    render.table(*table(profile, result))
    render.wrote(out)
