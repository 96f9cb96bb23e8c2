"""What a calibrated profile keeps in documents that did not choose it, and how sure that is.

The cheapest settings that reach a target in some documents reach it there partly because of what
just these documents are like. Each document is therefore judged by a choice made without it
(leave-one-out), and the spread of these figures is what is known about how documents differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from longswift.eval.calibration import Candidate, Tried, cheapest, with_choice
from longswift.mechanisms.profile import LayerProfile

# Upper 2.5 % points of Student's t for 1, 2, 3, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.959964


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What another document of the same kind is expected to keep.

    Attributes:
        mean: Over documents and heads.
        low: Lower end of the 95 % interval for one further document.
        high: Upper end; no share is above 1.
        each: The documents it comes from.
    """

    mean: float
    low: float
    high: float
    each: list[float]


def student(freedom: int) -> float:
    """The two-sided 95 % point of Student's t distribution."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    # Cornish and Fisher's expansion, within 0.003 from here on.
    z = _NORMAL
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def margin(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean; a single value tells none."""
    if len(values) < 2:
        return None
    return student(len(values) - 1) * stdev(values) / sqrt(len(values))


def pool(documents: Sequence[Mapping[int, Tried]]) -> dict[int, Tried]:
    """Means over documents, by layer."""
    return {
        layer: Tried(
            shares=_tables([one[layer].shares for one in documents]),
            costs=_tables([one[layer].costs for one in documents]),
            dense=fmean(one[layer].dense for one in documents),
        )
        for layer in documents[0]
    }


def expected(
    documents: Sequence[Mapping[int, Tried]],
    found: Sequence[Candidate],
    kv_heads: int,
    target: float,
) -> Expected | None:
    """Judge each document by the choice that the others lead to; None of a single document.

    Args:
        documents: What every candidate kept in each of them, by layer.
        found: The candidates.
        kv_heads: KV heads of a layer.
        target: What every query head must keep.
    """
    count = len(documents)
    if count < 2:
        return None
    each = []
    for index, one in enumerate(documents):
        others = pool([*documents[:index], *documents[index + 1 :]])
        chosen = {k: cheapest(tried, found, kv_heads, target) for k, tried in others.items()}
        each.append(mean_share(one, chosen, found))
    mean = fmean(each)
    wide = student(count - 1) * stdev(each) * sqrt(1 + 1 / count)
    return Expected(mean=mean, low=max(0.0, mean - wide), high=min(1.0, mean + wide), each=each)


def mean_share(
    document: Mapping[int, Tried], chosen: Mapping[int, LayerProfile], found: Sequence[Candidate]
) -> float:
    """What a document keeps with a choice, over all layers and query heads."""
    return fmean(
        share
        for layer, profile in chosen.items()
        for share in with_choice(document[layer], profile, found)[0]
    )


def _tables(tables: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return [
        [fmean(values) for values in zip(*lines, strict=True)]
        for lines in zip(*tables, strict=True)
    ]
