"""``longswift info``: what is installed and what can run here."""

from __future__ import annotations

from typing import Annotated

import typer


def info(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Versions, hardware, backends and mechanisms."""
    from longswift.cli import render
    from longswift.eval import inventory

    found = inventory.inventory()
    if json:
        typer.echo(inventory.as_json(found))
        return
    for title, columns, rows in inventory.tables(found):
        render.table(title, columns, rows, figures=False)
