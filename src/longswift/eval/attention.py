"""Attention alone: mechanisms against PyTorch's own scaled-dot-product attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Mechanism, check_positive
from longswift.core.types import AttentionStats
from longswift.eval import memory, options, text
from longswift.eval.progress import Bar, bar
from longswift.eval.results import Progress, Result, writable
from longswift.eval.timing import alternate, fit_exponent

BASELINE = "sdpa"
_NOTES = {
    "data": "q, k and v are independent standard normal numbers, the same for every rival",
    "time": "rivals alternate in one process, order reversed every round; the first run is "
    "dropped unless it is slow; medians",
    "exponent": "least squares of log seconds over log tokens, over the lengths at which the rival "
    "is sparse if there are two, over all of them otherwise",
    "memory": "rise of the resident high-water mark during one call in a fresh process, after a "
    "call of 64 tokens, less the output (and, with backward, the gradients)",
}


@dataclass(frozen=True, kw_only=True)
class AttentionBench:
    """What to measure.

    Attributes:
        lengths: Numbers of tokens.
        mechanisms: The rivals of SDPA, as ``Mechanism.to_dict`` gives them.
        dtype: Name of the dtype.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
        batch: Sequences per call.
        causal: Causal or bidirectional attention.
        backward: Time a training step of attention: forward and gradients of q, k and v.
        device: Where it runs.
        repeats: Samples of a fast case; slow ones get fewer.
        budget_seconds: Time spent on one rival at one length before it is run no more.
        memory: Also measure working memory, once per rival and length.
        seed: Seed of the data.
    """

    lengths: tuple[int, ...]
    mechanisms: tuple[dict[str, Any], ...]
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


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """One rival at one length.

    Attributes:
        name: Mechanism, or ``"sdpa"``.
        length: Tokens.
        seconds: Median wall-clock time of a call.
        fastest: Fastest sample.
        slowest: Slowest sample.
        samples: Timed runs.
        speedup: SDPA's median over this median.
        extra_bytes: Working memory beyond inputs and output, or None if not measured.
        keys_per_query: Mean number of keys scored per query.
        density: Share of what full attention scores.
        backend: Backend that ran.
    """

    name: str
    length: int
    seconds: float
    fastest: float
    slowest: float
    samples: int
    speedup: float
    extra_bytes: int | None
    keys_per_query: float
    density: float
    backend: str


def inputs(bench: AttentionBench, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q ``[B, H, n, D]`` and k, v ``[B, Hkv, n, D]`` of one length."""
    generator = torch.Generator().manual_seed(bench.seed)

    def draw(heads: int) -> Tensor:
        shape = (bench.batch, heads, length, bench.head_dim)
        x = torch.randn(shape, generator=generator).to(bench.device, options.dtype(bench.dtype))
        return x.requires_grad_(bench.backward)

    return draw(bench.heads), draw(bench.kv_heads), draw(bench.kv_heads)


