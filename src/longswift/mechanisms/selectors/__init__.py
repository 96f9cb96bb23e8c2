"""THE table of selectors: which tokens outside the window a block of queries asks for."""

from __future__ import annotations

from typing import Any

from longswift.core.errors import ConfigError, problem
from longswift.core.registry import Registry
from longswift.mechanisms.selectors.base import Selector

SELECTORS: Registry[Selector] = Registry(
    "selector",
    {
        "centroids": "longswift.mechanisms.selectors.centroids:Centroids",
        "bounds": "longswift.mechanisms.selectors.bounds:Bounds",
        "antidiagonal": "longswift.mechanisms.selectors.antidiagonal:Antidiagonal",
        "lowrank": "longswift.mechanisms.selectors.lowrank:LowRank",
        "pooled": "longswift.mechanisms.selectors.pooled:Pooled",
        "anchor": "longswift.mechanisms.selectors.anchor:Anchor",
    },
    entry_point_group="longswift.selectors",
)


def make_selector(value: str | dict[str, Any] | Selector) -> Selector:
    """A selector from its name, its saved configuration, or itself."""
    if isinstance(value, Selector):
        return value
    if isinstance(value, str):
        return SELECTORS.build(value, {})
    if isinstance(value, dict) and "name" in value:
        return SELECTORS.from_dict(value)
    raise ConfigError(
        problem(
            "selector",
            expected="a name, a Selector, or a dictionary with a 'name'",
            got=repr(value),
            fix=f"Use one of {', '.join(SELECTORS.names())}.",
        )
    )
