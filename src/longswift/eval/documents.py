"""The user's text: a UTF-8 file, or a one-line error that says what is wrong with it."""

from __future__ import annotations

import codecs
from pathlib import Path

from longswift.core.errors import InputError, problem


def source(file: str | Path | None) -> str:
    """The user's text, or held-out Python documentation and source if there is none."""
    if file is not None:
        return read_text(file)
    from longswift.tiny import corpus

    return corpus.text("heldout")


def read_text(path: str | Path) -> str:
    """Read a text file.

    Args:
        path: A UTF-8 file; a byte order mark is dropped.

    Raises:
        InputError: Missing, unreadable, empty, or not UTF-8 text.
    """
    file = Path(path)

    def refuse(got: str, fix: str) -> InputError:
        return InputError(problem(str(path), expected="a UTF-8 text file", got=got, fix=fix))

    if file.is_dir():
        raise refuse("a directory", "Name a file in it.")
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise refuse("no such file", "Check the path.") from None
    except OSError as error:
        raise refuse(error.strerror or str(error), "Check its permissions.") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise refuse("UTF-16", "Convert it, e.g. with iconv -f utf-16 -t utf-8.")
    if b"\0" in content:
        raise refuse("binary data", "Extract its text first, e.g. with pdftotext.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(
            f"other bytes at offset {error.start}",
            "Convert it, e.g. with iconv -f latin1 -t utf-8.",
        ) from None
    if not text.strip():
        raise refuse("an empty file", "Give one with text in it.")
    return text
