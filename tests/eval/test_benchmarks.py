"""The scripts in benchmarks/: exit codes that continuous integration can use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from longswift.eval.results import Result

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def save(place: Path, seconds: float) -> Path:
    row = {"name": "sdpa", "length": 8, "seconds": seconds}
    return Result(kind="attention", config={}, seed=0, rows=[row]).save(place)


def test_compare_fails_on_a_regression_only(tmp_path: Path) -> None:
    before, after = save(tmp_path / "a.json", 1.0), save(tmp_path / "b.json", 1.3)
    worse = run("compare.py", before, after)
    assert worse.returncode == 1 and "worse" in worse.stdout and "1.30x" in worse.stdout
    assert run("compare.py", before, after, "--threshold", "0.5").returncode == 0
    assert run("compare.py", after, before).returncode == 0
    missing = run("compare.py", before, tmp_path / "none.json")
    assert missing.returncode == 2 and len(missing.stderr.strip().splitlines()) == 1


def test_an_unknown_case_is_one_line() -> None:
    done = run("attention.py", "nonsense")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
