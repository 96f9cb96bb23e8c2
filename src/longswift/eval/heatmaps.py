"""Heat maps of retrieval: depth against length, one panel a mechanism, drawn from a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longswift.core.errors import InputError, problem
from longswift.eval import standings, text
from longswift.eval.plots import figure, save
from longswift.eval.results import Result
from longswift.eval.scores import ScoreRow
from longswift.eval.tasks import TASKS

# Red is wrong, blue is right, and both are told apart by those who do not see red and green.
_COLOURS = "RdYlBu"
_CELLS_WITH_FIGURES = 90


def plot_depths(result: Result, path: str | Path) -> Path:
    """One row of panels per task with depths, one column per mechanism, one scale for all.

    Args:
        result: What ``suite.run`` returned.
        path: The PNG.

    Raises:
        InputError: No task of the result has depths.
    """
    found = [row for row in standings.rows(result) if _has_depths(row)]
    if not found:
        raise InputError(
            problem(
                "plot",
                expected="a task with depths, such as needle or kv",
                got=", ".join(task["name"] for task in result.config["tasks"]),
                fix="Leave out --plot, or add --tasks needle.",
            )
        )
    names = [m["name"] for m in result.config["mechanisms"]]
    names = [name for name in names if any(row.mechanism == name for row in found)]
    shown = list(dict.fromkeys(row.task for row in found))
    lengths = sorted({row.length for row in found})
    width = max(2.6, 0.75 * len(lengths)) * len(names) + 2.2
    fig = figure(width, 3.1 * len(shown) + 1.0)
    panels: Any = fig.subplots(len(shown), len(names), squeeze=False)
    image: Any = None
    for line, task in enumerate(shown):
        for column, name in enumerate(names):
            rows = [r for r in found if r.task == task and r.mechanism == name]
            axis = panels[line][column]
            image = _panel(axis, rows, lengths, _depths(found, task))
            if line == 0:
                axis.set_title(_title(result, name), fontsize=11)
            if column == 0:
                axis.set_ylabel(f"{task}\ndepth")
            else:
                axis.set_yticklabels([])
            if line == len(shown) - 1:
                axis.set_xlabel("tokens")
    bar = fig.colorbar(image, ax=panels, shrink=0.9, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    bar.set_label("right answers")
    fig.suptitle(f"{result.config['model']}: score by depth and length", fontsize=12)
    return save(fig, path)


def _has_depths(row: ScoreRow) -> bool:
    task = TASKS.get(row.task)
    return task.axis == "depth" and row.metric == task.metrics[0] and row.at is not None


def _depths(rows: list[ScoreRow], task: str) -> list[float]:
    return sorted({row.at for row in rows if row.task == task and row.at is not None})


def _title(result: Result, name: str) -> str:
    windows = result.summary["windows"].values()
    if name != "sliding_window" or not windows:
        return name
    low, high = min(windows), max(windows)
    size = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{name}\n{size} tokens, equal cost"


def _panel(axis: Any, rows: list[ScoreRow], lengths: list[int], depths: list[float]) -> Any:
    """Cells of one task and mechanism; cells that were never asked stay grey."""
    import numpy as np

    cells = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        cells[depths.index(row.at or 0.0), lengths.index(row.length)] = row.score
    axis.set_facecolor("#d9d9d9")
    image = axis.imshow(cells, cmap=_COLOURS, vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(lengths)), [text.tokens(n) for n in lengths])
    axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axis.set_xticks(np.arange(-0.5, len(lengths)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(depths)), minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    if cells.size <= _CELLS_WITH_FIGURES:
        for (y, x), value in np.ndenumerate(cells):
            if not np.isnan(value):
                dark = value < 0.2 or value > 0.8
                axis.annotate(
                    f"{100 * value:.0f}",
                    (x, y),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
    return image
