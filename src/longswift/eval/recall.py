"""Random key-value recall by attention alone: does a selection find what it is asked for?

A text of random keys, some of them paired with a value of their own, and query rows of which some
ask for exactly one pair while all others ask for nothing in particular. Keys are independent, so
that no mean, block or neighbour tells anything about them: the hardest case for a selector, and a
check of seconds that needs no model.

* keys: standard normal, ``[length, head_dim]``; so are the queries that ask for nothing;
* an asking query is its pair's key, scaled so that full attention puts ``certainty`` of its weight
  on it, were all other scores at their expectation;
* values: random unit vectors. A pair is *found* if its own value, among those of all pairs, is
  nearest to the output, and *seen* if its key is among the keys the query saw.

Asking rows are spread over the last ``rows`` positions, so that several pairs share a block of
queries with rows that compete for its budget.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, UnsupportedError, check_positive, problem
from longswift.core.mechanism import Mechanism
from longswift.eval import text
from longswift.eval.cost import scores_every_key
from longswift.eval.results import Result
from longswift.eval.runner import FULL
from longswift.eval.scores import wilson


@dataclass(frozen=True, kw_only=True)
class Recall:
    """The problem.

    Attributes:
        length: Tokens.
        pairs: Key-value pairs among them.
        rows: Last positions, which hold the asking rows; between ``pairs`` and ``length``.
        heads: Query heads; every head asks for each pair once, at a place of its own.
        kv_heads: Key/value heads, each with keys of its own.
        head_dim: Width of a head.
        certainty: Weight of full attention on the asked pair.
        trials: Independent problems.
        seed: Seed of everything.
    """

    length: int = 16_384
    pairs: int = 48
    rows: int = 1024
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    certainty: float = 0.9
    trials: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {k: v for k, v in asdict(self).items() if k not in ("certainty", "seed")}
        check_positive("recall", **counts)
        if self.length < self.rows + self.pairs:
            least = self.rows + self.pairs
            raise ConfigError(
                problem(
                    "recall.length",
                    expected=f"at least {least:,}: {self.rows:,} positions that ask, and "
                    f"{self.pairs:,} pairs before them",
                    got=f"{self.length:,}",
                    fix=f"Use --length {least}.",
                )
            )
        if self.pairs > self.rows or self.heads % self.kv_heads or not 0 < self.certainty < 1:
            raise ConfigError(
                problem(
                    "recall",
                    expected=f"at most {self.rows:,} pairs, which is how many rows ask, "
                    "heads a multiple of kv_heads, 0 < certainty < 1",
                    got=f"{asdict(self)}",
                    fix="Change one of them.",
                )
            )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem.

    Attributes:
        q: ``[1, heads, length, head_dim]``.
        k: ``[1, kv_heads, length, head_dim]``.
        v: The same shape.
        places: Where each pair lies, ``[kv_heads, pairs]``.
        asking: Which row asks for each pair, ``[heads, pairs]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    places: Tensor
    asking: Tensor


@dataclass(frozen=True, kw_only=True)
class RecallRow:
    """One mechanism.

    Attributes:
        name: Mechanism.
        found: Share of the asked pairs whose value is nearest to the output.
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
        seen: Share whose key was among the keys the row saw; None where the mechanism has no keys
            to name.
        asked: Pairs asked.
        keys_per_query: Keys scored per query.
        density: The same as a share of what full attention scores.
        seconds: Time of a call, mean.
    """

    name: str
    found: float
    low: float
    high: float
    seen: float | None
    asked: int
    keys_per_query: float
    density: float
    seconds: float


def make(recall: Recall, trial: int = 0) -> Problem:
    """Problem number ``trial``."""
    random = torch.Generator().manual_seed(recall.seed * 1_000_003 + trial)
    n, d, group = recall.length, recall.head_dim, recall.heads // recall.kv_heads

    def normal(heads: int) -> Tensor:
        return torch.randn(1, heads, n, d, generator=random)

    q, k, v = normal(recall.heads), normal(recall.kv_heads), normal(recall.kv_heads)
    v = v / v.norm(dim=-1, keepdim=True)
    first = n - recall.rows
    places, asking = [], []
    for _ in range(recall.kv_heads):
        # Pairs lie before the rows that ask, so that all of them are in the past.
        order = torch.randperm(first, generator=random)
        places.append(order[: recall.pairs])
    for head in range(recall.heads):
        rows = first + torch.randperm(recall.rows, generator=random)[: recall.pairs]
        wanted = k[0, head // group, places[head // group]]
        q[0, head, rows] = wanted * _sharpness(recall, wanted)
        asking.append(rows)
    return Problem(q=q, k=k, v=v, places=torch.stack(places), asking=torch.stack(asking))


def _sharpness(recall: Recall, keys: Tensor) -> Tensor:
    """Factor on each key ``[pairs, d]`` at which the pair gets the weight asked for.

    Against an independent key the score of ``s * key`` is normal with variance
    ``s^2 |key|^2 / d``, whose exponential has the mean ``exp(s^2 |key|^2 / 2d)``; the pair's own
    score is ``s |key|^2 / sqrt(d)``. The smaller root of the quadratic equation.
    """
    square = keys.pow(2).sum(-1, keepdim=True)
    odds = math.log(recall.certainty / (1 - recall.certainty) * recall.length)
    a, b = square / (2 * recall.head_dim), square / recall.head_dim**0.5
    return (b - (b * b - 4 * a * odds).clamp(min=0).sqrt()) / (2 * a)


@torch.inference_mode()
def measure(recall: Recall, mechanism: Mechanism, *, visible: bool = True) -> RecallRow:
    """Ask one mechanism for all pairs of all trials.

    Args:
        recall: The problem.
        mechanism: A causal mechanism.
        visible: Also find out which keys were seen; O(length^2) memory.

    Raises:
        UnsupportedError: The mechanism has no causal form.
    """
    group = recall.heads // recall.kv_heads
    found = seen = asked = 0
    seconds = keys = density = 0.0
    for trial in range(recall.trials):
        problem = make(recall, trial)
        begin = time.perf_counter()
        result = mechanism(problem.q, problem.k, problem.v)
        seconds += time.perf_counter() - begin
        keys += result.stats.keys_per_query
        density += result.stats.density
        allowed = mechanism.visible(problem.q, problem.k) if visible else None
        for head in range(recall.heads):
            places, rows = problem.places[head // group], problem.asking[head]
            values = problem.v[0, head // group, places]
            nearest = (result.out[0, head, rows] @ values.T).argmax(-1)
            found += int((nearest == torch.arange(recall.pairs)).sum())
            if allowed is not None:
                seen += int(allowed[0, head, rows, places].sum())
            asked += recall.pairs
    low, high = wilson(found / asked, asked)
    return RecallRow(
        name=mechanism.name,
        found=found / asked,
        low=low,
        high=high,
        seen=seen / asked if visible else None,
        asked=asked,
        keys_per_query=keys / recall.trials,
        density=density / recall.trials,
        seconds=seconds / recall.trials,
    )


def run(recall: Recall, mechanisms: Iterable[tuple[str, Mechanism]]) -> Result:
    """Measure several mechanisms, each under a name of its own.

    Those without a causal form are named in ``summary["refused"]``, those other than full
    attention that left no key out in ``summary["dense"]``.

    Raises:
        UnsupportedError: None of them has one.
    """
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    dense: list[str] = []
    configs = {}
    for name, mechanism in mechanisms:
        configs[name] = mechanism.to_dict()
        try:
            row = measure(recall, mechanism)
        except UnsupportedError as error:
            refused[name] = str(error)
            continue
        rows.append({**asdict(row), "name": name})
        if row.name != FULL and scores_every_key(row.name, row.density):
            dense.append(name)
    if not rows:
        raise UnsupportedError(
            problem(
                "recall",
                expected="at least one mechanism with a causal form",
                got=", ".join(refused) or "none",
                fix="Name another one, for example ms_swift.",
            )
        )
    config = json.loads(json.dumps({**asdict(recall), "mechanisms": configs}))
    summary = {"refused": refused, "dense": dense, "chance": 1 / recall.pairs}
    return Result(kind="recall", config=config, seed=recall.seed, rows=rows, summary=summary)


def sentences(result: Result) -> list[str]:
    """What the rows do not say, in words."""
    length = result.config["length"]
    return [
        *(f"{name} did not run: {why}" for name, why in result.summary["refused"].items()),
        *(
            f"{name} is dense at {length:,} tokens: it saves nothing there, and what it finds says "
            "nothing."
            for name in result.summary["dense"]
        ),
    ]


def table(result: Result) -> text.Table:
    """The result for people."""
    config = result.config
    rows = [RecallRow(**row) for row in result.rows]
    cells = [
        (
            row.name,
            f"{100 * row.found:.0f} %",
            f"{100 * row.low:.0f} - {100 * row.high:.0f} %",
            "-" if row.seen is None else f"{100 * row.seen:.0f} %",
            f"{row.keys_per_query:,.0f} ({100 * row.density:.1f} %)",
            text.seconds(row.seconds),
        )
        for row in rows
    ]
    title = (
        f"{config['pairs']} random pairs in {config['length']:,} random tokens "
        f"(chance {100 * result.summary['chance']:.0f} %)"
    )
    return text.Table(
        title, ("", "found", "95 % interval", "keys seen", "keys/query", "time"), cells
    )
