"""Measures a model directory and writes its card: recall of secrets, and perplexity."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longswift.tiny import corpus, tasks
from longswift.tiny.tokenizer import END_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, SmolLM3ForCausalLM

__all__ = ["evaluate", "perplexity", "recall", "write"]

LENGTHS = (1024, 4096, 8192, 16384, 32768)
_PERPLEXITY_WINDOW = 2048


def _load(model_dir: str | Path) -> tuple[SmolLM3ForCausalLM, PreTrainedTokenizerFast]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    return model.eval(), AutoTokenizer.from_pretrained(model_dir)


def _plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def recall(
    model: SmolLM3ForCausalLM,
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


def perplexity(model: SmolLM3ForCausalLM, ids: Sequence[int]) -> float:
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
    keys: int = 16,
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
        trials: Documents per length with one secret.
        keys: Secrets per document with several.
        multi_lengths: Token counts for several secrets.
        multi_trials: Documents per length with several secrets.
        text: Text to hide secrets in; the held-out split by default.
        seed: Seed of all documents.
        threads: CPU threads.

    Returns:
        The figures, as plain values for JSON: ``single`` and ``multi`` map a length to recall.
    """
    import torch

    torch.set_num_threads(threads)
    model, tokenizer = _load(model_dir)
    ids = _plain(tokenizer, corpus.text("heldout") if text is None else text)
    began = time.monotonic()
    say = sys.stderr.write
    single, multi = {}, {}
    for length in lengths:
        single[str(length)] = recall(model, tokenizer, ids, length, trials=trials, seed=seed)
        say(f"{length} tokens, 1 secret: {single[str(length)]:.1%}\n")
    for length in multi_lengths:
        multi[str(length)] = recall(
            model, tokenizer, ids, length, keys=keys, trials=multi_trials, seed=seed
        )
        say(f"{length} tokens, {keys} secrets: {multi[str(length)]:.1%}\n")
    result: dict[str, Any] = {
        "single": single,
        "single_trials": trials,
        "multi": multi,
        "multi_keys": keys,
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

