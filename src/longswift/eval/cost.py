"""What attending costs: keys scored per query, and the window that costs the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from longswift.core.mechanism import Mechanism
from longswift.core.observe import Observed, observe

_EVERY = 0.99
# Options of mechanisms that let a query see more.
_WIDER = (
    *("window", "left", "chunk", "window_blocks", "random_blocks", "random_ratio"),
    *("global_blocks", "features", "landmarks"),
)


def equal_cost_window(keys_per_query: float, length: int) -> int:
    """The causal window that scores ``keys_per_query`` keys a query on average over a text.

    The first ``w`` queries see fewer than ``w`` keys: the mean over ``n`` queries is
    ``w - w (w - 1) / 2n``, solved for ``w``.
    """
    n = length
    wanted = min(keys_per_query, (n + 1) / 2)
    window = n + 0.5 - ((n + 0.5) ** 2 - 2 * n * wanted) ** 0.5
    return max(1, min(n, round(window)))


def counts_keys(name: str) -> bool:
    """Whether a mechanism scores keys one by one, so that a density of 1 is full attention.

    Elsewhere density is a measure of arithmetic, and says nothing about what is left out.
    """
    from longswift.mechanisms import MECHANISMS

    # A profile is MS-SWIFT with settings of single heads.
    known = name in MECHANISMS.names()
    return not known or MECHANISMS.get(name).exact_part is not Mechanism.exact_part


def remedy(name: str) -> str:
    """What may help where a mechanism loses too much, as the end of a sentence."""
    from longswift.mechanisms import MECHANISMS

    if name not in MECHANISMS.names() or name == "ms_swift":
        return "raise key_tokens or the windows, or let longswift calibrate choose"
    wider = [f.name for f in fields(MECHANISMS.get(name)) if f.name in _WIDER]
    return f"raise {' or '.join(wider)}, or try ms_swift" if wider else "try ms_swift"


def scores_every_key(name: str, density: float | None) -> bool:
    """Whether a mechanism of this density left nothing out, so that it saves and proves nothing."""
    return (density or 0) > _EVERY and counts_keys(name)


@dataclass
class Scored:
    """Keys scored by the calls that were added, weighted by queries."""

    queries: int = 0
    keys: float = 0.0

    def add(self, call: Observed) -> None:
        """Count a call."""
        queries = call.q.shape[2]
        self.queries += queries
        self.keys += queries * call.result.stats.keys_per_query


@contextmanager
def count_keys(mechanism: Mechanism | None, scored: Scored) -> Iterator[None]:
    """Count what calls equal to ``mechanism`` score."""

    def add(call: Observed) -> None:
        if call.mechanism == mechanism:
            scored.add(call)

    with observe(add):
        yield
