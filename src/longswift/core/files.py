"""Files that are replaced in one step, so that no reader sees half of one and none is lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from longswift.core.errors import InputError, problem


def target_of(path: str | Path) -> Path:
    """The file a path leads to. A rename would replace a link, and a device by a plain file."""
    target = Path(path).resolve()
    if target.is_file() or not target.exists():
        return target
    got, fix = "a device or a pipe", "Name a plain file."
    if target.is_dir():
        got, fix = "a directory", "Name a file in it."
    raise InputError(problem(str(path), expected="a file to write", got=got, fix=fix))


def write_text(path: str | Path, text: str) -> Path:
    """Replace ``path`` by ``text`` in one step."""
    return replace(path, lambda file: file.write_text(text, encoding="utf-8"))


def replace(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path`` and rename it to ``path``."""
    target = target_of(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix
    )
    os.close(number)
    try:
        # mkstemp files are private; a result gets the permissions of any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        write(Path(name))
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(path)
