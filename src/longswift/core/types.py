"""Result types shared by every mechanism and backend.

Shape legend used throughout: ``B`` batch, ``Hq`` query heads, ``Hkv`` key/value heads,
``G = Hq // Hkv`` group size, ``Lq`` queries, ``Lk`` keys, ``D`` head dimension.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionStats:
    """What one call actually computed.

    Attributes:
        mechanism: Name of the mechanism.
        backend: Backend that ran (never ``"auto"``).
        mode: How the choice of keys respected causality: ``"dense"``, ``"static"`` (the choice
            does not depend on content), ``"shared"`` or ``"strict"``.
        keys_per_query: Mean number of key slots scored per query, remainder entries included.
        density: ``keys_per_query`` over the mean number of keys full attention would score.
        dense_rows: Fraction of query rows that were computed exactly.
        extra: Figures particular to the mechanism.
    """

    mechanism: str
    backend: str
    mode: str
    keys_per_query: float
    density: float
    dense_rows: float
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)


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
