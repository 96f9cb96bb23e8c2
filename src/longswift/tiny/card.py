"""Measures a model directory and writes its card: recall of secrets, and perplexity."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longswift.core.files import write_text
from longswift.tiny import corpus, tasks
from longswift.tiny.tokenizer import END_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["described", "evaluate", "perplexity", "recall", "write"]

LENGTHS = (1024, 4096, 8192, 16384, 32768)
_PERPLEXITY_WINDOW = 2048


def _plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: Sequence[int],
    length: int,
    *,
    keys: int = 1,
    trials: int = 16,
    seed: int = 0,
) -> float:
    """Return the share of secrets whose digits full attention all gets right.

    Greedy decoding would give the same: an answer counts if every digit is the likeliest one
    after the right ones before it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: Token ids of the text to hide secrets in, ``[tokens]``; repeated if too short.
        length: Tokens from the start of the document to the end of the last answer, at most.
        keys: Secrets per document; all of them are asked, one after another.
        trials: Documents; the depth of a single secret goes evenly from start to end.
        seed: Chooses places in the text, words and numbers.

    Raises:
        ValueError: If the sentences do not fit into ``length``.
    """
    import torch

    from longswift.tiny.network import hidden_states

    def encode(sentence: str) -> list[int]:
        return _plain(tokenizer, sentence)

    room = length - 40 * keys
    if room < 1:
        raise ValueError(f"expected length > {40 * keys} for {keys} keys, got {length}; raise it")
    whole = list(text)
    while len(whole) < room:
        whole += text
    found = asked = 0
    for trial in range(trials):
        start = (seed + trial) * 7919 % (len(whole) - room + 1)
        depths = [(trial + 0.5) / trials] if keys == 1 else None
        hidden = tasks.hide_secrets(
            whole[start : start + room],
            keys,
            seed=seed * 1_000_003 + length * 101 + trial,
            depths=depths,
            encode=encode,
        )
        ids = [END_ID, *hidden.document]
        spans = []
        for question, answer in zip(hidden.questions, hidden.answers, strict=True):
            ids += encode(question) + encode(" ")
            spans.append((len(ids), len(ids) + len(answer)))
            ids += encode(answer) + encode(".")
        tokens = torch.tensor([ids])
        before = torch.tensor([p - 1 for span in spans for p in range(*span)])
        with torch.inference_mode():
            likeliest = model.lm_head(hidden_states(model, tokens, before))[0].argmax(-1)
        right = (likeliest == tokens[0, before + 1]).view(keys, -1).all(1)
        found += int(right.sum())
        asked += keys
    return found / asked


def perplexity(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """Return the perplexity per token of ``ids`` [tokens], in windows read from their start."""
    import torch

    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, _PERPLEXITY_WINDOW):
        piece = torch.tensor([[END_ID, *ids[start : start + _PERPLEXITY_WINDOW]]])
        with torch.inference_mode():
            logits = model(piece[:, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(
                logits.float(), piece[0, 1:], reduction="sum"
            ).item()
        count += piece.shape[1] - 1
    return math.exp(total / count)


def evaluate(
    model_dir: str | Path,
    lengths: Sequence[int] = LENGTHS,
    *,
    trials: int = 16,
    keys: Sequence[int] = (4, 16),
    multi_lengths: Sequence[int] = (32768,),
    multi_trials: int = 4,
    text: str | None = None,
    seed: int = 0,
    threads: int = 1,
) -> dict[str, Any]:
    """Measure a model directory with full attention.

    Args:
        model_dir: Directory that Transformers loads.
        lengths: Token counts for one secret.
        trials: Documents per length with one secret; fewer beyond 32768 tokens.
        keys: Secrets per document with several, each count measured on its own.
        multi_lengths: Token counts for several secrets.
        multi_trials: Documents per length with several secrets.
        text: Text to hide secrets in; the held-out split by default.
        seed: Seed of all documents.
        threads: CPU threads.

    Returns:
        The figures, as plain values for JSON. ``single`` maps a length to recall, ``multi`` a
        length to recall by the number of secrets.

    Raises:
        ConfigError: The directory holds no whole model.
    """
    import torch

    from longswift.hf.loading import load

    torch.set_num_threads(threads)
    model, tokenizer = load(model_dir)
    ids = _plain(tokenizer, corpus.text("heldout") if text is None else text)
    began = time.monotonic()
    say = sys.stderr.write
    single: dict[str, float] = {}
    documents: dict[str, int] = {}
    multi: dict[str, dict[str, float]] = {}
    for length in lengths:
        # Attention costs the square of the length, and the last lengths would take hours.
        documents[str(length)] = max(2, min(trials, trials * 32768 // length))
        found = recall(model, tokenizer, ids, length, trials=documents[str(length)], seed=seed)
        single[str(length)] = found
        say(f"{length} tokens, 1 secret: {found:.1%}\n")
    for length in multi_lengths:
        for count in keys:
            found = recall(
                model, tokenizer, ids, length, keys=count, trials=multi_trials, seed=seed
            )
            multi.setdefault(str(length), {})[str(count)] = found
            say(f"{length} tokens, {count} secrets: {found:.1%}\n")
    result: dict[str, Any] = {
        "single": single,
        "single_trials": documents,
        "multi": multi,
        "multi_trials": multi_trials,
        "text_tokens": len(ids),
        "seed": seed,
    }
    if text is None:
        prose = "\n".join(b for n, b in corpus.documents("heldout") if n.startswith("topic:"))
        source = "\n".join(b for n, b in corpus.documents("heldout") if n.startswith("file:"))
        result["perplexity"] = {
            "prose": round(perplexity(model, _plain(tokenizer, prose)), 2),
            "source": round(perplexity(model, _plain(tokenizer, source)[:65536]), 2),
        }
        say(f"perplexity: {result['perplexity']}\n")
    result["seconds"] = round(time.monotonic() - began, 1)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    return result


def _hardware(threads: int) -> str:
    names = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if names.exists():
        for line in names.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {threads} CPU thread{'s' if threads > 1 else ''}, no GPU"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    found = {"python": platform.python_version()}
    return found | {name: version(name) for name in ("torch", "transformers", "tokenizers")}


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# longswift tiny

A demonstration model with {parameters:.2f} M parameters. It exists so that long-context attention
can be tried and tested in seconds on a CPU: it finds numbers hidden in long texts and continues
Python documentation and source passably. It is of no use for anything else.

Even layers attend to the last {window} tokens and use rotary positions; odd layers attend to
everything and know no positions, so nothing in the model ends at the trained length
({trained} tokens). The tokenizer has {vocabulary} byte-level pieces, one for each digit.

## Measured

Full attention. A secret is a sentence such as ` The secret number of plimtea is 48213.` inside
held-out text; it counts as found if all five digits are right. Each word has a syllable that
no invented word of the training has.

| tokens | secrets in the text | documents | found |
|---:|---:|---:|---:|
{rows}

With one secret it is enough to find the sentence; with several, the words have to be told apart.

Perplexity per token on held-out text, in windows of {perplexity_window} tokens: **{prose}** on
documentation (`pydoc_data.topics`), **{source}** on the standard library's source.

## Reproduce

```python
from longswift import tiny
from longswift.tiny import card, train

train.train("run")                      # trains, or goes on after an interruption
{command}
```

Training read {tokens:.1f} M tokens of text that comes with Python {python}: about a quarter of
the documentation topics and {held:.0%} of the source files are held out, chosen by a hash of
their names. Another version of Python gives slightly different text, another processor slightly
different rounding. The packaged weights come from a run that was interrupted several times and
whose later stages were settled on the way, so a new run gives a model of the same kind and not
the same bytes. Seed of the training {seed}, of the measurement {measured_seed}.

Measured with {versions}
on {hardware}, in {seconds:.0f} s.
"""


