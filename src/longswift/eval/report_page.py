"""The report as one HTML page, made from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longswift.core.files import write_text
from longswift.eval import guarded, pages, pattern_plots, plots, standings
from longswift.eval import report_sections as measured
from longswift.eval import text as text_of
from longswift.eval.report_sections import FIDELITY, RETRIEVAL, WINDOW, ReadingRow
from longswift.eval.results import Result
from longswift.eval.scores import NLL, ScoreRow
from longswift.eval.tasks import TASKS
from longswift.mechanisms import list_mechanisms

_MARKS = {"good": "✓", "bad": "✗", "note": "·"}
_CELLS_WITH_FIGURES = 24


def write(result: Result, path: str | Path) -> Path:
    """Write the page in one step."""
    return write_text(path, html(result))


def html(result: Result) -> str:
    """The page."""
    rows = measured.readings(result)
    config = result.config
    return pages.page(
        "report.html",
        config=config,
        environment=result.environment,
        date=result.date,
        verdict=result.summary["verdict"],
        marks=_MARKS,
        readings=_bars(rows),
        guards=[
            {"label": row.label, "rows": guarded.table(row.guard)}
            for row in rows
            if row.guard is not None
        ],
        retrieval=_retrieval(result),
        fidelity=_fidelity(result),
        windows=_windows(rows),
        perplexity=pages.data_uri(plots.rendered(_by_position(rows), "svg"), "image/svg+xml"),
        pattern=_pattern(result.summary["subject"]),
        options={m["name"]: _options(m, rows) for m in config["mechanisms"]},
        commands=_commands(config),
    )


def _options(config: dict[str, Any], rows: Sequence[ReadingRow]) -> str:
    """Options in words; a window of equal cost is known only after the readings."""
    options = {key: value for key, value in config.items() if key != "name"}
    if config["name"] == WINDOW:
        options["window"] = next(row.windows[0][2] for row in rows if row.name == WINDOW)
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"


def _commands(config: dict[str, Any]) -> dict[str, str]:
    """What measures a section that is missing."""
    names = ",".join(m["name"] for m in config["mechanisms"] if m["name"] != "full")
    common = f"{config['model']} --file {config['file']}"
    if config.get("max_length") is not None:
        common += f" --max-length {config['max_length']} --rope {config['rope'] or 'none'}"
    return {
        RETRIEVAL: f"longswift eval {common} --lengths {config['length']} "
        f"--attention model,{names}",
        FIDELITY: f"longswift fidelity {common} --length {config['length']}",
    }


def _bars(rows: Sequence[ReadingRow]) -> list[dict[str, Any]]:
    """Figures of each reading, with the length of their bars in percent of the longest."""

    def share(value: float, values: list[float]) -> float:
        return round(100 * value / max([*values, 1e-9]), 1)

    seconds = [row.seconds for row in rows]
    peaks = [float(row.peak_bytes or 0) for row in rows]
    return [
        {
            "label": row.label,
            "seconds": text_of.seconds(row.seconds),
            "seconds_bar": share(row.seconds, seconds),
            "faster": text_of.times_faster(rows[0].seconds / row.seconds) if i else "",
            "decode": f"{row.tokens_per_second:.0f}",
            "peak": text_of.megabytes(row.peak_bytes),
            "peak_bar": share(row.peak_bytes or 0, peaks),
            "scored": f"{row.keys_per_query:,.0f} ({100 * row.density:.1f} %)",
            "perplexity": f"{measured.perplexity(row.nll):.3f}",
        }
        for i, row in enumerate(rows)
    ]


def _cell(value: float | None, title: str, figures: bool = True) -> dict[str, Any]:
    """A coloured cell; ``depth`` from 0 to 1, or nothing where nothing was asked."""
    if value is None:
        return {"depth": None, "text": "", "title": title}
    return {
        "depth": round(value, 3),
        "text": f"{100 * value:.0f}" if figures else "",
        "title": title,
    }


def _retrieval(result: Result) -> dict[str, Any] | None:
    """A table of scores, and a map of depth by length for each task with depths."""
    suite = measured.retrieval(result)
    if suite is None:
        return None
    labels = measured.labels(result)
    if suite.summary["windows"]:
        # Another window at each length.
        labels[WINDOW] = "window of equal cost"
    table = standings.table(suite)
    found = standings.rows(suite)
    return {
        "columns": [labels.get(name, name) for name in table.columns],
        "rows": table.rows,
        "sentences": standings.sentences(suite),
        "maps": [
            _depth_map([row for row in found if row.task == task], task, labels)
            for task in dict.fromkeys(row.task for row in found)
            if TASKS.get(task).axis == "depth"
        ],
    }


def _depth_map(rows: list[ScoreRow], task: str, labels: dict[str, str]) -> dict[str, Any]:
    rows = [row for row in rows if row.metric == standings.main_metric(task)]
    placed = {
        (r.mechanism, r.length, r.at): r for r in rows if r.at is not None and r.metric != NLL
    }
    names = list(dict.fromkeys(row.mechanism for row in rows))
    lengths = sorted({row.length for row in rows})
    depths = sorted({at for _, _, at in placed if at is not None})
    panels = []
    for name in names:
        lines = []
        for depth in depths:
            cells = []
            for length in lengths:
                row = placed.get((name, length, depth))
                asked = 0 if row is None else row.count
                title = f"{length:,} tokens, depth {100 * depth:.0f} %: {asked:.0f} asked"
                cells.append(_cell(None if row is None else row.score, title))
            lines.append({"head": f"{100 * depth:.0f} %", "cells": cells})
        panels.append({"title": labels.get(name, name), "lines": lines})
    return {"task": task, "lengths": [text_of.tokens(n) for n in lengths], "panels": panels}


def _fidelity(result: Result) -> dict[str, Any] | None:
    """The model's end as a table, and a map of captured mass, layers by heads."""
    content = measured.section(result, FIDELITY)
    if content is None:
        return None
    labels = {**measured.labels(result), "window": "window of equal cost", "uniform": "uniform"}
    ends = [
        (
            labels.get(name, name),
            f"{100 * row['density']:.1f} %",
            "-" if row["kl"] is None else f"{row['kl']:.4f}",
            "-" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %",
            "-" if row["perplexity_ratio"] is None else f"{row['perplexity_ratio']:.3f}",
        )
        for name, row in content["ends"].items()
    ]
    own = [head for head in content["heads"] if head["name"] == content["measured"]]
    count = 1 + max((head["head"] for head in own), default=0)
    layers = []
    for layer in sorted({head["layer"] for head in own}):
        cells = []
        for head in (h for h in own if h["layer"] == layer):
            title = f"layer {layer}, head {head['head']}: output error {head['error']:.3f}"
            if head["captured_mean"] is not None:
                title += (
                    f", mass: mean {head['captured_mean']:.3f}, 10th percentile "
                    f"{head['captured_p10']:.3f}, least {head['captured_min']:.3f}; "
                    f"{100 * head['density']:.1f} % of the keys"
                )
            cells.append(_cell(head["captured_mean"], title, count <= _CELLS_WITH_FIGURES))
        layers.append({"head": str(layer), "cells": cells})
    return {
        "judge": content["judge"],
        "ends": ends,
        "heads": list(range(count)) if count <= _CELLS_WITH_FIGURES else [],
        "layers": layers,
        "label": labels.get(content["measured"], content["measured"]),
    }


