"""Results of the attention benchmark for people: rows, growth, sentences, the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longswift.eval import text
from longswift.eval.growth import growth
from longswift.eval.results import Result

_NOTES = {
    "data": "q, k and v are independent standard normal numbers, the same for every rival",
    "time": "rivals alternate in one process, order reversed every round; the first run is "
    "dropped unless it is slow on a CPU; medians",
    "samples": "up to `repeats` timed runs; a rival that has spent `budget_seconds` at a length is "
    "run no more, so that long calls have one or two: `samples` of each row says how many",
    "backward": "with --backward a run is the forward pass and the gradients of q, k and v; "
    "`backward_seconds` is the median of the gradients alone, in the same runs",
    "exponent": "least squares of log over log tokens, over the lengths at which the rival is "
    "sparse if there are two, over all of them otherwise; `growth` names the range, and the slope "
    "of the time between its two longest lengths",
    "memory": "rise of the resident high-water mark during one call in a fresh process, after a "
    "call of 64 tokens, less the output (and, with backward, the gradients); on a GPU the rise of "
    "what PyTorch's allocator has handed out",
    "footprint": "the memory that is fitted: q, k, v, output and working memory",
    "state": "bytes allocated for what decoding behind the text needs: sums, a memory's state, or "
    "the buffers of a cache",
    "direction": "a mechanism without the form asked for is timed in the other one, against the "
    "baseline in that",
    "roofline": "the least time for the products with the keys that are scored and for moving q, "
    "k, v and the output once, at the rates of the fastest matrix product and the fastest copy "
    "measured just before; choosing keys counts as time, not as work",
    "skipped": "a mechanism is left out at lengths where a call would take longer than the budget, "
    "by the growth of its last two fastest times; the baseline never is",
}


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """One rival at one length. The fields of the roofline are None in older results.

    Attributes:
        name: Mechanism, or name of the baseline.
        length: Tokens.
        causal: Timed in causal attention.
        seconds: Median wall-clock time of a call.
        fastest: Fastest sample.
        slowest: Slowest sample.
        samples: Timed runs.
        speedup: The baseline's median over this median, in the same direction.
        backward_seconds: Median of the gradients alone, a part of ``seconds``; None in a benchmark
            of the forward pass, and in older results.
        backward_speedup: The baseline's over this one's.
        extra_bytes: Working memory beyond inputs and output, or None if not measured.
        state_bytes: Allocated for what decoding behind the text needs of it; None in bidirectional
            attention, if not measured, and in older results.
        keys_per_query: Mean number of keys scored per query.
        density: Share of what full attention scores.
        backend: Backend that ran.
        flops: Operations of the products of queries with scored keys and their values.
        least_bytes: Bytes of the tensors that must be moved once.
        matmul_flops: Measured ceiling, operations per second.
        copy_bytes: Measured ceiling, bytes per second.
        least_seconds: The shortest time the ceilings allow.
    """

    name: str
    length: int
    causal: bool = True
    seconds: float
    fastest: float
    slowest: float
    samples: int
    speedup: float
    extra_bytes: int | None
    keys_per_query: float
    density: float
    backend: str
    backward_seconds: float | None = None
    backward_speedup: float | None = None
    state_bytes: int | None = None
    flops: float | None = None
    least_bytes: float | None = None
    matmul_flops: float | None = None
    copy_bytes: float | None = None
    least_seconds: float | None = None

    @property
    def roofline(self) -> float | None:
        """Share of the roofline that was reached, or None where it was not measured."""
        return None if self.least_seconds is None else self.least_seconds / self.seconds

    @property
    def footprint(self) -> float | None:
        """Bytes of inputs, output and working memory, or None where one was not measured."""
        if self.least_bytes is None or self.extra_bytes is None:
            return None
        return self.least_bytes + self.extra_bytes


def series(result: Result) -> dict[str, list[AttentionRow]]:
    """Rows by rival, ascending in length, the baseline first."""
    found: dict[str, list[AttentionRow]] = {}
    for row in sorted((AttentionRow(**row) for row in result.rows), key=lambda r: r.length):
        found.setdefault(row.name, []).append(row)
    return found


def baseline(result: Result) -> str:
    """Name of the baseline; older results name none and mean SDPA."""
    name: str = result.config.get("against", "sdpa")
    return name


def is_baseline(result: Result, name: str) -> bool:
    """Whether a row of this name is the baseline, in one of the two directions."""
    return name.partition(" ")[0] == baseline(result)


def label(row: AttentionRow, result: Result) -> str:
    """The name of a row, and its direction where it is not the one that was asked for."""
    if row.causal == result.config["causal"] or is_baseline(result, row.name):
        return row.name
    return f"{row.name} ({'causal' if row.causal else 'bidirectional'})"


def summarise(result: Result) -> dict[str, Any]:
    """Fitted exponents, a sentence per mechanism, and how the figures were made."""
    rivals = series(result)
    found = growth(rivals)
    exponents, sentences = {}, []
    for name, rows in rivals.items():
        exponents[name] = found[name].time if name in found else None
        last = rows[-1]
        if not is_baseline(result, name):
            sentences.append(
                f"{label(last, result)} at {last.length:,} tokens: {text.seconds(last.seconds)}, "
                f"{text.times_faster(last.speedup)} than {baseline_title(result)}, "
                f"{_backward(last)}scoring {100 * last.density:.1f} % of the keys."
            )
    if (ceilings := _ceilings(result)) is not None:
        sentences.append(ceilings)
    return {
        "exponents": exponents,
        "growth": {name: asdict(one) for name, one in found.items()},
        "sentences": sentences,
        "how": _NOTES,
    }


def _backward(row: AttentionRow) -> str:
    if row.backward_seconds is None or row.backward_speedup is None:
        return ""
    faster = text.times_faster(row.backward_speedup)
    return f"the backward pass alone {text.seconds(row.backward_seconds)} and {faster}, "


def left_out(result: Result) -> list[str]:
    """A sentence for everything that was asked for and not timed."""
    return [f"{name} was left out: {why}" for name, why in result.config["left_out"].items()] + [
        f"{case['name']} at {case['length']:,} tokens was left out: a call would take about "
        f"{text.seconds(case['predicted_seconds'])}, more than the budget."
        for case in result.summary["skipped"]
    ]


def baseline_title(result: Result) -> str:
    """The baseline as people call it."""
    return {"sdpa": "SDPA", "flex": "FlexAttention"}[baseline(result)]


def _ceilings(result: Result) -> str | None:
    """The fastest product and copy of the run, in words."""
    rows = [AttentionRow(**row) for row in result.rows]
    rates = [(r.matmul_flops, r.copy_bytes) for r in rows if r.matmul_flops and r.copy_bytes]
    if not rates:
        return None
    flops, copied = (max(values) for values in zip(*rates, strict=True))
    return (
        f"Ceilings of this run: {text.rate(flops, 'FLOP/s')} in matrix products, "
        f"{text.rate(copied, 'B/s')} in copies."
    )


def table(result: Result) -> text.Table:
    """The result for people."""
    exponents, config = result.summary["exponents"], result.config
    title = f"attention only, {config['dtype']}, {result.environment.place(config['device'])}"
    apart = any(row.get("backward_seconds") is not None for row in result.rows)
    cells = [
        (
            label(row, result),
            f"{row.length}",
            text.seconds(row.seconds),
            f"{text.seconds(row.fastest)} - {text.seconds(row.slowest)}",
            f"{row.samples}",
            f"{row.speedup:.2f}x",
            *(_backward_cells(row) if apart else ()),
            text.megabytes(row.extra_bytes),
            f"{row.keys_per_query:,.0f} ({100 * row.density:.1f} %)",
            "-" if exponents[row.name] is None else f"{exponents[row.name]:.2f}",
            "-" if row.roofline is None else f"{100 * row.roofline:.0f} %",
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
        f"vs {baseline_title(result)}",
        *(("backward alone", f"backward vs {baseline_title(result)}") if apart else ()),
        "extra memory",
        "keys/query",
        "n^",
        "of roofline",
    )
    return text.Table(title, columns, cells)


def _backward_cells(row: AttentionRow) -> tuple[str, str]:
    if row.backward_seconds is None or row.backward_speedup is None:
        return "-", "-"
    return text.seconds(row.backward_seconds), f"{row.backward_speedup:.2f}x"


def growth_table(result: Result) -> text.Table:
    """One line per rival for people: exponents, their range, and figures at its last length."""
    rivals = series(result)
    cells = []
    for name, one in growth(rivals).items():
        last = rivals[name][-1]
        exponents = (one.time, one.last_time, one.memory, one.state)
        cells.append(
            (
                label(last, result),
                f"{text.tokens(one.shortest)} - {text.tokens(one.longest)}",
                *("-" if value is None else f"{value:.2f}" for value in exponents),
                text.seconds(last.seconds),
                f"{last.speedup:.2f}x",
                text.megabytes(last.extra_bytes),
                text.size(last.state_bytes),
            )
        )
    columns = (
        "",
        "tokens",
        "time n^",
        "last two",
        "memory n^",
        "state n^",
        "median",
        f"vs {baseline_title(result)}",
        "extra memory",
        "state",
    )
    return text.Table("growth with the number of tokens, figures at the last", columns, cells)
