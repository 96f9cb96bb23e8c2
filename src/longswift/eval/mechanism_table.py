"""The tables of mechanisms for people: one row each, and in words what did not run."""

from __future__ import annotations

from dataclasses import dataclass, field

from longswift.eval import text as text_of
from longswift.eval.results import Result


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
        tuned_scores: Score of each task after the fine-tuning; empty without one.
        tuned_kept: The same as shares of full attention's after the same fine-tuning.
        tuned_perplexity: Of the text, after it.
        tuned_perplexity_ratio: The same over full attention's after it.
        tuned_loss: Of the last training steps, mean.
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
    tuned_scores: dict[str, float] = field(default_factory=dict)
    tuned_kept: dict[str, float] = field(default_factory=dict)
    tuned_perplexity: float | None = None
    tuned_perplexity_ratio: float | None = None
    tuned_loss: float | None = None
    note: str = ""


def speed(result: Result) -> text_of.Table:
    """Growth, time and memory of attention alone."""
    longest = max(result.config["speed"]["lengths"])
    cells = [
        (
            row.name if row.causal else f"{row.name} (bidirectional)",
            _shown(row.exponent, "{:.2f}"),
            "-" if row.seconds is None else text_of.seconds(row.seconds),
            _shown(row.speedup, "{:.2f}x"),
            text_of.megabytes(row.extra_bytes),
            _share(row.density),
        )
        for row in _rows(result)
    ]
    columns = ["", "n^", "time", "vs SDPA", "memory", "keys"]
    return text_of.Table(f"attention alone at {longest:,} tokens", columns, cells)


def quality(result: Result) -> text_of.Table:
    """What a model does with each mechanism, zero-shot and after a fine-tuning if there was one."""
    tasks = [task["name"] for task in result.config["quality"]["tasks"]]
    tuning = result.config.get("tuning")
    # The share of keys belongs to the tasks' length only if attention was timed there.
    length = result.config["text_tokens"]
    timed = max(result.config["speed"]["lengths"]) == length
    cells = []
    for row in _rows(result):
        if not row.scores:
            continue
        cell = [row.name, *([_share(row.density)] if timed else [])]
        cell += [_score(row.scores, row.kept, task) for task in tasks]
        cell.append(_shown(row.perplexity_ratio, "{:.3f}x"))
        cell.append(_shown(row.kl, "{:.4f}"))
        cell.append(_shown(None if row.top1 is None else 100 * row.top1, "{:.1f} %"))
        if tuning is not None:
            cell += [_score(row.tuned_scores, row.tuned_kept, task) for task in tasks]
            cell.append(_shown(row.tuned_perplexity_ratio, "{:.3f}x"))
        cells.append(tuple(cell))
    columns = ["", *(["keys"] if timed else []), *tasks, "perplexity", "KL", "top 1"]
    title = f"{result.config['quality']['model']} at {length:,} tokens, zero-shot"
    if tuning is not None:
        title += f" and after {tuning['steps']} equal steps of fine-tuning"
        columns += [*(f"{task}, tuned" for task in tasks), "perplexity, tuned"]
    return text_of.Table(f"{title} (share of full attention's)", columns, cells)


def _rows(result: Result) -> list[MechanismRow]:
    return [MechanismRow(**row) for row in result.rows]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _score(scores: dict[str, float], kept: dict[str, float], task: str) -> str:
    if task not in scores:
        return "-"
    share = f" ({100 * kept[task]:.0f} %)" if task in kept else ""
    return f"{100 * scores[task]:.0f} %{share}"


def sentences(result: Result) -> list[str]:
    """What did not run or saved nothing, what guards did, which window was of equal cost."""
    said = [f"{row['name']}: {row['note']}" for row in result.rows if row["note"]]
    tokens = result.config["text_tokens"]
    said += [
        f"{name} is dense at {tokens:,} tokens: its quality says nothing."
        for name in result.summary["dense"]
    ]
    said += result.summary.get("guards", [])
    window = result.summary["window"]
    if window is not None:
        said.insert(0, f"sliding_window has {window:,} tokens, the cost of ms_swift.")
    return said
