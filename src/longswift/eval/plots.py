"""Pictures of results, drawn from their JSON; matplotlib is loaded only here."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from longswift.core.files import replace
from longswift.eval import demo, text
from longswift.eval.results import Result, apart, writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#444444", "#d1495b", "#00798c", "#edae49", "#5b5f97", "#2e8b57", "#8d6a9f")


def drawable(path: str | Path, *others: str | Path | None) -> Path:
    """Check, before any long work, that a picture can be written; see ``writable``.

    Args:
        path: The picture.
        others: What else the command writes; see ``apart``.
    """
    apart(*others, path)
    return writable(path, endings=(".png", ".svg"))


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
    """Write an SVG or a PNG, as the name says, in one step; equal figures give equal bytes.

    Args:
        fig: The figure.
        path: File to write.
        colours: Reduce a PNG to so many colours, a quarter of the bytes for a drawing.

    Raises:
        InputError: The name ends in neither.
    """
    kind = drawable(path).suffix.lower()[1:]
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
