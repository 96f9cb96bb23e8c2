"""``longswift bench``: time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

app = typer.Typer(help="Measure time and memory.")


@app.callback()
def _group() -> None:
    """Measure time and memory."""


@app.command()
def attention(
    lengths: Annotated[str, Option(help="Tokens, e.g. 4096,32k,131072.")] = "4096,32768",
    mechanism: Annotated[str, Option(help="Rivals of SDPA, comma-separated.")] = "ms_swift",
    settings: Annotated[
        list[str] | None, Option("--set", help="NAME.OPTION=VALUE of a mechanism; repeat at will.")
    ] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16, float16 or float64.")] = "bfloat16",
    heads: Annotated[int, Option(help="Query heads.")] = 2,
    kv_heads: Annotated[int | None, Option(help="Key/value heads; default: --heads.")] = None,
    head_dim: Annotated[int, Option(help="Width of a head.")] = 64,
    batch: Annotated[int, Option(help="Sequences per call.")] = 1,
    bidirectional: Annotated[bool, Option(help="Attention without causal order.")] = False,
    backward: Annotated[bool, Option(help="Time forward and gradients.")] = False,
    device: Annotated[str, Option(help="cpu, cuda, mps.")] = "cpu",
    repeats: Annotated[int, Option(help="Timed runs; slow cases get fewer.")] = 5,
    budget: Annotated[float, Option(help="Seconds per rival and length.")] = 60.0,
    memory: Annotated[bool, Option(help="Also measure working memory (one more run).")] = True,
    seed: Annotated[int, Option(help="Seed of the random q, k, v.")] = 0,
    json: Annotated[
        Path | None, Option(help="Write the result; an interrupted run resumes.")
    ] = None,
    plot: Annotated[Path | None, Option(help="Draw a PNG.")] = None,
    fresh: Annotated[bool, Option(help="Ignore what an interrupted run left.")] = False,
) -> None:
    """Time mechanisms against PyTorch's SDPA, alternating in one process."""
    from longswift.cli import render
    from longswift.eval import attention as bench
    from longswift.eval import options
    from longswift.eval.plots import plot_attention
    from longswift.eval.results import writable

    asked = bench.AttentionBench(
        lengths=options.lengths(lengths),
        mechanisms=tuple(
            m.to_dict() for m in options.mechanisms(mechanism, settings or ()).values()
        ),
        dtype=dtype,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        batch=batch,
        causal=not bidirectional,
        backward=backward,
        device=device,
        repeats=repeats,
        budget_seconds=budget,
        memory=memory,
        seed=seed,
    )
    if plot is not None:
        writable(plot)
    result = bench.run(asked, json, fresh=fresh)
    for sentence in result.summary["sentences"]:
        typer.echo(sentence)
    render.table(*bench.table(result))
    if plot is not None:
        plot_attention(result, plot)
    render.wrote(json, plot)


@app.command()
def recall(
    mechanism: Annotated[str, Option(help="Mechanisms, comma-separated.")] = "full,ms_swift",
    settings: Annotated[
        list[str] | None, Option("--set", help="NAME.OPTION=VALUE of a mechanism; repeat at will.")
    ] = None,
    length: Annotated[str, Option(help="Random tokens.")] = "4096",
    pairs: Annotated[int, Option(help="Key-value pairs among them.")] = 48,
    trials: Annotated[int, Option(help="Independent problems.")] = 2,
    seed: Annotated[int, Option(help="Seed of the problems.")] = 0,
    json: Annotated[Path | None, Option(help="Write the result.")] = None,
) -> None:
    """Look up random pairs by attention alone: the hardest case for a selection of keys."""
    from longswift.cli import render
    from longswift.eval import options
    from longswift.eval import recall as recalling
    from longswift.eval.results import writable

    asked = recalling.Recall(length=options.length(length), pairs=pairs, trials=trials, seed=seed)
    if json is not None:
        writable(json)
    result = recalling.run(asked, options.mechanisms(mechanism, settings or ()).items())
    for name, why in result.summary["refused"].items():
        typer.echo(f"{name} did not run: {why}")
    render.table(*recalling.table(result))
    if json is not None:
        result.save(json)
    render.wrote(json)
