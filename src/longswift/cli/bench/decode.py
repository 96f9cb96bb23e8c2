"""``longswift bench decode``: a token behind a long cache, attention alone and the whole model."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from longswift.cli.bench import phase, shared


def decode(
    model: shared.Model = "random-llama",
    lengths: Annotated[str, Option(help="Tokens in the cache.")] = "32768,131072",
    mechanism: shared.Mechanism = "ms_swift",
    settings: shared.Settings = None,
    against: shared.Against = "sdpa",
    batches: shared.Batches = "1,8",
    tokens: Annotated[int, Option(help="Tokens decoded in a timed run.")] = 16,
    dynamic_cache: Annotated[
        bool, Option(help="Also decode with Transformers' own DynamicCache.")
    ] = False,
    dtype: shared.Dtype = "float32",
    device: shared.Device = "cpu",
    repeats: shared.Repeats = 5,
    budget: shared.Budget = 60.0,
    seed: shared.Seed = 0,
    json: shared.Json = None,
    plot: shared.Plot = None,
    fresh: shared.Fresh = False,
) -> None:
    """Time a decoded token behind a cache, attention alone and the whole model."""
    from longswift.eval import options, phases

    asked = phases.PhaseBench(
        phase=phases.DECODE,
        model=model,
        lengths=options.lengths(lengths),
        mechanisms=phase.configs(mechanism, settings),
        against=against,
        batches=options.counts(batches, "batches", least=1),
        tokens=tokens,
        dynamic_cache=dynamic_cache,
        dtype=dtype,
        device=device,
        repeats=repeats,
        budget_seconds=budget,
        seed=seed,
    )
    phase.report(asked, json=json, plot=plot, fresh=fresh)
