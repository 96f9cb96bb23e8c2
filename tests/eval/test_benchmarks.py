"""The scripts in benchmarks/: exit codes that continuous integration can use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_an_unknown_case_is_one_line() -> None:
    done = run("attention.py", "nonsense")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
