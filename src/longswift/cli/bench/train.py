"""``longswift bench train``: a training step, attention alone and the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from longswift.cli.bench import phase


def train(
    model: Annotated[
        str, typer.Argument(help="'random-llama', 'tiny', a model directory or a hub name.")
    ] = "random-llama",
    lengths: Annotated[str, Option(help="Tokens of the text.")] = "4096,16384",
    mechanism: Annotated[str, Option(help="Mechanisms, comma-separated.")] = "ms_swift",
    settings: Annotated[
        list[str] | None, Option("--set", help="NAME.OPTION=VALUE of a mechanism; repeat at will.")
    ] = None,
    against: Annotated[str, Option(help="Baseline: sdpa, or flex where it runs.")] = "sdpa",
    batches: Annotated[str, Option(help="Sequences per call, e.g. 1,8.")] = "1",
    checkpointing: Annotated[bool, Option(help="Recompute layers while going back.")] = False,
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
    """Time a training step (forward and backward), attention alone and the whole model."""
    from longswift.eval import options, phases

    asked = phases.PhaseBench(
        phase=phases.TRAIN,
        model=model,
        lengths=options.lengths(lengths),
        mechanisms=phase.configs(mechanism, settings),
        against=against,
        batches=options.lengths(batches),
        checkpointing=checkpointing,
        memory=memory,
        dtype=dtype,
        device=device,
        repeats=repeats,
        budget_seconds=budget,
        seed=seed,
    )
    phase.report(asked, json=json, plot=plot, fresh=fresh)
