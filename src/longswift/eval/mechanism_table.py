"""The table of mechanisms, measured on the same work: growth, time, memory, and quality kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longswift.core.errors import ConfigError, InputError, LongSwiftError, problem
from longswift.core.mechanism import Mechanism
from longswift.eval import attention, options, standings, suite
from longswift.eval import text as text_of
from longswift.eval.attention import AttentionBench
from longswift.eval.cost import equal_cost_window
from longswift.eval.divergence import divergence, last_states
from longswift.eval.models import Loaded
from longswift.eval.progress import bar
from longswift.eval.results import Result, writable
from longswift.eval.results import load as load_result
from longswift.eval.runner import FULL, SWIFT, WINDOW
from longswift.eval.suite import Suite
from longswift.eval.tasks.haystack import text_tokens

ALL = "all"
_NOTES = {
    "growth": "exponent of the time fitted over the lengths, time and memory at the longest one; "
    "attention alone on random numbers, against SDPA in the same process",
    "window": "sliding_window has the window of equal cost: as many keys per query as ms_swift "
    "scores at the tasks' length",
    "quality": "zero-shot: the mechanism replaces the full-attention layers of a model that was "
    "trained with full attention, without any training since",
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
        left_out: Mechanisms that could not even be configured, and why.
    """

    speed: AttentionBench
    quality: Suite
    file: str | None = None
    left_out: dict[str, str]

    def __post_init__(self) -> None:
        if len(self.quality.lengths) != 1:
            raise ConfigError(
                problem(
                    "compare",
                    expected="one length for the tasks",
                    got=self.quality.lengths,
                    fix="Use longswift eval for several.",
                )
            )


@dataclass(frozen=True, kw_only=True)
class MechanismRow:
    """One mechanism. Figures are None where they do not exist, and ``note`` says why.

    Attributes:
        name: Mechanism.
        causal: Timed in causal attention.
        exponent: Fitted growth of the time with the length.
        seconds: Time of a call at the longest length, median.
        speedup: SDPA's time over it.
        extra_bytes: Working memory at the longest length.
        keys_per_query: Keys scored per query there.
        density: The same as a share of what full attention scores.
        scores: Score of each task.
        kept: The same as shares of full attention's.
        kl: Next-token divergence from full attention, in nats.
        top1: Share of positions with the same likeliest token.
        perplexity: Of the text.
        perplexity_ratio: The same over full attention's.
        note: What did not run, and why; empty if all did.
    """

    name: str
    causal: bool = True
    exponent: float | None = None
    seconds: float | None = None
    speedup: float | None = None
    extra_bytes: int | None = None
    keys_per_query: float | None = None
    density: float | None = None
    scores: dict[str, float]
    kept: dict[str, float]
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    note: str = ""


