"""The resumable recipe of the tiny model: ``train(out_dir)`` rebuilds it from nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longswift.core.files import replace, write_text
from longswift.core.hardware import cpu_multiplies_fast
from longswift.tiny import data, positions, settings
from longswift.tiny.config import Config, Stage

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["export", "load_checkpoint", "train"]

_CACHED_TOKENS = 6400


def _prepare(out: Path, config: Config) -> tuple[PreTrainedTokenizerFast, data.Pool]:
    """Load or make the tokenizer and the tokenised corpus under ``out``."""
    import pickle

    from transformers import PreTrainedTokenizerFast

    from longswift.tiny import tokenizer as pieces

    folder, cache = out / "tokenizer", out / "pool.pickle"
    if cache.exists():
        with cache.open("rb") as file:
            return PreTrainedTokenizerFast.from_pretrained(folder), pickle.load(file)
    tokenizer = pieces.train(config.vocab_size, limit=config.corpus_limit)
    tokenizer.save_pretrained(folder)
    pool = data.make_pool(tokenizer, limit=config.corpus_limit, words=config.words)
    replace(cache, lambda path: path.write_bytes(pickle.dumps(pool)))
    return tokenizer, pool


def _gradients(
    model: PreTrainedModel, batch: data.Batch, places: np.ndarray | None = None
) -> dict[str, float]:
    """Add a batch's gradients to the model's, and return what the log tells about it.

    Args:
        model: The model.
        batch: Tokens and weights of the step.
        places: Positions ``[rows, length]`` of the tokens that are read, if they do not count up.
    """
    import torch

    from longswift.tiny.network import hidden_states

    rows, length = batch.ids.shape
    # A few rows at a time keep the temporaries of a step within the cache.
    few = max(1, _CACHED_TOKENS // length)
    total = float(batch.weights[:, 1:].sum())
    sums: dict[str, list[float]] = {"loss": [0.0, 1.0]}
    for first in range(0, rows, few):
        ids = torch.from_numpy(batch.ids[first : first + few])
        at = None if places is None else torch.from_numpy(places[first : first + few])
        weights = torch.from_numpy(batch.weights[first : first + few, 1:]).reshape(-1)
        scored = weights.nonzero().squeeze(1)
        if not len(scored):
            continue
        # Logits are the largest tensor of the step, so unscored tokens get none.
        if len(ids) == 1:
            states = hidden_states(model, ids[:, :-1], scored, positions=at)[0]
        else:
            states = hidden_states(model, ids[:, :-1], positions=at).flatten(0, 1)[scored]
        weights, wanted = weights[scored], ids[:, 1:].reshape(-1)[scored]
        logits = model.lm_head(states)
        each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        loss = (each * weights).sum() / total
        loss.backward()
        answers = weights > data.TEXT_WEIGHT
        right = (logits.detach()[answers].argmax(-1) == wanted[answers]).float()
        sums["loss"][0] += loss.item()
        for name, values in (
            ("answers", each.detach()[answers]),
            ("right", right),
            ("text", each.detach()[(weights > data.QUESTION_WEIGHT) & ~answers]),
        ):
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += values.sum().item()
            entry[1] += len(values)
    return {name: total / count for name, (total, count) in sums.items() if count}


def _places(config: Config, step: int) -> np.ndarray | None:
    """Return the positions ``[rows, length]`` of a step's tokens, or None where they count up."""
    stage = config.locate(step)[0]
    if config.reach is None:
        return None
    return positions.draw(
        stage.rows,
        stage.length,
        reach=config.reach,
        leaps=stage.leaps,
        seed=config.seed,
        step=step,
    )


def _keep_memory() -> None:
    """Ask the C library to keep freed memory, as faulting it in again takes a tenth of a step."""
    import ctypes

    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, (1 << 31) - 1)


def _optimizers(model: PreTrainedModel, config: Config) -> list[torch.optim.Optimizer]:
    import torch

    from longswift.tiny.optim import Muon

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def load_checkpoint(out_dir: str | Path) -> dict[str, Any] | None:
    """Return the latest checkpoint of a run, or None before the first one."""
    import torch

    file = Path(out_dir) / "checkpoint.pt"
    return torch.load(file, weights_only=True) if file.exists() else None


def _model(config: Config) -> PreTrainedModel:
    from longswift.tiny.network import MAX_POSITIONS, build

    # Only the windowed family reads beyond what it was trained on as it is.
    trained = max([config.reach or 0, *(stage.length for stage in config.stages)])
    return build(
        family=config.family,
        positions=trained if config.family == "llama" else MAX_POSITIONS,
        vocab_size=config.vocab_size,
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        feed_forward=config.feed_forward,
        window=config.window,
        rope_theta=config.rope_theta,
        seed=config.seed,
    )


