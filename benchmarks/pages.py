"""Time and memory of every mechanism into its own page, from one result of ``all-fp32``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from longswift.core.files import write_text
from longswift.eval import text

# Marks of its own: those of report.py hold other tables of the same page.
BEGIN, END = "<!-- time and memory: begin -->", "<!-- time and memory: end -->"
LENGTHS = (2048, 8192, 32768, 131072)


def section(result: dict[str, Any], name: str) -> str:
    """The figures of one mechanism, between the marks."""
    rows = {row["length"]: row for row in result["rows"] if row["name"] == name}
    config, here = result["config"], result["environment"]
    lines = [
        "## Time and memory",
        "",
        f"Attention alone, {config['dtype']}, {config['heads']} heads of {config['head_dim']}, "
        f"{'causal' if any(row['causal'] for row in rows.values()) else 'bidirectional'}, "
        f"{here['threads']} threads of {here['cpu'] or 'a CPU'}, against SDPA in the same run "
        "(`python benchmarks/attention.py all-fp32`).",
        "",
        "| tokens | median | vs SDPA | keys/query | extra memory |",
        "|---:|---:|---:|---:|---:|",
    ]
    for length in LENGTHS:
        if length in rows:
            row = rows[length]
            cells = (
                f"{length:,}",
                text.seconds(row["seconds"]),
                f"{row['speedup']:.2f}x",
                f"{row['keys_per_query']:,.0f}",
                text.size(row["extra_bytes"]),
            )
            lines.append(f"| {' | '.join(cells)} |")
    missing = [length for length in LENGTHS if length not in rows]
    if missing:
        lines += ["", f"Too slow to be timed at {', '.join(f'{m:,}' for m in missing)} tokens."]
    growth = result["summary"].get("growth", {}).get(name)
    if growth and growth["time"] is not None:
        lines += [
            "",
            f"Between {growth['shortest']:,} and {growth['longest']:,} tokens time grows as "
            f"n^{growth['time']:.2f}.",
        ]
    return "\n".join([BEGIN, "", *lines, "", END])


def main() -> int:
    """``pages.py RESULT.json FOLDER``."""
    if len(sys.argv) != 3:
        print("expected: pages.py RESULT.json FOLDER", file=sys.stderr)
        return 2
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    names = {row["name"] for row in result["rows"]}
    for page in sorted(Path(sys.argv[2]).glob("*.md")):
        if page.stem not in names:
            continue
        old = page.read_text(encoding="utf-8")
        new = section(result, page.stem)
        if BEGIN in old:
            before, rest = old.split(BEGIN)
            new = before + new + rest.split(END)[1]
        else:
            new = f"{old.rstrip()}\n\n{new}\n"
        write_text(page, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
