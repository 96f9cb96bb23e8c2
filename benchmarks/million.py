"""A million tokens: how the cost of a token grows, by default, with every box bounded, with a tree.

``python benchmarks/million.py [--lengths 131072,1048576] [--only "default;prefill of tiny"]``

Two heads of 64, bf16, attention alone and causal, without a baseline: full attention of a million
tokens takes many minutes a call. Boxes are also timed without the remainder, of whose means, one
for at least 256 tokens, every query sees up to 512, and the tree with means of 2,048. The packaged
model (fp32) reads random tokens up to its first token by default, in chunks of 16,384 tokens:
every chunk looks at all keys before it. That takes minutes: what is measured is kept beside the
JSON, and a run that was interrupted goes on there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longswift import MSSwift
from longswift.core.errors import LongSwiftError
from longswift.eval import memory, options
from longswift.eval.attention import AttentionBench, inputs
from longswift.eval.environment import environment
from longswift.eval.journal import Journal
from longswift.eval.models import TINY
from longswift.eval.phase_work import Place, Work
from longswift.eval.phases import PhaseBench
from longswift.eval.results import Result, writable
from longswift.eval.timing import Seconds, alternate
from longswift.mechanisms.selectors.bounds import Bounds

KIND = "million"
HEADS, WIDTH = 2, 64
TREE = Bounds(tree=16, row_group=16, key_radius=0.7, row_radius=0.0)
MECHANISMS = {
    "default": MSSwift(),
    "every box": MSSwift(key_tokens=128, selector=Bounds()),
    "tree": MSSwift(key_tokens=128, selector=TREE),
    "every box, no remainder": MSSwift(key_tokens=128, selector=Bounds(), remainder=None),
    "tree, no remainder": MSSwift(key_tokens=128, selector=TREE, remainder=None),
    "tree, remainder 2048": MSSwift(key_tokens=128, selector=TREE, remainder=2048),
}
PREFILL, CHUNK = "prefill of tiny", 16384


def tensors(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard normal q, k and v."""
    bench = AttentionBench(
        lengths=(length,), mechanisms=(), heads=HEADS, kv_heads=HEADS, head_dim=WIDTH, seed=seed
    )
    return inputs(bench, length)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="131072,1048576")
    parser.add_argument("--only", help="labels, separated by semicolons")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds a mechanism and length"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("results/million.json"))
    parser.add_argument("--fresh", action="store_true", help="ignore what an earlier run finished")
    given = parser.parse_args()
    try:
        chosen = options.labelled(given.only, {**MECHANISMS, PREFILL: MSSwift()})
        target = writable(given.json, kind=KIND)
        lengths = [options.length(text) for text in given.lengths.split(",")]
        config = {
            "heads": HEADS,
            "head_dim": WIDTH,
            "dtype": "bfloat16",
            "mechanisms": {name: mechanism.to_dict() for name, mechanism in chosen.items()},
            "prefill": {"model": TINY, "dtype": "float32", "chunk": CHUNK},
        }
        how = {name: getattr(given, name) for name in ("seed", "repeats", "budget", "no_memory")}
        here = environment()
        kept = Journal(
            target.with_suffix(".parts.jsonl"),
            {"kind": KIND, "config": config, "how": how, "environment": here.to_dict()},
            fresh=given.fresh,
        )
        rows = _rows(lengths, chosen, given, kept)
    except (LongSwiftError, OSError) as error:
        print(f"million: {error}", file=sys.stderr)
        return 2
    config = {"lengths": lengths, **config}
    Result(kind=KIND, config=config, seed=given.seed, rows=rows, environment=here).save(target)
    assert kept.path is not None
    kept.path.unlink()
    first = {row["name"]: row for row in rows if row["length"] == lengths[0]}
    print(f"{'':26}{'tokens':>10}{'seconds':>10}{'us/token':>10}{'growth':>8}{'MiB':>8}")
    for row in rows:
        growth = row["microseconds_per_token"] / first[row["name"]]["microseconds_per_token"]
        extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:,.0f}"
        print(
            f"{row['name']:26}{row['length']:>10,}{row['median']:>10.2f}"
            f"{row['microseconds_per_token']:>10.2f}{growth:>8.2f}{extra:>8}"
        )
    return 0


def _rows(
    lengths: list[int], chosen: dict[str, MSSwift], given: argparse.Namespace, kept: Journal
) -> list[dict[str, Any]]:
    """Everything, by length; what an earlier run has kept is not measured again."""
    attention = {name: own for name, own in chosen.items() if name != PREFILL}
    parts: dict[str, Callable[[int], list[dict[str, Any]]]] = {}
    if attention:
        parts["attention"] = lambda length: _measure(length, attention, given)
    if PREFILL in chosen:
        parts[PREFILL] = lambda length: [_prefill(length, chosen[PREFILL], given)]
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for part, measure in parts.items():
            if not kept.find(part=part, length=length):
                kept.add({"part": part, "length": length, "rows": measure(length)})
            rows += kept.find(part=part, length=length)[0]["rows"]
    return rows


def _measure(
    length: int, mechanisms: dict[str, MSSwift], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Attention alone."""
    q, k, v = tensors(length, given.seed)

    def call(mechanism: MSSwift) -> Callable[[], object]:
        return lambda: mechanism(q, k, v)

    with torch.no_grad():
        timed = _timed({name: call(own) for name, own in mechanisms.items()}, length, given)
    rows = []
    for name, mechanism in mechanisms.items():
        extra = None
        if not given.no_memory:
            bench = AttentionBench(
                lengths=(length,),
                mechanisms=(mechanism.to_dict(),),
                heads=HEADS,
                kv_heads=HEADS,
                head_dim=WIDTH,
                seed=given.seed,
            )
            extra = memory.in_fresh_process(
                "longswift.eval.attention:working_memory",
                {"bench": bench.to_dict(), "rival": mechanism.name, "length": length},
            )["extra"]
        rows.append(_row(name, length, timed[name], extra))
    return rows


def _prefill(length: int, mechanism: MSSwift, given: argparse.Namespace) -> dict[str, Any]:
    """The packaged model's way to its first token, its cache included in the memory."""
    bench = PhaseBench(
        phase="prefill",
        lengths=(length,),
        mechanisms=(mechanism.to_dict(),),
        model=TINY,
        chunk=CHUNK,
        seed=given.seed,
    )
    where = Place("model", length, 1)
    job = Work(bench).jobs(where)[mechanism.name]
    timed = _timed({PREFILL: lambda: job.run()}, length, given)
    extra = None
    if not given.no_memory:
        extra = memory.in_fresh_process(
            "longswift.eval.phases:peak",
            {"bench": bench.to_dict(), "place": list(where), "rival": mechanism.name},
        )
    return _row(PREFILL, length, timed[PREFILL], extra)


def _timed(
    calls: dict[str, Callable[[], object]], length: int, given: argparse.Namespace
) -> dict[str, Seconds]:
    return alternate(
        calls,
        repeats=given.repeats,
        budget_seconds=given.budget,
        tick=lambda name: print(f"{length} tokens: {name}", file=sys.stderr),
    )


def _row(name: str, length: int, seconds: Seconds, extra: int | None) -> dict[str, Any]:
    per_token = 1e6 * seconds.median / length
    row = {"name": name, "length": length, **seconds.to_dict(), "extra_bytes": extra}
    return {**row, "microseconds_per_token": per_token}


if __name__ == "__main__":
    sys.exit(main())