def choose(text: str, settings: Sequence[str] = ()) -> tuple[list[Mechanism], dict[str, str]]:
    """Mechanisms by name, ``"all"`` for the whole table; those that need options are named.

    Returns:
        The mechanisms, and why others of ``"all"`` were left out.
    """
    from longswift.mechanisms import list_mechanisms

    if text != ALL:
        return list(options.mechanisms(text, settings).values()), {}
    names = list_mechanisms()
    # A setting for an unknown name must be refused, whatever else is left out.
    if strange := [s for s in settings if s not in options.settings_of(settings, names)]:
        options.mechanisms(FULL, strange)
    found, left_out = [], {}
    for name in names:
        try:
            mine = options.settings_of(settings, [name])
            found.append(options.mechanisms(name, mine)[name])
        except LongSwiftError as error:
            if mine:
                raise
            left_out[name] = str(error)
    return found, left_out


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
        output: JSON file of the table. Its parts lie beside it: ``<name>.causal.json``,
            ``<name>.bidirectional.json`` and ``<name>.eval.json`` with its samples.
        fresh: Start over.
        progress: Show bars on stderr.
    """
    if output is not None:
        writable(output)
    mechanisms = [options.from_json(config) for config in comparison.speed.mechanisms]
    length = comparison.quality.lengths[0]
    mechanisms, window = _equal_cost(mechanisms, comparison.speed, length)
    causal = [m for m in mechanisms if m.supports_causal]
    found: dict[str, dict[str, Any]] = {m.name: {"name": m.name, "note": ""} for m in mechanisms}
    for direction, some in ((True, causal), (False, [m for m in mechanisms if m not in causal])):
        kind = "causal" if direction else "bidirectional"
        runs = _runnable(some, direction, found)
        if runs:
            bench = _bench(comparison.speed, runs, direction)
            _times(_measured(bench, _beside(output, kind), fresh, progress), found, direction)
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
    _divergences(comparison, suite.prepare(asked), judged, found, progress)
    rows = [asdict(MechanismRow(**{"scores": {}, "kept": {}, **row})) for row in found.values()]
    rows += [
        asdict(MechanismRow(name=name, scores={}, kept={}, note=f"not configured: {why}"))
        for name, why in comparison.left_out.items()
    ]
    speed = _bench(comparison.speed, mechanisms, True).to_dict()
    result = Result(
        kind="compare",
        config={"speed": speed, "quality": scored.config, "text_tokens": length},
        seed=comparison.speed.seed,
        rows=rows,
        summary={"window": window, "dense": list(standings.dense(scored)), "how": _NOTES},
    )
    if output is not None:
        result.save(output)
    return result


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


def _runnable(
    mechanisms: list[Mechanism], causal: bool, found: dict[str, dict[str, Any]]
) -> list[Mechanism]:
    """Those that attend to a few tokens; what the others say becomes their note."""
    able = []
    for mechanism in mechanisms:
        x = torch.zeros(1, 1, 8, 16)
        try:
            mechanism(x, x, x, causal=causal)
            able.append(mechanism)
        except LongSwiftError as error:
            found[mechanism.name]["note"] = str(error)
    return able


def _bench(bench: AttentionBench, mechanisms: list[Mechanism], causal: bool) -> AttentionBench:
    content = {**asdict(bench), "causal": causal}
    return AttentionBench(**{**content, "mechanisms": tuple(m.to_dict() for m in mechanisms)})


def _measured(bench: AttentionBench, path: Path | None, fresh: bool, progress: bool) -> Result:
    """Times of a bench, read from ``path`` if the same run wrote it."""
    if path is not None and path.is_file() and not fresh:
        try:
            before = load_result(path, "attention")
        except InputError:
            before = None
        now = Result(kind="attention", config=bench.to_dict(), seed=bench.seed, rows=[])
        if before is not None and now.same_run(before):
            return before
    return attention.run(bench, path, fresh=fresh, progress=progress)


def _times(result: Result, found: dict[str, dict[str, Any]], causal: bool) -> None:
    for name, rows in attention.series(result).items():
        if name in found:
            last = rows[-1]
            found[name].update(
                causal=causal,
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


def _divergences(
    comparison: Comparison,
    loaded: Loaded,
    mechanisms: list[Mechanism],
    found: dict[str, dict[str, Any]],
    progress: bool,
) -> None:
    """Read one text with each mechanism, full attention first."""
    length, chunk = comparison.quality.lengths[0], comparison.quality.chunk
    begin = loaded.begin()
    ids = [*begin, *text_tokens(loaded, comparison.file)[: length - len(begin)]]
    if len(ids) < length:
        raise InputError(
            problem(
                "text",
                expected=f"at least {length} tokens",
                got=len(ids),
                fix="Give a longer file, or a shorter length.",
            )
        )
    full = None
    with bar(len(mechanisms) * len(ids), "reading", shown=progress) as step:
        for mechanism in mechanisms:
            row = found.get(mechanism.name)
            if row is not None and row["note"]:
                continue
            step(text=f"divergence of {mechanism.name}")
            loaded.use(mechanism)
            states = last_states(loaded, ids, chunk=chunk, step=step)
            full = states if full is None else full
            if row is not None:
                row.update(divergence(loaded, ids, full, states).to_dict())


def table(result: Result) -> text_of.Table:
    """The result for people."""
    rows = [MechanismRow(**row) for row in result.rows]
    tasks = [task["name"] for task in result.config["quality"]["tasks"]]
    longest = max(result.config["speed"]["lengths"])

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    cells = []
    for row in rows:
        scores = [
            "-"
            if task not in row.scores
            else f"{100 * row.scores[task]:.0f} %"
            + (f" ({100 * row.kept[task]:.0f} %)" if task in row.kept else "")
            for task in tasks
        ]
        cells.append(
            (
                row.name if row.causal else f"{row.name} (bidirectional)",
                shown(row.exponent, "{:.2f}"),
                "-" if row.seconds is None else text_of.seconds(row.seconds),
                shown(row.speedup, "{:.2f}x"),
                text_of.megabytes(row.extra_bytes),
                "-" if row.density is None else f"{100 * row.density:.1f} %",
                *scores,
                shown(row.kl, "{:.4f}"),
                shown(None if row.top1 is None else 100 * row.top1, "{:.1f} %"),
                shown(row.perplexity_ratio, "{:.3f}x"),
            )
        )
    title = (
        f"attention alone at {longest:,} tokens; {result.config['quality']['model']} at "
        f"{result.config['text_tokens']:,} tokens, zero-shot (share of full attention's)"
    )
    measured = ("n^", "time", "vs SDPA", "memory", "keys")
    return text_of.Table(title, ("", *measured, *tasks, "KL", "top 1", "perplexity"), cells)


def sentences(result: Result) -> list[str]:
    """What did not run, what saved nothing, and which window was of equal cost."""
    said = [f"{row['name']}: {row['note']}" for row in result.rows if row["note"]]
    tokens = result.config["text_tokens"]
    said += [
        f"{name} is dense at {tokens} tokens: its quality says nothing."
        for name in result.summary["dense"]
    ]
    window = result.summary["window"]
    if window is not None:
        said.insert(0, f"sliding_window has {window} tokens, the cost of ms_swift.")
    return said
