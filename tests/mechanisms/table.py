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
        alike: All KV heads see the same keys.
        bidirectional: Has a bidirectional form.
        causal: Has a causal form.
        cross: The bidirectional form accepts any number of queries.
        softmax: With ``covering`` it is softmax attention, and ``lse`` that of the scores. False
            for other kernels and for estimates, which only their reference judges.
        own_query: A row depends on no query but its own, even where it sees the same keys.
        vanishing: A query may meet no weight at all; it is then 0 as if it saw no key.
        biased: Takes a position bias. False for mechanisms without scores to add one to.
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
    alike: bool = True
    bidirectional: bool = True
    causal: bool = True
    cross: bool = False
    softmax: bool = True
    own_query: bool = True
    vanishing: bool = False
    biased: bool = True

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"Case({self.label})")

    @property
    def trainings(self) -> tuple[bool, ...]:
        """Values of ``training`` that a call may pass."""
        return (False, True) if self.strict else (False,)

    @property
    def directions(self) -> tuple[bool, ...]:
        """Values of ``causal`` that a call may pass."""
        return (True,) * self.causal + (False,) * self.bidirectional

    def build(self, **overrides: Any) -> Mechanism:
        return get_mechanism(self.name, **{**self.config, **overrides})


def _window(label: str, **config: Any) -> Case:
    return Case(
        name="sliding_window",
        label=f"sliding_window-{label}",
        config=config,
        covering={"window": 1024},
    )


def _longformer(label: str, **config: Any) -> Case:
    return Case(
        name="longformer",
        label=f"longformer-{label}",
        config=config,
        covering={"left": 1024, "right": 1024},
    )


def _bigbird(label: str, **config: Any) -> Case:
    return Case(
        name="bigbird",
        label=f"bigbird-{label}",
        config={"block": 8, **config},
        covering={"window_blocks": 2047},
        alike=False,
    )


def _blocks(label: str, *, kv_heads: tuple[int, ...] = (1, 2, 3), **config: Any) -> Case:
    return Case(
        name="block_sparse",
        label=f"block_sparse-{label}",
        config=config,
        covering={"layout": ("x",), "block": 1024},
        kv_heads=kv_heads,
        alike=kv_heads != (2,),
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
        subset=options["remainder"] is None and "delta" not in options,
        content=options["key_tokens"] != 0,
        strict=options["selector"] is not ANTIDIAGONAL and "min_coverage" not in options,
        grid=options["block"],
        kv_heads=kv_heads,
        # Other choices would be made as if there were no bias.
        biased=options["selector"]["name"] in ("bounds", "antidiagonal")
        and "tree" not in options["selector"],
        # An exact row corrects its followers.
        own_query="delta" not in options,
    )


def _state(name: str, label: str = "", *, vanishing: bool = False, **config: Any) -> Case:
    return Case(
        name=name,
        label=f"{name}-{label}" if label else name,
        # Short chunks, so that short texts cross many.
        config={"chunk": 16, **config},
        subset=False,
        cross=True,
        softmax=False,
        vanishing=vanishing,
        biased=False,
    )


ANTIDIAGONAL = {"name": "antidiagonal", "key_block": 8, "stride": 4}
TREE = {"name": "bounds", "key_block": 4, "row_group": 4, "proposals": 1, "tree": 2}
LOWRANK = {"name": "lowrank", "key_block": 8, "rank": 2, "proposals": 2}
POOLED = {"name": "pooled", "key_block": 8, "proposals": 2}
ANCHOR = {"name": "anchor", "key_block": 8, "stride": 6}

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
        _swift("tree", selector=TREE, key_tokens=4, remainder=32),
        _swift("lowrank", selector=LOWRANK, remainder=32),
        _swift("lowrank_fit", selector={**LOWRANK, "fit": 20}, coverage=0.8),
        _swift("pooled", selector=POOLED, windows=(16,), remainder=16),
        _swift("pooled_variance", selector={**POOLED, "variance": True}, coverage=0.8),
        _swift("anchor", selector=ANCHOR, remainder=32),
        _swift("anchor_coverage", selector=ANCHOR, windows=(16,), coverage=0.8),
        _swift("block8", windows=(24,), block=8, key_tokens=8, sinks=0, remainder=16),
        _swift("budgets", key_tokens=(8, 24), remainder=16, kv_heads=(2,)),
        _swift("dense_head", windows=(16, 32), dense_heads=(1,), kv_heads=(2, 3), remainder=16),
        _swift("guard", min_coverage=0.9, key_tokens=8, windows=(16,), remainder=16),
        _swift("delta", delta=8, windows=(16,), key_tokens=8, remainder=16),
        _swift("key_block1", selector={"name": "bounds", "key_block": 1}, key_tokens=3),
    ],
    "longformer": [
        _longformer("9,4", left=9, right=4, global_tokens=2, global_positions=(37, 38, 64, 150)),
    ],
    "bigbird": [
        _bigbird("1+1", random_blocks=2, last_global_blocks=1),
        _bigbird("wide", random_blocks=1, window_blocks=5, global_blocks=0, block=5, seed=3),
    ],
    "block_sparse": [
        _blocks("8", layout=("x..x", "xx..", "x.xx", "xx.x"), block=8),
        _blocks(
            "by_head",
            kv_heads=(2,),
            layout=(("x...", "xx..", "xxxx", "..xx"), ("x.x.", "xx.x", "xxxx", "x..x")),
            block=13,
        ),
    ],
    "dilated_window": [
        Case(
            name="dilated_window",
            label="dilated_window-5@3,1",
            config={"window": 5, "dilation": (3, 1)},
            covering={"window": 1024, "dilation": 1},
            alike=False,
        ),
    ],
    "chunked": [
        Case(
            name="chunked",
            label="chunked-11+4",
            config={"chunk": 11, "overlap": 4},
            covering={"overlap": 1024},
        ),
    ],
    "hierarchical": [
        Case(
            name="hierarchical",
            label="hierarchical-12",
            config={"chunk": 12, "pooling": "attention"},
            covering={"chunk": 1024},
            subset=False,
            # Its summaries weigh their tokens by content.
            biased=False,
        ),
        Case(
            name="hierarchical",
            label="hierarchical-mean",
            config={"chunk": 9, "pooling": "mean"},
            covering={"chunk": 1024},
            subset=False,
        ),
        Case(
            name="hierarchical",
            label="hierarchical-first",
            config={"chunk": 7, "pooling": "first", "count_weighted": False},
            covering={"chunk": 1024},
            subset=False,
        ),
    ],
    "bigbird_tokens": [
        Case(
            name="bigbird_tokens",
            label="bigbird_tokens-7",
            config={"window": 7, "global_tokens": 2},
            covering={"random_ratio": 1.0},
            alike=False,
        ),
    ],
    "linear": [
        _state("linear", "elu1"),
        _state("linear", "relu", feature_map="relu", vanishing=True, chunk=5),
        _state("linear", "identity", feature_map="identity", normalise=False, chunk=128),
    ],
    "efficient": [_state("efficient", chunk=7)],
    "performer": [
        _state("performer", features=24),
        _state("performer", "hyperbolic", features=10, hyperbolic=True, seed=3),
    ],
    "nystrom": [
        Case(
            name="nystrom",
            label="nystrom-8",
            config={"landmarks": 8},
            subset=False,
            causal=False,
            softmax=False,
            biased=False,
        ),
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
