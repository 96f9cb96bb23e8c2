"""The table of mechanisms, measured on the same work: growth, time, memory, and quality kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, InputError, problem
from longswift.core.mechanism import Mechanism
from longswift.eval import attention, attention_rivals, options, standings, suite, tuned_runs
from longswift.eval import text as text_of
from longswift.eval.attention import AttentionBench
from longswift.eval.attention_table import AttentionRow, series
from longswift.eval.cost import equal_cost_window
from longswift.eval.documents import source
from longswift.eval.judging import EndJudge
from longswift.eval.mechanism_table import MechanismRow
from longswift.eval.models import Loaded
from longswift.eval.progress import bar
from longswift.eval.reading import hidden_states
from longswift.eval.results import Result, writable
from longswift.eval.results import load as load_result
from longswift.eval.rows import check_rows
from longswift.eval.runner import FULL, SWIFT, WINDOW
from longswift.eval.samples import samples
from longswift.eval.suite import Suite
from longswift.eval.tuning import Tuning

_RIVAL = "rival"
_NOTES = {
    "growth": "exponent of the time fitted over the lengths, time and memory at the longest one; "
    "attention alone on random numbers, against SDPA in the same process",
    "window": "sliding_window has the window of equal cost: as many keys per query as ms_swift "
    "scores at the tasks' length",
    "quality": "zero-shot: the mechanism replaces the full-attention layers of a model that was "
    "trained with full attention, without any training since",
    "tuned": "the same questions and text after the same number of steps on the same rows with "
    "the same rate and seed for every mechanism, full attention included",
    "divergence": "next-token distributions on a text of the tasks' length, from full attention's",
    "direction": "mechanisms without a causal form are timed in bidirectional attention and "
    "cannot run in a language model",
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare, and on which work.

    Attributes:
        speed: Attention alone. Its mechanisms are the rows of the table; ``causal`` is decided
            per mechanism.
        quality: Tasks on a model at one length. Its mechanisms are ignored.
        file: Text for the divergence; Python's documentation by default.
        tuning: Also fine-tune a copy of the model with each mechanism, and ask again.
        left_out: Mechanisms that could not even be configured, and why.
    """

    speed: AttentionBench
    quality: Suite
    file: str | None = None
    tuning: Tuning | None = None
    left_out: dict[str, str]

    def __post_init__(self) -> None:
        own = None if self.tuning is None else self.tuning.file
        if (
            own is not None
            and self.file is not None
            and Path(own).resolve() == Path(self.file).resolve()
        ):
            raise ConfigError(
                problem(
                    "--tune-file",
                    expected="another text than that of the tasks",
                    got=own,
                    fix="Give text of the same kind that nothing is measured on.",
                )
            )
        if len(self.quality.lengths) != 1:
            raise ConfigError(
                problem(
                    "compare",
                    expected="one length for the tasks",
                    got=self.quality.lengths,
                    fix="Use longswift eval for several.",
                )
            )


