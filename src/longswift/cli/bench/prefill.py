"""``longswift bench prefill``: a model's time to the first token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from longswift.cli.bench import phase


def prefill(
    model: Annotated[
        str, typer.Argument(help="'random-llama', 'tiny', a model directory or a hub name.")
    ],
    lengths: Annotated[str, Option(help="Tokens of the text.")] = "8192,32768",
    mechanism: Annotated[str, Option(help="Mechanisms, comma-separated.")] = "ms_swift",
    settings: Annotated[
        list[str] | None, Option("--set", help="NAME.OPTION=VALUE of a mechanism; repeat at will.")
    ] = None,
    against: Annotated[str, Option(help="Baseline: sdpa, or flex where it runs.")] = "sdpa",
    batches: Annotated[str, Option(help="Sequences per call, e.g. 1,8.")] = "1",
    chunk: Annotated[int, Option(help="Tokens per forward pass.")] = 1024,
    memory: Annotated[bool, Option(help="Also measure peak memory (one more run).")] = True,
    dtype: Annotated[str, Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, Option(help="cpu, cuda, mps.")] = "cpu",
    repeats: Annotated[int, Option(help="Timed runs; slow cases get fewer.")] = 5,
    budget: Annotated[float, Option(help="Seconds per rival and case.")] = 60.0,
    seed: Annotated[int, Option(help="Seed of texts, caches and random weights.")] = 0,
    json: Annotated[
        Path | None, Option(help="Write the result; an interrupted run resumes.")
    ] = None,
    plot: Annotated[Path | None, Option(help="Draw a PNG.")] = None,
    fresh: Annotated[bool, Option(help="Ignore what an interrupted run left.")] = False,
) -> None:
    """Time a model's way to its first token, and its peak memory, with attentions side by side."""
    from longswift.eval import options, phases

    asked = phases.PhaseBench(
        phase=phases.PREFILL,
        model=model,
        lengths=options.lengths(lengths),
        mechanisms=phase.configs(mechanism, settings),
        against=against,
        batches=options.lengths(batches),
        chunk=chunk,
        memory=memory,
        dtype=dtype,
        device=device,
        repeats=repeats,
        budget_seconds=budget,
        seed=seed,
    )
    phase.report(asked, json=json, plot=plot, fresh=fresh)
