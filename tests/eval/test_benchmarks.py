"""The scripts in benchmarks/: exit codes that continuous integration can use."""

from __future__ import annotations

import json
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


def test_a_page_keeps_both_kinds_of_tables(tmp_path: Path) -> None:
    timed = tmp_path / "timed.json"
    asked = AttentionBench(
        lengths=(2048,), memory=False, repeats=1, dtype="float32", mechanisms=({"name": "linear"},)
    )
    attention.run(asked, timed, progress=False)
    far = tmp_path / "far.json"
    assert run("approximation.py", "--length", "64", "--json", far).returncode == 0
    page = tmp_path / "linear.md"
    page.write_text("before\n<!-- figures: begin -->\n<!-- figures: end -->\nafter\n")
    for _ in range(2):
        assert run("pages.py", timed, tmp_path).returncode == 0
        assert run("report.py", page, far).returncode == 0
    content = page.read_text()
    assert content.count("## Time and memory") == 1 and content.count("### far: ") == 1
    assert content.count("| 2,048 |") == 1 and "| nystrom 64 |" in content


def test_calibrations_are_counted_and_not_repeated(model_directory: Path, tmp_path: Path) -> None:
    text, data = tmp_path / "words.txt", tmp_path / "c.json"
    text.write_text("a list of values and the name of each value is short " * 120)
    options = ["--model", model_directory, "--text", f"words={text}", "--lengths", "512"]
    options += ["--seeds", "0,1", "--target", "0.4", "--json", data]
    for setting in ("windows=[32]", "block=32", "remainder=64", "dense_below=128"):
        options += ["--set", f"ms_swift.{setting}"]
    done = run("calibration.py", *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads(data.read_text())["rows"]
    assert [row["seed"] for row in rows] == [0, 1] and rows[0]["documents"] >= 2
    assert f"{sum(row['off'] <= 0.01 for row in rows)} of 2 within 1 point" in done.stdout
    assert not data.with_suffix(".partial.json").exists()
    failed = run("calibration.py", "--text", "none=nowhere.txt", "--json", data)
    assert failed.returncode == 2 and "no such file" in failed.stderr


def test_a_killed_measurement_of_a_million_tokens_goes_on(tmp_path: Path) -> None:
    data = tmp_path / "million.json"
    options = ["--only", "default", "--no-memory", "--repeats", "1", "--json", data]
    parts = data.with_suffix(".parts.jsonl")
    command = [sys.executable, SCRIPTS / "million.py", "--lengths", "256,131072", *options]
    with subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        # The second length has begun, so the first is on disk.
        assert any(b"131072 tokens" in line for line in process.stderr)
        process.kill()
    assert not data.exists() and len(parts.read_text().splitlines()) == 2
    before = json.loads(parts.read_text().splitlines()[1])["rows"]
    done = run("million.py", "--lengths", "256,512", *options)
    assert done.returncode == 0, done.stderr
    assert "512 tokens: default" in done.stderr and "256 tokens" not in done.stderr
    rows = json.loads(data.read_text())["rows"]
    assert rows[:1] == before and [row["length"] for row in rows] == [256, 512]
    assert not parts.exists()
