"""Options of the commands that can extend a model's positions."""

from __future__ import annotations

from typing import Annotated, TypedDict

from typer import Option

MaxLength = Annotated[str | None, Option(help="Extend the model's positions to this many tokens.")]
Rope = Annotated[
    str | None,
    Option(help="Scaling of rotary positions for --max-length, or 'none'; default: yarn."),
]
_DEFAULT, _NONE = "yarn", "none"


class Extension(TypedDict):
    """What is asked of ``extend``."""

    max_length: int | None
    rope: str | None


def extension(max_length: str | None, rope: str | None) -> Extension:
    """The two options as everything below the command line takes them.

    Raises:
        ConfigError: An unknown scaling, or one without a length to scale to.
    """
    from longswift.core.registry import unknown_name
    from longswift.eval import options
    from longswift.extend.rope import KINDS

    # What extends nothing is no choice on the command line, which has a word of its own for it.
    known = [kind for kind in KINDS if kind != "default"]
    if rope is not None and rope not in (*known, _NONE):
        raise unknown_name("--rope", rope, known, _NONE)
    if max_length is None:
        options.check_unused(
            "positions as they are",
            {"--rope": rope},
            fix="Say with --max-length how far to extend them.",
        )
    return {
        "max_length": None if max_length is None else options.length(max_length),
        "rope": None if rope == _NONE else rope or _DEFAULT,
    }
