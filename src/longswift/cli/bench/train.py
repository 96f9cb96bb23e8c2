"""``longswift bench train``: a training step, attention alone and the whole model."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from longswift.cli.bench import phase, shared


def train(
    model: shared.Model = "random-llama",
    lengths: Annotated[str, Option(help="Tokens of the text.")] = "4096,16384",
    mechanism: shared.Mechanism = "ms_swift",
    settings: shared.Settings = None,
    against: shared.Against = "sdpa",
    batches: shared.Batches = "1",
    checkpointing: Annotated[bool, Option(help="Recompute layers while going back.")] = False,
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
    """Time a training step (forward and backward), attention alone and the whole model."""
    from longswift.eval import options, phases

    asked = phases.PhaseBench(
        phase=phases.TRAIN,
        model=model,
        lengths=options.lengths(lengths),
        mechanisms=phase.configs(mechanism, settings),
        against=against,
        batches=options.counts(batches, "batches", least=1),
        checkpointing=checkpointing,
        memory=memory,
        dtype=dtype,
        device=device,
        repeats=repeats,
        budget_seconds=budget,
        seed=seed,
    )
    phase.report(asked, json=json, plot=plot, fresh=fresh)
