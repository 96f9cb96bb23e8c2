"""What the commands that time a phase of a model's work share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from longswift.eval.phases import PhaseBench


def configs(mechanism: str, settings: Sequence[str] | None) -> tuple[dict[str, Any], ...]:
    """Configurations of mechanisms as people type them."""
    from longswift.eval import options

    return tuple(m.to_dict() for m in options.mechanisms(mechanism, settings or ()).values())


def report(asked: PhaseBench, *, json: Path | None, plot: Path | None, fresh: bool) -> None:
    """Measure, print the sentences and the table, draw the plot."""
    from longswift.cli import render
    from longswift.eval import phase_table, phases
    from longswift.eval.bench_plots import plot_phase
    from longswift.eval.plots import drawable

    if plot is not None:
        drawable(plot, json)
    result = phases.run(asked, json, fresh=fresh)
    for sentence in result.summary["sentences"]:
        typer.echo(sentence)
    render.table(*phase_table.table(result))
    if plot is not None:
        plot_phase(result, plot)
    render.wrote(json, plot)
