"""Results of decoding, prefill and training for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longswift.eval import text
from longswift.eval.attention_table import baseline, baseline_title
from longswift.eval.results import Result

STEP = {
    "decode": "per token",
    "prefill": "to the first token",
    "train": "per step",
}
_NOTES = {
    "time": "rivals alternate in one process, order reversed every round; the first run is "
    "dropped unless it is slow on a CPU; medians",
    "attention": "decode: one query per sequence against a SwiftCache of random keys, to which a "
    "token is added first; train: forward and gradients of q, k and v",
    "model": "decode: greedy tokens behind a SwiftCache of random keys; prefill: random tokens "
    "read in chunks into a SwiftCache, and the first token; train: loss of the next tokens and "
    "gradients of all weights, without an optimiser; the baseline is Transformers' own",
    "memory": "rise of the resident high-water mark during one run in a fresh process above the "
    "loaded model: cache, activations and gradients included; on a GPU the rise of what PyTorch's "
    "allocator has handed out",
    "keys": "keys scored per query in the layers a mechanism replaces",
}


@dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """One rival in one case.

    Attributes:
        part: ``"attention"`` alone or the whole ``"model"``.
        name: Mechanism, or name of the baseline.
        length: Tokens.
        batch: Sequences per call.
        seconds: Median time of a decoded token, of the way to the first token, or of a step.
        fastest: Fastest sample.
        slowest: Slowest sample.
        samples: Timed runs.
        speedup: The baseline's median over this median.
        tokens_per_second: Tokens of all sequences per second.
        peak_bytes: Memory above the loaded model, or None if not measured.
        keys_per_query: Mean number of keys scored per query.
    """

    part: str
    name: str
    length: int
    batch: int
    seconds: float
    fastest: float
    slowest: float
    samples: int
    speedup: float
    tokens_per_second: float
    peak_bytes: int | None
    keys_per_query: float


def rows(result: Result) -> list[PhaseRow]:
    """The rows of a result, typed."""
    return [PhaseRow(**row) for row in result.rows]


def heading(result: Result) -> str:
    """What was measured, on what, in a line."""
    config = result.config
    work = {
        "decode": "decoding behind a cache",
        "prefill": f"time to the first token, chunks of {config['chunk']}",
        "train": "a training step" + ", layers recomputed" * config["checkpointing"],
    }[result.kind]
    return (
        f"{work}: {config['model']}, {config['dtype']}, "
        f"{result.environment.place(config['device'])}"
    )


def summarise(result: Result) -> dict[str, Any]:
    """A sentence per part and mechanism, at the longest length, and how figures were made."""
    found = rows(result)
    longest = max(row.length for row in found)
    sentences = [
        f"{part_title(row.part)}, {row.name} at {longest:,} tokens, batch {row.batch}: "
        f"{text.seconds(row.seconds)} {STEP[result.kind]}, {text.times_faster(row.speedup)} than "
        f"{baseline_title(result)} ({text.plain(row.tokens_per_second)} tokens/s)."
        for row in found
        if row.length == longest and row.name != baseline(result)
    ]
    return {"sentences": sentences, "how": _NOTES}


def part_title(part: str) -> str:
    """A part as people call it."""
    return {"attention": "attention alone", "model": "whole model"}[part]


def table(result: Result) -> text.Table:
    """The result for people."""
    cells = [
        (
            row.name,
            part_title(row.part),
            f"{row.length}",
            f"{row.batch}",
            text.seconds(row.seconds),
            f"{text.seconds(row.fastest)} - {text.seconds(row.slowest)}",
            f"{row.samples}",
            f"{row.speedup:.2f}x",
            text.plain(row.tokens_per_second),
            text.megabytes(row.peak_bytes),
            f"{row.keys_per_query:,.0f}",
        )
        for row in rows(result)
    ]
    columns = (
        "",
        "part",
        "tokens",
        "batch",
        f"median, {STEP[result.kind]}",
        "range",
        "runs",
        f"vs {baseline_title(result)}",
        "tokens/s",
        "peak memory",
        "keys/query",
    )
    return text.Table(heading(result), columns, cells)
