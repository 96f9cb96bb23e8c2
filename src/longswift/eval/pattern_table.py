"""How each mechanism is configured and labelled in pictures; a mechanism needs no line here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from longswift.core.mechanism import Mechanism
from longswift.eval import options
from longswift.eval.patterns import Why
from longswift.mechanisms import list_mechanisms

# Options in units of a 32nd of the length, so that a picture looks the same at every length.
_CONFIGS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sliding_window": lambda u: {"window": 6 * u},
    "ms_swift": lambda u: {
        "windows": (4 * u, 8 * u, 16 * u),
        "sinks": u,
        "key_tokens": 2 * u,
        "block": 2 * u,
        "selector": {"name": "bounds", "key_block": u, "row_group": u},
        "remainder": 4 * u,
        "dense_below": 0,
    },
}

# A text of a few pages fits into the default windows; with these there is something to choose.
_SHORT_TEXT: dict[str, dict[str, Any]] = {
    "ms_swift": {
        "windows": (64, 128, 256),
        "sinks": 4,
        "key_tokens": 64,
        "block": 64,
        "remainder": 64,
        "dense_below": 0,
    },
}

_LABELS: dict[Why, str] = {
    Why.GLOBAL: "global token",
    Why.WINDOW: "window",
    Why.CHOSEN: "elsewhere",
    Why.FULL_ROW: "row that sees everything",
    Why.STATE: "all, through a state",
    Why.SUMMARY: "through a summary",
    Why.NOTHING: "not at all",
}
_OWN_LABELS: dict[str, dict[Why, str]] = {
    "full": {Why.WINDOW: "seen"},
    "ms_swift": {
        Why.GLOBAL: "sink",
        Why.CHOSEN: "key token",
        Why.FULL_ROW: "exact row",
        Why.SUMMARY: "through a mean",
    },
}


def config(name: str, length: int) -> dict[str, Any]:
    """Options that suit a picture of ``length`` tokens; none for a mechanism without a line."""
    unit = 1 << max(0, (length // 32).bit_length() - 1)
    return _CONFIGS[name](unit) if name in _CONFIGS else {}


def label(name: str | None, why: Why) -> str:
    """What a reason is called for one mechanism, or in general."""
    return _OWN_LABELS.get(name or "", {}).get(why, _LABELS[why])


def mechanisms(names: str | None, settings: Sequence[str], length: int) -> list[Mechanism]:
    """Mechanisms configured for pictures.

    Args:
        names: Comma-separated, or None for every one of the table.
        settings: ``OPTION=VALUE`` for a single mechanism, ``NAME.OPTION=VALUE`` for several.
        length: Tokens of the pictures.

    Raises:
        ConfigError: Unknown mechanism or option, or an impossible value.
    """
    names = ",".join(list_mechanisms()) if names is None else names
    chosen = [name.replace("-", "_") for name in options.names(names)]
    full = [_full(setting, chosen) for setting in settings]
    return [
        options.from_json({**config(name, length), **asked})
        for name, asked in options.configs("mechanism", names, full)
    ]


def reading(name: str, settings: Sequence[str]) -> Mechanism:
    """One mechanism configured to show its choices in a text of a few pages.

    Args:
        name: The mechanism.
        settings: ``OPTION=VALUE``.
    """
    name = name.replace("-", "_")
    full = [_full(setting, [name]) for setting in settings]
    ((_, asked),) = options.configs("mechanism", name, full)
    return options.from_json({**_SHORT_TEXT.get(name, {}), **asked})


def _full(setting: str, chosen: list[str]) -> str:
    """``windows=8,16`` as ``ms_swift.windows=[8,16]``."""
    target, equals, value = setting.partition("=")
    if "." not in target and len(chosen) == 1:
        target = f"{chosen[0]}.{target.strip()}"
    if re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)+\s*", value):
        value = f"[{value}]"
    return f"{target}{equals}{value}"
