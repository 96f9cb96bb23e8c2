"""One long document, read three ways: full attention, a window of equal cost, MS-SWIFT."""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longswift.core.errors import check_positive
from longswift.core.mechanism import Mechanism
from longswift.eval import memory, options, reading
from longswift.eval import text as text_of
from longswift.eval.cost import Scored, count_keys, equal_cost_window, scores_every_key
from longswift.eval.documents import source
from longswift.eval.exams import Exam, answer, exams
from longswift.eval.models import TINY, Loaded, load
from longswift.eval.progress import Bar, bar
from longswift.eval.results import Progress, Result, apart, writable

FULL, WINDOW, SWIFT = "full", "sliding_window", "ms_swift"
_WARM_UP = 2048
_NOTES = {
    "full": "the model's own attention (sdpa), as Transformers runs it",
    "window": "sliding window whose mean number of keys per query is the one MS-SWIFT scored "
    "while reading; like MS-SWIFT it replaces only the model's full-attention layers",
    "reading": "the same chunks and the same kind of cache for all three; seconds are those of "
    "the decoder, without the scoring of the text",
    "memory": "rise of the process's resident high-water mark above the loaded model while "
    "reading and answering, cache included; the mark is reset before each reading",
    "found": "questions appended to the read document one at a time, decoded greedily; found "
    "means every digit right",
    "documents": "the same text, read anew with other secrets at other places; seconds are the "
    "median over the documents, perplexity is over all their tokens",
}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What to show.

    Attributes:
        length: Tokens of the document, secrets included.
        documents: How often the text is read, each time with other secrets.
        secrets: How many a document hides; a model must match their words if there are several.
        file: Text to hide them in; held-out Python documentation by default.
        model: ``tiny``, a directory or a name on the hub.
        mechanism: The MS-SWIFT configuration, as ``Mechanism.to_dict`` gives it.
        chunk: Tokens per forward pass.
        decoded: Tokens decoded to time decoding.
        seed: Chooses words, numbers and places.
    """

    mechanism: dict[str, Any]
    length: int = 32768
    documents: int = 6
    secrets: int = 1
    file: str | None = None
    model: str = TINY
    chunk: int = 1024
    decoded: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(
            "demo",
            length=self.length,
            documents=self.documents,
            secrets=self.secrets,
            chunk=self.chunk,
            decoded=self.decoded,
        )
        reading.check_chunk("demo.chunk", self.chunk, options.from_json(self.mechanism))


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One way of reading.

    Attributes:
        name: Mechanism.
        label: What to call it in tables.
        length: Tokens read.
        prefill_seconds: Time to read a document, median.
        decode_tokens_per_second: Greedy decoding behind a document, median.
        peak_bytes: Memory above the loaded model, or None where it cannot be measured.
        found: Secrets with every digit right.
        asked: Secrets asked.
        right: The same per secret.
        depths: Where each secret lies, 0 start, 1 end.
        answers: What the model said.
        perplexity: Of the document, per token.
        keys_per_query: Keys scored per query in the full-attention layers, averaged.
        density: The same as a share of what full attention scores.
    """

    name: str
    label: str
    length: int
    prefill_seconds: float
    decode_tokens_per_second: float
    peak_bytes: int | None
    found: int
    asked: int
    right: list[bool]
    depths: list[float]
    answers: list[str]
    perplexity: float
    keys_per_query: float
    density: float


def _read(
    demo: Demo,
    loaded: Loaded,
    documents: list[Exam],
    name: str,
    mechanism: Mechanism | None,
    step: Bar,
) -> DemoRow:
    """Read, decode and answer with one attention."""
    from longswift.hf import SwiftCache

    model = loaded.model
    loaded.use(mechanism)
    warm = SwiftCache(model.config)
    reading.read(model, documents[0].document[: min(_WARM_UP, demo.chunk)], warm, chunk=demo.chunk)
    del warm
    dense = (demo.length + 1) / 2
    told: list[reading.Reading] = []
    speeds: list[float] = []
    answers: list[str] = []
    scored = Scored()
    with memory.watch(model.device) as peak:
        for number, exam in enumerate(documents, 1):
            step(text=f"{name}: reading {number} of {len(documents)}")
            cache = SwiftCache(model.config)
            with count_keys(mechanism, scored):
                told.append(
                    reading.read(
                        model, exam.document, cache, chunk=demo.chunk, score=True, step=step
                    )
                )
            step(text=f"{name}: answering")
            speeds.append(reading.decode_speed(model, exam.questions[0], cache, demo.decoded))
            answers += answer(loaded, exam, cache)
            del cache
    keys = dense if mechanism is None else scored.keys / max(1, scored.queries)
    true = [answer for exam in documents for answer in exam.answers]
    right = [said == answer for said, answer in zip(answers, true, strict=True)]
    whole = reading.Reading(
        tokens=1 + sum(r.tokens - 1 for r in told), seconds=0.0, nll=sum(r.nll for r in told)
    )
    label = {FULL: "full attention", SWIFT: "MS-SWIFT"}.get(name, "")
    if name == WINDOW:
        label = f"window of {mechanism.window:,}"  # type: ignore[union-attr]
    return DemoRow(
        name=name,
        label=label,
        length=demo.length,
        prefill_seconds=statistics.median(r.seconds for r in told),
        decode_tokens_per_second=statistics.median(speeds),
        peak_bytes=peak.bytes,
        found=sum(right),
        asked=len(right),
        right=right,
        depths=[depth for exam in documents for depth in exam.depths],
        answers=answers,
        perplexity=whole.perplexity,
        keys_per_query=keys,
        density=keys / dense,
    )


