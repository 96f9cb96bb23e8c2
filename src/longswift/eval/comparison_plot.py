"""The picture of ``longswift compare``: a bar per mechanism in every panel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longswift.eval.mechanism_table import MechanismRow
from longswift.eval.plots import COLOURS, figure, save
from longswift.eval.results import Result

_SWIFT, _OTHER = COLOURS[2], COLOURS[0]
_SWIFT_BEFORE, _OTHER_BEFORE = "#8cc3ca", "#b8b8b8"


class Panel(NamedTuple):
    """One quantity of all mechanisms, measured once or before and after the fine-tuning."""

    title: str
    form: str
    values: Sequence[float | None]
    tuned: Sequence[float | None] = ()
    logarithmic: bool = False

    def found(self) -> list[float]:
        """All figures there are."""
        return [value for value in (*self.values, *self.tuned) if value is not None]


def plot_comparison(result: Result, path: str | Path) -> Path:
    """Growth, speed, memory and quality kept; after the fine-tuning, too, if there was one."""
    rows = [MechanismRow(**row) for row in result.rows]
    rows = [row for row in rows if row.seconds is not None]
    # What was not measured, such as memory without its extra run, needs no room.
    panels = [panel for panel in _panels(result, rows) if panel.found()]
    tuning = result.config.get("tuning")
    fig = figure(3 * len(panels), (0.55 if tuning else 0.42) * len(rows) + 2.0)
    axes: Any = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, rows)
    names = [row.name if row.causal else f"{row.name}\n(bidirectional)" for row in rows]
    axes[0].set_yticks(_places(rows), names)
    done = (
        f"zero-shot (light) and after {tuning['steps']} equal steps of fine-tuning (dark)"
        if tuning
        else "zero-shot"
    )
    fig.suptitle(
        f"Mechanisms on the same work: attention alone ({result.config['speed']['dtype']}, "
        f"{result.environment.threads} thread(s)), and {result.config['quality']['model']} {done}",
        fontsize=11,
    )
    return save(fig, path)


def _places(rows: Sequence[MechanismRow]) -> list[int]:
    return list(range(len(rows)))[::-1]


def _panels(result: Result, rows: Sequence[MechanismRow]) -> list[Panel]:
    tasks = [task["name"] for task in result.config["quality"]["tasks"]]
    longest, length = max(result.config["speed"]["lengths"]), result.config["text_tokens"]
    which = f"worst of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]

    def worst(kept: dict[str, float]) -> float | None:
        # A mean hides what a mechanism cannot do.
        return 100 * min(kept.values()) if kept else None

    return [
        Panel("time grows like n to the", "{:.2f}", [row.exponent for row in rows]),
        Panel(
            f"times faster than SDPA,\n{longest:,} tokens",
            "{:.2f}x",
            [row.speedup for row in rows],
            logarithmic=True,
        ),
        Panel(
            "extra memory, MiB",
            "{:,.0f}",
            [None if r.extra_bytes is None else r.extra_bytes / 2**20 for r in rows],
        ),
        Panel(
            f"% of full attention's score kept,\n{length:,} tokens, {which}",
            "{:.0f} %",
            [worst(row.kept) for row in rows],
            [worst(row.tuned_kept) for row in rows],
        ),
        Panel("next-token KL from full", "{:.4f}", [row.kl for row in rows]),
        Panel(
            "perplexity over full attention's",
            "{:.3f}x",
            [row.perplexity_ratio for row in rows],
            [row.tuned_perplexity_ratio for row in rows],
            logarithmic=True,
        ),
    ]


def _draw(axis: Any, panel: Panel, rows: Sequence[MechanismRow]) -> None:
    tuned = any(value is not None for value in panel.tuned)
    both = [(panel.values, 0.19, 0.36), (panel.tuned, -0.19, 0.36)]
    for values, shift, height in both if tuned else [(panel.values, 0.0, 0.65)]:
        before = tuned and values is panel.values
        for place, row, value in zip(_places(rows), rows, values, strict=True):
            own, light = _OTHER, _OTHER_BEFORE
            if row.name == "ms_swift":
                own, light = _SWIFT, _SWIFT_BEFORE
            start = 1.0 if panel.logarithmic else 0.0
            end = start if value is None else value
            axis.barh(
                place + shift,
                end - start,
                left=start,
                color=light if before else own,
                height=height,
            )
            axis.annotate(
                "-" if value is None else panel.form.format(value),
                (max(start, end), place + shift),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8 if tuned else 9,
            )
    low, top = min(panel.found()), max(panel.found())
    if panel.logarithmic:
        axis.set_xscale("log", base=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(min(0.5, low / 2), max(2.0, 4 * top))
        axis.xaxis.set_major_formatter(
            lambda value, _: f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x"
        )
    else:
        axis.set_xlim(min(0.0, low), 1.4 * max(top, 1e-9))
        axis.locator_params(axis="x", nbins=4)
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
