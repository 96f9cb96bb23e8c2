"""How far mechanisms are from softmax attention, next to what is free: the mean of all values.

Without softmax ``(Q K^T) V`` and ``Q (K^T V)`` are the same numbers; with it they are not, and
every linear mechanism pays a price that depends on how peaked attention is. Here the price is
measured on random queries, keys and values whose scaled scores have a given spread.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import check_positive
from longswift.eval import options, text
from longswift.eval.results import Result, writable
from longswift.mechanisms.full import Full
from longswift.mechanisms.linear import Linear

UNIFORM = "uniform"
_NOTES = {
    "data": "q, k and v are independent standard normal numbers, q times the spread, so that the "
    "scaled scores have the spread as standard deviation",
    "error": "norm of the difference from softmax attention over the norm of softmax attention",
    UNIFORM: "every query returns the mean of the values it may see",
}


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """What to compare.

    Attributes:
        mechanisms: ``Mechanism.to_dict`` by label.
        spreads: Standard deviations of the scaled scores, from flat to peaked.
        length: Tokens.
        heads: Heads.
        head_dim: Width of a head.
        seed: Seed of the data.
    """

    mechanisms: dict[str, dict[str, Any]]
    spreads: tuple[float, ...] = (0.1, 1.0, 4.0)
    length: int = 1024
    heads: int = 4
    head_dim: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(
            "approximation", length=self.length, heads=self.heads, head_dim=self.head_dim
        )


def reassociated(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """``(Q K^T) V`` and ``Q (K^T V)`` without softmax: the same numbers up to rounding.

    Args:
        q: ``[B, H, L, D]``.
        k: ``[B, H, L, D]``.
        v: ``[B, H, L, Dv]``.
        causal: Products of a query with later keys are left out of both.

    Returns:
        The quadratic and the linear one, ``[B, H, L, Dv]``.
    """
    weights = q @ k.transpose(2, 3)
    quadratic = (weights.tril() if causal else weights) @ v
    plain = Linear(feature_map="identity", normalise=False)
    return quadratic, plain(q, k, v, causal=causal, scale=1.0).out


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@torch.no_grad()
def _measure(asked: Approximation, spread: float, causal: bool) -> list[dict[str, Any]]:
    """Errors of every rival on data of one spread."""
    generator = torch.Generator().manual_seed(asked.seed)
    shape = (1, asked.heads, asked.length, asked.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    q = q * spread
    exact = Full()(q, k, v, causal=causal).out
    mean = v.mean(2, keepdim=True).expand_as(v)
    if causal:
        mean = v.cumsum(2) / torch.arange(1, asked.length + 1).unsqueeze(1)
    quadratic, linear = reassociated(q, k, v, causal=causal)
    errors = {UNIFORM: _error(mean, exact)}
    for label, config in asked.mechanisms.items():
        mechanism = options.from_json(config)
        if mechanism.supports_causal if causal else mechanism.supports_bidirectional:
            errors[label] = _error(mechanism(q, k, v, causal=causal).out, exact)
    gap = _error(linear, quadratic)
    return [
        {"name": name, "spread": spread, "causal": causal, "error": error, "reassociation": gap}
        for name, error in errors.items()
    ]


def run(asked: Approximation, output: str | Path | None = None) -> Result:
    """Measure every rival at every spread, causal and bidirectional.

    Args:
        asked: What to compare.
        output: JSON file to write.
    """
    if output is not None:
        writable(output, kind="approximation")
    rows = [
        row
        for causal in (True, False)
        for spread in asked.spreads
        for row in _measure(asked, spread, causal)
    ]
    config: dict[str, Any] = json.loads(json.dumps(asdict(asked)))
    result = Result(kind="approximation", config=config, seed=asked.seed, rows=rows)
    worst = max(row["reassociation"] for row in rows)
    sentence = (
        f"Without softmax (Q K^T) V and Q (K^T V) differ by {worst:.1e} at most, which is "
        "rounding; the table shows how far linear mechanisms are from softmax attention."
    )
    result.summary.update({"sentences": [sentence], "how": _NOTES})
    if output is not None:
        result.save(output)
    return result


def table(result: Result) -> text.Table:
    """Relative errors, one line per rival, one column per direction and spread."""
    cases = list(dict.fromkeys((row["causal"], row["spread"]) for row in result.rows))
    errors = {(r["name"], (r["causal"], r["spread"])): r["error"] for r in result.rows}

    def cell(name: str, case: tuple[bool, float]) -> str:
        error = errors.get((name, case))
        return "-" if error is None else f"{error:.3f}"

    names = dict.fromkeys(row["name"] for row in result.rows)
    cells = [(name, *(cell(name, case) for case in cases)) for name in names]
    columns = ("", *(f"{'causal' if causal else 'both'}, {spread:g}" for causal, spread in cases))
    length, width = result.config["length"], result.config["head_dim"]
    title = f"error against softmax attention, {length:,} tokens, heads of {width}"
    return text.Table(title, columns, cells)
