"""``longswift bench``: time and memory."""

from __future__ import annotations

import typer

from longswift.cli.bench import attention, decode, diff, prefill, recall, train

app = typer.Typer(help="Measure time and memory.")


@app.callback()
def _group() -> None:
    """Measure time and memory."""


app.command()(attention.attention)
app.command()(decode.decode)
app.command()(prefill.prefill)
app.command()(train.train)
app.command()(recall.recall)
app.command()(diff.diff)
