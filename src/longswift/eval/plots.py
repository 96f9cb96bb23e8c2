"""Pictures of results, drawn from their JSON; matplotlib is loaded only here."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from longswift.eval import demo, text
from longswift.eval.mechanism_table import MechanismRow
from longswift.eval.results import Result, replace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#444444", "#d1495b", "#00798c", "#edae49", "#5b5f97", "#2e8b57", "#8d6a9f")


def figure(width: float, height: float) -> Figure:
    """An empty figure on the Agg canvas; no window system and no global state is touched.

    Args:
        width: Inches.
        height: Inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained"))
    return canvas.figure


def save(fig: Figure, path: str | Path, *, colours: int | None = None) -> Path:
    """Write an SVG if the name says so, else a PNG, in one step; equal figures give equal bytes.

    Args:
        fig: The figure.
        path: File to write.
        colours: Reduce a PNG to so many colours, a quarter of the bytes for a drawing.
    """
    kind = "svg" if Path(path).suffix.lower() == ".svg" else "png"
    return replace(path, lambda file: file.write_bytes(rendered(fig, kind, colours=colours)))


def rendered(fig: Figure, kind: str = "png", *, colours: int | None = None) -> bytes:
    """The figure as PNG or SVG, without date or software in its metadata; see ``save``."""
    from matplotlib import rc_context

    stripped = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    buffer = BytesIO()
    # The salt names the parts of an SVG; a random one would change every file.
    with rc_context({"svg.hashsalt": "longswift"}):
        fig.savefig(buffer, dpi=150, format=kind, metadata=stripped)
    if kind == "svg" or colours is None:
        return buffer.getvalue()
    from PIL import Image

    small = BytesIO()
    Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(
        small, format="png", optimize=True
    )
    return small.getvalue()


def plot_demo(result: Result, path: str | Path) -> Path:
    """Time, memory, and which secret was found at which depth, for each way of reading."""
    found = demo.rows(result)
    colours = {demo.FULL: COLOURS[0], demo.WINDOW: COLOURS[3], demo.SWIFT: COLOURS[2]}
    labels = [row.label.replace(" of ", "\nof ").replace("full ", "full\n") for row in found]
    places = list(range(len(found)))[::-1]
    fig = figure(12, 4.6)
    time, memory, secrets = fig.subplots(1, 3, width_ratios=(1, 0.8, 1.9))

    def bars(axis: Any, values: list[float], shown: list[str], title: str) -> None:
        axis.barh(places, values, color=[colours[row.name] for row in found], height=0.6)
        for place, value, words in zip(places, values, shown, strict=True):
            axis.annotate(
                words, (value, place), xytext=(5, 0), textcoords="offset points", va="center"
            )
        axis.set_xlim(0, 1.45 * max([*values, 1e-9]))
        axis.set_ylim(-0.5, len(found) - 0.5)
        axis.locator_params(axis="x", nbins=4)
        axis.set_title(title, fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)

    seconds = [row.prefill_seconds for row in found]
    bars(time, seconds, [text.seconds(s) for s in seconds], "seconds to read")
    sizes = [row.peak_bytes for row in found]
    bars(memory, [(s or 0) / 2**20 for s in sizes], list(map(text.megabytes, sizes)), "peak MiB")
    time.set_yticks(places, labels)
    memory.set_yticks([])
    for place, row in zip(places, found, strict=True):
        for right, face in ((True, colours[row.name]), (False, "white")):
            depths = [d for d, r in zip(row.depths, row.right, strict=True) if r is right]
            secrets.scatter(
                [100 * d for d in depths],
                [place] * len(depths),
                s=130,
                facecolor=face,
                edgecolor=colours[row.name],
                linewidth=1.5,
            )
        secrets.annotate(
            f"{row.found} of {row.asked}\nppl {row.perplexity:.2f}",
            (104, place),
            va="center",
            annotation_clip=False,
        )
    secrets.set_xlim(-8, 128)
    secrets.set_ylim(-0.5, len(found) - 0.5)
    secrets.set_xticks([0, 25, 50, 75, 100], ["start", "25 %", "50 %", "75 %", "end"])
    secrets.set_yticks([])
    secrets.set_title("secrets found (filled) by their place", fontsize=11, loc="left")
    secrets.spines[["top", "right", "left"]].set_visible(False)
    fig.suptitle("\n".join(wrap(result.summary["verdict"], 125)), fontsize=11)
    return save(fig, path)