def _plain_settings(file: Path) -> None:
    """Keep of the tokenizer's settings only what every version of Transformers understands."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        content.pop(name, None)
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    content["model_input_names"] = ["input_ids", "attention_mask"]
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(out_dir: str | Path, model_dir: str | Path, config: Config | None = None) -> int:
    """Write the latest checkpoint as a directory that Transformers loads.

    Args:
        out_dir: Directory of the run.
        model_dir: Directory to write; files there are replaced one by one.
        config: Settings of the run.

    Returns:
        The step of the checkpoint.

    Raises:
        ValueError: If the run has no checkpoint yet.
    """
    from transformers import PreTrainedTokenizerFast

    state = load_checkpoint(out_dir)
    if state is None:
        raise ValueError(f"expected a checkpoint in {out_dir}, got none; train first")
    model = _model(config or Config())
    model.load_state_dict(state["model"])
    target = Path(model_dir)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        model.save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(Path(out_dir) / "tokenizer").save_pretrained(folder)
        _plain_settings(Path(folder) / "tokenizer_config.json")
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            os.replace(file, target / file.name)
    return int(state["step"])


def _check_settings(out: Path, config: Config) -> None:
    """Note the settings of a new run; refuse to continue one that had others."""
    mine = settings.kept(config)
    file = out / "settings.json"
    if not file.exists():
        text = json.dumps(mine, indent=1)
        write_text(file, text)
        return
    theirs = settings.noted(file)
    other = sorted(k for k in mine.keys() | theirs.keys() if theirs.get(k) != mine.get(k))
    if other:
        raise ValueError(
            f"expected the settings this run was started with, got another {', '.join(other)}; "
            f"use a new out_dir or the settings in {file}"
        )


def train(out_dir: str | Path, *, config: Config | None = None) -> Path:
    """Train the tiny model, or go on where an interrupted run stopped.

    SIGTERM and Ctrl-C end the run after the current step, with a checkpoint.

    Args:
        out_dir: Directory of the run: tokenizer, cache, checkpoint, ``log.jsonl``, ``model``.
        config: Settings; a directory keeps those it was started with.

    Returns:
        The directory of the exported model.

    Raises:
        ValueError: If the directory holds a run with other settings.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    config = config or Config()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out, config)
    torch.set_num_threads(config.threads)
    _keep_memory()
    _, pool = _prepare(out, config)
    model = _model(config)
    optimizers = _optimizers(model, config)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    state, step = load_checkpoint(out), 0
    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = int(state["step"])

    def save() -> None:
        content = {
            "step": step,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        replace(out / "checkpoint.pt", lambda path: torch.save(content, path))

    end = min(config.total_steps, config.max_steps or config.total_steps)
    progress = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
    log = _Log(out / "log.jsonl")
    with progress, _StopRequest() as stop:
        task = progress.add_task("starting", total=end, completed=step)
        saved_at = time.monotonic()
        while step < end and not stop.asked:
            stage, rate = config.locate(step)[0], config.rate(step)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * rate
            batch = data.make_batch(
                pool, stage.rows, stage.length, config.seed, step, kind=stage.kind
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_fast(torch.bfloat16)):
                told = _gradients(model, batch, _places(config, step))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            log.add(told)
            if step % 20 == 0 or step == end:
                line = log.write(step, stage, stage.rows * stage.length)
                progress.update(task, completed=step, description=line)
            if time.monotonic() - saved_at > config.checkpoint_seconds:
                save()
                saved_at = time.monotonic()
        save()
    export(out, out / "model", config)
    return out / "model"


class _StopRequest:
    """Remembers SIGTERM and SIGINT, so that a step in progress is finished first."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _StopRequest:
        self._before: dict[int, Any] = {}
        # Python takes signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True


class _Log:
    """Averages what the steps tell and appends it to a file, one JSON object per line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._told: list[dict[str, float]] = []
        self._since = time.monotonic()

    def add(self, told: dict[str, float]) -> None:
        self._told.append(told)

    def write(self, step: int, stage: Stage, tokens: int) -> str:
        names = sorted({name for told in self._told for name in told})
        entry: dict[str, float] = {"step": step, "length": stage.length}
        for name in names:
            values = [told[name] for told in self._told if name in told]
            entry[name] = round(sum(values) / len(values), 4)
        spent = max(time.monotonic() - self._since, 1e-9)
        entry["tokens_per_second"] = round(len(self._told) * tokens / spent)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._told, self._since = [], time.monotonic()
        return " ".join(f"{k} {v}" for k, v in entry.items() if k != "step")
