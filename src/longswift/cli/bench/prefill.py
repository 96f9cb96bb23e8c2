"""``longswift bench prefill``: a model's time to the first token."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from longswift.cli.bench import phase, shared


def prefill(
    model: shared.Model,
    lengths: Annotated[str, Option(help="Tokens of the text.")] = "8192,32768",
    mechanism: shared.Mechanism = "ms_swift",
    settings: shared.Settings = None,
    against: shared.Against = "sdpa",
    batches: shared.Batches = "1",
    chunk: Annotated[int, Option(help="Tokens per forward pass.")] = 1024,
    memory: shared.Memory = True,
    dtype: shared.Dtype = "float32",
    device: shared.Device = "cpu",
    repeats: shared.Repeats = 5,
    budget: shared.Budget = 60.0,
    seed: shared.Seed = 0,
    json: shared.Json = None,
    plot: shared.Plot = None,
    fresh: shared.Fresh = False,
) -> None:
    """Time a model's way to its first token, and its peak memory, with attentions side by side."""
    from longswift.eval import options, phases

    asked = phases.PhaseBench(
        phase=phases.PREFILL,
        model=model,
        lengths=options.lengths(lengths),
        mechanisms=phase.configs(mechanism, settings),
        against=against,
        batches=options.counts(batches, "batches", least=1),
        chunk=chunk,
        memory=memory,
        dtype=dtype,
        device=device,
        repeats=repeats,
        budget_seconds=budget,
        seed=seed,
    )
    phase.report(asked, json=json, plot=plot, fresh=fresh)