def plot_comparison(result: Result, path: str | Path) -> Path:
    """The table of mechanisms as bars: growth, speed, memory, and quality kept."""
    found = [MechanismRow(**row) for row in result.rows]
    found = [row for row in found if row.seconds is not None]
    places = list(range(len(found)))[::-1]
    tasks = [task["name"] for task in result.config["quality"]["tasks"]]
    longest, length = max(result.config["speed"]["lengths"]), result.config["text_tokens"]

    def kept(row: MechanismRow) -> float | None:
        # The worst task: a mean hides what a mechanism cannot do.
        return min(row.kept.values()) if row.kept else None

    panels: list[tuple[str, list[float | None], str, bool]] = [
        ("time grows like n to the", [row.exponent for row in found], "{:.2f}", False),
        (
            f"times faster than SDPA,\n{longest:,} tokens",
            [row.speedup for row in found],
            "{:.2f}x",
            True,
        ),
        (
            "extra memory, MiB",
            [None if r.extra_bytes is None else r.extra_bytes / 2**20 for r in found],
            "{:,.0f}",
            False,
        ),
        (
            f"% of full attention's score kept,\n{length:,} tokens"
            + (f", worst of {len(tasks)} tasks" if len(tasks) > 1 else f", {tasks[0]}"),
            [None if kept(r) is None else 100 * (kept(r) or 0) for r in found],
            "{:.0f} %",
            False,
        ),
        ("next-token KL from full", [row.kl for row in found], "{:.4f}", False),
    ]
    # What was not measured, such as memory without its extra run, needs no room.
    panels = [panel for panel in panels if any(value is not None for value in panel[1])]
    fig = figure(3 * len(panels), 0.42 * len(found) + 2.0)
    axes: Any = fig.subplots(1, len(panels), sharey=True)
    for axis, (title, values, form, logarithmic) in zip(axes, panels, strict=True):
        for place, row, value in zip(places, found, values, strict=True):
            colour = COLOURS[2] if row.name == "ms_swift" else COLOURS[0]
            start = 1.0 if logarithmic else 0.0
            end = start if value is None else value
            axis.barh(place, end - start, left=start, color=colour, height=0.65, alpha=0.9)
            axis.annotate(
                "-" if value is None else form.format(value),
                (max(start, end), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        top = max([v for v in values if v is not None], default=1.0)
        if logarithmic:
            axis.set_xscale("log", base=2)
            axis.axvline(1, color="black", linewidth=0.8)
            low = min([v for v in values if v is not None], default=1.0)
            axis.set_xlim(min(0.5, low / 2), max(2.0, 4 * top))
            axis.xaxis.set_major_formatter(
                lambda value, _: f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x"
            )
        else:
            low = min([v for v in values if v is not None], default=0.0)
            axis.set_xlim(min(0.0, low), 1.4 * max(top, 1e-9))
            axis.locator_params(axis="x", nbins=4)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    names = [row.name if row.causal else f"{row.name}\n(bidirectional)" for row in found]
    axes[0].set_yticks(places, names)
    fig.suptitle(
        f"Mechanisms on the same work: attention alone ({result.config['speed']['dtype']}, "
        f"{result.environment.threads} thread(s)), and {result.config['quality']['model']} "
        "zero-shot",
        fontsize=11,
    )
    return save(fig, path)
