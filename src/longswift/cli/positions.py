"""Options of the commands that can extend a model's positions."""

from __future__ import annotations

from typing import Annotated, TypedDict

from typer import Option

MaxLength = Annotated[str | None, Option(help="Extend the model's positions to this many tokens.")]
Rope = Annotated[str, Option(help="Scaling of rotary positions for --max-length, or 'none'.")]


class Extension(TypedDict):
    """What is asked of ``extend``."""

    max_length: int | None
    rope: str | None


def extension(max_length: str | None, rope: str) -> Extension:
    """The two options as everything below the command line takes them."""
    from longswift.eval import options

    return {
        "max_length": None if max_length is None else options.length(max_length),
        "rope": None if rope == "none" else rope,
    }