def _config(demo: Demo, loaded: Loaded, text: str) -> dict[str, Any]:
    """Everything that changes the figures; contents by their hash, so that no path is kept."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(demo)))
    content["file"] = None if demo.file is None else Path(demo.file).name
    content["model"] = loaded.name
    content["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    content["model_sha256"] = loaded.fingerprint()
    return content


def run(demo: Demo, output: Path, *, fresh: bool = False, progress: bool = True) -> Result:
    """Read the document three ways; finished readings of the same run are reused.

    Args:
        demo: What to show.
        output: Directory for ``demo.json``; rows are kept there as they finish.
        fresh: Start over.
        progress: Show a bar on stderr.

    Returns:
        Three rows (full attention, window, MS-SWIFT) and the verdict in the summary.

    Raises:
        InputError: The document is too short, or longer than the model can position.
        UnsupportedError: The model cannot run MS-SWIFT.
    """
    from longswift.hf import check_length
    from longswift.mechanisms import get_mechanism

    apart(output / "demo.json", output / "demo.png")
    target = writable(output / "demo.json", kind="demo")
    text = source(demo.file)
    loaded = load(demo.model)
    check_length(
        loaded.model, demo.length + 64, "Lower --length, or give a model of a longer window."
    )
    documents = exams(
        loaded,
        text,
        length=demo.length,
        documents=demo.documents,
        secrets=demo.secrets,
        seed=demo.seed,
    )
    result = Result(kind="demo", config=_config(demo, loaded, text), seed=demo.seed, rows=[])
    kept = Progress(result, target, fresh=fresh, finished=True, records=DemoRow)
    swift = options.from_json(demo.mechanism)
    loaded.check_runs(swift)
    size = demo.documents * demo.length
    with bar(3 * size, "starting", shown=progress) as step:

        def finish(name: str, mechanism: Mechanism | None) -> dict[str, Any]:
            row = kept.find(name=name)
            if row is None:
                row = asdict(_read(demo, loaded, documents, name, mechanism, step))
                kept.add(row)
            else:
                step(size, f"{name}: measured before")
            return row

        finish(FULL, None)
        scored = finish(SWIFT, swift)["keys_per_query"]
        window = equal_cost_window(scored, demo.length)
        finish(WINDOW, get_mechanism(WINDOW, window=window))
    order = [FULL, WINDOW, SWIFT]
    result.rows.sort(key=lambda row: order.index(row["name"]))
    result.summary.update(verdict=verdict(rows(result)), how=_NOTES, reused=kept.reused)
    result.save(target)
    kept.done()
    return result


def rows(result: Result) -> list[DemoRow]:
    """The rows of a result, typed."""
    return [DemoRow(**row) for row in result.rows]


def verdict(found: list[DemoRow]) -> str:
    """What the three rows say, in words."""
    by_name = {row.name: row for row in found}
    full, window, swift = (by_name[name] for name in (FULL, WINDOW, SWIFT))
    faster = text_of.times_faster(full.prefill_seconds / swift.prefill_seconds)
    exact = ""
    if scores_every_key(SWIFT, swift.density):
        exact = (
            " MS-SWIFT was exact here, as every query saw every key: nothing is saved at this "
            "length, and nothing is learned. Give a greater --length."
        )
    return (
        f"MS-SWIFT reads {swift.length:,} tokens in {swift.prefill_seconds:.1f} s, {faster} than "
        f"full attention, scoring "
        f"{100 * swift.density:.0f} % of the keys; it finds {swift.found} of {swift.asked} secrets "
        f"(full attention {full.found}, a window of equal cost {window.found}) at perplexity "
        f"{swift.perplexity:.2f} (full {full.perplexity:.2f}, window {window.perplexity:.2f})."
        f"{exact}"
    )


def table(result: Result) -> text_of.Table:
    """The result for people."""
    columns = ("", "prefill", "decode", "peak memory", "secrets", "perplexity", "keys/query")
    cells = [
        (
            row.label,
            text_of.seconds(row.prefill_seconds),
            f"{row.decode_tokens_per_second:.0f} tokens/s",
            text_of.megabytes(row.peak_bytes),
            f"{row.found} of {row.asked}",
            f"{row.perplexity:.3f}",
            f"{row.keys_per_query:,.0f} ({100 * row.density:.1f} %)",
        )
        for row in rows(result)
    ]
    config, threads = result.config, result.environment.threads
    title = f"{config['model']} reads {config['length']:,} tokens, {threads} thread(s)"
    return text_of.Table(title, columns, cells)
