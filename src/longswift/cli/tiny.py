"""``longswift tiny``: rebuild and judge the tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

app = typer.Typer(help="Rebuild and judge the tiny models.")


@app.callback()
def _group() -> None:
    """Rebuild and judge the tiny models."""


@app.command()
def train(
    out: Annotated[Path, Option(help="Directory of the run; an interrupted run goes on.")],
    recipe: Annotated[
        str, Option(help="Which model: packaged, or rotary, a Llama that knows 33,000 positions.")
    ] = "packaged",
    threads: Annotated[int, Option(help="CPU threads.")] = 1,
    seed: Annotated[int | None, Option(help="Seed of weights and data.")] = None,
    max_steps: Annotated[int | None, Option(help="Stop early, with a checkpoint.")] = None,
) -> None:
    """Train a tiny model from nothing, or go on where a run stopped."""
    from longswift.cli import render
    from longswift.eval import recipes

    render.wrote(recipes.train(out, recipe=recipe, threads=threads, seed=seed, max_steps=max_steps))


@app.command()
def card(
    directory: Annotated[Path, Argument(help="Model directory.")],
    threads: Annotated[int, Option(help="CPU threads.")] = 1,
    seed: Annotated[int, Option(help="Seed of the documents.")] = 0,
    write: Annotated[bool, Option("--write", help="Also write the card into DIRECTORY.")] = False,
) -> None:
    """Measure recall and perplexity of a tiny model."""
    from longswift.eval import recipes

    typer.echo(recipes.card(directory, threads=threads, seed=seed, write=write))