def _windows(rows: Sequence[ReadingRow]) -> list[dict[str, Any]]:
    """Windows of every KV head, of each mechanism whose heads differ in them."""
    found = []
    for row in rows:
        sizes = {size for _, _, size in row.windows}
        if len(sizes) < 2:
            continue
        layers: dict[int, list[tuple[int, int]]] = {}
        for layer, head, size in row.windows:
            layers.setdefault(layer, []).append((head, size))
        widest = max(sizes)
        found.append(
            {
                "label": row.label,
                "heads": max(len(heads) for heads in layers.values()),
                "layers": [
                    {
                        "head": layer,
                        "cells": [
                            {"text": f"{size:,}", "depth": round(size / widest, 3), "title": ""}
                            for _, size in sorted(heads)
                        ],
                    }
                    for layer, heads in sorted(layers.items())
                ],
            }
        )
    return found


def _by_position(rows: Sequence[ReadingRow]) -> Any:
    """Perplexity of equal parts of the text, one line an attention."""
    fig = plots.figure(6, 3)
    axis = fig.subplots()
    styles = ("-", "-", "--", ":", "-.")
    for i, row in enumerate(rows):
        parts = len(row.nll_by_part)
        middle = [(part + 0.5) * row.tokens / parts for part in range(parts)]
        axis.plot(
            middle,
            [measured.perplexity(value) for value in row.nll_by_part],
            marker="os^Dv"[i % 5],
            linestyle=styles[i % len(styles)],
            color=plots.COLOURS[i % len(plots.COLOURS)],
            markersize=4,
            label=row.label,
        )
    axis.set(xlabel="position in the text, tokens", ylabel="perplexity")
    axis.set_xlim(0, rows[0].tokens)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return fig


def _pattern(name: str) -> str | None:
    """The subject at 64 tokens, everything scaled down; None for what the table does not hold."""
    if name not in list_mechanisms():
        return None
    ((shown, graph),) = pattern_plots.pictures(name)
    fig = pattern_plots.draw_picture(shown, graph)
    return pages.data_uri(plots.rendered(fig, colours=pattern_plots.DRAWING), "image/png")
