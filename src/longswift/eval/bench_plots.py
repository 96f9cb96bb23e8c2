"""Pictures of ``longswift bench``: lines over lengths, drawn from the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longswift.eval import phase_table, text
from longswift.eval.attention_table import (
    AttentionRow,
    baseline,
    baseline_title,
    is_baseline,
    label,
    series,
)
from longswift.eval.plots import COLOURS, figure, save
from longswift.eval.results import Result

_OTHERS = ("#d1495b", "#edae49", "#5b5f97", "#2e8b57", "#8d6a9f", "#c77b30", "#4aa3df")
_DASHES = ("-", "--", ":")
_FEW = 3
# Points nearer than this factor would have their numbers in each other.
_TIE = 1.5


class Line(NamedTuple):
    """How one rival looks in every panel of a figure."""

    label: str
    colour: str
    dashes: str
    width: float = 1.5

    def style(self) -> dict[str, Any]:
        """Arguments of ``Axes.plot``."""
        return {
            "color": self.colour,
            "linestyle": self.dashes,
            "linewidth": self.width,
            "marker": "o",
            "markersize": 4,
            "zorder": self.width,
        }


def lines(labels: Mapping[str, str], baselines: Sequence[str], highlight: str) -> dict[str, Line]:
    """A look for each rival: baselines black, one highlighted, the others told apart.

    Args:
        labels: What the legend says, by name.
        baselines: Names of the baselines.
        highlight: Name of the rival the others stand beside.
    """
    found, others = {}, 0
    for name, words in labels.items():
        if name in baselines:
            found[name] = Line(words, COLOURS[0], _DASHES[list(baselines).index(name) % 3], 2.0)
        elif name == highlight:
            found[name] = Line(words, COLOURS[2], "-", 2.8)
        else:
            turn, colour = divmod(others, len(_OTHERS))
            found[name] = Line(words, _OTHERS[colour], _DASHES[turn % 3])
            others += 1
    return found


def length_axis(axis: Any, lengths: Sequence[int]) -> None:
    """A logarithmic axis of lengths with a tick at each."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [text.tokens(n) for n in lengths], minor=False)
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def seconds_axis(axis: Any, title: str) -> None:
    """A logarithmic axis of times, with enough ticks where they span little."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,)))
    axis.yaxis.set_major_formatter(lambda value, _: text.seconds(value))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(title, fontsize=10, loc="left")


def ratio_axis(axis: Any, title: str) -> None:
    """A logarithmic axis of ratios, with a line at 1; it shows at least half and double."""
    axis.axhline(1, color=COLOURS[0], linewidth=1.5)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(
        lambda value, _: f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x"
    )
    axis.set_title(title, fontsize=10, loc="left")
    axis.margins(y=0.12)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.45), max(high, 2.2))


def _legend(fig: Any, axis: Any) -> None:
    """The lines of one panel, named beside all of them."""
    handles, words = axis.get_legend_handles_labels()
    place = {"loc": "outside right center", "frameon": False}
    fig.legend(handles, words, fontsize=9, handlelength=3, **place)


def plot_attention(result: Result, path: str | Path) -> Path:
    """Seconds, speed-up, memory and share of the roofline against length."""
    found = series(result)
    labels = {}
    for name, rows in found.items():
        exponent = result.summary["exponents"].get(name)
        labels[name] = label(rows[-1], result) + (
            "" if exponent is None else f"\n  time ~ n^{exponent:.2f}"
        )
    base = [name for name in found if is_baseline(result, name)]
    looks = lines(labels, base, "ms_swift")
    panels = [_draw_seconds, _draw_speedups]
    every = [row for rows in found.values() for row in rows]
    panels += [_draw_memory] * any(row.extra_bytes is not None for row in every)
    panels += [_draw_roofline] * any(row.roofline is not None for row in every)
    across = len(panels) if len(panels) < 4 else 2
    down = -(-len(panels) // across)
    fig = figure(1.6 + 5.2 * across, 1 + 4.2 * down)
    axes: Any = fig.subplots(down, across, squeeze=False).ravel()
    for axis, draw in zip(axes, panels, strict=True):
        draw(axis, found, looks, result)
        length_axis(axis, sorted({row.length for row in every}))
    _legend(fig, axes[0])
    config = result.config
    direction = "causal" if config["causal"] else "bidirectional"
    work = "forward + backward" if config["backward"] else "forward"
    fig.suptitle(
        f"Attention only, {direction}, {work}, {config['dtype']}, batch {config['batch']}, "
        f"{config['heads']} heads ({config['kv_heads']} KV) of {config['head_dim']}, "
        f"{result.environment.place(config['device'])}",
        fontsize=11,
    )
    return save(fig, path)


_Series = dict[str, list[AttentionRow]]


def _draw_seconds(axis: Any, found: _Series, looks: dict[str, Line], result: Result) -> None:
    for name, rows in found.items():
        x = [row.length for row in rows]
        axis.plot(x, [row.seconds for row in rows], label=looks[name].label, **looks[name].style())
        axis.fill_between(
            x,
            [row.fastest for row in rows],
            [row.slowest for row in rows],
            color=looks[name].colour,
            alpha=0.15,
            linewidth=0,
        )
    seconds_axis(axis, "time of a call (median, range shaded)")


def _draw_speedups(axis: Any, found: _Series, looks: dict[str, Line], result: Result) -> None:
    rivals = {name: rows for name, rows in found.items() if not is_baseline(result, name)}
    for name, rows in rivals.items():
        axis.plot([r.length for r in rows], [r.speedup for r in rows], **looks[name].style())
    if len(rivals) <= _FEW:
        _number_speedups(axis, rivals, looks)
    ratio_axis(axis, f"times faster than {baseline_title(result)} (line at 1)")


def _number_speedups(axis: Any, rivals: _Series, looks: dict[str, Line]) -> None:
    """Numbers above their points; of those that nearly tie the smaller ones stand below."""
    points: dict[int, list[tuple[float, str]]] = {}
    for name, rows in rivals.items():
        for row in rows:
            points.setdefault(row.length, []).append((row.speedup, name))
    for length, some in points.items():
        higher, below = float("inf"), 0
        for speedup, name in sorted(some, reverse=True):
            below = below + 1 if higher < _TIE * speedup else 0
            higher = speedup
            axis.annotate(
                f"{speedup:.1f}x",
                (length, speedup),
                textcoords="offset points",
                xytext=(0, 7) if below == 0 else (0, -5 - 11 * below),
                ha="center",
                color=looks[name].colour,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
            )


def _draw_memory(axis: Any, found: _Series, looks: dict[str, Line], result: Result) -> None:
    for name, rows in found.items():
        some = [r for r in rows if r.extra_bytes is not None]
        sizes = [max(1.0, (r.extra_bytes or 0) / 2**20) for r in some]
        axis.plot([r.length for r in some], sizes, **looks[name].style())
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_title(
        "working memory beyond inputs and output, MiB (1 or more)", fontsize=10, loc="left"
    )


def _draw_roofline(axis: Any, found: _Series, looks: dict[str, Line], result: Result) -> None:
    for name, rows in found.items():
        some = [(r.length, 100 * r.roofline) for r in rows if r.roofline is not None]
        if some:
            axis.plot(*zip(*some, strict=True), **looks[name].style())
    axis.set_ylim(bottom=0)
    axis.set_title("share of the roofline reached by what is scored, %", fontsize=10, loc="left")


def plot_phase(result: Result, path: str | Path) -> Path:
    """Time, speed-up and, if measured, memory of decoding, prefill or training."""
    found = phase_table.rows(result)
    parts = list(dict.fromkeys(row.part for row in found))
    names = list(dict.fromkeys(row.name for row in found))
    batches = list(dict.fromkeys(row.batch for row in found))
    looks = lines({name: name for name in names}, [baseline(result)], "ms_swift")
    measured = any(row.peak_bytes is not None for row in found)
    across = 2 + measured
    fig = figure(4.6 * across + 1.6, 0.8 + 3.8 * len(parts))
    axes: Any = fig.subplots(len(parts), across, squeeze=False)
    for part, panels in zip(parts, axes, strict=True):
        for name in names:
            for turn, batch in enumerate(batches):
                some = [r for r in found if (r.part, r.name, r.batch) == (part, name, batch)]
                some.sort(key=lambda row: row.length)
                style = {**looks[name].style(), "linestyle": _DASHES[turn % len(_DASHES)]}
                label = name if len(batches) == 1 else f"{name}, batch {batch}"
                x = [row.length for row in some]
                panels[0].plot(x, [row.seconds for row in some], label=label, **style)
                low, high = [r.fastest for r in some], [r.slowest for r in some]
                panels[0].fill_between(x, low, high, color=looks[name].colour, alpha=0.15)
                if name != baseline(result):
                    panels[1].plot(x, [row.speedup for row in some], **style)
                if measured:
                    panels[2].plot(x, [(r.peak_bytes or 0) / 2**20 for r in some], **style)
        words = phase_table.part_title(part)
        seconds_axis(panels[0], f"{words}: time {phase_table.STEP[result.kind]}")
        ratio_axis(panels[1], f"{words}: times faster than {baseline_title(result)}")
        if measured:
            panels[2].set_title(f"{words}: peak memory, MiB", fontsize=10, loc="left")
            panels[2].set_ylim(bottom=0)
        for axis in panels:
            length_axis(axis, sorted({row.length for row in found}))
    _legend(fig, axes[0][0])
    fig.suptitle(phase_table.heading(result), fontsize=11)
    return save(fig, path)
