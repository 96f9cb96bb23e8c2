"""Attention alone: mechanisms against full attention as PyTorch computes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.eval import baselines, cases, memory, options, roofline
from longswift.eval.attention_rivals import Done, Rival, baseline_row, caller, carried, rivals
from longswift.eval.attention_table import AttentionRow, series, summarise
from longswift.eval.normal import normal
from longswift.eval.progress import Bar
from longswift.eval.results import Result
from longswift.eval.timing import Seconds, alternate, check_budget, fit_exponent

_PROCESSES = 2


@dataclass(frozen=True, kw_only=True)
class AttentionBench:
    """What to measure.

    Attributes:
        lengths: Numbers of tokens.
        mechanisms: The rivals, mechanisms and memories, as their ``to_dict`` gives them.
        against: The baseline, full attention of PyTorch: a name of ``eval.baselines``.
        dtype: Name of the dtype.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
        batch: Sequences per call.
        causal: Causal or bidirectional attention. A mechanism that has only the other form is
            timed in that, against the baseline in that.
        backward: Time a training step of attention: forward and gradients of q, k and v, and of
            these the gradients alone.
        device: Where it runs.
        repeats: Samples of a fast case; slow ones get fewer.
        budget_seconds: Time spent on one rival at one length before it is run no more. A
            mechanism of which a single call is predicted to take longer is left out there.
        memory: Also measure working memory and state, once per rival and length.
        seed: Seed of the data.
        left_out: Mechanisms that were asked for and cannot be timed, and why.
    """

    lengths: tuple[int, ...]
    mechanisms: tuple[dict[str, Any], ...]
    against: str = baselines.SDPA
    dtype: str = "bfloat16"
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    batch: int = 1
    causal: bool = True
    backward: bool = False
    device: str = "cpu"
    repeats: int = 5
    budget_seconds: float = 60.0
    memory: bool = True
    seed: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive(
            "bench",
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            batch=self.batch,
            repeats=self.repeats,
        )
        check_budget(self.budget_seconds)
        options.dtype(self.dtype)
        options.device(self.device)
        baselines.get(self.against)
        if self.heads % self.kv_heads:
            raise ConfigError(
                problem(
                    "heads",
                    expected="a multiple of --kv-heads",
                    got=f"{self.heads} heads and {self.kv_heads} kv-heads",
                    fix="Change one of them.",
                )
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, in the very form JSON gives back."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


def inputs(bench: AttentionBench, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q ``[B, H, n, D]`` and k, v ``[B, Hkv, n, D]`` of one length."""
    drawn = normal(bench.seed, bench.device, options.dtype(bench.dtype))

    def draw(heads: int) -> Tensor:
        return drawn(bench.batch, heads, length, bench.head_dim).requires_grad_(bench.backward)

    return draw(bench.heads), draw(bench.kv_heads), draw(bench.kv_heads)


def working_memory(bench: dict[str, Any], rival: str, length: int) -> dict[str, int | None]:
    """Bytes that one call needs and leaves behind; see ``memory.measured``.

    Args:
        bench: ``AttentionBench.to_dict``.
        rival: Name of its row.
        length: Tokens.

    Returns:
        ``extra``, needed beyond inputs and output, and ``state`` (see ``carried``); None where
        there is none or it cannot be measured.
    """
    asked = _from_dict(bench)
    chosen = next(r for r in rivals(asked) if r.name == rival)
    compiled = chosen.attention is None and baselines.get(asked.against).compiled
    caller(asked, chosen, *inputs(asked, length if compiled else min(64, length)))()
    q, k, v = inputs(asked, length)
    run = caller(asked, chosen, q, k, v)
    with memory.watch(asked.device) as peak:
        out = run().out
    extra = None
    if peak.bytes is not None:
        wanted = [out, q.grad, k.grad, v.grad] if asked.backward else [out]
        extra = max(0, peak.bytes - sum(x.nbytes for x in wanted if x is not None))
    return {"extra": extra, "state": carried(chosen, q, k, v)}


def _from_dict(content: dict[str, Any]) -> AttentionBench:
    plain = {**content, "lengths": tuple(content["lengths"])}
    return AttentionBench(**{**plain, "mechanisms": tuple(content["mechanisms"])})


def predicted_seconds(
    rows: list[AttentionRow], length: int, *, dense: bool = False
) -> float | None:
    """Time of a call at ``length`` from those at shorter lengths; None where nothing tells.

    Dense rows tell nothing about a mechanism that will be sparse.

    Args:
        rows: Ascending in length.
        length: Tokens.
        dense: The rival scores every key at every length.
    """
    telling = [row for row in rows if (dense or row.density < 1) and row.length < length][-2:]
    if not telling:
        return None
    # The fastest samples: what else the machine did must not look like growth.
    exponent = fit_exponent([r.length for r in telling], [r.fastest for r in telling])
    # Time as short as a call's overhead grows slower than it will; nothing outgrows full attention.
    growth = 2.0 if dense else min(2.0, max(1.0, exponent or 0.0))
    return telling[-1].fastest * (length / telling[-1].length) ** growth


