"""The phases of a model's work, timed: decoding, prefill, a training step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.eval import baselines, cases, memory, options, phase_work
from longswift.eval.phase_table import PhaseRow, summarise
from longswift.eval.phase_work import ATTENTION, MODEL, Job, Place
from longswift.eval.progress import Bar
from longswift.eval.reading import check_chunk
from longswift.eval.results import Result
from longswift.eval.timing import Seconds, alternate, check_budget

DECODE, PREFILL, TRAIN = "decode", "prefill", "train"
# Attention alone, and inside a model; the time to the first token has no attention of its own.
PARTS = {DECODE: (ATTENTION, MODEL), PREFILL: (MODEL,), TRAIN: (ATTENTION, MODEL)}


@dataclass(frozen=True, kw_only=True)
class PhaseBench:
    """What to measure.

    Attributes:
        phase: ``decode``, ``prefill`` or ``train``.
        model: ``random-llama``, ``random-llama-8b``, ``tiny``, a directory or a name on the hub.
        lengths: Tokens: those in the cache for ``decode``, those of the text otherwise.
        batches: Sequences per call.
        mechanisms: The rivals, as ``Mechanism.to_dict`` gives them.
        against: The baseline, full attention of PyTorch: a name of ``eval.baselines``.
        tokens: Tokens decoded in one timed run of ``decode``.
        dynamic_cache: Also decode with Transformers' own ``DynamicCache``, which copies.
        chunk: Tokens per forward pass of ``prefill``.
        checkpointing: Recompute layers in the backward pass of ``train``.
        dtype: Name of the dtype.
        device: Where it runs.
        repeats: Samples of a fast case; slow ones get fewer.
        budget_seconds: Time spent on one rival in one case before it is run no more.
        memory: Also measure peak memory, per rival and case; not for ``decode``, whose memory is
            the cache.
        seed: Seed of texts, caches and random weights.
    """

    phase: str
    model: str
    lengths: tuple[int, ...]
    mechanisms: tuple[dict[str, Any], ...]
    batches: tuple[int, ...] = (1,)
    against: str = baselines.SDPA
    tokens: int = 16
    dynamic_cache: bool = False
    chunk: int = 1024
    checkpointing: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    repeats: int = 5
    budget_seconds: float = 60.0
    memory: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("bench", tokens=self.tokens, chunk=self.chunk, repeats=self.repeats)
        for batch in self.batches:
            check_positive("bench", batch=batch)
        check_budget(self.budget_seconds)
        options.dtype(self.dtype)
        options.device(self.device)
        baselines.get(self.against)
        for config in self.mechanisms:
            mechanism = options.from_json(config)
            if not mechanism.supports_causal:
                raise ConfigError(
                    problem(
                        "mechanism",
                        expected="one with a causal form, as language models need it",
                        got=mechanism.name,
                        fix="Time it with longswift bench attention.",
                    )
                )
            if self.phase == PREFILL:
                check_chunk("--chunk", self.chunk, mechanism)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, in the very form JSON gives back."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PhaseBench:
        """Inverse of ``to_dict``."""
        several = {name: tuple(content[name]) for name in ("lengths", "mechanisms", "batches")}
        return cls(**{**content, **several})

    def places(self) -> Iterator[Place]:
        """Every case in which all rivals are timed."""
        for part in PARTS[self.phase]:
            for batch in self.batches:
                for length in self.lengths:
                    yield Place(part, length, batch)


def run(
    bench: PhaseBench,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    progress: bool = True,
) -> Result:
    """Measure, continuing an interrupted run of the same options in the same environment.

    Args:
        bench: What to measure.
        output: JSON file to write; finished cases are kept beside it until it is complete.
        fresh: Start over.
        progress: Show a bar on stderr.

    Returns:
        One row per part (attention alone, the whole model), batch, length and rival.
    """
    result = cases.begin(bench.phase, bench, output, backward=bench.phase == TRAIN)
    work = phase_work.Work(bench)
    measured = bench.memory and bench.phase != DECODE
    return cases.measure(
        result,
        [place._asdict() for place in bench.places()],
        lambda case, step: _measure(bench, work, Place(**case), measured, step),
        record=PhaseRow,
        share=(len(bench.mechanisms) + 1) * (bench.repeats + 1 + measured),
        summarise=lambda: summarise(result),
        output=output,
        fresh=fresh,
        progress=progress,
    )


def _measure(
    bench: PhaseBench, work: phase_work.Work, place: Place, measured: bool, step: Bar
) -> list[PhaseRow]:
    """Every rival in one case."""
    where = f"{place.part}, {place.length} tokens, batch {place.batch}"
    step(text=f"{where}: preparing")
    jobs = work.jobs(place)
    if baselines.get(bench.against).compiled:
        step(text=f"{where}: compiling {bench.against}")
        try:
            jobs[bench.against].run()
        except Exception as error:  # Inside a model a compiler fails in more ways than alone.
            raise baselines.refusal(bench.against, error) from None
    times = alternate(
        {name: _once(job) for name, job in jobs.items()},
        repeats=bench.repeats,
        compiles=bench.device != "cpu",
        budget_seconds=bench.budget_seconds,
        tick=lambda name: step(1, f"{where}: {name}"),
    )
    rows = []
    for name, job in jobs.items():
        peak = None
        if measured:
            step(1, f"{where}: memory of {name}")
            peak = memory.measured(
                "longswift.eval.phases:peak",
                {"bench": bench.to_dict(), "place": list(place), "rival": name},
                bench.device,
            )
        rows.append(_row(bench, place, name, times, job, peak))
    return rows


def _once(job: Job) -> Callable[[], None]:
    return lambda: job.run()


def _row(
    bench: PhaseBench,
    place: Place,
    name: str,
    times: dict[str, Seconds],
    job: Job,
    peak: int | None,
) -> PhaseRow:
    time, base = times[name], times[bench.against]
    # A run of decoding makes several tokens; what counts is one.
    steps = bench.tokens if bench.phase == DECODE else 1
    read = 1 if bench.phase == DECODE else place.length
    seconds = time.median / steps
    return PhaseRow(
        part=place.part,
        name=name,
        length=place.length,
        batch=place.batch,
        seconds=seconds,
        fastest=time.fastest / steps,
        slowest=time.slowest / steps,
        samples=time.samples,
        speedup=base.median / time.median,
        tokens_per_second=place.batch * read / seconds,
        peak_bytes=peak,
        keys_per_query=job.keys_per_query(),
    )


def peak(bench: dict[str, Any], place: list[Any], rival: str) -> int | None:
    """Bytes by which one run raises memory; see ``memory.measured``.

    Args:
        bench: ``PhaseBench.to_dict``.
        place: Part, length and batch.
        rival: Name of its row.
    """
    asked = PhaseBench.from_dict(bench)
    work, where = phase_work.Work(asked), Place(*place)
    # What is loaded and compiled by a first call is not part of the work.
    small = where._replace(length=where.length if baselines.get(asked.against).compiled else 64)
    work.jobs(small)[rival].run()
    job = work.jobs(where)[rival]
    with memory.watch(asked.device) as rise:
        job.run()
    return rise.bytes
