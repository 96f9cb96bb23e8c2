"""Results as typed JSON: a schema, atomic writing, loading with validation, resuming."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_type_hints

from longswift.core.errors import InputError, problem
from longswift.core.files import target_of, write_text
from longswift.eval.environment import Environment, environment
from longswift.eval.rows import Records, check_rows

SCHEMA = 1
# What files that are no JSON begin with where this library wrote them, or another did the like.
_MARKS = {
    ".html": (b'<meta name="generator" content="longswift">',),
    ".htm": (b'<meta name="generator" content="longswift">',),
    ".jsonl": (b'{"run":',),
    ".png": (b"\x89PNG",),
    ".svg": (b"<svg",),
}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement: what was asked, where it ran, what came out.

    Attributes:
        kind: What was measured, e.g. ``"attention"`` or ``"demo"``.
        config: Every option that changes the figures.
        seed: Seed of the data.
        rows: One flat record per measured case.
        summary: Figures and sentences derived from the rows.
        environment: Versions, hardware and revision.
        date: UTC time at which the result was made.
        schema: Version of this layout.
    """

    kind: str
    config: dict[str, Any]
    seed: int
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    environment: Environment = field(default_factory=environment)
    date: str = field(default_factory=_now)
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write JSON under a temporary name and rename it, so that no half file is ever seen."""
        return write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def same_run(self, other: Result) -> bool:
        """Whether rows of ``other`` may stand for rows of this run."""
        mine, theirs = ((r.kind, r.config, r.seed, r.environment) for r in (self, other))
        return mine == theirs


def writable(path: str | Path, *, endings: tuple[str, ...] = (), kind: str | None = None) -> Path:
    """Make the directory of ``path`` and check, before any long work, that it can be written.

    Args:
        path: The file.
        endings: What its name may end in, for example ``(".html",)``; anything if empty.
        kind: Kind of the result that will be written; one of another kind is not replaced.

    Raises:
        OSError: It cannot.
        InputError: It is a directory, a device or a pipe, has another ending, or holds something
            that this library did not write.
    """
    if endings and Path(path).suffix.lower() not in endings:
        raise InputError(
            problem(
                str(path),
                expected=f"a name that ends in {' or '.join(endings)}",
                got=repr(Path(path).suffix),
                fix="Name the file accordingly.",
            )
        )
    target = target_of(path)
    if target.is_file() and (found := _strange(target, kind)):
        raise InputError(
            problem(
                str(path),
                expected=f"a new file, or {'one' if kind is None else kind} written by longswift",
                got=found,
                fix="Name another file, or move this one away.",
            )
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            return Path(path)
    except OSError as error:
        # The name of the file that was tried means nothing to anybody.
        raise OSError(error.errno, error.strerror, str(path)) from None


def apart(*paths: str | Path | None) -> None:
    """Check, before any long work, that no output of a command would replace another.

    Args:
        paths: Where they go, links followed; None for what is not asked for.

    Raises:
        InputError: Two are the same file.
    """
    seen: dict[Path, str | Path] = {}
    for path in paths:
        if path is None:
            continue
        target = Path(path).resolve()
        if target in seen:
            raise InputError(
                problem(
                    str(path),
                    expected="a file of its own for each output",
                    got=f"two outputs in {seen[target]}"
                    if str(seen[target]) == str(path)
                    else f"the same file as {seen[target]}",
                    fix="Name another file for one of them.",
                )
            )
        seen[target] = path


def _strange(file: Path, kind: str | None) -> str | None:
    """What a file holds that must not be replaced; None for nothing or a result of ours."""
    content = file.read_bytes()
    marks = _MARKS.get(file.suffix.lower())
    if not content:
        return None
    if marks is not None:
        # Of a line of samples a killed process may have written the beginning only.
        ours = any(mark in content[:1000] for mark in marks) or marks[0].startswith(content)
        return None if ours else "a file of something else"
    try:
        found = json.loads(content)
    except ValueError:
        return "a file of something else"
    name = found.get("kind", found.get("format")) if isinstance(found, dict) else None
    if not isinstance(name, str) or not {"schema", "version"} & set(found):
        return "JSON of something else"
    return None if kind in (None, name) else f"{name} of an earlier run"


def _invalid(path: Path, what: str) -> InputError:
    return InputError(
        problem(
            str(path),
            expected="a result written by longswift",
            got=what,
            fix="Measure again, or name another file.",
        )
    )


def _build(path: Path, cls: type, content: Any) -> Any:
    """An instance of a dataclass from JSON, with names and outer types checked."""
    if not isinstance(content, dict):
        raise _invalid(path, f"{type(content).__name__} where {cls.__name__} belongs")
    known = {f.name for f in fields(cls)}
    if known != set(content):
        different = ", ".join(sorted(known ^ set(content)))
        raise _invalid(path, f"missing or unknown fields ({different})")
    hints = get_type_hints(cls)
    for name, value in content.items():
        hint = hints[name]
        allowed = getattr(hint, "__args__", (hint,)) if not hasattr(hint, "__origin__") else (hint,)
        outer = tuple(getattr(h, "__origin__", h) for h in allowed)
        number = float in outer and isinstance(value, int) and not isinstance(value, bool)
        if not number and not isinstance(value, outer):
            raise _invalid(path, f"{name}={value!r}")
    return cls(**content)


def load(path: str | Path, kind: str | None = None) -> Result:
    """Read a result back.

    Args:
        path: File written by ``Result.save``.
        kind: Refuse results of any other kind.

    Raises:
        InputError: Not JSON, not a result, another schema or another kind.
        OSError: The file cannot be read.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _invalid(file, f"text that is not JSON ({error})") from None
    if isinstance(content, dict) and content.get("schema") not in (None, SCHEMA):
        raise _invalid(file, f"schema {content['schema']} instead of {SCHEMA}")
    if isinstance(content, dict) and isinstance(content.get("environment"), dict):
        content["environment"] = _build(file, Environment, content["environment"])
    result: Result = _build(file, Result, content)
    if not all(isinstance(row, dict) for row in result.rows):
        raise _invalid(file, "rows that are not records")
    if kind is not None and result.kind != kind:
        raise _invalid(file, f"a result of kind {result.kind!r} instead of {kind!r}")
    return result


