"""An equal short fine-tuning: the same steps, text, rate and seed for whatever attention runs.

A model trained with full attention expects full attention; mechanisms that compute something else
are judged fairly only after the weights had a chance to follow. A step sees, half and half, rows
of plain text and rows of text with sentences hidden in it that are asked for at the end. Its loss
is the mean over the text's tokens plus the mean over the answers'.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, UnsupportedError, check_positive, problem
from longswift.core.files import replace, write_text
from longswift.core.mechanism import Mechanism
from longswift.eval.documents import source
from longswift.eval.models import Codec, Loaded
from longswift.eval.progress import Bar, silent
from longswift.eval.reading import next_token_logits
from longswift.eval.tasks import get_task, haystack
from longswift.eval.tasks.base import CONTINUE

_ROW_PER_NEEDLE, _MOST_NEEDLES, _QUESTION = 256, 8, 48
_WARM = 0.1
_SAVE_SECONDS = 60.0
_LAST = 10


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How to fine-tune.

    Attributes:
        steps: Optimizer steps.
        rows: Sequences per step; the kinds of rows take turns.
        length: Tokens of a sequence.
        rate: Peak learning rate of AdamW: linear warm-up over a tenth of the steps, then linearly
            to zero.
        file: UTF-8 text to train on, not what quality is measured on. None leaves it to
            ``tuned_runs``: Python's library and documentation without the held-out part.
        seed: Seed of the rows.
    """

    steps: int
    rows: int = 2
    length: int
    rate: float = 5e-4
    file: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("tuning", steps=self.steps, rows=self.rows, length=self.length)
        if not 0 < self.rate < 1:
            raise ConfigError(
                problem("rate", expected="between 0 and 1", got=self.rate, fix="For example 5e-4.")
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training sequence: token ids, and which of them are answers."""

    ids: list[int]
    answers: list[bool]


def row(codec: Codec, tuning: Tuning, number: int) -> Row:
    """Training sequence ``number``; nothing but the arguments decides what it holds."""
    if number % 2 == 0:
        rng = random.Random(f"{tuning.seed}/tuning/{number}")
        begin = codec.begin()
        room = tuning.length - len(begin)
        text = haystack.filler(codec, haystack.TEXT, tuning.file, room, rng)
        return Row(ids=[*begin, *text], answers=[False] * tuning.length)
    keys = max(1, min(_MOST_NEEDLES, tuning.length // _ROW_PER_NEEDLE))
    task = get_task(
        "needle",
        keys=keys,
        queries=keys,
        form=CONTINUE,
        file=tuning.file,
        # A seed that no evaluation has: the questions are others.
        seed=10_000_019 + tuning.seed,
    )
    sample = task.generate(codec, tuning.length - (keys - 1) * _QUESTION, number)
    ids = list(sample.document)
    answers = [False] * len(ids)
    for question in sample.questions:
        said = _behind(sample.document, question.ids, question.limit)
        if len(ids) + len(question.ids) + len(said) <= tuning.length:
            ids += [*question.ids, *said]
            answers += [False] * len(question.ids) + [True] * len(said)
    return Row(ids=ids, answers=answers)


def _behind(document: Sequence[int], begun: Sequence[int], count: int) -> list[int]:
    """The tokens with which the document itself goes on after ``begun``."""
    size = len(begun)
    for start in range(len(document) - size):
        if tuple(document[start : start + size]) == tuple(begun):
            return list(document[start + size : start + size + count])
    raise AssertionError("a question about a sentence that the document does not hold")


def loss_of(model: Any, one: Row) -> Tensor:
    """Mean loss of a row's text plus, where there are any, the mean loss of its answers."""
    ids = torch.tensor([one.ids], device=model.device)
    hidden = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[0]
    logits = next_token_logits(model, hidden)
    each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    answers = torch.tensor(one.answers[1:], device=model.device)
    text = each[~answers].mean()
    return text + each[answers].mean() if answers.any() else text


def rate_at(tuning: Tuning, step: int) -> float:
    """Learning rate of a step."""
    warm = max(1, round(_WARM * tuning.steps))
    left = (tuning.steps - step) / max(1, tuning.steps - warm)
    return tuning.rate * min((step + 1) / warm, left)


def tune(
    loaded: Loaded,
    mechanism: Mechanism,
    tuning: Tuning,
    place: str | Path,
    *,
    fresh: bool = False,
    step: Bar = silent,
) -> list[float]:
    """Fine-tune all weights with ``mechanism`` in the full-attention layers.

    Goes on where an interrupted run of the same settings stopped, and ends in the same weights.

    Args:
        loaded: A model in its original state; it is changed.
        mechanism: What the full-attention layers run.
        tuning: How.
        place: Directory for the checkpoint and, at the end, ``model``.
        fresh: Start over.
        step: Progress, in optimizer steps.

    Returns:
        The loss of every step.

    Raises:
        UnsupportedError: The mechanism cannot be trained in this model, or the loss is not finite.
    """
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(loaded, mechanism, tuning)
    done = None if fresh else _finished(folder, settings)
    if done is not None:
        step(tuning.steps)
        return done
    loaded.use(mechanism)
    model = loaded.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=tuning.rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    losses = [] if fresh else _resume(folder, settings, model, optimizer)
    step(len(losses))
    saved = time.monotonic()
    while len(losses) < tuning.steps:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(tuning, len(losses))
        total = 0.0
        for i in range(tuning.rows):
            number = len(losses) * tuning.rows + i
            loss = loss_of(model, row(loaded, tuning, number)) / tuning.rows
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise UnsupportedError(
                problem(
                    f"tuning with {mechanism.name}",
                    expected="a finite loss",
                    got=f"{total} in step {len(losses) + 1}",
                    fix="Lower the learning rate.",
                )
            )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        step(1)
        if time.monotonic() - saved > _SAVE_SECONDS:
            _save(folder, settings, model, optimizer, losses)
            saved = time.monotonic()
    model.eval()
    loaded.use(None)
    # What an earlier tuning said of its weights is not to vouch for these.
    (folder / "tuned.json").unlink(missing_ok=True)
    model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    content = {"settings": settings, "losses": losses}
    write_text(folder / "tuned.json", json.dumps(content, indent=1) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return losses


def last_loss(losses: Sequence[float]) -> float:
    """Mean of the last steps: single ones differ by what their rows hold."""
    last = losses[-_LAST:]
    return sum(last) / len(last)


def _settings(loaded: Loaded, mechanism: Mechanism, tuning: Tuning) -> dict[str, Any]:
    """Everything that changes the weights."""
    content = {
        **asdict(tuning),
        "file": None if tuning.file is None else Path(tuning.file).name,
        "text_sha256": hashlib.sha256(source(tuning.file).encode()).hexdigest(),
        "mechanism": mechanism.to_dict(),
        "model_sha256": loaded.fingerprint(),
    }
    found: dict[str, Any] = json.loads(json.dumps(content))
    return found


def _finished(folder: Path, settings: dict[str, Any]) -> list[float] | None:
    file = folder / "tuned.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return list(content["losses"]) if content["settings"] == settings else None


def _save(folder: Path, settings: dict[str, Any], model: Any, optimizer: Any, losses: Any) -> None:
    content = {
        "settings": json.dumps(settings),
        "losses": losses,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    replace(folder / "checkpoint.pt", lambda file: torch.save(content, file))


def _resume(folder: Path, settings: dict[str, Any], model: Any, optimizer: Any) -> list[float]:
    file = folder / "checkpoint.pt"
    if not file.is_file():
        return []
    content = torch.load(file, weights_only=True, map_location=model.device)
    if json.loads(content["settings"]) != settings:
        return []
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return list(content["losses"])
