"""Put the tables of results into a page: ``report.py PAGE.md RESULT.json...``.

Everything between the two ``figures`` markers of the page is replaced.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longswift.core.errors import InputError, LongSwiftError, problem
from longswift.core.files import write_text
from longswift.eval import approximation, attention_table, demo, mechanism_table, phase_table
from longswift.eval.results import Result, load
from longswift.eval.text import Table

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
# A line per rival and length fills pages from here on.
MANY_LENGTHS = 4


def attention(result: Result) -> Table:
    """Every length, or the growth over many of them."""
    many = len(result.config["lengths"]) >= MANY_LENGTHS
    every = attention_table.table(result)
    return attention_table.growth_table(result)._replace(title=every.title) if many else every


KINDS = {
    "approximation": approximation.table,
    "attention": attention,
    "compare": mechanism_table.quality,
    "decode": phase_table.table,
    "demo": demo.table,
    "prefill": phase_table.table,
    "train": phase_table.table,
}


def markdown(table: Table) -> str:
    """A table in Markdown; figures to the right."""
    heads = [column or " " for column in table.columns]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table.rows)])


def section(name: str, result: Result) -> str:
    """Heading, sentences, table and provenance of one result."""
    if result.kind not in KINDS:
        raise InputError(
            problem(
                "result", expected=f"one of {', '.join(KINDS)}", got=result.kind, fix="Skip it."
            )
        )
    table, here = KINDS[result.kind](result), result.environment
    if result.kind == "compare":
        told = [f"{sentence.rstrip('.')}." for sentence in mechanism_table.sentences(result)]
    else:
        told = result.summary.get("sentences") or [result.summary["verdict"]]
    versions = ", ".join(f"{k} {v}" for k, v in here.versions.items() if k in ("python", "torch"))
    provenance = (
        f"{here.cpu} ({' '.join(here.cpu_features)}), {here.threads} thread(s) of {here.cores} "
        f"cores, {versions}, seed {result.seed}, {result.date[:10]}, "
        f"revision {(here.revision or 'installed')[:12]}."
    )
    return "\n\n".join([f"### {name}: {table.title}", " ".join(told), markdown(table), provenance])


def main() -> int:
    """Replace the figures of a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    asked = parser.parse_args()
    try:
        before, found, rest = asked.page.read_text(encoding="utf-8").partition(BEGIN)
        _, closed, after = rest.partition(END)
        if not (found and closed):
            raise InputError(
                problem(
                    str(asked.page),
                    expected=f"a page with {BEGIN} and {END}",
                    got="one without",
                    fix="Add the two lines where the figures belong.",
                )
            )
        sections = [section(file.stem, load(file)) for file in asked.results]
        write_text(asked.page, "\n\n".join([before + BEGIN, *sections, END + after]))
    except (LongSwiftError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
