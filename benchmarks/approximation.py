"""How far linear and landmark attention are from softmax attention, on flat and peaked scores.

``python benchmarks/approximation.py [--length 1024] [--json results/approximation.json]``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longswift.core.errors import LongSwiftError
from longswift.eval import approximation
from longswift.eval.options import length
from longswift.mechanisms import get_mechanism

RIVALS = {
    "window 64": get_mechanism("sliding_window", window=64),
    "linear elu1": get_mechanism("linear"),
    "linear relu": get_mechanism("linear", feature_map="relu"),
    "efficient": get_mechanism("efficient"),
    "performer 256": get_mechanism("performer", features=256),
    "performer 4096": get_mechanism("performer", features=4096),
    "nystrom 64": get_mechanism("nystrom"),
    "nystrom 64, exact inverse": get_mechanism("nystrom", iterations=None),
    "ms_swift": get_mechanism("ms_swift", windows=(64,), key_tokens=64, dense_below=0),
}


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", default="1024")
    parser.add_argument("--json", type=Path, default=Path("results/approximation.json"))
    given = parser.parse_args()
    try:
        rivals = {label: mechanism.to_dict() for label, mechanism in RIVALS.items()}
        asked = approximation.Approximation(mechanisms=rivals, length=length(given.length))
        result = approximation.run(asked, given.json)
    except (LongSwiftError, OSError) as error:
        print(f"approximation: {error}", file=sys.stderr)
        return 2
    table = approximation.table(result)
    print(*result.summary["sentences"], sep="\n")
    for row in [table.columns, *table.rows]:
        print(f"{row[0]:26}" + "".join(f"{cell:>14}" for cell in row[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
