"""``longswift compare``: the table of mechanisms, measured on the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option


def compare(
    model: Annotated[str, Option(help="'tiny', a model directory or a hub name.")] = "tiny",
    attention: Annotated[
        str, Option(help="Mechanisms, comma-separated, or 'all' of the table.")
    ] = "all",
    settings: Annotated[
        list[str] | None,
        Option("--set", help="NAME.OPTION=VALUE of a mechanism; repeat at will."),
    ] = None,
    lengths: Annotated[
        str, Option(help="Tokens at which attention alone is timed.")
    ] = "2048,4096,8192,16384",
    length: Annotated[str, Option(help="Tokens of the tasks and of the text.")] = "8192",
    tasks: Annotated[str, Option(help="Tasks, comma-separated.")] = "needle",
    samples: Annotated[int, Option(help="Documents per task.")] = 20,
    form: Annotated[str, Option(help="Form of the tasks, see longswift eval.")] = "auto",
    file: Annotated[
        Path | None, Option(help="Text of tasks and divergence; default: Python's documentation.")
    ] = None,
    dtype: Annotated[str, Option(help="Of the attention that is timed.")] = "float32",
    heads: Annotated[int, Option(help="Heads of the attention that is timed.")] = 2,
    head_dim: Annotated[int, Option(help="Width of its heads.")] = 64,
    repeats: Annotated[int, Option(help="Timed runs; slow cases get fewer.")] = 5,
    budget: Annotated[float, Option(help="Seconds per mechanism and length.")] = 60.0,
    memory: Annotated[bool, Option(help="Also measure working memory (one more run).")] = True,
    chunk: Annotated[int, Option(help="Tokens per forward pass while reading.")] = 1024,
    tune_steps: Annotated[
        int, Option(help="Also fine-tune with each mechanism for so many steps and ask again.")
    ] = 0,
    tune_rows: Annotated[
        int | None, Option(help="Sequences per step, each of --length tokens; default: 2.")
    ] = None,
    tune_rate: Annotated[float | None, Option(help="Peak learning rate; default: 5e-4.")] = None,
    tune_file: Annotated[
        Path | None, Option(help="Text to train on; default: Python's library, not held out.")
    ] = None,
    device: Annotated[str, Option(help="cpu, cuda, mps.")] = "cpu",
    seed: Annotated[int, Option(help="Seed of numbers, documents and questions.")] = 0,
    json: Annotated[
        Path | None, Option(help="Write the result; an interrupted run resumes.")
    ] = None,
    plot: Annotated[Path | None, Option(help="Draw a PNG or SVG.")] = None,
    fresh: Annotated[bool, Option(help="Measure again what an earlier run left.")] = False,
) -> None:
    """Time, memory, growth and quality of every mechanism, on the same work."""
    from longswift.cli import render
    from longswift.eval import mechanism_runs, mechanism_table, options, suite
    from longswift.eval.attention import AttentionBench
    from longswift.eval.comparison_plot import plot_comparison
    from longswift.eval.plots import drawable
    from longswift.eval.tuning import Tuning

    if not tune_steps:
        options.check_unused(
            "compare without --tune-steps",
            {"--tune-rows": tune_rows, "--tune-rate": tune_rate, "--tune-file": tune_file},
            fix="Say how many steps to tune for.",
        )
    chosen, left_out = options.choose(attention, settings or ())
    asked = mechanism_runs.Comparison(
        speed=AttentionBench(
            lengths=options.lengths(lengths),
            mechanisms=tuple(mechanism.to_dict() for mechanism in chosen),
            dtype=dtype,
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            device=device,
            repeats=repeats,
            budget_seconds=budget,
            memory=memory,
            seed=seed,
        ),
        quality=suite.asked(
            model=model,
            tasks=tasks,
            attention="full",
            form=form,
            file=file,
            seed=seed,
            lengths=(options.length(length),),
            samples=samples,
            chunk=chunk,
            device=device,
        ),
        file=None if file is None else str(file),
        tuning=None
        if not tune_steps
        else Tuning(
            steps=tune_steps,
            rows=2 if tune_rows is None else tune_rows,
            length=options.length(length),
            rate=5e-4 if tune_rate is None else tune_rate,
            file=None if tune_file is None else str(tune_file),
            seed=seed,
        ),
        left_out=left_out,
    )
    if plot is not None:
        drawable(plot, json)
    result = mechanism_runs.run(asked, json, fresh=fresh)
    for sentence in mechanism_table.sentences(result):
        typer.echo(sentence)
    render.table(*mechanism_table.speed(result))
    render.table(*mechanism_table.quality(result))
    render.wrote(json, None if plot is None else plot_comparison(result, plot))
