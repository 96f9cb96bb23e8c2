"""What a mechanism gives and costs with a model and a text of the user's own, in one report.

Everything is measured first and kept as typed JSON; the page is made from the JSON alone. A section
that was not measured says so, and which command measures it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.mechanism import Mechanism
from longswift.core.observe import Observed, observe
from longswift.eval import fidelity, fidelity_runs, memory, options, reading, runner, suite
from longswift.eval.cost import Scored, count_keys, equal_cost_window
from longswift.eval.guarded import Guarded, summarise
from longswift.eval.models import Loaded, load
from longswift.eval.progress import Bar, bar
from longswift.eval.report_sections import (
    FIDELITY,
    FULL,
    READING,
    RECORDS,
    RETRIEVAL,
    WINDOW,
    ReadingRow,
    readings,
)
from longswift.eval.report_verdict import verdict
from longswift.eval.results import Progress, Result, apart, writable
from longswift.eval.samples import samples
from longswift.eval.tasks import from_dict
from longswift.extend.rope import check_kind
from longswift.mechanisms import get_mechanism
from longswift.mechanisms.ms_swift import MSSwift
from longswift.mechanisms.sliding_window import SlidingWindow

_SHORTEST = 256
_WARM_UP = 2048
_DECODED = 16
PARTS = 12


@dataclass(frozen=True, kw_only=True)
class Report:
    """What to report on.

    Attributes:
        model: ``tiny``, a directory or a name on the hub.
        file: UTF-8 text.
        mechanisms: As ``Mechanism.to_dict`` gives them. Full attention, the judge, is always
            measured, as the model's own layers run it.
        length: Tokens of the text to read; None for all, at most 32k.
        max_length: Extend the model's positions to this many tokens.
        rope: Scaling of rotary positions for that.
        tasks: Retrieval tasks as ``Task.to_dict`` gives them; empty to leave them out.
        samples: Documents per task and length.
        fidelity: Compare single heads and next-token distributions with full attention.
        equal_cost: Give ``sliding_window`` the window that costs what the subject costs.
        chunk: Tokens per forward pass.
        seed: Seed of the retrieval tasks.
        dtype: Name of a dtype, or ``"auto"``.
        device: Where to run.
        trust_remote_code: Allow the model to bring Python code of its own.
    """

    model: str
    file: str
    mechanisms: tuple[dict[str, Any], ...]
    length: int | None = None
    max_length: int | None = None
    rope: str | None = "yarn"
    tasks: tuple[dict[str, Any], ...] = ()
    samples: int = 5
    fidelity: bool = True
    equal_cost: bool = True
    chunk: int = 1024
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_positive("report", samples=self.samples, chunk=self.chunk)
        if self.length is not None:
            check_positive("report", length=self.length)
        check_kind(self.rope)
        if all(config["name"] == FULL for config in self.mechanisms):
            raise ConfigError(
                problem(
                    "attention",
                    expected="at least one mechanism beside full attention",
                    got="none",
                    fix="Try --attention ms_swift,sliding_window,full.",
                )
            )
        for config in self.mechanisms:
            reading.check_chunk("chunk", self.chunk, options.from_json(config))

    @property
    def subject(self) -> str:
        """The mechanism the report is about: the first that is neither judge nor window."""
        names = [config["name"] for config in self.mechanisms if config["name"] != FULL]
        return next((name for name in names if name != WINDOW), names[0])


def asked(
    *,
    file: str,
    attention: str,
    settings: Sequence[str] = (),
    tasks: str = "needle",
    questions: Path | None = None,
    samples: int = 5,
    seed: int = 0,
    **rest: Any,
) -> Report:
    """A report from options as people type them.

    Args:
        file: The user's text; tasks hide things in it.
        attention: Comma-separated names.
        settings: ``NAME.OPTION=VALUE`` of a mechanism or a task. A window given here stays as it
            is.
        tasks: Comma-separated names of retrieval tasks, or ``"none"``.
        questions: File of the task ``qa``.
        samples: Documents per task and length; tasks with depths ask at as many, evenly.
        seed: Seed of the tasks.
        rest: The other fields of ``Report``.
    """
    names = [] if tasks == "none" else [name.replace("-", "_") for name in options.names(tasks)]
    others = [name.replace("-", "_") for name in options.names(attention)]
    mine, left = options.parted(settings, names, others)
    found = options.mechanisms(attention, left)
    common = {"file": file, "seed": seed, "depths": samples}
    chosen = options.tasks(tasks, mine, questions=questions, **common) if names else {}
    return Report(
        file=file,
        mechanisms=tuple(mechanism.to_dict() for mechanism in found.values()),
        tasks=tuple(task.to_dict() for task in chosen.values()),
        equal_cost=not options.is_set(left, f"{WINDOW}.window"),
        samples=samples,
        seed=seed,
        **rest,
    )


def run(report: Report, path: str | Path, *, fresh: bool = False, progress: bool = True) -> Result:
    """Measure everything, going on where an interrupted run of the same report stopped.

    Args:
        report: What to report on.
        path: The page; the JSON goes beside it.
        fresh: Start over.
        progress: Show a bar on stderr.

    Returns:
        One row per attention, and one per further section.

    Raises:
        InputError: The file is no text, too short, or longer than the model can position.
        UnsupportedError: The model cannot run one of the mechanisms.
    """
    target = writable(path, endings=(".html", ".htm"))
    apart(target, target.with_suffix(".json"))
    data = writable(target.with_suffix(".json"), kind="report")
    loaded = load(
        report.model,
        dtype=report.dtype,
        device=report.device,
        trust_remote_code=report.trust_remote_code,
    )
    loaded.extend(report.max_length, report.rope)
    text = samples(loaded, report.file, length=report.length, documents=1, least=_SHORTEST)
    ids = text.documents[0]
    config: dict[str, Any] = json.loads(json.dumps(asdict(report)))
    config.update(
        model=loaded.name,
        file=Path(report.file).name,
        tasks=[suite.described(task) for task in config["tasks"]],
        length=len(ids),
        text_sha256=text.sha256,
        model_sha256=loaded.fingerprint(),
    )
    result = Result(kind="report", config=config, seed=report.seed, rows=[])
    kept = Progress(result, data, fresh=fresh, finished=True, records=RECORDS)
    work = _Work(report, loaded, ids, kept)
    with bar(work.units, "starting", shown=progress) as step:
        work.run(step)
    result.summary.update(subject=report.subject, reused=kept.reused)
    result.summary["guard"] = {
        row.name: row.guard for row in readings(result) if row.guard is not None
    }
    result.summary["verdict"] = verdict(result).to_dict()
    result.save(data)
    kept.done()
    return result


class _Work:
    """The measurements of one report, each kept as soon as it is finished."""

    def __init__(self, report: Report, loaded: Loaded, ids: list[int], kept: Progress) -> None:
        self.report, self.loaded, self.ids, self.kept = report, loaded, ids, kept
        others = {config["name"]: options.from_json(config) for config in report.mechanisms}
        others.pop(FULL, None)
        # The window waits for the cost of the subject.
        order = sorted(others, key=lambda name: (name == WINDOW, name != report.subject))
        self.mechanisms: dict[str, Mechanism | None] = {FULL: None}
        self.mechanisms |= {name: others[name] for name in order}
        shares = (4, 2, 1)
        self.lengths = tuple(sorted({max(_SHORTEST, len(ids) // share) for share in shares}))
        self.units = len(ids) * (len(self.mechanisms) + (4 if report.fidelity else 0))

    def run(self, step: Bar) -> None:
        """Measure what is missing.

        Raises:
            InputError: A task finds no document in its file.
            UnsupportedError: The model cannot run one of the mechanisms.

        Nothing was read then.
        """
        for config in self.report.tasks:
            task = from_dict(config)
            for length in self.lengths:
                task.available(self.loaded, length, self.report.samples)
        for mechanism in self.mechanisms.values():
            if mechanism is not None:
                self.loaded.check_runs(mechanism)
        for name, mechanism in self.mechanisms.items():
            step(text=f"{name}: reading")
            row = self.kept.find(section=READING, name=name)
            if name == WINDOW and self.report.equal_cost and self.report.subject != WINDOW:
                subject = self.kept.find(section=READING, name=self.report.subject)
                assert subject is not None
                window = equal_cost_window(subject["keys_per_query"], len(self.ids))
                mechanism = get_mechanism(WINDOW, window=window)
            if row is None:
                read = self._read(name, mechanism, step)
                self.kept.add({"section": READING, **json.loads(json.dumps(asdict(read)))})
        if self.report.tasks and self.kept.find(section=RETRIEVAL) is None:
            step(text="retrieval")
            self.kept.add({"section": RETRIEVAL, "content": self._retrieve()})
        if self.report.fidelity and self.kept.find(section=FIDELITY) is None:
            self.kept.add({"section": FIDELITY, "content": self._judge(step)})

    def _read(self, name: str, mechanism: Mechanism | None, step: Bar) -> ReadingRow:
        from longswift.hf import SwiftCache

        model, ids, chunk = self.loaded.model, self.ids, self.report.chunk
        self.loaded.use(mechanism)
        warm = SwiftCache(model.config)
        reading.read(model, ids[: min(_WARM_UP, chunk)], warm, chunk=chunk)
        del warm
        scored, layers, guarded = Scored(), _Layers(mechanism), Guarded()
        with memory.watch(model.device) as peak:
            cache = SwiftCache(model.config)
            with count_keys(mechanism, scored), observe(layers.see), observe(guarded.see):
                told = reading.read(model, ids, cache, chunk=chunk, score=True, step=step)
            speed = reading.decode_speed(model, ids[-1:], cache, _DECODED)
            del cache
        dense = (len(ids) + 1) / 2
        keys = dense if mechanism is None else scored.keys / max(1, scored.queries)
        parts = told.losses.double().tensor_split(PARTS)
        return ReadingRow(
            name=name,
            label=_label(name, mechanism),
            tokens=told.tokens,
            seconds=told.seconds,
            tokens_per_second=speed,
            peak_bytes=peak.bytes,
            keys_per_query=keys,
            density=keys / dense,
            nll=told.nll / max(1, told.tokens - 1),
            nll_by_part=[float(part.mean()) for part in parts],
            windows=layers.windows,
            guard=summarise(map(asdict, guarded.rows())),
        )

    def _retrieve(self) -> dict[str, Any]:
        """The suite's result; the model's own attention is the judge there, too."""
        names = [{"name": runner.MODEL}]
        names += [m.to_dict() for m in self.mechanisms.values() if m is not None]
        found = suite.run(
            suite.Suite(
                model=self.report.model,
                tasks=self.report.tasks,
                lengths=self.lengths,
                mechanisms=tuple(names),
                samples=self.report.samples,
                equal_cost=self.report.equal_cost,
                max_length=self.report.max_length,
                rope=self.report.rope,
                chunk=self.report.chunk,
                dtype=self.report.dtype,
                device=self.report.device,
                trust_remote_code=self.report.trust_remote_code,
            ),
            progress=False,
        )
        content: dict[str, Any] = json.loads(json.dumps(found.to_dict()))
        return content

    def _judge(self, step: Bar) -> dict[str, Any]:
        """The subject against full attention, head by head and at the model's end."""
        mechanism = self.mechanisms[self.report.subject]
        assert mechanism is not None
        found = fidelity.measure(
            self.loaded.model, self.ids, mechanism, chunk=self.report.chunk, step=step
        )
        return fidelity_runs.summarise(found.to_rows(), fidelity.name_of(mechanism))


class _Layers:
    """Notes the window of each head in the layers a mechanism runs in."""

    def __init__(self, mechanism: Mechanism | None) -> None:
        self._mechanism = mechanism
        self.windows: list[tuple[int, int, int]] = []

    def see(self, call: Observed) -> None:
        """An observer."""
        known = {layer for layer, _, _ in self.windows}
        if call.mechanism != self._mechanism or call.layer is None or call.layer in known:
            return
        heads = call.k.shape[1]
        sizes: Sequence[int] = ()
        if isinstance(call.mechanism, MSSwift):
            sizes = call.mechanism.window_of_head(heads)
        elif isinstance(call.mechanism, SlidingWindow):
            sizes = (call.mechanism.window,) * heads
        self.windows += [(call.layer, head, size) for head, size in enumerate(sizes)]


def _label(name: str, mechanism: Mechanism | None) -> str:
    if isinstance(mechanism, SlidingWindow):
        return f"window of {mechanism.window:,}"
    return {FULL: "full attention", "ms_swift": "MS-SWIFT"}.get(name, name)
