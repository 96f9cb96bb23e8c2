"""``longswift generate``: ask a model about a long text file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from longswift.cli import positions


def generate(
    model: Annotated[str, Argument(help="'tiny', a model directory or a hub name.")],
    file: Annotated[Path, Option(help="UTF-8 text the model reads first.")],
    prompt: Annotated[str, Option(help="What to ask, or how to go on.")] = "",
    attention: Annotated[
        str, Option(help="A mechanism, or 'model' for the model's own attention.")
    ] = "ms_swift",
    settings: Annotated[
        list[str] | None, Option("--set", help="NAME.OPTION=VALUE of the mechanism.")
    ] = None,
    profile: Annotated[
        Path | None, Option(help="A profile of longswift calibrate instead.")
    ] = None,
    max_new_tokens: Annotated[int, Option(help="Longest answer.")] = 256,
    max_length: positions.MaxLength = None,
    rope: positions.Rope = None,
    chat: Annotated[bool, Option(help="Use the model's chat template, if it has one.")] = True,
    chunk: Annotated[int, Option(help="Tokens per forward pass while reading.")] = 1024,
    dtype: Annotated[str, Option(help="A dtype, or 'auto' for the checkpoint's.")] = "auto",
    device: Annotated[str, Option(help="cpu, cuda, mps.")] = "cpu",
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Let the model run Python code of its own.")
    ] = False,
) -> None:
    """Read a long file with sparse attention, then stream the answer."""
    from longswift.cli import render
    from longswift.eval import answering
    from longswift.mechanisms.profile import read_profile

    asked = answering.Question(
        model=model,
        file=str(file),
        prompt=prompt,
        mechanism=answering.mechanism(attention, settings or (), own=profile is None),
        profile=None if profile is None else read_profile(profile),
        max_new_tokens=max_new_tokens,
        **positions.extension(max_length, rope),
        chat=chat,
        chunk=chunk,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    answer = answering.Answer(asked)
    render.remark(answer.describe())
    for piece in answer.stream():
        typer.echo(piece, nl=False)
    typer.echo()
    render.remark(answer.account())
