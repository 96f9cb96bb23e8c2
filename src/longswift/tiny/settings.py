"""The settings that a run keeps to its end, as its directory notes them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longswift.tiny.config import Config, Stage

__all__ = ["kept", "noted"]

_FREE = {"max_steps", "checkpoint_seconds", "threads"}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as JSON would give them back, with lists for tuples."""
    back: dict[str, Any] = json.loads(json.dumps(settings))
    return back


def kept(config: Config) -> dict[str, Any]:
    """Return what a run may not change: all but where it stops, how often it saves, its threads."""
    return _plain({name: value for name, value in asdict(config).items() if name not in _FREE})


def noted(file: Path) -> dict[str, Any]:
    """Read what a run was started with; what was no setting yet then has its default."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    stage = _plain(asdict(Stage(length=1, tokens=1, batch=1)))
    settings["stages"] = [stage | each for each in settings["stages"]]
    return kept(Config()) | settings