class Progress:
    """Rows of an unfinished run, kept beside the result so that the next run continues.

    Args:
        result: The result without rows.
        path: Where the finished result will go, or None to keep nothing.
        fresh: Ignore rows that an earlier run left.
        finished: Rows of a finished result of the same run are reused, too.
        records: What rows are; those of an earlier run are held against it.

    Attributes:
        reused: How many rows came from an earlier run.

    Raises:
        InputError: A row that an earlier run left, perhaps edited since, is no such record.
    """

    def __init__(
        self,
        result: Result,
        path: str | Path | None,
        *,
        fresh: bool = False,
        finished: bool = False,
        records: Records | None = None,
    ) -> None:
        self.result = result
        self.file = None if path is None else Path(path).with_suffix(".partial.json")
        self.reused = 0
        if path is None or self.file is None or fresh:
            return
        for earlier in (self.file, Path(path)) if finished else (self.file,):
            before = _same_run(result, earlier)
            if before is not None:
                if records is not None:
                    check_rows(before.rows, records, earlier)
                self.result.rows.extend(before.rows)
                self.reused = len(before.rows)
                return

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The finished row with these values, or None."""
        for row in self.result.rows:
            if all(row.get(key) == value for key, value in wanted.items()):
                return row
        return None

    def add(self, *rows: dict[str, Any]) -> None:
        """Keep finished rows."""
        self.result.rows.extend(rows)
        if self.file is not None:
            self.result.save(self.file)

    def done(self) -> None:
        """Forget the unfinished run once the result itself is saved."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _same_run(result: Result, file: Path) -> Result | None:
    """The result in ``file`` if its rows may stand for rows of ``result``."""
    try:
        before = load(file, result.kind)
    except (InputError, OSError):
        return None
    return before if result.same_run(before) else None
