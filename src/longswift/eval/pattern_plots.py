"""Pictures of attention patterns: the matrix of who sees whom, and tokens on a circle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longswift.eval import pattern_table, plots
from longswift.eval.patterns import Picture, Why, check_length, options_in_words, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Hues that colour-blind readers tell apart; lightness falls with the reason, so greys do as well.
COLOURS: dict[Why, str] = {
    Why.SUMMARY: "#e6e9f0",
    Why.STATE: "#b9d8b5",
    Why.FULL_ROW: "#8fbbe2",
    Why.CHOSEN: "#e08a00",
    Why.WINDOW: "#2670a8",
    Why.GLOBAL: "#1f1f3d",
}
_FRAME, _NODE = "#8a8f98", "#333333"
# Beyond this many shapes a drawing program suffers more from vectors than from pixels.
_MOST_VECTORS = 6000
_ON_CIRCLE = 24
# Colours of a drawing with a few flat ones and their edges.
DRAWING = 48
_WIDTH = 9.6


def draw(
    names: str | None,
    path: str | Path,
    *,
    length: int = 64,
    settings: Sequence[str] = (),
    causal: bool = True,
) -> list[Picture]:
    """Draw one mechanism with its heads, or a sheet of several.

    Args:
        names: Comma-separated mechanisms, or None for a sheet of all of them. In a sheet of all a
            mechanism that has only one form is drawn in that form, and the sheet says so.
        path: File to write, PNG or SVG.
        length: Tokens of the matrices.
        settings: Options, see ``pattern_table.mechanisms``.
        causal: The causal or the bidirectional form.

    Raises:
        ConfigError: Unknown names or impossible options.
        InputError: Another kind of file.
        UnsupportedError: A mechanism named has no such form.
    """
    plots.drawable(path)
    pairs = pictures(names, length=length, settings=settings, causal=causal)
    fig = draw_picture(*pairs[0]) if len(pairs) == 1 else draw_sheet(pairs)
    plots.save(fig, path, colours=DRAWING)
    return [shown for shown, _ in pairs]


def pictures(
    names: str | None, *, length: int = 64, settings: Sequence[str] = (), causal: bool = True
) -> list[tuple[Picture, Picture]]:
    """Each mechanism at ``length`` tokens and at few, see ``draw``."""
    check_length(length)
    on_circle = min(_ON_CIRCLE, length)
    pairs = []
    for large, small in zip(
        pattern_table.mechanisms(names, settings, length),
        pattern_table.mechanisms(names, settings, on_circle),
        strict=True,
    ):
        form = causal
        if names is None:
            form = large.supports_causal and (causal or not large.supports_bidirectional)
        pairs.append((picture(large, length, causal=form), picture(small, on_circle, causal=form)))
    return pairs


def draw_picture(shown: Picture, graph: Picture) -> Figure:
    """The matrix of each different head above the graphs by reason.

    Args:
        shown: The matrices.
        graph: The same mechanism at few tokens, since a circle of many is one blot.
    """
    parts = _parts(graph)
    fig = plots.figure(_WIDTH, 6.2)
    halves: Any = fig.subfigures(2, 1, height_ratios=(3.4, 2.5))
    top, bottom = halves
    matrices = top.subplots(1, len(shown.heads), squeeze=False)[0]
    for axis, heads in zip(matrices, shown.heads, strict=True):
        _matrix(axis, heads.why)
        axis.set_title(heads.label, fontsize=9)
    matrices[0].set(xlabel="keys", ylabel="queries")
    circles = bottom.subplots(1, len(parts), squeeze=False)[0]
    for axis, (title, chosen) in zip(circles, parts, strict=True):
        _circle(axis, graph, chosen)
        axis.set_title(title, fontsize=9)
    bottom.suptitle(f"Who sees whom, {graph.length} tokens on a circle", fontsize=9, color=_NODE)
    _legend(bottom, shown.mechanism.name, sorted({*shown.reasons, *graph.reasons}, reverse=True))
    top.suptitle(_title(shown), fontsize=10)
    return fig


def draw_sheet(pictures: Sequence[tuple[Picture, Picture]]) -> Figure:
    """A matrix and a graph of every mechanism.

    Args:
        pictures: Matrices, each with the same mechanism at few tokens for the graph.
    """
    columns = min(3, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    fig = plots.figure(max(_WIDTH / 2, 4.4 * columns), 2.5 * rows + 0.6)
    axes = fig.subplots(rows, 2 * columns, squeeze=False)
    for axis in axes.flat[2 * len(pictures) :]:
        axis.set_visible(False)
    for i, (shown, graph) in enumerate(pictures):
        left, right = axes.flat[2 * i : 2 * i + 2]
        _matrix(left, shown.heads[0].why, ticks=False)
        _circle(right, graph, [*COLOURS])
        left.set_title(shown.mechanism.name, fontsize=10, loc="left", fontweight="bold")
        right.set_title(_share(shown), fontsize=8, loc="left", color=_NODE)
        left.set_xlabel("causal" if shown.causal else "bidirectional")
    reasons = {why for pair in pictures for shown in pair for why in shown.reasons}
    _legend(fig, None, sorted(reasons, reverse=True))
    return fig


def _title(shown: Picture) -> str:
    form = "causal" if shown.causal else "bidirectional"
    head = f"{shown.mechanism.name}, {form}, {shown.length} tokens: {_share(shown)}"
    return "\n".join([head, *wrap(options_in_words(shown.mechanism), 110)])


def _share(shown: Picture) -> str:
    if Why.STATE in shown.reasons:
        return "no subset of keys"
    return f"{100 * shown.density:.0f} % of pairs exact"


def _matrix(axis: Any, why: Tensor, *, ticks: bool = True) -> None:
    """Queries downwards, keys to the right."""
    from matplotlib.collections import PolyCollection

    queries, keys = why.shape
    boxes = list(rectangles(why))
    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h, _ in boxes]
    axis.add_collection(
        PolyCollection(
            corners,
            facecolors=[COLOURS[reason] for *_, reason in boxes],
            edgecolors="none",
            antialiased=False,
            rasterized=len(boxes) > _MOST_VECTORS,
        )
    )
    axis.set(xlim=(0, keys), ylim=(queries, 0), aspect="equal")
    axis.spines[:].set(color=_FRAME, linewidth=0.8)
    axis.tick_params(labelsize=7, color=_FRAME, length=2)
    axis.xaxis.label.set_size(8)
    axis.yaxis.label.set_size(8)
    axis.xaxis.tick_top()
    step = keys // 4
    axis.set_xticks(range(0, keys + 1, step) if ticks else [])
    axis.set_yticks(range(0, queries + 1, step) if ticks else [])


def rectangles(why: Tensor) -> Iterator[tuple[int, int, int, int, Why]]:
    """Rectangles of one reason that cover ``why [Lq, Lk]``: column, row, width, height, reason."""
    open_runs: dict[tuple[int, int, int], int] = {}
    for row, line in enumerate([*why.tolist(), []]):
        runs = set(_runs(line))
        for run in [r for r in open_runs if r not in runs]:
            start, end, reason = run
            top = open_runs.pop(run)
            yield start, top, end - start, row - top, Why(reason)
        for run in sorted(runs):
            open_runs.setdefault(run, row)


def _runs(line: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for i in range(1, len(line) + 1):
        if i == len(line) or line[i] != line[start]:
            if line[start]:
                yield start, i, line[start]
            start = i


def _parts(graph: Picture) -> list[tuple[str, list[Why]]]:
    """The graphs of the articles: full attention, each kind of edge alone, and all of them."""
    name, reasons = graph.mechanism.name, graph.reasons
    alone = [why for why in (Why.CHOSEN, Why.WINDOW, Why.GLOBAL) if why in reasons]
    parts: list[tuple[str, list[Why]]] = [("full attention", [])]
    if len(reasons) > 1:
        parts += [(pattern_table.label(name, why), [why]) for why in alone]
    return [*parts, (name, reasons)]


def _circle(axis: Any, shown: Picture, chosen: list[Why]) -> None:
    """Tokens clockwise from the top; a line joins two of which one sees the other.

    The head with most kinds of edges is drawn; ``chosen`` empty stands for full attention.
    """
    from matplotlib.collections import LineCollection

    n = shown.length
    why = max((heads.why for heads in shown.heads), key=lambda w: len(w.unique()))
    angle = torch.arange(n) * (2 * math.pi / n)
    x, y = angle.sin(), angle.cos()
    ends = torch.stack([x, y], 1)
    layers = [(why == int(reason), COLOURS[reason]) for reason in sorted(chosen)]
    if not chosen:
        layers = [(torch.ones(n, n, dtype=torch.bool), _FRAME)]
    for mask, colour in layers:
        pair = (mask | mask.T).triu(1).nonzero()
        if not len(pair):
            continue
        axis.add_collection(
            LineCollection(
                ends[pair].tolist(),
                colors=colour,
                linewidths=min(0.9, 20 / n) if chosen else 0.4,
                rasterized=len(pair) > _MOST_VECTORS,
            )
        )
    axis.scatter(x.tolist(), y.tolist(), s=min(16, 400 / n), color=_NODE, zorder=3, linewidths=0)
    axis.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), aspect="equal")
    axis.axis("off")


def _legend(fig: Any, name: str | None, reasons: list[Why]) -> None:
    from matplotlib.patches import Patch

    marks = [
        Patch(
            facecolor=COLOURS[why],
            edgecolor=_FRAME,
            linewidth=0.6,
            label=pattern_table.label(name, why),
        )
        for why in reasons
    ]
    fig.legend(handles=marks, loc="outside lower center", ncols=6, frameon=False, fontsize=9)


def lines(pictures: Sequence[Picture]) -> list[str]:
    """What the pictures show, a line for each."""
    return [_title(shown).partition("\n")[0] for shown in pictures]
