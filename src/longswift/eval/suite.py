"""A model answers tasks at several lengths with several mechanisms; every sample is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longswift.core.errors import ConfigError, UnsupportedError, check_positive, problem
from longswift.eval import guarded, options, scores, tasks
from longswift.eval.documents import source
from longswift.eval.environment import environment
from longswift.eval.journal import Journal
from longswift.eval.models import Loaded, load
from longswift.eval.progress import bar
from longswift.eval.results import Result, writable
from longswift.eval.runner import MODEL, SWIFT, WINDOW, Case, Runner, identity
from longswift.eval.tasks.base import AUTO, Task
from longswift.extend.rope import check_kind

_NOTES = {
    "model": "the model's own attention (sdpa), as Transformers runs it; the other mechanisms "
    "replace only its full-attention layers",
    "score": "mean over questions; depth, position and hops in rows of their own; nll is the mean "
    "negative log-likelihood of a token in nats, weighted by tokens",
    "interval": "95 % Wilson interval over questions; questions about the same document are not "
    "independent, so with several a document it is rather too narrow",
    "reading": "each document is read once in chunks, and each question is asked behind it, "
    "answered greedily and removed again",
    "refused": "samples longer than the length are refused and counted, never truncated",
}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What to evaluate.

    Attributes:
        model: ``tiny``, a directory or a name on the hub.
        tasks: As ``Task.to_dict`` gives them, each name once.
        lengths: Tokens of a sample.
        mechanisms: As ``Mechanism.to_dict`` gives them; ``{"name": "model"}`` is the model's own
            attention. A second name of the same mechanism is impossible.
        samples: Documents per task and length.
        equal_cost: Give ``sliding_window`` the window whose cost is that of ``ms_swift``, measured
            at each length, if both are asked for.
        chunk: Tokens per forward pass while reading.
        max_length: Extend the model's positions to this many tokens.
        rope: Scaling of rotary positions used for that.
        chat: Use the tokenizer's chat template if it has one.
        dtype: Name of a dtype, or ``"auto"``.
        device: Where to run.
        trust_remote_code: Allow the model to bring Python code of its own.
    """

    model: str
    tasks: tuple[dict[str, Any], ...]
    lengths: tuple[int, ...]
    mechanisms: tuple[dict[str, Any], ...]
    samples: int = 20
    equal_cost: bool = True
    chunk: int = 1024
    max_length: int | None = None
    rope: str | None = "yarn"
    chat: bool = True
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_positive("eval", samples=self.samples, chunk=self.chunk)
        check_kind(self.rope)
        for what, found in (("tasks", self.tasks), ("mechanisms", self.mechanisms)):
            names = [entry["name"] for entry in found]
            if not names:
                raise ConfigError(
                    problem(what, expected="at least one name", got="none", fix="Name one.")
                )
            if len(set(names)) < len(names):
                raise ConfigError(
                    problem(
                        what, expected="each name once", got=names, fix="Remove the repetition."
                    )
                )
        for config in self.mechanisms:
            block = config.get("block", 1)
            if self.chunk % block:
                raise ConfigError(
                    problem(
                        "chunk",
                        expected=f"a multiple of the block of {config['name']} ({block})",
                        got=self.chunk,
                        fix="Try 1024.",
                    )
                )


def asked(
    *,
    tasks: str,
    attention: str,
    settings: Sequence[str] = (),
    form: str = AUTO,
    file: Path | None = None,
    questions: Path | None = None,
    seed: int = 0,
    **rest: Any,
) -> Suite:
    """A suite from options as people type them.

    Args:
        tasks: Comma-separated names.
        attention: Comma-separated names; ``"model"`` is the model's own attention.
        settings: ``NAME.OPTION=VALUE`` of a mechanism or a task. A window given here stays.
        form: Form of every task that has a choice.
        file: Text of every task but ``qa``.
        questions: File of ``qa``.
        seed: Seed of every task.
        rest: The other fields of ``Suite``.
    """
    names = [name.replace("-", "_") for name in options.names(tasks)]
    ordered = [name.replace("-", "_") for name in options.names(attention)]
    mine, left = options.parted(settings, names, [name for name in ordered if name != MODEL])
    place = None if file is None else str(file)
    chosen = options.tasks(tasks, mine, questions=questions, form=form, file=place, seed=seed)
    others = ",".join(name for name in options.names(attention) if name != MODEL)
    # The model's own attention has no options.
    found = options.mechanisms(others or attention, left) if ordered != [MODEL] else {}
    mechanisms = {name: mechanism.to_dict() for name, mechanism in found.items()}
    return Suite(
        tasks=tuple(task.to_dict() for task in chosen.values()),
        mechanisms=tuple(mechanisms.get(name, {"name": name}) for name in ordered),
        equal_cost=not options.is_set(left, f"{WINDOW}.window"),
        **rest,
    )


