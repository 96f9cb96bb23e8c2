"""The embedded demonstration model, the text it learned from and the recipe that made it.

Importing this package loads neither PyTorch nor Transformers.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Return the directory of the packaged model, ready for ``from_pretrained``.

    Raises:
        ValueError: If the package is not installed as plain files on disk.
    """
    here = resources.files(__name__) / "model"
    if not isinstance(here, Path):
        raise ValueError(
            f"expected the packaged model as plain files, got {type(here).__name__}; "
            "install longswift unpacked instead of importing it from an archive"
        )
    return here
