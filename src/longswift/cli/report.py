"""``longswift report``: everything about a model and a text on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from longswift.cli import positions


def report(
    model: Annotated[str, Argument(help="'tiny', a model directory or a hub name.")],
    file: Annotated[Path, Option(help="Your text, UTF-8.")],
    attention: Annotated[
        str, Option(help="Mechanisms, comma-separated; full attention is always the judge.")
    ] = "ms_swift,sliding_window,full",
    settings: Annotated[
        list[str] | None, Option("--set", help="NAME.OPTION=VALUE of a mechanism or task.")
    ] = None,
    length: Annotated[
        str | None, Option(help="Tokens of the text to read; default: all, at most 32k.")
    ] = None,
    tasks: Annotated[str, Option(help="Retrieval tasks, comma-separated, or 'none'.")] = "needle",
    questions: Annotated[
        Path | None, Option(help="Documents and questions of the task qa, a .jsonl file.")
    ] = None,
    samples: Annotated[int, Option(help="Documents per task and length.")] = 5,
    fidelity: Annotated[bool, Option(help="Compare every head with full attention.")] = True,
    max_length: positions.MaxLength = None,
    rope: positions.Rope = None,
    chunk: Annotated[int, Option(help="Tokens per forward pass.")] = 1024,
    dtype: Annotated[str, Option(help="A dtype, or 'auto' for the checkpoint's.")] = "auto",
    device: Annotated[str, Option(help="cpu, cuda, mps.")] = "cpu",
    seed: Annotated[int, Option(help="Seed of the retrieval tasks.")] = 0,
    out: Annotated[Path, Option(help="The page; its figures go beside it as JSON.")] = Path(
        "results/report.html"
    ),
    fresh: Annotated[bool, Option(help="Measure again what an earlier run left.")] = False,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Let the model run Python code of its own.")
    ] = False,
) -> None:
    """Measure speed, memory and quality on your text, and say in words whether it is worth it."""
    from longswift.cli import render
    from longswift.eval import options, report_page
    from longswift.eval import report as measuring

    asked = measuring.asked(
        model=model,
        file=str(file),
        attention=attention,
        settings=settings or (),
        length=None if length is None else options.length(length),
        tasks=tasks,
        questions=questions,
        samples=samples,
        fidelity=fidelity,
        **positions.extension(max_length, rope),
        chunk=chunk,
        dtype=dtype,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    result = measuring.run(asked, out, fresh=fresh)
    report_page.write(result, out)
    typer.echo(result.summary["verdict"]["headline"])
    for finding in result.summary["verdict"]["findings"]:
        typer.echo(f"- {finding['text']}")
    if result.summary["reused"]:
        render.remark(
            f"{result.summary['reused']} sections are from an earlier run of the same options; "
            "--fresh measures them again"
        )
    render.wrote(out.with_suffix(".json"), out)
