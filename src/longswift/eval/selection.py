"""Ways to choose keys compared on one model and one text: quality against time on real kernels.

A document with secrets is read once by the dense model. Every rival then attends to the dense
model's own queries, keys and values (attention mass captured, error of the output, seconds), reads
the document by itself (next-token divergence), and is asked for the secrets.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import check_positive
from longswift.core.observe import Observed, Observer
from longswift.eval import options
from longswift.eval import text as text_of
from longswift.eval.cost import Scored
from longswift.eval.documents import source
from longswift.eval.exams import Exam, answer, exams
from longswift.eval.judging import EndJudge, LayerJudge
from longswift.eval.models import TINY, Loaded, load
from longswift.eval.progress import Bar, bar
from longswift.eval.reading import finish
from longswift.eval.results import Progress, Result, writable
from longswift.eval.rivals import FULL, Rival
from longswift.eval.walk import Walk, on_trial
from longswift.extend.rope import check_kind
from longswift.mechanisms.full import Full

KIND = "selection"
_NOTES = {
    "seconds": "attention alone, choosing included, summed over the full-attention layers, on the "
    "dense model's queries, keys and values of the whole document; median of the repeats",
    "ratio": "seconds of torch's SDPA on the same tensors, same run, over the rival's",
    "captured": "share of full attention's mass on the keys seen one by one, mean over rows, heads "
    "and layers; what is seen through pooled means is not counted",
    "kl": "next-token distribution against the dense model's when the rival reads by itself, nats",
    "found": "secrets answered with every digit right, out of those full attention answers",
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to compare.

    Attributes:
        mechanisms: By label, as ``Mechanism.to_dict`` gives them.
        length: Tokens of a document, secrets included.
        documents: How often the text is read, each time with other secrets.
        secrets: How many a document hides.
        repeats: How often attention is timed.
        model: ``tiny``, a directory or a name on the hub.
        file: Text; held-out Python documentation by default.
        seed: Chooses words, numbers and places.
        max_length: Extend the model's positions to this many tokens.
        rope: Scaling of rotary positions for that.
        device: Where the model is.
        dtype: What it computes in; ``"auto"`` is that of the checkpoint.
    """

    mechanisms: dict[str, dict[str, Any]]
    length: int = 8192
    documents: int = 1
    secrets: int = 12
    repeats: int = 3
    model: str = TINY
    file: str | None = None
    seed: int = 0
    max_length: int | None = None
    rope: str | None = "yarn"
    device: str = "cpu"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_positive(
            "selection",
            length=self.length,
            documents=self.documents,
            secrets=self.secrets,
            repeats=self.repeats,
        )
        check_kind(self.rope)


class _Clock:
    """Times torch's SDPA and every rival on what full attention attended to."""

    def __init__(self, rivals: Sequence[Rival], repeats: int) -> None:
        self._rivals, self._repeats = rivals, repeats
        self.seconds: dict[str, float] = {}

    def __call__(self, call: Observed) -> None:
        q, k, v = call.q, call.k, call.v
        times: dict[str, list[float]] = {}

        def dense() -> None:
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
            )

        def attend(rival: Rival) -> Callable[[], Any]:
            mechanism = rival.choose(call.layer)
            return lambda: mechanism(q, k, v, causal=True, scale=call.scale)

        runs = {FULL: dense, **{rival.name: attend(rival) for rival in self._rivals}}
        for _ in range(self._repeats):
            for name, attention in runs.items():
                finish(q.device)
                begin = time.perf_counter()
                attention()
                finish(q.device)
                times.setdefault(name, []).append(time.perf_counter() - begin)
        for name, of in times.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + statistics.median(of)


