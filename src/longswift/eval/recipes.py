"""The tiny model's recipe and card, with errors and options as the command line wants them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from longswift.core.errors import ConfigError, problem


@contextmanager
def _one_line() -> Iterator[None]:
    """The recipe raises plain ``ValueError`` for what a user can put right."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def train(out: Path, *, recipe: str, threads: int, seed: int | None, max_steps: int | None) -> Path:
    """Train, or go on where a run stopped; returns the directory of the model."""
    from longswift.tiny import train as training
    from longswift.tiny.config import recipe as named

    config = replace(named(recipe), threads=threads, max_steps=max_steps)
    if seed is not None:
        config = replace(config, seed=seed)
    with _one_line():
        return training.train(out, config=config)


def card(directory: Path, *, threads: int, seed: int, write: bool) -> str:
    """Measure a tiny model; returns the figures as JSON text.

    Args:
        directory: Model directory.
        threads: CPU threads.
        seed: Seed of the documents.
        write: Also write the card beside the model.
    """
    from longswift.tiny import card as measuring
    from longswift.tiny.config import check_run

    check_run(threads=threads, seed=seed)
    if not (directory / "config.json").is_file():
        raise ConfigError(
            problem(
                str(directory),
                expected="a model directory with a config.json",
                got="none there",
                fix="Name the directory that longswift tiny train wrote.",
            )
        )
    with _one_line():
        if write:
            measuring.described(directory)
        figures = measuring.evaluate(directory, threads=threads, seed=seed)
        if write:
            command = f"longswift tiny card --threads {threads} --seed {seed} --write"
            figures = measuring.write(directory, figures, command=command, threads=threads)
    return json.dumps(figures, indent=1)
