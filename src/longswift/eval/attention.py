"""Attention alone: mechanisms against full attention as PyTorch computes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, LongSwiftError, problem
from longswift.core.mechanism import Mechanism, check_positive
from longswift.core.types import AttentionStats
from longswift.eval import baselines, memory, options, roofline
from longswift.eval.attention_table import AttentionRow, series, summarise
from longswift.eval.progress import Bar, Share, bar
from longswift.eval.results import Progress, Result, writable
from longswift.eval.timing import alternate, fit_exponent


@dataclass(frozen=True, kw_only=True)
class AttentionBench:
    """What to measure.

    Attributes:
        lengths: Numbers of tokens.
        mechanisms: The rivals, as ``Mechanism.to_dict`` gives them.
        against: The baseline, full attention of PyTorch: a name of ``eval.baselines``.
        dtype: Name of the dtype.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
        batch: Sequences per call.
        causal: Causal or bidirectional attention. A mechanism that has only the other form is
            timed in that, against the baseline in that.
        backward: Time a training step of attention: forward and gradients of q, k and v.
        device: Where it runs.
        repeats: Samples of a fast case; slow ones get fewer.
        budget_seconds: Time spent on one rival at one length before it is run no more. A sparse
            mechanism of which a single call is predicted to take longer is left out there.
        memory: Also measure working memory, once per rival and length.
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


@dataclass(frozen=True)
class _Rival:
    """Something to time: a mechanism in a direction, or the baseline."""

    name: str
    mechanism: Mechanism | None
    causal: bool


def direction(mechanism: Mechanism, causal: bool) -> bool:
    """Whether ``mechanism`` runs causally where ``causal`` is wanted, if it can."""
    return mechanism.supports_causal if causal else not mechanism.supports_bidirectional


def _rivals(bench: AttentionBench) -> list[_Rival]:
    """The baseline in every direction that is needed, that of the bench first, and the others."""
    mechanisms = [options.from_json(config) for config in bench.mechanisms]
    found = [_Rival(m.name, m, direction(m, bench.causal)) for m in mechanisms]
    directions = [bench.causal]
    directions += [not bench.causal] * any(r.causal != bench.causal for r in found)
    base = [_Rival(baseline_row(bench, causal), None, causal) for causal in directions]
    return base + found


def baseline_row(bench: AttentionBench, causal: bool) -> str:
    """How rows call the baseline in a direction."""
    if causal == bench.causal:
        return bench.against
    return f"{bench.against} ({'causal' if causal else 'bidirectional'})"


def runnable(
    mechanisms: Iterable[Mechanism], causal: bool
) -> tuple[list[Mechanism], dict[str, str]]:
    """Mechanisms that attend to a few tokens, and what the others say instead.

    Args:
        mechanisms: To try.
        causal: The direction, for those that have both.
    """
    able, refused = [], {}
    x = torch.zeros(1, 1, 8, 16)
    for mechanism in mechanisms:
        try:
            mechanism(x, x, x, causal=direction(mechanism, causal))
            able.append(mechanism)
        except LongSwiftError as error:
            refused[mechanism.name] = str(error)
    return able, refused