def measure(
    loaded: Loaded, exam: Exam, rivals: Sequence[Rival], repeats: int, document: int, step: Bar
) -> list[dict[str, Any]]:
    """One document: a row for full attention and for every rival."""
    clock, judge = _Clock(rivals, repeats), LayerJudge(rivals)

    def watch(call: Observed) -> None:
        clock(call)
        judge(call)

    ids = exam.document
    # In one piece, as attention is timed.
    walk = Walk(loaded.model, ids, len(ids), step)
    states: dict[str, Tensor] = {}
    right: dict[str, list[bool]] = {}
    keys = {FULL: (len(ids) + 1) / 2}

    def read(rival: Rival, observer: Observer) -> None:
        def see(_: int, hidden: Tensor) -> None:
            states[rival.name] = hidden

        def ask(cache: Any) -> None:
            said = zip(answer(loaded, exam, cache), exam.answers, strict=True)
            right[rival.name] = [a == b for a, b in said]

        walk.read(rival, observer, see, ask)

    with on_trial(loaded.model), torch.inference_mode():
        read(Rival(FULL, Full()), watch)
        for rival in rivals:
            scored = Scored()
            read(rival, scored.add)
            keys[rival.name] = scored.keys / scored.queries
        ends = EndJudge(loaded.model, ids)
        ends.add(0, states.pop(FULL), states)
    heads = judge.rows(document)
    rows = []
    for end in ends.rows(document, keys):
        own = [head for head in heads if head.name == end.name]
        masses = [head.captured_mean for head in own if head.captured_mean is not None]
        rows.append(
            {
                **asdict(end),
                "seconds": clock.seconds[end.name],
                "ratio": clock.seconds[FULL] / clock.seconds[end.name],
                "captured": fmean(masses) if masses else None,
                "captured_worst": min(masses) if masses else None,
                "error": fmean(head.error for head in own) if own else None,
                "right": right[end.name],
            }
        )
    return rows


def run(study: Study, output: str | Path, *, fresh: bool = False, progress: bool = True) -> Result:
    """Compare; documents an interrupted run of the same study has finished are reused.

    Raises:
        InputError: The text is too short, or longer than the model can position.
    """
    from longswift.hf import check_length

    target = writable(output, kind=KIND)
    loaded, text = load(study.model, dtype=study.dtype, device=study.device), source(study.file)
    loaded.extend(study.max_length, study.rope)
    check_length(loaded.model, study.length + 64)
    found = exams(
        loaded,
        text,
        length=study.length,
        documents=study.documents,
        secrets=study.secrets,
        seed=study.seed,
    )
    rivals = [Rival(name, options.from_json(own)) for name, own in study.mechanisms.items()]
    config: dict[str, Any] = json.loads(json.dumps(asdict(study)))
    config.update(
        model=loaded.name,
        model_sha256=loaded.fingerprint(),
        file=None if study.file is None else Path(study.file).name,
    )
    result = Result(kind=KIND, config=config, seed=study.seed, rows=[])
    kept = Progress(result, target, fresh=fresh, finished=True)
    with bar((len(rivals) + 1) * study.length * len(found), "starting", shown=progress) as step:
        for number, exam in enumerate(found):
            if kept.find(document=number) is None:
                kept.add(*measure(loaded, exam, rivals, study.repeats, number, step))
    result.summary.update(mechanisms=summarise(result.rows), how=_NOTES)
    result.save(target)
    kept.done()
    return result


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the documents, a record per mechanism."""
    dense = {row["document"]: row for row in rows if row["name"] == FULL}
    known = {number: row["right"] for number, row in dense.items()}
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        pairs = [
            (theirs, mine)
            for row in own
            for theirs, mine in zip(known[row["document"]], row["right"], strict=True)
        ]
        nll = fmean(row["nll"] - dense[row["document"]]["nll"] for row in own)

        def mean(column: str, own: Sequence[dict[str, Any]] = own) -> float | None:
            values = [row[column] for row in own if row[column] is not None]
            return fmean(values) if values else None

        columns = "keys_per_query", "density", "seconds", "ratio", "captured", "error", "kl"
        found.append(
            {
                "name": name,
                **{column: mean(column) for column in columns},
                "captured_worst": mean("captured_worst"),
                "agreement": mean("agreement"),
                "perplexity_ratio": math.exp(nll),
                "found": sum(mine for theirs, mine in pairs if theirs),
                "asked": sum(theirs for theirs, _ in pairs),
            }
        )
    return found


def table(result: Result) -> text_of.Table:
    """The result for people."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    columns = (
        "",
        "x SDPA",
        "keys/query",
        "captured",
        "error",
        "KL",
        "same top",
        "x ppl",
        "secrets",
    )
    cells = [
        (
            row["name"],
            f"{row['ratio']:.2f}",
            f"{row['keys_per_query']:,.0f}",
            share(row["captured"]),
            share(row["error"]),
            f"{row['kl']:.4f}",
            share(row["agreement"]),
            f"{row['perplexity_ratio']:.4f}",
            f"{row['found']} of {row['asked']}",
        )
        for row in result.summary["mechanisms"]
    ]
    config = result.config
    title = f"{config['model']}, {config['documents']} x {config['length']:,} tokens"
    return text_of.Table(title, columns, cells)
