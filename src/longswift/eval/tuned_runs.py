"""The second half of the table of mechanisms: the same questions after an equal fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from longswift.core.errors import UnsupportedError
from longswift.core.files import write_text
from longswift.core.mechanism import Mechanism
from longswift.eval import standings, suite
from longswift.eval.models import Loaded, load
from longswift.eval.progress import Bar, bar
from longswift.eval.reading import read
from longswift.eval.runner import FULL
from longswift.eval.suite import Suite
from longswift.eval.tuning import Tuning, last_loss, tune

TEXT = "text.txt"
# Enough for some hundred rows; all of the library's source would take minutes to tokenise.
_CHARACTERS = 1_500_000
_PARAGRAPH = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What one mechanism can do after the fine-tuning.

    Attributes:
        name: Mechanism.
        scores: Score of each task.
        perplexity: Of the text of the divergence.
        loss: Of the last training steps, mean.
        note: Why there is nothing, or empty.
    """

    name: str
    scores: dict[str, float]
    perplexity: float | None = None
    loss: float | None = None
    note: str = ""


def training_text(folder: Path) -> Path:
    """Python's library and documentation, without what quality is measured on, as a file."""
    from longswift.tiny import corpus

    # Topics of the documentation quote each other, paragraph by paragraph.
    measured = set(corpus.text("heldout").split(_PARAGRAPH))
    paragraphs = corpus.text("train").split(_PARAGRAPH)
    text = _PARAGRAPH.join(one for one in paragraphs if one not in measured)
    # The documentation's prose leads; source is taken from all over the library.
    prose, rest = text[: _CHARACTERS // 3], text[_CHARACTERS // 3 :]
    size = _CHARACTERS // 150
    pieces = [rest[i : i + size] for i in range(0, len(rest), len(rest) // 100)][:100]
    return write_text(folder / TEXT, "\n".join([prose, *pieces]))


def run(
    quality: Suite,
    mechanisms: Iterable[Mechanism],
    ids: list[int],
    tuning: Tuning,
    folder: Path | None,
    *,
    fresh: bool = False,
    progress: bool = True,
) -> list[Tuned]:
    """Fine-tune a copy of the model with each mechanism and ask it what was asked zero-shot.

    Args:
        quality: The suite; its mechanisms are ignored.
        mechanisms: Each is trained and then evaluated.
        ids: Text for the perplexity.
        tuning: How to fine-tune.
        folder: For checkpoints, tuned models and answers, a directory per mechanism; None forgets
            them.
        fresh: Start over.
        progress: Show bars on stderr.
    """
    if folder is None:
        with TemporaryDirectory() as place:
            return run(quality, mechanisms, ids, tuning, Path(place), progress=progress)
    if tuning.file is None:
        tuning = replace(tuning, file=str(training_text(folder)))
    chosen = list(mechanisms)
    found = []
    with bar(tuning.steps * len(chosen), "tuning", shown=progress) as step:
        for mechanism in chosen:
            step(text=f"tuning {mechanism.name}")
            found.append(
                _one(quality, mechanism, ids, tuning, folder / mechanism.name, fresh, step)
            )
    return found


def _one(
    quality: Suite,
    mechanism: Mechanism,
    ids: list[int],
    tuning: Tuning,
    place: Path,
    fresh: bool,
    step: Bar,
) -> Tuned:
    loaded = suite.prepare(quality)
    try:
        losses = tune(loaded, mechanism, tuning, place, fresh=fresh, step=step)
    except UnsupportedError as error:
        return Tuned(name=mechanism.name, scores={}, note=str(error))
    content = {f.name: getattr(quality, f.name) for f in fields(quality)}
    # The tuned model is saved as it is, longer positions included.
    content.update(
        model=str(place / "model"),
        mechanisms=(mechanism.to_dict(),),
        equal_cost=False,
        max_length=None,
    )
    scored = suite.run(Suite(**content), place / "eval.json", fresh=fresh, progress=False)
    scores = {
        row.task: row.score
        for row in standings.rows(scored)
        if row.at is None
        and row.score is not None
        and row.metric == standings.main_metric(row.task)
    }
    return Tuned(
        name=mechanism.name,
        scores=scores,
        perplexity=_perplexity(load(str(place / "model")), mechanism, ids, quality.chunk),
        loss=last_loss(losses),
    )


def _perplexity(loaded: Loaded, mechanism: Mechanism, ids: list[int], chunk: int) -> float:
    from longswift.hf import SwiftCache

    loaded.use(mechanism)
    told = read(loaded.model, ids, SwiftCache(loaded.model.config), chunk=chunk, score=True)
    return told.perplexity


def into(rows: dict[str, dict[str, Any]], tuned: list[Tuned]) -> None:
    """Write the figures into the table's rows, beside full attention's after the same steps."""
    full = next((one for one in tuned if one.name == FULL), None)
    for one in tuned:
        row = rows.get(one.name)
        if row is None:
            continue
        row.update(tuned_scores=one.scores, tuned_perplexity=one.perplexity, tuned_loss=one.loss)
        row["note"] += one.note
        if full is None:
            continue
        row["tuned_kept"] = {
            task: score / full.scores[task]
            for task, score in one.scores.items()
            if full.scores.get(task, 0.0) >= standings.ABLE
        }
        if one.perplexity is not None and full.perplexity is not None:
            row["tuned_perplexity_ratio"] = one.perplexity / full.perplexity