def _config(suite: Suite, loaded: Loaded) -> dict[str, Any]:
    """Everything that changes the figures; contents by their hash, so that no path is kept."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(suite)))
    content["model"] = loaded.name
    content["model_sha256"] = loaded.fingerprint()
    content["tasks"] = [described(task) for task in content["tasks"]]
    return content


def described(task: dict[str, Any]) -> dict[str, Any]:
    """A task as results keep it: its text by name and hash, so that no path is kept."""
    if "file" not in task:
        return task
    digest = hashlib.sha256(source(task["file"]).encode()).hexdigest()
    name = None if task["file"] is None else Path(task["file"]).name
    return {**task, "file": name, "text_sha256": digest}


def prepare(suite: Suite) -> Loaded:
    """Load the suite's model and extend it if that is asked for.

    Raises:
        InputError: A length is beyond the model's window.
    """
    loaded = load(
        suite.model,
        dtype=suite.dtype,
        device=suite.device,
        trust_remote_code=suite.trust_remote_code,
    )
    loaded.extend(suite.max_length, suite.rope)
    # A window that is too small is found out before hours of work, not after.
    loaded.check_length(max(suite.lengths))
    return replace(loaded, chat=suite.chat)


def run(
    suite: Suite,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    progress: bool = True,
) -> Result:
    """Evaluate, going on where an interrupted run of the same suite stopped.

    Args:
        suite: What to evaluate.
        output: JSON file for the result. Beside it ``<name>.samples.jsonl`` gets each finished
            sample with the model's answers; it is kept.
        fresh: Start over.
        progress: Show a bar on stderr.

    Returns:
        One row per mechanism, task, metric, length and place.

    Raises:
        InputError: A length beyond the model's window, a malformed file, or finished samples of
            another run beside ``output``.
        UnsupportedError: No mechanism can run in this model.
    """
    if output is not None:
        writable(output, kind="eval")
    loaded = prepare(suite)
    chosen = [tasks.from_dict(entry) for entry in suite.tasks]
    config, here = _config(suite, loaded), environment()
    kept = Journal(
        None if output is None else Path(output).with_suffix(".samples.jsonl"),
        {"kind": "eval", "config": config, "environment": here.to_dict()},
        fresh=fresh,
    )
    cases = _cases(suite, loaded, chosen)
    with bar(sum(case.length for case in cases), "starting", shown=progress) as step:
        runner = Runner(loaded, kept, chunk=suite.chunk, equal_cost=suite.equal_cost, step=step)
        for case in cases:
            runner.measure(case)
    if len(runner.refused) == len(suite.mechanisms):
        raise UnsupportedError(next(iter(runner.refused.values())))
    measured = {identity(entry): entry for entry in kept.entries}
    wanted = [identity(case.key()) for case in cases]
    entries = [measured[key] for key in wanted if key in measured]
    result = Result(
        kind="eval",
        config=config,
        seed=chosen[0].seed,
        rows=scores.aggregate(entries),
        summary={
            "windows": runner.windows,
            "refused": runner.refused,
            "cost": _cost(entries),
            "reused": kept.reused,
            "how": _NOTES,
        },
        environment=here,
    )
    if output is not None:
        result.save(output)
    return result


def _cases(suite: Suite, loaded: Loaded, chosen: list[Task]) -> list[Case]:
    """Everything to measure; what fixes the cost of another comes before it."""
    names = [entry["name"] for entry in suite.mechanisms]
    order = sorted(suite.mechanisms, key=lambda m: m["name"] == WINDOW and SWIFT in names)
    return [
        Case(length=length, mechanism=mechanism, task=task, index=index)
        for length in suite.lengths
        for mechanism in order
        for task in chosen
        for index in range(task.available(loaded, length, suite.samples))
    ]


def _cost(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What reading took; the keys of the model's own attention are unknown."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        if "seconds" in entry:
            found.setdefault((entry["mechanism"], entry["length"]), []).append(entry)
    costs = []
    for (name, length), some in found.items():
        queries, keys = (sum(e[key] for e in some) for key in ("queries", "keys"))
        dense = sum(e["queries"] * (e["read"] + 1) / 2 for e in some)
        costs.append(
            {
                "mechanism": name,
                "length": length,
                "samples": len(some),
                "seconds": sum(e["seconds"] for e in some) / len(some),
                "keys_per_query": keys / queries if queries else None,
                "density": keys / dense if queries else None,
                "guard": guarded.summarise(row for e in some for row in e.get("guard", ())),
            }
        )
    return costs
