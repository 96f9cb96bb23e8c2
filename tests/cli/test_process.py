"""The command line as a process: exit codes, streams, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PYTHON = [sys.executable, "-m", "longswift"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PYTHON, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_results_go_to_stdout_and_remarks_to_stderr(tmp_path: Path) -> None:
    options = ["--lengths", "256", "--mechanism", "full", "--repeats", "1", "--no-memory"]
    done = run("bench", "attention", *options, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert "keys/query" in done.stdout and "wrote" not in done.stdout
    assert "wrote" in done.stderr


def test_an_error_is_one_line_without_a_traceback() -> None:
    done = run("bench", "attention", "--mechanism", "nothing")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    traced = run("--debug", "bench", "attention", "--mechanism", "nothing")
    assert traced.returncode == 1 and "Traceback" in traced.stderr


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent differently there")
def test_ctrl_c_leaves_the_finished_lengths_and_the_next_run_goes_on(tmp_path: Path) -> None:
    file, partial = tmp_path / "r.json", tmp_path / "r.partial.json"
    options = ["bench", "attention", "--mechanism", "full", "--repeats", "2", "--no-memory"]
    # The second length takes long enough to be interrupted in its middle. What a shell starts in
    # the background ignores Ctrl-C, and so would this child of a suite that was started there.
    options += ["--dtype", "float32", "--lengths", "128,16384", "--json", str(file)]
    with subprocess.Popen(
        [*PYTHON, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 100
        while not partial.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert out == "" and err.strip().splitlines()[-1].startswith("longswift: interrupted")
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["r.partial.json"]
    before = partial.read_text()
    assert before.count('"length": 128') == 2


def test_ctrl_c_while_the_commands_load_is_one_line(tmp_path: Path) -> None:
    """Typer is the first thing loaded that is not Python's own."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [*PYTHON, "info"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.strip() == "longswift: interrupted."


def test_a_terminal_without_utf_8_is_no_error(model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "Größe.txt"
    file.write_text("漢字 and words. " * 40, encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    show = "from longswift.cli.main import app; import typer"
    show += "; app.command('show')(lambda: typer.echo(chr(0x1F600))); app(['show'])"
    options = ["--file", os.fsencode(file), "--prompt", "漢字".encode(), "--max-new-tokens", "2"]
    for command in (
        [*PYTHON, "generate", str(model_directory), *options],
        [sys.executable, "-c", show],
    ):
        done = subprocess.run(
            command, capture_output=True, timeout=120, env={**os.environ, **plain}
        )
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr[-2000:]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m longswift info | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