def _attend(bench: AttentionBench, mechanism: Mechanism | None) -> Callable[..., Any]:
    """``(q, k, v) -> (out, stats or None)``; gradients included when asked for."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, AttentionStats | None]:
        with torch.set_grad_enabled(bench.backward):
            if mechanism is None:
                gqa = bench.heads != bench.kv_heads
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=bench.causal, enable_gqa=gqa
                )
                stats = None
            else:
                out, _, stats = mechanism(q, k, v, causal=bench.causal)
            if bench.backward:
                q.grad = k.grad = v.grad = None
                out.sum().backward()
        if q.device.type == "cuda":
            torch.cuda.synchronize(q.device)
        return out, stats

    return run


def working_memory(bench: dict[str, Any], mechanism: dict[str, Any] | None, length: int) -> Any:
    """Bytes one call needs beyond inputs and output; run it in a fresh process.

    Args:
        bench: ``AttentionBench.to_dict``.
        mechanism: ``Mechanism.to_dict``, or None for SDPA.
        length: Tokens.
    """
    asked = _from_dict(bench)
    run = _attend(asked, _mechanism(mechanism))
    run(*inputs(asked, min(64, length)))
    q, k, v = inputs(asked, length)
    with memory.watch(asked.device) as peak:
        out, _ = run(q, k, v)
    if peak.bytes is None:
        return None
    wanted = [out, q.grad, k.grad, v.grad] if asked.backward else [out]
    return max(0, peak.bytes - sum(x.nbytes for x in wanted if x is not None))


def _mechanism(config: dict[str, Any] | None) -> Mechanism | None:
    return None if config is None else options.from_json(config)


def _from_dict(content: dict[str, Any]) -> AttentionBench:
    plain = {**content, "lengths": tuple(content["lengths"])}
    return AttentionBench(**{**plain, "mechanisms": tuple(content["mechanisms"])})


def _measure(bench: AttentionBench, length: int, step: Bar) -> list[AttentionRow]:
    """Every rival at one length."""
    rivals = {BASELINE: None, **{m["name"]: _mechanism(m) for m in bench.mechanisms}}
    q, k, v = inputs(bench, length)
    stats: dict[str, AttentionStats | None] = {}

    def job(name: str) -> Callable[[], None]:
        run = _attend(bench, rivals[name])

        def call() -> None:
            stats[name] = run(q, k, v)[1]

        return call

    times = alternate(
        {name: job(name) for name in rivals},
        repeats=bench.repeats,
        budget_seconds=bench.budget_seconds,
        tick=lambda name: step(1, f"{length} tokens: {name}"),
    )
    dense_keys = (length + 1) / 2 if bench.causal else float(length)
    rows = []
    for name, mechanism in rivals.items():
        extra = None
        if bench.memory:
            step(1, f"{length} tokens: memory of {name}")
            extra = memory.in_fresh_process(
                "longswift.eval.attention:working_memory",
                {
                    "bench": bench.to_dict(),
                    "mechanism": None if mechanism is None else mechanism.to_dict(),
                    "length": length,
                },
            )
        seen, time = stats[name], times[name]
        rows.append(
            AttentionRow(
                name=name,
                length=length,
                seconds=time.median,
                fastest=time.fastest,
                slowest=time.slowest,
                samples=time.samples,
                speedup=times[BASELINE].median / time.median,
                extra_bytes=extra,
                keys_per_query=dense_keys if seen is None else seen.keys_per_query,
                density=1.0 if seen is None else seen.density,
                backend="torch" if seen is None else seen.backend,
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
    result = Result(kind="attention", config=bench.to_dict(), seed=bench.seed, rows=[])
    kept = Progress(result, output, fresh=fresh)
    rivals = len(bench.mechanisms) + 1
    total = len(bench.lengths) * rivals * (bench.repeats + 1 + bench.memory)
    with bar(total, "starting", shown=progress) as step:
        for length in bench.lengths:
            if kept.find(length=length) is None:
                kept.add(*(asdict(row) for row in _measure(bench, length, step)))
            else:
                step(total / len(bench.lengths), f"{length} tokens: measured before")
    result.summary.update(summarise(result))
    if output is not None:
        result.save(output)
        kept.done()
    return result


def series(result: Result) -> dict[str, list[AttentionRow]]:
    """Rows by rival, ascending in length, SDPA first."""
    found: dict[str, list[AttentionRow]] = {}
    for row in sorted((AttentionRow(**row) for row in result.rows), key=lambda r: r.length):
        found.setdefault(row.name, []).append(row)
    return found


def summarise(result: Result) -> dict[str, Any]:
    """Fitted exponents, a sentence per mechanism, and how the figures were made."""
    exponents, sentences = {}, []
    for name, rows in series(result).items():
        # Below its crossover a mechanism is dense, which says nothing about how it grows.
        sparse = [r for r in rows if r.density < 1] if name != BASELINE else rows
        fitted = sparse if len(sparse) > 1 else rows
        exponents[name] = fit_exponent([r.length for r in fitted], [r.seconds for r in fitted])
        if name != BASELINE:
            last = rows[-1]
            sentences.append(
                f"{name} at {last.length} tokens: {text.seconds(last.seconds)}, "
                f"{text.times_faster(last.speedup)} than SDPA, scoring "
                f"{100 * last.density:.1f} % of the keys."
            )
    return {"exponents": exponents, "sentences": sentences, "how": _NOTES}


def table(result: Result) -> text.Table:
    """The result for people."""
    exponents, config = result.summary["exponents"], result.config
    title = (
        f"attention only, {config['dtype']}, {result.environment.threads} thread(s), "
        f"{config['device']}"
    )
    cells = [
        (
            row.name,
            f"{row.length}",
            text.seconds(row.seconds),
            f"{text.seconds(row.fastest)} - {text.seconds(row.slowest)}",
            f"{row.samples}",
            f"{row.speedup:.2f}x",
            text.megabytes(row.extra_bytes),
            f"{row.keys_per_query:,.0f} ({100 * row.density:.1f} %)",
            "-" if exponents[row.name] is None else f"{exponents[row.name]:.2f}",
        )
        for found in series(result).values()
        for row in found
    ]
    columns = (
        "",
        "tokens",
        "median",
        "range",
        "runs",
        "vs SDPA",
        "extra memory",
        "keys/query",
        "n^",
    )
    return text.Table(title, columns, cells)