def run(
    comparison: Comparison,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    progress: bool = True,
) -> Result:
    """Measure everything; parts that an interrupted run of the same options finished are reused.

    Args:
        comparison: What to compare.
        output: JSON file of the table. Its parts lie beside it: ``<name>.attention.json``,
            ``<name>.eval.json`` with its samples, and in ``<name>.tuned`` checkpoints, tuned
            models and their answers.
        fresh: Start over.
        progress: Show bars on stderr.
    """
    if output is not None:
        writable(output, kind="compare")
    mechanisms = [options.from_json(config) for config in comparison.speed.mechanisms]
    length = comparison.quality.lengths[0]
    mechanisms, window = _equal_cost(mechanisms, comparison.speed, length)
    causal = [m for m in mechanisms if m.supports_causal]
    ids = _text(comparison, causal)
    found: dict[str, dict[str, Any]] = {m.name: {"name": m.name, "note": ""} for m in mechanisms}
    runs, refused = attention_rivals.runnable(mechanisms, causal=True)
    for name, why in refused.items():
        found[name]["note"] = why
    if runs:
        bench = _bench(comparison.speed, runs)
        _times(_measured(bench, _beside(output, "attention"), fresh, progress), found)
    able = [m for m in causal if "seconds" in found[m.name]]
    for mechanism in mechanisms:
        if not mechanism.supports_causal:
            found[mechanism.name]["note"] += "no causal form: not run in the model"
    if not able:
        raise ConfigError(
            problem(
                "compare",
                expected="at least one mechanism with a causal form",
                got=", ".join(found),
                fix="Add full or ms_swift.",
            )
        )
    judged = _with_full(able)
    asked = _suite(comparison.quality, judged)
    scored = suite.run(asked, _beside(output, "eval"), fresh=fresh, progress=progress)
    _scores(scored, found)
    _divergences(comparison, suite.prepare(asked), ids, judged, found, progress)
    if comparison.tuning is not None:
        _tuned(comparison, asked, ids, judged, found, output, fresh, progress)
    rows = [asdict(MechanismRow(**{"scores": {}, "kept": {}, **row})) for row in found.values()]
    rows += [
        asdict(MechanismRow(name=name, scores={}, kept={}, note=f"not configured: {why}"))
        for name, why in comparison.left_out.items()
    ]
    speed = _bench(comparison.speed, mechanisms).to_dict()
    result = Result(
        kind="compare",
        config={
            "speed": speed,
            "quality": scored.config,
            "text_tokens": length,
            "tuning": _tuning(comparison.tuning),
        },
        seed=comparison.speed.seed,
        rows=rows,
        summary={
            "window": window,
            "dense": list(standings.dense(scored)),
            "guards": standings.guards(scored),
            "how": _NOTES,
        },
    )
    if output is not None:
        result.save(output)
    return result


def _tuning(tuning: Tuning | None) -> dict[str, Any] | None:
    if tuning is None:
        return None
    file = None if tuning.file is None else Path(tuning.file).name
    return {**asdict(tuning), "file": file}


def _tuned(
    comparison: Comparison,
    asked: Suite,
    ids: list[int],
    judged: list[Mechanism],
    found: dict[str, dict[str, Any]],
    output: str | Path | None,
    fresh: bool,
    progress: bool,
) -> None:
    """The quality of every mechanism that ran, after the fine-tuning."""
    assert comparison.tuning is not None
    runs = [m for m in judged if m.name == FULL or not found[m.name]["note"]]
    folder = None if output is None else Path(output).with_suffix(".tuned")
    tuned = tuned_runs.run(
        asked, runs, ids, comparison.tuning, folder, fresh=fresh, progress=progress
    )
    tuned_runs.into(found, tuned)


def _text(comparison: Comparison, causal: list[Mechanism]) -> list[int]:
    """What divergence and perplexity are measured on; what cannot be read is found out first.

    Raises:
        LongSwiftError: A file, the model or an option would end the run after the timing.
    """
    if comparison.tuning is not None:
        source(comparison.tuning.file)
    asked = _suite(comparison.quality, _with_full(causal))
    for task in asked.tasks:
        source(task.get("file"))
    loaded = suite.prepare(asked)
    (ids,) = samples(loaded, comparison.file, length=asked.lengths[0], documents=1).documents
    return ids


def _beside(output: str | Path | None, part: str) -> Path | None:
    return None if output is None else Path(output).with_suffix(f".{part}.json")


def _with_full(mechanisms: Iterable[Mechanism]) -> list[Mechanism]:
    """Full attention judges, whether it is a row of the table or not."""
    chosen = list(mechanisms)
    if not any(m.name == FULL for m in chosen):
        chosen.insert(0, options.mechanisms(FULL)[FULL])
    return sorted(chosen, key=lambda m: m.name != FULL)


def _equal_cost(
    mechanisms: list[Mechanism], bench: AttentionBench, length: int
) -> tuple[list[Mechanism], int | None]:
    """Give the window the cost of MS-SWIFT at ``length``, if both are there."""
    by_name = {m.name: m for m in mechanisms}
    if SWIFT not in by_name or WINDOW not in by_name:
        return mechanisms, None
    with torch.inference_mode():
        stats = by_name[SWIFT](*attention.inputs(bench, length)).stats
    window = equal_cost_window(stats.keys_per_query, length)
    equal = options.from_json({**by_name[WINDOW].to_dict(), "window": window})
    return [equal if m.name == WINDOW else m for m in mechanisms], window


