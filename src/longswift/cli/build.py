"""``longswift build``: compile the C++ kernels for this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def build(
    optional: Annotated[
        bool, typer.Option("--optional", help="Where it cannot be done, say why and succeed.")
    ] = False,
) -> None:
    """Compile the C++ kernels for this machine, once; everything works without them, slower."""
    from longswift.cli import render
    from longswift.core import compiled
    from longswift.core.errors import UnsupportedError

    try:
        path = compiled.library()
        if not path.exists():
            with render.busy("compiling the kernels, a few minutes"):
                compiled.build()
    except UnsupportedError as error:
        if not optional:
            raise
        typer.echo(f"longswift: not compiled. {error}", err=True)
        return
    typer.echo(str(path))
