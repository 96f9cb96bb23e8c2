"""The scripts in benchmarks/: exit codes that continuous integration can use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from longswift.eval import attention
from longswift.eval.attention import AttentionBench

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_an_unknown_case_is_one_line() -> None:
    done = run("attention.py", "nonsense")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_a_page_shows_every_length_or_the_growth_over_many(tmp_path: Path) -> None:
    common = {"mechanisms": ({"name": "linear"},), "dtype": "float32", "repeats": 1}
    for name, lengths in (("few", (16, 32)), ("many", (16, 32, 64, 128))):
        asked = AttentionBench(lengths=lengths, memory=False, **common)
        attention.run(asked, tmp_path / f"{name}.json", progress=False)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    done = run("report.py", page, tmp_path / "few.json", tmp_path / "many.json")
    assert done.returncode == 0, done.stderr
    few, many = page.read_text().split("### ")[1:]
    assert few.count("| linear |") == 2 and "| linear | 16 |" in few
    assert many.count("| linear |") == 1 and "| linear | 16 - 128 |" in many
    assert "old" not in page.read_text() and page.read_text().endswith("after\n")
