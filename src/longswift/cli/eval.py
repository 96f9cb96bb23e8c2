"""``longswift eval``: retrieval and other tasks, per mechanism, task and length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from longswift.cli import positions


def evaluate(
    model: Annotated[str, Argument(help="'tiny', a model directory or a hub name.")],
    tasks: Annotated[str, Option(help="Tasks, comma-separated; see docs/evaluation.md.")] = (
        "needle,kv"
    ),
    lengths: Annotated[str, Option(help="Tokens of a sample, e.g. 4096,32k.")] = "4096",
    attention: Annotated[
        str, Option(help="Mechanisms, comma-separated; 'model' is the model's own attention.")
    ] = "full,ms_swift,sliding_window",
    samples: Annotated[int, Option(help="Documents per task and length.")] = 20,
    form: Annotated[
        str, Option(help="auto, instruct, continuation or key_value, where a task has it.")
    ] = "auto",
    file: Annotated[
        Path | None, Option(help="Text to hide things in; default: Python's documentation.")
    ] = None,
    questions: Annotated[
        Path | None, Option(help="Documents and questions of the task qa, a .jsonl file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", help="NAME.OPTION=VALUE of a mechanism or task; repeat at will."),
    ] = None,
    max_length: positions.MaxLength = None,
    rope: positions.Rope = None,
    chat: Annotated[bool, Option(help="Use the model's chat template, if it has one.")] = True,
    chunk: Annotated[int, Option(help="Tokens per forward pass while reading.")] = 1024,
    dtype: Annotated[str, Option(help="A dtype, or 'auto' for the checkpoint's.")] = "auto",
    device: Annotated[str, Option(help="cpu, cuda, mps.")] = "cpu",
    seed: Annotated[int, Option(help="Seed of documents and questions.")] = 0,
    json: Annotated[
        Path | None, Option(help="Write the result; an interrupted run resumes.")
    ] = None,
    plot: Annotated[Path | None, Option(help="Scores by depth and length: PNG or SVG.")] = None,
    fresh: Annotated[bool, Option(help="Ignore samples that an earlier run finished.")] = False,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Let the model run Python code of its own.")
    ] = False,
) -> None:
    """Score a model on long-context tasks with several attention mechanisms."""
    from longswift.cli import render
    from longswift.eval import options, standings, suite
    from longswift.eval.heatmaps import plot_depths
    from longswift.eval.plots import drawable

    asked = suite.asked(
        model=model,
        tasks=tasks,
        attention=attention,
        settings=settings or (),
        form=form,
        file=file,
        questions=questions,
        seed=seed,
        lengths=options.lengths(lengths),
        samples=samples,
        **positions.extension(max_length, rope),
        chat=chat,
        chunk=chunk,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if plot is not None:
        drawable(plot, json)
    result = suite.run(asked, json, fresh=fresh)
    for sentence in standings.sentences(result):
        typer.echo(sentence)
    render.table(*standings.table(result))
    if result.summary["reused"]:
        render.remark(
            f"{result.summary['reused']} samples are from an earlier run of the same suite; "
            "--fresh measures them again"
        )
    render.wrote(json, None if plot is None else plot_depths(result, plot))
