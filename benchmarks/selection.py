"""Which keys to choose: quality against time of every selector and setting, on one model.

``python benchmarks/selection.py [--length 32768] [--only bounds] [--json results/selection.json]``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from longswift import MSSwift, SlidingWindow
from longswift.cli.positions import extension
from longswift.core.errors import LongSwiftError
from longswift.core.mechanism import Mechanism
from longswift.eval import options, selection
from longswift.eval.plots import COLOURS, drawable, figure, save
from longswift.eval.results import Result, load
from longswift.mechanisms.selectors.anchor import Anchor
from longswift.mechanisms.selectors.antidiagonal import Antidiagonal
from longswift.mechanisms.selectors.bounds import Bounds
from longswift.mechanisms.selectors.centroids import Centroids
from longswift.mechanisms.selectors.lowrank import LowRank
from longswift.mechanisms.selectors.pooled import Pooled

# Groups of rows stand for their centres: a third fewer products with boxes.
CENTRES: dict[str, Any] = {"key_radius": 0.7, "row_radius": 0.0}
# Settings beside the default that change one thing each, then other ways to propose.
CONFIGS: dict[str, Mechanism] = {
    "window 1024": SlidingWindow(window=1024),
    "no key tokens": MSSwift(key_tokens=0),
    "centroids": MSSwift(),
    "centroids, no remainder": MSSwift(remainder=None),
    "centroids, remainder 64": MSSwift(remainder=64),
    "centroids, rows 16": MSSwift(selector=Centroids(rows=16)),
    "centroids, rows 8": MSSwift(selector=Centroids(rows=8)),
    "centroids, rows 4": MSSwift(selector=Centroids(rows=4, far=65_536)),
    "centroids, proposals 4": MSSwift(selector=Centroids(proposals=4)),
    "centroids, proposals 8": MSSwift(selector=Centroids(proposals=8)),
    "centroids, proposals 32": MSSwift(selector=Centroids(proposals=32)),
    "centroids, 128 tokens": MSSwift(key_tokens=128, selector=Centroids(proposals=32)),
    "centroids, 512 tokens": MSSwift(key_tokens=512, selector=Centroids(proposals=8)),
    "centroids, block 64": MSSwift(block=64),
    "centroids, block 64 of 12x": MSSwift(block=64, selector=Centroids(proposals=12)),
    "centroids, block 32": MSSwift(block=32),
    "bounds": MSSwift(key_tokens=128, selector=Bounds()),
    "bounds, full radii": MSSwift(key_tokens=128, selector=Bounds(key_radius=1, row_radius=1)),
    "bounds, rows by 8": MSSwift(key_tokens=128, selector=Bounds(row_group=8)),
    "bounds, proposals 24": MSSwift(key_tokens=128, selector=Bounds(proposals=24)),
    "bounds, 256 tokens of 16x": MSSwift(selector=Bounds(proposals=16, most_proposals=32)),
    "bounds, keys by 1 and 48x": MSSwift(
        key_tokens=128, selector=Bounds(key_block=1, proposals=48)
    ),
    "bounds, tree 16": MSSwift(key_tokens=128, selector=Bounds(tree=16)),
    "bounds, centres of 16 rows": MSSwift(key_tokens=128, selector=Bounds(row_group=16, **CENTRES)),
    "bounds, tree 16, centres": MSSwift(
        key_tokens=128, selector=Bounds(tree=16, row_group=16, **CENTRES)
    ),
    "antidiagonal 4": MSSwift(selector=Antidiagonal(stride=4)),
    "antidiagonal 8": MSSwift(selector=Antidiagonal(stride=8)),
    "anchor 64": MSSwift(selector=Anchor(stride=64)),
    "anchor 16": MSSwift(selector=Anchor(stride=16)),
    "centroids, delta 64": MSSwift(delta=64),
    "pooled 16": MSSwift(key_tokens=128, selector=Pooled(proposals=12, most_proposals=64)),
    "pooled 4": MSSwift(
        key_tokens=128, selector=Pooled(key_block=4, proposals=12, most_proposals=64)
    ),
    "lowrank": MSSwift(
        key_tokens=128, selector=LowRank(key_block=4, proposals=12, most_proposals=64)
    ),
}

# What brings predictions closer beyond 32k tokens, and what it costs there; on request only.
CLOSER: dict[str, Mechanism] = {
    "centroids, 384 of 24x": MSSwift(key_tokens=384, selector=Centroids(proposals=24)),
    "centroids, 512 of 16x": MSSwift(key_tokens=512),
    "centroids, 512 of 32x": MSSwift(key_tokens=512, selector=Centroids(proposals=32)),
    "centroids, 256 of 64x": MSSwift(selector=Centroids(proposals=64)),
    "centroids, block 64 of 32x": MSSwift(block=64, selector=Centroids(proposals=32)),
    "centroids, block 64, 384": MSSwift(block=64, key_tokens=384),
    "centroids, far 65536": MSSwift(selector=Centroids(far=65_536)),
    "centroids, far 65536, 32x": MSSwift(selector=Centroids(far=65_536, proposals=32)),
    "centroids, far 65536, 512": MSSwift(key_tokens=512, selector=Centroids(far=65_536)),
    "centroids, far 65536, block 64": MSSwift(block=64, selector=Centroids(far=65_536)),
    "centroids, 1024 of 16x": MSSwift(key_tokens=1024),
    "centroids, 1024 of 32x": MSSwift(key_tokens=1024, selector=Centroids(proposals=32)),
}

# Points closer than this, in pixels across and up, share a label.
_APART = 20, 12


def _kind(row: dict[str, Any]) -> str:
    """Selector of a row, for its colour."""
    return str(row["name"]).split(",")[0].split()[0]


def _number(axis: Any, points: list[tuple[float, float]]) -> None:
    """Numbers the points above 0, from 1; those that lie on each other share a label."""
    together: list[tuple[tuple[float, float], list[int]]] = []
    for number, point in enumerate(points, 1):
        if point[1] <= 0:
            continue
        x, y = axis.transData.transform(point)
        for (other_x, other_y), numbers in together:
            if abs(x - other_x) < _APART[0] and abs(y - other_y) < _APART[1]:
                numbers.append(number)
                break
        else:
            together.append(((x, y), [number]))
    for _, numbers in together:
        axis.annotate(
            " ".join(map(str, numbers)),
            points[numbers[0] - 1],
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=8,
        )


def plot(result: Result, path: Path) -> Path:
    """Divergence, captured mass and secrets against speed, each mechanism a labelled point."""
    rows = [row for row in result.summary["mechanisms"] if row["name"] != "full"]
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    fig = figure(13, 5)
    panels: tuple[tuple[str, Any], ...] = (
        ("next-token divergence from full attention, nats", lambda row: row["kl"]),
        ("attention mass not captured", lambda row: 1 - row["captured"]),
        (
            "secrets lost (numbers: those that lose any)",
            lambda row: 1 - row["found"] / max(1, row["asked"]),
        ),
    )
    for axis, (title, value) in zip(fig.subplots(1, 3), panels, strict=True):
        for row in rows:
            turn, colour = divmod(kinds.index(_kind(row)), len(COLOURS))
            marker = "osD"[turn % 3]
            axis.plot(row["ratio"], value(row), marker, color=COLOURS[colour], markersize=6)
        axis.set_xlabel("times faster than SDPA, attention alone")
        axis.set_ylabel(title)
        axis.grid(True, alpha=0.3)
    for axis in fig.axes[:2]:
        axis.set_yscale("log")
    for axis, (_, value) in zip(fig.axes, panels, strict=True):
        _number(axis, [(row["ratio"], value(row)) for row in rows])
    names = "   ".join(f"{number} {row['name']}" for number, row in enumerate(rows, 1))
    fig.text(0.01, 0.01, names, fontsize=7.5, wrap=True, verticalalignment="bottom")
    config = result.config
    fig.suptitle(
        f"{config['model']}, {config['documents']} x {config['length']:,} tokens: lower right is "
        "better",
        fontsize=11,
    )
    fig.set_layout_engine("tight", rect=(0, 0.09, 1, 0.97))
    return save(fig, path)


def main() -> int:
    """Compare, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--length", default="32768")
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-length", help="extend the model's positions to this many tokens")
    parser.add_argument("--rope", default="yarn", help="scaling of rotary positions for that")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="that of the checkpoint by default")
    parser.add_argument("--only", help="labels, separated by semicolons")
    parser.add_argument("--json", type=Path, default=Path("results/selection.json"))
    parser.add_argument("--png", type=Path, help="draw the result")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run")
    given = parser.parse_args()
    try:
        chosen = options.labelled(given.only, CONFIGS | CLOSER) if given.only else CONFIGS
        study = selection.Study(
            mechanisms={label: mechanism.to_dict() for label, mechanism in chosen.items()},
            model=given.model,
            length=options.length(given.length),
            documents=given.documents,
            **extension(given.max_length, given.rope),
            device=given.device,
            dtype=given.dtype,
            repeats=given.repeats,
        )
        if given.png:
            drawable(given.png)
        selection.run(study, given.json, fresh=given.fresh)
        result = load(given.json, selection.KIND)
        if given.png:
            plot(result, given.png)
    except (LongSwiftError, OSError) as error:
        print(f"selection: {error}", file=sys.stderr)
        return 2
    found = selection.table(result)
    print(found.title)
    for row in [found.columns, *found.rows]:
        print(f"{row[0]:26}" + "".join(f"{cell:>13}" for cell in row[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
