"""A model reads a long document in chunks, is scored on it, and is asked about it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, InputError, UnsupportedError, problem
from longswift.core.mechanism import Mechanism
from longswift.eval.progress import Bar, silent

SCORED_ROWS = 512
# Relative distance of logits that rounding explains, 16-bit weights included.
_SAME = 0.05


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What reading a document took and told.

    Attributes:
        tokens: Tokens read.
        seconds: Time of the decoder over all chunks, without the scoring.
        nll: Negative log-likelihood of every token after the first, summed, in nats; 0 if not
            scored.
        losses: The same for each of them, fp32 ``[tokens - 1]`` on the CPU; empty if not scored.
    """

    tokens: int
    seconds: float
    nll: float
    losses: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """Token-weighted perplexity of the document."""
        return float(torch.tensor(self.nll / max(1, self.tokens - 1), dtype=torch.float64).exp())


def finish(device: torch.device) -> None:
    """Waits for what a device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def next_token_logits(model: Any, hidden: Tensor) -> Tensor:
    """fp32 logits ``[T, vocabulary]`` behind ``hidden [T, width]``, as the model scales them."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    # Cohere and Falcon-H1 multiply, Granite divides, Gemma caps.
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits * (getattr(config, "lm_head_multiplier", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def finite(logits: Tensor) -> Tensor:
    """The logits ``[..., vocabulary]``, if every row has a largest one.

    Raises:
        InputError: Some are NaN or infinite, of which no score and no next token can be told.
    """
    if bool(logits.amax(-1).isfinite().all()):
        return logits
    raise InputError(
        problem(
            "logits",
            expected="finite numbers",
            got="NaN or infinity",
            fix="The weights may be damaged, or the dtype too narrow for this model and text: "
            "try bfloat16 or float32.",
        )
    )


def _score(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each of ``targets [T]`` after ``hidden [1, >= T, width]``."""
    losses = []
    for start in range(0, targets.shape[0], SCORED_ROWS):
        wanted = targets[start : start + SCORED_ROWS]
        logits = finite(next_token_logits(model, hidden[0, start : start + len(wanted)]))
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu())
    return torch.cat(losses) if losses else torch.zeros(0)


def check_chunk(owner: str, chunk: int, mechanism: Mechanism | None) -> None:
    """Raise ``ConfigError`` unless reading in chunks gives what reading at once gives."""
    block = getattr(mechanism, "block", 1)
    if chunk % block:
        raise ConfigError(
            problem(
                owner,
                expected=f"a multiple of the mechanism's block ({block})",
                got=chunk,
                fix=f"Try {8 * block}.",
            )
        )


@torch.inference_mode()
def hidden_states(
    model: Any, ids: Sequence[int] | Tensor, cache: Any, chunk: int
) -> Iterator[Tensor]:
    """The decoder's last hidden states ``[B, T, width]``, a chunk of the document at a time.

    Args:
        model: A causal language model of Transformers.
        ids: Token ids of one document, or of several, ``[B, tokens]``.
        cache: It grows.
        chunk: Tokens per forward pass.
    """
    decoder = model.get_decoder()
    tokens = ids if isinstance(ids, Tensor) else torch.tensor([ids], device=model.device)
    for part in tokens.split(chunk, dim=1):
        yield decoder(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state


@torch.inference_mode()
def check_readable(model: Any, ids: Sequence[int]) -> None:
    """Raise unless the model, read in chunks and scored here, says what it says by itself.

    Without a sign of it, all figures would be wrong where recurrent layers forget their state
    from one call to the next, or where a model scales its logits in a way of its own.

    Args:
        model: A causal language model of Transformers.
        ids: A few dozen tokens of text.

    Raises:
        UnsupportedError: It does not.
        InputError: Its logits are not finite.
    """
    from longswift.hf import SwiftCache
    from longswift.hf.settings import stand_in
    from longswift.mechanisms.full import Full

    tokens = torch.tensor([ids], device=model.device)
    with stand_in(lambda _: Full()):
        truth = finite(model(input_ids=tokens, use_cache=False).logits[0].float())
        for chunk, got, fix in (
            (len(ids), "logits it scales in a way of its own", "It cannot be scored here."),
            (
                max(1, len(ids) // 8),
                "layers that forget what an earlier call read",
                "Transformers cannot read with it in pieces; choose another architecture.",
            ),
        ):
            states = hidden_states(model, ids, SwiftCache(model.config), chunk)
            found = torch.cat([next_token_logits(model, part[0]) for part in states])
            off = (found - truth).norm(dim=1) / truth.norm(dim=1)
            # Where a call begins, most is forgotten. Rounding may send single tokens to other
            # experts; the median tells.
            begun = off[chunk::chunk] if chunk < len(ids) else off
            if float(begun.median()) > _SAME:
                raise UnsupportedError(
                    problem(
                        type(model).__name__,
                        expected="the same next-token distributions read whole and in chunks",
                        got=got,
                        fix=fix,
                    )
                )


@torch.inference_mode()
def read(
    model: Any,
    ids: Sequence[int],
    cache: Any,
    *,
    chunk: int,
    score: bool = False,
    step: Bar = silent,
) -> Reading:
    """Fill ``cache`` with a document, a chunk at a time.

    Args:
        model: A causal language model of Transformers.
        ids: Token ids of the document.
        cache: Empty cache; holds ``len(ids)`` tokens afterwards.
        chunk: Tokens per forward pass; a multiple of the mechanism's block.
        score: Also sum the log-likelihood; logits exist for a few hundred rows at a time.
        step: Progress, in tokens.
    """
    tokens = torch.tensor(ids, device=model.device)
    states = hidden_states(model, ids, cache, chunk)
    seconds = 0.0
    losses = []
    for start in range(0, len(ids), chunk):
        finish(tokens.device)
        begin = time.perf_counter()
        hidden = next(states)
        finish(tokens.device)
        seconds += time.perf_counter() - begin
        if score:
            losses.append(_score(model, hidden, tokens[start + 1 : start + 1 + hidden.shape[1]]))
        step(hidden.shape[1])
    every = torch.cat(losses) if losses else torch.zeros(0)
    return Reading(tokens=len(ids), seconds=seconds, nll=every.double().sum().item(), losses=every)


@torch.inference_mode()
def _next(model: Any, ids: Sequence[int], cache: Any) -> int:
    """The likeliest token after ``ids``, which are added to the cache."""
    part = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(finite(logits[0, -1]).argmax())


def decode(
    model: Any, ids: Sequence[int], cache: Any, limit: int, stop: Collection[int] = ()
) -> Iterator[int]:
    """Greedy tokens after ``ids``, which are appended to what the cache holds.

    Args:
        model: A causal language model of Transformers.
        ids: Prompt that follows the text in the cache; at least one token.
        cache: The prefilled cache; it grows.
        limit: Tokens to yield at most.
        stop: Tokens that end the answer; they are not yielded.
    """
    for _ in range(limit):
        token = _next(model, ids, cache)
        if token in stop:
            return
        yield token
        ids = [token]


def _copy(state: Any) -> Any:
    """``state`` with tensors of its own."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state


@contextmanager
def bookmark(cache: Any) -> Iterator[None]:
    """Whatever the work inside appends to the cache is removed again afterwards.

    Full layers are cropped. Layers with a window or a state forget what a crop would need, so
    their bounded contents are copied.
    """
    from longswift.hf.cache import SwiftLayer

    full = [(layer, layer.get_seq_length()) for layer in cache.layers if type(layer) is SwiftLayer]
    rest = [(layer, _copy(vars(layer))) for layer in cache.layers if type(layer) is not SwiftLayer]
    try:
        yield
    finally:
        for layer, length in full:
            if layer.get_seq_length() > length:
                layer.crop(length)
        for layer, state in rest:
            vars(layer).update(state)


def ask(
    model: Any, ids: Sequence[int], cache: Any, limit: int, stop: Collection[int] = ()
) -> list[int]:
    """Greedy answer to a question about the text in the cache, which is left as it was."""
    with bookmark(cache):
        return list(decode(model, ids, cache, limit, stop))


def decode_speed(model: Any, ids: Sequence[int], cache: Any, count: int) -> float:
    """Tokens per second of greedy decoding behind the text in the cache, which is restored.

    The first token, which also reads ``ids``, is not counted.
    """
    with bookmark(cache):
        stream = decode(model, ids, cache, count + 1)
        next(stream)
        begin = time.perf_counter()
        made = sum(1 for _ in stream)
        return made / (time.perf_counter() - begin)
