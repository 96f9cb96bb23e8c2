"""``longswift bench``: time and memory."""

from __future__ import annotations

import typer

from longswift.cli.bench import attention, recall

app = typer.Typer(help="Measure time and memory.")


@app.callback()
def _group() -> None:
    """Measure time and memory."""


app.command()(attention.attention)
app.command()(recall.recall)
