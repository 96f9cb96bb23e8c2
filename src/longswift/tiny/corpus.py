"""English and Python text that every Python installation carries, split deterministically."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path

__all__ = ["SPLITS", "documents", "text"]

SPLITS = ("train", "heldout")

_NO_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings")
_NO_PROSE = ("test", "tests", "idle_test", "idlelib", "turtledemo", "pydoc_data")
_SKIPPED = frozenset(_NO_LIBRARY + _NO_PROSE)
_TOPICS_HELD_OUT = 0.25
FILES_HELD_OUT = 0.06


def _fraction(name: str) -> float:
    """Map a name to [0, 1), the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _topics() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    return sorted(topics.items())


def _files() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in root.rglob("*.py"):
        name = file.relative_to(root)
        # Generated tables and build settings differ between machines and teach nothing.
        if _SKIPPED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        if any(part.startswith("config-") for part in name.parts):
            continue
        found.append((name.as_posix(), file.read_text(encoding="utf-8", errors="replace")))
    return sorted(found)


def documents(split: str) -> list[tuple[str, str]]:
    """Return the ``(name, text)`` pairs of a split, documentation topics first.

    Args:
        split: ``"train"`` or ``"heldout"``.

    Raises:
        ValueError: If the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split among {SPLITS}, got {split!r}; use one of those")
    held = split == "heldout"
    chosen = []
    for kind, docs, share in (
        ("topic", _topics(), _TOPICS_HELD_OUT),
        ("file", _files(), FILES_HELD_OUT),
    ):
        for name, body in docs:
            if (_fraction(f"{kind}:{name}") < share) == held and body.strip():
                chosen.append((f"{kind}:{name}", body.strip() + "\n"))
    return chosen


@lru_cache(maxsize=2)
def text(split: str) -> str:
    """Return a split as one string: the documentation's prose, then the library's source."""
    return "\n".join(body for _, body in documents(split))
