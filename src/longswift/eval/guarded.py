"""How often the coverage guard fired while a model read, layer by layer and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from longswift.core.observe import Observed

# From here on a reading saves nothing that a user would notice.
_NOTHING = 0.9


@dataclass(frozen=True, kw_only=True)
class GuardRow:
    """What the guard of one layer did while a text was read.

    Attributes:
        document: Index of the document.
        layer: Layer.
        min_coverage: What every block had to cover.
        pairs: Pairs of a block of queries and a KV head that were probed; rows that are exact
            anyway are not.
        dense: Those that fell short and were computed with every key.
        lowest: The smallest coverage probed; None if nothing was.
        lowest_after: The smallest once those that fell short saw every key.
    """

    document: int
    layer: int
    min_coverage: float
    pairs: int = 0
    dense: int = 0
    lowest: float | None = None
    lowest_after: float | None = None


class Guarded:
    """An observer that adds up what the guard did in each layer, reading one document."""

    def __init__(self, document: int = 0) -> None:
        self._document = document
        self._layers: dict[int, GuardRow] = {}

    def see(self, call: Observed) -> None:
        """Count a call; mechanisms without a guard are passed over."""
        target = getattr(call.mechanism, "min_coverage", None)
        if target is None:
            return
        layer = call.layer or 0
        before = self._layers.get(layer) or GuardRow(
            document=self._document, layer=layer, min_coverage=target
        )
        told = call.result.stats.extra.get("guard")
        if told is not None:
            before = replace(
                before,
                pairs=before.pairs + told["blocks"],
                dense=before.dense + told["dense"],
                lowest=_least((before.lowest, told["lowest"])),
                lowest_after=_least((before.lowest_after, told["lowest_after"])),
            )
        self._layers[layer] = before

    def rows(self) -> list[GuardRow]:
        """What was counted, by layer; nothing for a mechanism without a guard."""
        return [self._layers[layer] for layer in sorted(self._layers)]


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Readings taken together, as a whole and per layer; None where there was no guard.

    Args:
        rows: Fields of ``GuardRow``, of any number of documents.
    """
    layers: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        layers.setdefault(row["layer"], []).append(row)
    if not layers:
        return None
    every = [row for found in layers.values() for row in found]
    return {
        "min_coverage": every[0]["min_coverage"],
        **_together(every),
        "layers": [{"layer": layer, **_together(layers[layer])} for layer in sorted(layers)],
    }


def _together(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    pairs, dense = (sum(row[name] for row in rows) for name in ("pairs", "dense"))
    return {
        "pairs": pairs,
        "dense": dense,
        "share": dense / pairs if pairs else None,
        "lowest": _least(row["lowest"] for row in rows),
        "lowest_after": _least(row["lowest_after"] for row in rows),
    }


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def mostly_dense(guard: Mapping[str, Any] | None) -> bool:
    """Whether the guard replaced more than half of what the mechanism chose."""
    return guard is not None and bool(guard["pairs"]) and guard["share"] > 0.5


def probed(guard: Mapping[str, Any] | None) -> bool:
    """Whether a guard had anything to judge."""
    return guard is not None and bool(guard["pairs"])


def sentence(guard: Mapping[str, Any], density: float) -> str:
    """A summary in words.

    Args:
        guard: What ``summarise`` gave.
        density: Keys scored over those full attention scores, of the same reading.
    """
    name = f"The guard (min_coverage={guard['min_coverage']:g})"
    if not probed(guard):
        return f"{name} had nothing to judge: every row was computed exactly anyway."
    said = (
        f"{name} computed {guard['dense']:,} of {guard['pairs']:,} pairs of a block and a KV head "
        f"densely ({100 * guard['share']:.1f} %); the lowest coverage was "
        f"{_percent(guard['lowest'])} before and {_percent(guard['lowest_after'])} after that."
    )
    if mostly_dense(guard):
        saved = "nothing" if density >= _NOTHING else "little"
        said += (
            f" Most blocks were computed densely, so {saved} is saved (with the probes "
            f"{100 * density:.0f} % of full attention's keys are scored, the choice not counted): "
            "raise key_tokens or the windows, or lower min_coverage."
        )
    elif density >= _NOTHING:
        said += (
            f" With the probes {100 * density:.0f} % of full attention's keys are scored, so "
            "nothing is saved on a text of this length."
        )
    return said


def table(guard: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Cells of each layer: layer, dense, of, lowest coverage before and after."""
    return [
        (
            str(row["layer"]),
            f"{row['dense']:,} of {row['pairs']:,}",
            _percent(row["share"]),
            _percent(row["lowest"]),
            _percent(row["lowest_after"]),
        )
        for row in guard["layers"]
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
