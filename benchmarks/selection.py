"""Which keys to choose: quality against time of every selector and setting, on one model.

``python benchmarks/selection.py [--length 32768] [--only bounds] [--json results/selection.json]``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from longswift import MSSwift, SlidingWindow
from longswift.core.errors import InputError, LongSwiftError, problem
from longswift.core.mechanism import Mechanism
from longswift.eval import selection
from longswift.eval.options import length
from longswift.eval.plots import COLOURS, figure, save
from longswift.eval.results import Result, load
from longswift.mechanisms.selectors.antidiagonal import Antidiagonal
from longswift.mechanisms.selectors.bounds import Bounds

# Layers that see everything have two KV heads in the model studied, hence windows of 512 and 128.
CONFIGS: dict[str, Mechanism] = {
    "window 1024": SlidingWindow(window=1024),
    "window 4096": SlidingWindow(window=4096),
    "no key tokens": MSSwift(key_tokens=0),
    "antidiagonal 4": MSSwift(selector=Antidiagonal(stride=4)),
    "antidiagonal 8": MSSwift(selector=Antidiagonal(stride=8)),
    "bounds": MSSwift(),
    "bounds, no remainder": MSSwift(remainder=None),
    "bounds, remainder 64": MSSwift(remainder=64),
    "bounds, remainder 1024": MSSwift(remainder=1024),
    "bounds, full radii": MSSwift(selector=Bounds(key_radius=1.0, row_radius=1.0)),
    "bounds, keys by 16": MSSwift(selector=Bounds(key_block=16)),
    "bounds, rows by 8": MSSwift(selector=Bounds(row_group=8)),
    "bounds, rows by 4": MSSwift(selector=Bounds(row_group=4)),
    "bounds, 2 proposals": MSSwift(selector=Bounds(proposals=2)),
    "bounds, 8 proposals": MSSwift(selector=Bounds(proposals=8)),
    "bounds, 16 proposals": MSSwift(selector=Bounds(proposals=16)),
    "bounds, block 64": MSSwift(block=64),
    "bounds, block 32": MSSwift(block=32),
    "bounds, 128 key tokens": MSSwift(key_tokens=128),
    "bounds, 512 key tokens": MSSwift(key_tokens=512),
    "bounds, 1024 key tokens": MSSwift(key_tokens=1024),
}


def plot(result: Result, path: Path) -> Path:
    """Divergence, captured mass and secrets against speed, each mechanism a labelled point."""
    rows = [row for row in result.summary["mechanisms"] if row["name"] != "full"]
    fig = figure(13, 5)
    panels: tuple[tuple[str, Any], ...] = (
        ("next-token divergence from full attention, nats", lambda row: row["kl"]),
        ("attention mass not captured", lambda row: 1 - row["captured"]),
        ("secrets lost", lambda row: 1 - row["found"] / max(1, row["asked"])),
    )
    for axis, (title, value) in zip(fig.subplots(1, 3), panels, strict=True):
        for number, row in enumerate(rows, 1):
            colour = COLOURS[sum(map(ord, row["name"].split(",")[0].split()[0])) % len(COLOURS)]
            axis.plot(row["ratio"], value(row), "o", color=colour, markersize=6)
            axis.annotate(
                str(number),
                (row["ratio"], value(row)),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=8,
            )
        axis.set_xlabel("times faster than SDPA, attention alone")
        axis.set_ylabel(title)
        axis.grid(True, alpha=0.3)
    fig.axes[0].set_yscale("log")
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
    parser.add_argument("--only", help="labels that contain this")
    parser.add_argument("--json", type=Path, default=Path("results/selection.json"))
    parser.add_argument("--png", type=Path, help="draw the result")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run")
    given = parser.parse_args()
    try:
        chosen = {k: v.to_dict() for k, v in CONFIGS.items() if (given.only or "") in k}
        if not chosen:
            raise InputError(
                problem("--only", expected=f"part of {list(CONFIGS)}", got=given.only, fix="Pick.")
            )
        study = selection.Study(
            mechanisms=chosen,
            model=given.model,
            length=length(given.length),
            documents=given.documents,
            repeats=given.repeats,
        )
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
