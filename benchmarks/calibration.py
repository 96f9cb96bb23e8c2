"""Does one half of a text predict what a profile keeps in the other? Several texts, seeds, lengths.

``python benchmarks/calibration.py [--text NAME=FILE ...] [--lengths 4k,8k] [--json FILE]``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from longswift.core.errors import LongSwiftError
from longswift.eval import options
from longswift.eval.calibration_runs import Calibration, run
from longswift.eval.calibration_summary import CLOSE
from longswift.eval.results import Progress, Result, writable

PYTHON = "python"


def measured(asked: Calibration, place: Path) -> dict[str, Any]:
    """Calibrate once; the profile is kept."""
    _, result = run(asked, place, progress=False)
    found = {k: v for k, v in result.summary.items() if k not in ("layers", "verdict")}
    return {"documents": result.config["documents"], **found}


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    other = row["another"]
    chance = row["off_margin"]
    return (
        row["text"],
        f"{row['length']:,} x {row['documents']}",
        f"{row['seed']}",
        f"{100 * row['predicted']:.1f} %",
        f"{100 * row['checked']:.1f} %",
        f"{100 * (row['predicted'] - row['checked']):+.2f}",
        "-" if chance is None else f"{100 * chance:.2f}",
        f"{100 * row['worst_head_off']:.1f}",
        "-" if other is None else f"{100 * other['low']:.1f} - {100 * other['high']:.1f} %",
    )


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--lengths", default="8k")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--set", action="append", default=[], metavar="ms_swift.OPTION=VALUE")
    parser.add_argument("--json", type=Path, default=Path("results/calibration.json"))
    given = parser.parse_args()
    try:
        texts = dict(one.split("=", 1) for one in given.text) or {PYTHON: ""}
        config = {
            "model": given.model,
            "texts": {name: Path(file).name for name, file in texts.items()},
            "lengths": list(options.lengths(given.lengths)),
            "seeds": list(options.counts(given.seeds)),
            "target": given.target,
            "mechanism": options.mechanisms("ms_swift", given.set)["ms_swift"].to_dict(),
        }
        result = Result(kind="calibrations", config=config, seed=config["seeds"][0], rows=[])
        kept = Progress(result, writable(given.json), fresh=False)
        for name, file in texts.items():
            for length in config["lengths"]:
                for seed in config["seeds"]:
                    case = {"text": name, "length": length, "seed": seed}
                    if kept.find(**case) is None:
                        asked = Calibration(
                            mechanism=config["mechanism"],
                            model=given.model,
                            target=given.target,
                            file=file or None,
                            length=length,
                            seed=seed,
                        )
                        place = given.json.with_suffix(f".{name}-{length}-{seed}.json")
                        kept.add({**case, **measured(asked, place)})
                    print("  ".join(line(result.rows[-1])), flush=True)
        off = [row["off"] for row in result.rows]
        within = sum(one <= CLOSE for one in off)
        result.summary["within"] = within
        result.save(given.json)
        kept.done()
        print(f"{within} of {len(off)} within 1 point, the worst {100 * max(off):.2f} points off")
    except (LongSwiftError, OSError) as error:
        print(f"calibration: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