def described(model_dir: str | Path) -> dict[str, Any]:
    """Return the configuration of a model that the card's text describes.

    Raises:
        ValueError: If the model has no windows, as one of another recipe.
    """
    shape: dict[str, Any] = json.loads((Path(model_dir) / "config.json").read_text("utf-8"))
    if "sliding_window" not in shape:
        raise ValueError(
            f"expected a model with windows, got a {shape.get('model_type')}; "
            "measure it without a card, whose text is the packaged model's"
        )
    return shape


def write(
    model_dir: str | Path, result: dict[str, Any], *, command: str, threads: int = 1
) -> dict[str, Any]:
    """Write ``MODEL_CARD.md`` and ``card.json`` next to the model.

    Args:
        model_dir: Directory of the model.
        result: What :func:`evaluate` returned, for the held-out split.
        command: The Python statement that gave ``result``.
        threads: CPU threads it ran with.

    Returns:
        The content of ``card.json``.

    Raises:
        ValueError: If the result lacks the perplexity, as with a text of the caller's, or the
            model has no windows.
    """
    from longswift.tiny.config import Config

    if "perplexity" not in result:
        raise ValueError("expected a result with perplexity, got none; evaluate without text=")
    target = Path(model_dir)
    shape = described(target)
    config = Config()
    content = result | {
        "command": command,
        "hardware": _hardware(threads),
        "versions": _versions(),
        "training_seed": config.seed,
        "training_tokens": sum(s.steps * s.rows * s.length for s in config.stages),
    }
    rows: list[tuple[str, str | int, int, float]] = [
        (length, 1, result["single_trials"][length], found)
        for length, found in result["single"].items()
    ]
    rows += [
        (length, count, result["multi_trials"], found)
        for length, counts in result["multi"].items()
        for count, found in counts.items()
    ]
    text = _CARD.format(
        parameters=result["parameters"] / 1e6,
        window=shape["sliding_window"],
        trained=max(stage.length for stage in config.stages),
        vocabulary=shape["vocab_size"],
        rows="\n".join(f"| {n} | {k} | {d} | {found:.1%} |" for n, k, d, found in rows),
        perplexity_window=_PERPLEXITY_WINDOW,
        prose=result["perplexity"]["prose"],
        source=result["perplexity"]["source"],
        command=command,
        tokens=content["training_tokens"] / 1e6,
        python=content["versions"]["python"],
        held=corpus.FILES_HELD_OUT,
        seed=config.seed,
        measured_seed=result["seed"],
        versions=", ".join(f"{k} {v}" for k, v in content["versions"].items()),
        hardware=content["hardware"],
        seconds=result["seconds"],
    )
    write_text(target / "MODEL_CARD.md", text)
    write_text(target / "card.json", json.dumps(content, indent=1) + "\n")
    return content
