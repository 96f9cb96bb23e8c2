"""Finished samples of a long run, one JSON line each, from which an interrupted run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from longswift.core.errors import InputError, problem
from longswift.eval.results import writable


class Journal:
    """Lines appended to a file and read back.

    The first line says which run the file belongs to. A line counts once its end is on disk: what
    a killed process left behind the last line end is cut off.

    Args:
        path: The file, or None to keep lines in memory only.
        run: What must be equal for lines to be of the same run, JSON-ready.
        fresh: Start over, whatever the file holds.

    Attributes:
        entries: Every line, those of earlier processes first.
        reused: How many of them were there before.

    Raises:
        InputError: The file is of another run, or no journal.
    """

    def __init__(self, path: Path | None, run: dict[str, Any], *, fresh: bool = False) -> None:
        self.entries: list[dict[str, Any]] = []
        self.path = None if path is None else writable(path)
        run = json.loads(json.dumps(run))
        if self.path is None:
            self.reused = 0
            return
        if self.path.is_file() and not fresh:
            self.entries = _read(self.path, run)
        else:
            self.path.write_bytes(b"")
        self.reused = len(self.entries)
        if self.path.stat().st_size == 0:
            self._append({"run": run})

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a line; it is on disk when this returns."""
        self.entries.append(entry)
        if self.path is not None:
            self._append(entry)

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """The lines with these values."""
        return [e for e in self.entries if all(e.get(k) == v for k, v in wanted.items())]

    def _append(self, entry: dict[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("ab") as file:
            file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole lines of a file, which is cut behind the last of them."""

    def refuse(got: str) -> InputError:
        return InputError(
            problem(
                str(path),
                expected="finished samples of this very run",
                got=got,
                fix="Use --fresh to start over, or write to another file.",
            )
        )

    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise refuse("a file that is no journal") from None
    if not all(isinstance(line, dict) for line in lines) or lines and "run" not in lines[0]:
        raise refuse("a file that is no journal")
    if lines and lines[0]["run"] != run:
        raise refuse(f"those of one with another {_difference(lines[0]['run'], run)}")
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return lines[1:]


def _difference(before: Any, now: Any, name: str = "") -> str:
    """Where two runs differ first, as a dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                inner = f"{name}.{key}" if name else key
                return _difference(before.get(key), now.get(key), inner)
    return name or "kind of content"