def _too_slow(
    bench: AttentionBench, length: int, earlier: dict[str, list[AttentionRow]]
) -> dict[str, float]:
    """Mechanisms whose call would take longer than the budget, and how long."""
    found = {}
    for rival in rivals(bench):
        rows = earlier.get(rival.name, [])
        told = predicted_seconds(rows, length, dense=rival.always_dense)
        if rival.attention is not None and told is not None and told > bench.budget_seconds:
            found[rival.name] = told
    return found


def _sizes(
    bench: AttentionBench, length: int, able: list[Rival], step: Bar
) -> dict[str, dict[str, int | None]]:
    """Memory of every rival by name."""
    if not bench.memory:
        return {}

    def measure(rival: Rival) -> dict[str, int | None]:
        step(1, f"{length} tokens: memory of {rival.name}")
        found: dict[str, int | None] = memory.measured(
            "longswift.eval.attention:working_memory",
            {"bench": bench.to_dict(), "rival": rival.name, "length": length},
            bench.device,
        )
        return found

    # Starting a process takes longer than most calls, and no clock runs meanwhile.
    with ThreadPoolExecutor(_PROCESSES if bench.device == "cpu" else 1) as pool:
        return dict(zip((r.name for r in able), pool.map(measure, able), strict=True))


def _measure(
    bench: AttentionBench, length: int, step: Bar, able: list[Rival]
) -> list[AttentionRow]:
    """Every rival at one length."""
    q, k, v = inputs(bench, length)
    done: dict[str, Done] = {}
    backward: dict[str, list[float]] = {rival.name: [] for rival in able}

    def job(rival: Rival) -> Callable[[], None]:
        run = caller(bench, rival, q, k, v)

        def call() -> None:
            # Outputs of all rivals together may not fit.
            did = done[rival.name] = run()._replace(out=q[:0])
            if did.backward_seconds is not None:
                backward[rival.name].append(did.backward_seconds)

        return call

    step(text=f"{length} tokens: ceilings of the machine")
    ceilings = roofline.measure_ceilings(options.dtype(bench.dtype), bench.device)
    jobs = {rival.name: job(rival) for rival in able}
    if baselines.get(bench.against).compiled:
        step(text=f"{length} tokens: compiling {bench.against}")
        for rival in able:
            if rival.attention is None:
                jobs[rival.name]()
    times = alternate(
        jobs,
        repeats=bench.repeats,
        compiles=bench.device != "cpu",
        budget_seconds=bench.budget_seconds,
        tick=lambda name: step(1, f"{length} tokens: {name}"),
    )
    # The first runs were thrown away.
    alone = {
        name: Seconds.of(found[-times[name].samples :]).median
        for name, found in backward.items()
        if found
    }
    sizes = _sizes(bench, length, able, step)
    rows = []
    for rival in able:
        did, time = done[rival.name], times[rival.name]
        base, gradients = baseline_row(bench, rival.causal), alone.get(rival.name)
        size = sizes.get(rival.name, {})
        work = roofline.attention_work(
            batch=bench.batch,
            heads=bench.heads,
            kv_heads=bench.kv_heads,
            head_dim=bench.head_dim,
            queries=length,
            keys=length,
            keys_per_query=did.keys,
            itemsize=q.element_size(),
            backward=bench.backward,
        )
        rows.append(
            AttentionRow(
                name=rival.name,
                length=length,
                causal=rival.causal,
                seconds=time.median,
                fastest=time.fastest,
                slowest=time.slowest,
                samples=time.samples,
                speedup=times[base].median / time.median,
                backward_seconds=gradients,
                backward_speedup=None if gradients is None else alone[base] / gradients,
                extra_bytes=size.get("extra"),
                state_bytes=size.get("state"),
                keys_per_query=did.keys,
                density=did.density,
                backend=did.backend,
                flops=work.flops,
                least_bytes=work.bytes,
                matmul_flops=ceilings.flops,
                copy_bytes=ceilings.bytes,
                least_seconds=work.seconds(ceilings),
            )
        )
    return rows


def run(
    bench: AttentionBench,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    progress: bool = True,
) -> Result:
    """Measure, continuing an interrupted run of the same options in the same environment.

    Args:
        bench: What to measure.
        output: JSON file to write; finished lengths are kept beside it until it is complete.
        fresh: Start over.
        progress: Show a bar on stderr.

    Returns:
        One row per rival and length, with the fitted exponents in the summary.
    """
    result = cases.begin("attention", bench, output, backward=bench.backward)
    every = rivals(bench)

    def rows_of(case: dict[str, Any], step: Bar) -> list[AttentionRow]:
        length = case["length"]
        slow = _too_slow(bench, length, series(result))
        return _measure(bench, length, step, [rival for rival in every if rival.name not in slow])

    return cases.measure(
        result,
        [{"length": length} for length in bench.lengths],
        rows_of,
        record=AttentionRow,
        share=len(every) * (bench.repeats + 1 + bench.memory),
        summarise=lambda: {**summarise(result), "skipped": _skipped(bench, series(result))},
        output=output,
        fresh=fresh,
        progress=progress,
    )


def _skipped(
    bench: AttentionBench, rows: dict[str, list[AttentionRow]]
) -> list[dict[str, str | int | float]]:
    """What was not measured, as rows of shorter lengths told how long it would take."""
    return [
        {"name": name, "length": length, "predicted_seconds": told}
        for length in bench.lengths
        for name, told in _too_slow(bench, length, rows).items()
    ]