def inputs(bench: AttentionBench, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q ``[B, H, n, D]`` and k, v ``[B, Hkv, n, D]`` of one length."""
    generator = torch.Generator().manual_seed(bench.seed)

    def draw(heads: int) -> Tensor:
        shape = (bench.batch, heads, length, bench.head_dim)
        x = torch.randn(shape, generator=generator).to(bench.device, options.dtype(bench.dtype))
        return x.requires_grad_(bench.backward)

    return draw(bench.heads), draw(bench.kv_heads), draw(bench.kv_heads)


def _attend(bench: AttentionBench, rival: _Rival) -> Callable[..., Any]:
    """``(q, k, v) -> (out, stats or None)``; gradients included when asked for."""
    baseline = baselines.get(bench.against)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, AttentionStats | None]:
        stats = None
        with torch.set_grad_enabled(bench.backward):
            if rival.mechanism is None:
                out = baseline.attend(q, k, v, rival.causal)
            else:
                out, _, stats = rival.mechanism(q, k, v, causal=rival.causal)
            if bench.backward:
                q.grad = k.grad = v.grad = None
                out.sum().backward()
        if q.device.type == "cuda":
            torch.cuda.synchronize(q.device)
        return out, stats

    return run


def working_memory(bench: dict[str, Any], rival: str, length: int) -> int | None:
    """Bytes one call needs beyond inputs and output; run it in a fresh process.

    Args:
        bench: ``AttentionBench.to_dict``.
        rival: Name of its row.
        length: Tokens.
    """
    asked = _from_dict(bench)
    chosen = next(r for r in _rivals(asked) if r.name == rival)
    run = _attend(asked, chosen)
    compiled = chosen.mechanism is None and baselines.get(asked.against).compiled
    run(*inputs(asked, length if compiled else min(64, length)))
    q, k, v = inputs(asked, length)
    with memory.watch(asked.device) as peak:
        out, _ = run(q, k, v)
    if peak.bytes is None:
        return None
    wanted = [out, q.grad, k.grad, v.grad] if asked.backward else [out]
    return max(0, peak.bytes - sum(x.nbytes for x in wanted if x is not None))


def _from_dict(content: dict[str, Any]) -> AttentionBench:
    plain = {**content, "lengths": tuple(content["lengths"])}
    return AttentionBench(**{**plain, "mechanisms": tuple(content["mechanisms"])})


def predicted_seconds(rows: list[AttentionRow], length: int) -> float | None:
    """Time of a call at ``length`` from those at shorter lengths; None where nothing tells.

    Dense rows tell nothing about a mechanism that will be sparse.
    """
    sparse = [row for row in rows if row.density < 1 and row.length < length][-2:]
    if not sparse:
        return None
    exponent = fit_exponent([r.length for r in sparse], [r.seconds for r in sparse])
    # Time as short as a call's overhead grows slower than it will.
    growth = 1.0 if exponent is None else max(1.0, exponent)
    return sparse[-1].seconds * (length / sparse[-1].length) ** growth


def _too_slow(
    bench: AttentionBench, rivals: list[_Rival], length: int, earlier: dict[str, list[AttentionRow]]
) -> dict[str, float]:
    """Mechanisms whose call would take longer than the budget, and how long."""
    found = {}
    for rival in rivals:
        told = predicted_seconds(earlier.get(rival.name, []), length)
        if rival.mechanism is not None and told is not None and told > bench.budget_seconds:
            found[rival.name] = told
    return found


def _measure(
    bench: AttentionBench, length: int, step: Bar, rivals: list[_Rival]
) -> list[AttentionRow]:
    """Every rival at one length."""
    q, k, v = inputs(bench, length)
    stats: dict[str, AttentionStats | None] = {}

    def job(rival: _Rival) -> Callable[[], None]:
        run = _attend(bench, rival)

        def call() -> None:
            stats[rival.name] = run(q, k, v)[1]

        return call

    step(text=f"{length} tokens: ceilings of the machine")
    ceilings = roofline.measure_ceilings(options.dtype(bench.dtype), bench.device)
    jobs = {rival.name: job(rival) for rival in rivals}
    if baselines.get(bench.against).compiled:
        step(text=f"{length} tokens: compiling {bench.against}")
        for rival in rivals:
            if rival.mechanism is None:
                jobs[rival.name]()
    times = alternate(
        jobs,
        repeats=bench.repeats,
        budget_seconds=bench.budget_seconds,
        tick=lambda name: step(1, f"{length} tokens: {name}"),
    )
    rows = []
    for rival in rivals:
        extra = None
        if bench.memory:
            step(1, f"{length} tokens: memory of {rival.name}")
            extra = memory.in_fresh_process(
                "longswift.eval.attention:working_memory",
                {"bench": bench.to_dict(), "rival": rival.name, "length": length},
            )
        seen, time = stats[rival.name], times[rival.name]
        dense_keys = (length + 1) / 2 if rival.causal else float(length)
        keys = dense_keys if seen is None else seen.keys_per_query
        work = roofline.attention_work(
            batch=bench.batch,
            heads=bench.heads,
            kv_heads=bench.kv_heads,
            head_dim=bench.head_dim,
            queries=length,
            keys=length,
            keys_per_query=keys,
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
                speedup=times[baseline_row(bench, rival.causal)].median / time.median,
                extra_bytes=extra,
                keys_per_query=keys,
                density=1.0 if seen is None else seen.density,
                backend="torch" if seen is None else seen.backend,
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
    if output is not None:
        writable(output)
    baselines.check(
        bench.against,
        dtype=options.dtype(bench.dtype),
        device=bench.device,
        backward=bench.backward,
    )
    result = Result(kind="attention", config=bench.to_dict(), seed=bench.seed, rows=[])
    kept = Progress(result, output, fresh=fresh)
    rivals = _rivals(bench)
    share = len(rivals) * (bench.repeats + 1 + bench.memory)
    skipped = []
    with bar(len(bench.lengths) * share, "starting", shown=progress) as step:
        for length in bench.lengths:
            slow = _too_slow(bench, rivals, length, series(result))
            skipped += [
                {"name": name, "length": length, "predicted_seconds": told}
                for name, told in slow.items()
            ]
            if kept.find(length=length) is None:
                measured = Share(step, share)
                able = [rival for rival in rivals if rival.name not in slow]
                kept.add(*(asdict(row) for row in _measure(bench, length, measured, able)))
                measured.finish()
            else:
                step(share, f"{length} tokens: measured before")
    result.summary.update(summarise(result), skipped=skipped)
    if output is not None:
        result.save(output)
        kept.done()
    return result
