"""Result types shared by every mechanism and backend.

Shape legend used throughout: ``B`` batch, ``Hq`` query heads, ``Hkv`` key/value heads,
``G = Hq // Hkv`` group size, ``Lq`` queries, ``Lk`` keys, ``D`` head dimension.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CapturedMass:
    """Full attention's mass on the keys that were seen, per query head, mean over the batch.

    Attributes:
        basis: ``"exact"`` when it was computed for every query row, ``"sampled"`` when it was
            computed (exactly) for some of them: the mean is then an estimate, and rows worse than
            ``lowest`` may exist.
        rows: Query rows measured per head.
        mean: Share of the mass on the keys seen one by one, mean over the measured rows.
        lowest: The smallest share of a measured row.
        remainder: Share of the output's own weight that lies on pooled means, mean over the
            measured rows; not part of ``mean``.
    """

    basis: str
    rows: int
    mean: tuple[float, ...]
    lowest: tuple[float, ...]
    remainder: tuple[float, ...]

    @staticmethod
    def over_batch(parts: Sequence[CapturedMass]) -> CapturedMass | None:
        """Rows of a batch taken together; None for none."""
        if not parts:
            return None
        return CapturedMass(
            basis="exact" if all(p.basis == "exact" for p in parts) else "sampled",
            rows=min(p.rows for p in parts),
            mean=means([p.mean for p in parts]),
            lowest=tuple(min(of) for of in zip(*(p.lowest for p in parts), strict=True)),
            remainder=means([p.remainder for p in parts]),
        )


def means(parts: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Means of the entries of equally long tuples."""
    return tuple(sum(of) / len(parts) for of in zip(*parts, strict=True))


@dataclass(frozen=True, kw_only=True)
class AttentionStats:
    """What one call actually computed.

    Attributes:
        mechanism: Name of the mechanism.
        backend: Backend that ran (never ``"auto"``).
        mode: How the choice of keys respected causality: ``"dense"``, ``"static"`` (the choice
            does not depend on content), ``"shared"`` or ``"strict"``.
        keys_per_query: Mean number of key slots scored per query, remainder entries included. Where
            no keys are scored, how many could have been for the same arithmetic.
        density: ``keys_per_query`` over the mean number of keys full attention would score.
        dense_rows: Fraction of query rows that were computed exactly.
        density_by_head: ``density`` of each KV head; empty where heads do not differ.
        captured: The attention mass that was seen, where it was asked for.
        extra: Figures particular to the mechanism. Dictionaries in it are counts, which add up
            over heads and batch rows, and shares, of which the lowest is told.
    """

    mechanism: str
    backend: str
    mode: str
    keys_per_query: float
    density: float
    dense_rows: float
    density_by_head: tuple[float, ...] = ()
    captured: CapturedMass | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def over_batch(name: str, stats: Sequence[AttentionStats]) -> AttentionStats:
        """Average over batch rows; a batch of nothing but padding computed nothing."""
        if not stats:
            return AttentionStats(
                mechanism=name,
                backend="none",
                mode="dense",
                keys_per_query=0.0,
                density=0.0,
                dense_rows=0.0,
            )

        def mean(field: str) -> float:
            return sum(getattr(s, field) for s in stats) / len(stats)

        # Short rows are dense; the row that was not says what the mechanism did.
        telling = min(stats, key=lambda s: s.dense_rows)
        return AttentionStats(
            mechanism=name,
            backend=telling.backend,
            mode=telling.mode,
            keys_per_query=mean("keys_per_query"),
            density=mean("density"),
            dense_rows=mean("dense_rows"),
            density_by_head=means([s.density_by_head for s in stats]),
            captured=CapturedMass.over_batch([s.captured for s in stats if s.captured is not None]),
            # Rows attended together share one object.
            extra={**telling.extra, **counted(list({id(s): s for s in stats}.values()))},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, in the very form JSON gives back."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


def counted(parts: Sequence[AttentionStats]) -> dict[str, dict[str, Any]]:
    """The dictionaries in ``extra`` of all parts together: whole numbers summed, lowest shares."""
    figures: dict[str, list[dict[str, Any]]] = {}
    for stats in parts:
        for name, value in stats.extra.items():
            if isinstance(value, dict):
                figures.setdefault(name, []).append(value)
    return {
        name: {
            key: (sum if isinstance(value, int) else min)(each[key] for each in found)
            for key, value in found[0].items()
        }
        for name, found in figures.items()
    }


class AttentionResult(NamedTuple):
    """Output of a mechanism.

    Attributes:
        out: ``[B, Hq, Lq, Dv]`` in the dtype of the query.
        lse: ``[B, Hq, Lq]`` natural-log-sum-exp of the scaled scores, fp32 (fp64 for fp64
            input); ``-inf`` where a query saw nothing.
        stats: What was computed.
    """

    out: Tensor
    lse: Tensor
    stats: AttentionStats


class Partial(NamedTuple):
    """Attention of some queries over some keys, mergeable by log-sum-exp.

    ``out [..., Lq, Dv]`` is normalised within the part and 0 where ``lse [..., Lq]`` is ``-inf``.
    """

    out: Tensor
    lse: Tensor
