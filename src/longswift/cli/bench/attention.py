"""``longswift bench attention``: mechanisms alone, at several lengths."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from longswift.cli.bench import shared


def attention(
    lengths: Annotated[str, Option(help="Tokens, e.g. 4096,32k,131072.")] = "4096,32768",
    mechanism: Annotated[
        str, Option(help="Mechanisms and memories, comma-separated, or 'all'.")
    ] = "ms_swift",
    settings: shared.Settings = None,
    against: shared.Against = "sdpa",
    dtype: shared.Dtype = "bfloat16",
    heads: Annotated[int, Option(help="Query heads.")] = 2,
    kv_heads: Annotated[int | None, Option(help="Key/value heads; default: --heads.")] = None,
    head_dim: Annotated[int, Option(help="Width of a head.")] = 64,
    batch: Annotated[int, Option(help="Sequences per call.")] = 1,
    bidirectional: Annotated[bool, Option(help="Attention without causal order.")] = False,
    backward: Annotated[bool, Option(help="Time forward and gradients.")] = False,
    device: shared.Device = "cpu",
    repeats: shared.Repeats = 5,
    budget: Annotated[
        float, Option(help="Seconds per rival and length; slower mechanisms are left out.")
    ] = 60.0,
    memory: Annotated[bool, Option(help="Also measure working memory (one more run).")] = True,
    seed: Annotated[int, Option(help="Seed of the random q, k, v.")] = 0,
    json: shared.Json = None,
    plot: shared.Plot = None,
    fresh: shared.Fresh = False,
) -> None:
    """Time mechanisms against PyTorch's full attention, alternating in one process."""
    from longswift.cli import render
    from longswift.eval import attention as bench
    from longswift.eval import attention_rivals, attention_table, options
    from longswift.eval.bench_plots import plot_attention
    from longswift.eval.plots import drawable

    chosen, left_out = options.choose_attentions(mechanism, settings or ())
    if mechanism.strip() == options.ALL:
        chosen, refused = attention_rivals.runnable(chosen, causal=not bidirectional)
        left_out = {**left_out, **refused}
    asked = bench.AttentionBench(
        lengths=options.lengths(lengths),
        mechanisms=tuple(m.to_dict() for m in chosen),
        against=against,
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
        left_out=left_out,
    )
    if plot is not None:
        drawable(plot, json)
    result = bench.run(asked, json, fresh=fresh)
    for sentence in [*result.summary["sentences"], *attention_table.left_out(result)]:
        typer.echo(sentence)
    render.table(*attention_table.table(result))
    if len(asked.lengths) > 1:
        render.table(*attention_table.growth_table(result))
    if plot is not None:
        plot_attention(result, plot)
    render.wrote(json, plot)