def _bench(bench: AttentionBench, mechanisms: list[Mechanism]) -> AttentionBench:
    return replace(bench, causal=True, mechanisms=tuple(m.to_dict() for m in mechanisms))


def _measured(bench: AttentionBench, path: Path | None, fresh: bool, progress: bool) -> Result:
    """Times of a bench, read from ``path`` if the same run wrote it."""
    if path is not None and path.is_file() and not fresh:
        try:
            before = load_result(path, "attention")
        except InputError:
            before = None
        now = Result(kind="attention", config=bench.to_dict(), seed=bench.seed, rows=[])
        if before is not None and now.same_run(before):
            check_rows(before.rows, AttentionRow, path)
            return before
    return attention.run(bench, path, fresh=fresh, progress=progress)


def _times(result: Result, found: dict[str, dict[str, Any]]) -> None:
    skipped = {case["name"]: case for case in result.summary["skipped"]}
    for name, rows in series(result).items():
        if name in skipped:
            case = skipped[name]
            took = text_of.seconds(case["predicted_seconds"])
            found[name]["note"] = f"a call at {case['length']:,} tokens would take about {took}"
        elif name in found:
            last = rows[-1]
            found[name].update(
                causal=last.causal,
                exponent=result.summary["exponents"][name],
                seconds=last.seconds,
                speedup=last.speedup,
                extra_bytes=last.extra_bytes,
                keys_per_query=last.keys_per_query,
                density=last.density,
            )


def _suite(quality: Suite, mechanisms: list[Mechanism]) -> Suite:
    content = {f: getattr(quality, f) for f in quality.__dataclass_fields__}
    content["mechanisms"] = tuple(m.to_dict() for m in mechanisms)
    # The window is the one that was timed.
    return Suite(**{**content, "equal_cost": False})


def _scores(result: Result, found: dict[str, dict[str, Any]]) -> None:
    kept = {(row.mechanism, row.task): share for row, _, share in standings.compared(result)}
    for row in standings.rows(result):
        own = found.get(row.mechanism)
        if own is None or row.at is not None or row.score is None:
            continue
        if row.metric == standings.main_metric(row.task):
            own.setdefault("scores", {})[row.task] = row.score
            share = 1.0 if row.mechanism == FULL else kept.get((row.mechanism, row.task))
            if share is not None:
                own.setdefault("kept", {})[row.task] = share
    for name, why in result.summary["refused"].items():
        found[name]["note"] += why


@torch.inference_mode()
def _divergences(
    comparison: Comparison,
    loaded: Loaded,
    ids: list[int],
    mechanisms: list[Mechanism],
    found: dict[str, dict[str, Any]],
    progress: bool,
) -> None:
    """Read one text with each mechanism, full attention first."""
    from longswift.hf import SwiftCache

    truth: list[Tensor] = []
    with bar(len(mechanisms) * len(ids), "reading", shown=progress) as step:
        for mechanism in mechanisms:
            row = found.get(mechanism.name)
            # Full attention judges, even where it was too slow to be timed.
            if row is not None and row["note"] and mechanism.name != FULL:
                continue
            step(text=f"divergence of {mechanism.name}")
            loaded.use(mechanism)
            states = []
            for hidden in hidden_states(
                loaded.model, ids, SwiftCache(loaded.model.config), comparison.quality.chunk
            ):
                states.append(hidden)
                step(hidden.shape[1])
            truth = truth or states
            if row is not None:
                row.update(_divergence(loaded, ids, truth, states))


@torch.inference_mode()
def _divergence(
    loaded: Loaded, ids: list[int], truth: list[Tensor], states: list[Tensor]
) -> dict[str, float | None]:
    """Next-token distributions of a reading against those of full attention."""
    judge, start = EndJudge(loaded.model, ids), 0
    for full, other in zip(truth, states, strict=True):
        judge.add(start, full, {_RIVAL: other})
        start += full.shape[1]
    ends = {end.name: end for end in judge.rows(0, {FULL: 0.0, _RIVAL: 0.0})}
    return {
        "kl": ends[_RIVAL].kl,
        "top1": ends[_RIVAL].agreement,
        "perplexity": math.exp(ends[_RIVAL].nll),
        "perplexity_ratio": math.exp(ends[_RIVAL].nll - ends[FULL].nll),
    }
