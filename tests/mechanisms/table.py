"""The table behind every property test: one small configuration or more per mechanism.

A mechanism added to ``longswift.mechanisms`` is tested with its default configuration and every
property at once; give it a line here for smaller blocks, or to name what its design excludes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longswift.core.mechanism import Mechanism
from longswift.mechanisms import get_mechanism, list_mechanisms


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    Attributes:
        name: Registered name.
        label: Test id.
        config: Options of the mechanism.
        covering: Options that make every key visible at the lengths tested.
        subset: The output is an exact softmax over ``visible()``.
        content: The choice of keys depends on content, so shared and strict modes differ.
        strict: The mechanism can choose without looking ahead, hence can be trained.
        grid: Chunks in multiples of this equal one shot.
        kv_heads: Numbers of key/value heads the configuration accepts.
        bidirectional: Has a bidirectional form.
        cross: The bidirectional form accepts any number of queries.
    """

    name: str
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    covering: dict[str, Any] = field(default_factory=dict)
    subset: bool = True
    content: bool = False
    strict: bool = True
    grid: int = 1
    kv_heads: tuple[int, ...] = (1, 2, 3)
    bidirectional: bool = True
    cross: bool = False

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"Case({self.label})")

    @property
    def trainings(self) -> tuple[bool, ...]:
        """Values of ``training`` that a call may pass."""
        return (False, True) if self.strict else (False,)

    def build(self, **overrides: Any) -> Mechanism:
        return get_mechanism(self.name, **{**self.config, **overrides})


def _window(label: str, **config: Any) -> Case:
    return Case(
        name="sliding_window",
        label=f"sliding_window-{label}",
        config=config,
        covering={"window": 1024},
    )


def _swift(label: str, *, kv_heads: tuple[int, ...] = (1, 2, 3), **config: Any) -> Case:
    small = {
        "windows": (32,),
        "sinks": 4,
        "key_tokens": 16,
        "block": 16,
        "selector": {"name": "bounds", "key_block": 8, "row_group": 4, "proposals": 2},
        "remainder": None,
        "dense_below": 0,
    }
    options = {**small, **config}
    return Case(
        name="ms_swift",
        label=f"ms_swift-{label}",
        config=options,
        covering={"key_tokens": 1024, "coverage": None},
        subset=options["remainder"] is None,
        content=options["key_tokens"] != 0,
        strict=options["selector"] is not ANTIDIAGONAL and "min_coverage" not in options,
        grid=options["block"],
        kv_heads=kv_heads,
    )


ANTIDIAGONAL = {"name": "antidiagonal", "key_block": 8, "stride": 4}

_SMALL: dict[str, list[Case]] = {
    "full": [Case(name="full", label="full", cross=True)],
    "sliding_window": [
        _window("8", window=8),
        _window("1", window=1),
        _window("33+5", window=33, global_tokens=5),
        _window("200+3", window=200, global_tokens=3),
    ],
    "ms_swift": [
        _swift("plain"),
        _swift("remainder", remainder=32),
        _swift("scales", windows=(16, 32, 64), remainder=64, key_tokens=8),
        _swift("by_head", windows=(16, 64), scale_of_head=(1, 0), kv_heads=(2,), remainder=16),
        _swift("overlap", windows=(48,), overlap=0.2, remainder=16),
        _swift("coverage", coverage=0.7, key_tokens=32, remainder=32),
        _swift("no_keys", key_tokens=0, remainder=32),
        _swift("sinks_only", key_tokens=0, sinks=20),
        _swift("dense_start", dense_below=40, remainder=16),
        _swift("antidiagonal", selector=ANTIDIAGONAL, key_tokens=32),
        _swift("antidiagonal_coverage", selector=ANTIDIAGONAL, coverage=0.8, remainder=32),
        _swift("block8", windows=(24,), block=8, key_tokens=8, sinks=0, remainder=16),
        _swift("budgets", key_tokens=(8, 24), remainder=16, kv_heads=(2,)),
        _swift("dense_head", windows=(16, 32), dense_heads=(1,), kv_heads=(2, 3), remainder=16),
        _swift("guard", min_coverage=0.9, key_tokens=8, windows=(16,), remainder=16),
        _swift("key_block1", selector={"name": "bounds", "key_block": 1}, key_tokens=3),
    ],
}


def cases() -> list[Case]:
    """Every row, at least one per registered mechanism."""
    return [
        case
        for name in list_mechanisms()
        for case in _SMALL.get(name, [Case(name=name, label=name)])
    ]


CASES = cases()
