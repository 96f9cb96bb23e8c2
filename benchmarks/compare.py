"""Compare two results of one benchmark: ``compare.py BEFORE.json AFTER.json [--threshold 0.1]``.

Exit code 1 if a figure got worse by more than the threshold, 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longswift.core.errors import LongSwiftError
from longswift.eval.compare import compare
from longswift.eval.results import load


def main() -> int:
    """Print a line per figure, the worse ones marked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="share it may get worse by")
    asked = parser.parse_args()
    try:
        before, after = load(asked.before), load(asked.after)
        changes = compare(before, after, asked.threshold)
    except (LongSwiftError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if before.environment != after.environment:
        print("note: the two were measured with different versions or hardware", file=sys.stderr)
    for change in changes:
        figures = f"{change.before:>12.4g} {change.after:>12.4g} {change.ratio:>7.2f}x"
        mark = "  worse" if change.worse else ""
        print(f"{change.case:<28} {change.measure:<26} {figures}{mark}")
    worse = sum(change.worse for change in changes)
    print(f"{worse} of {len(changes)} figures worse by more than {asked.threshold:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
