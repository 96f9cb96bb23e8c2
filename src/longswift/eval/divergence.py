"""How far a mechanism moves a model's predictions of a text from those of full attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from longswift.eval import reading
from longswift.eval.models import Loaded
from longswift.eval.progress import Bar, silent

_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Means over the positions of a text.

    Attributes:
        kl: Kullback-Leibler divergence of the next-token distribution from full attention's, in
            nats.
        top1: Share of positions where both find the same token likeliest.
        perplexity: Of the text under the mechanism.
        perplexity_ratio: The same over full attention's.
    """

    kl: float
    top1: float
    perplexity: float
    perplexity_ratio: float

    def to_dict(self) -> dict[str, float]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)


@torch.inference_mode()
def last_states(loaded: Loaded, ids: Sequence[int], *, chunk: int, step: Bar = silent) -> Tensor:
    """The decoder's last states ``[tokens, width]``, with the attention in force.

    Args:
        loaded: The model.
        ids: Token ids of the text.
        chunk: Tokens per forward pass; a multiple of the mechanism's block.
        step: Progress, in tokens.
    """
    from longswift.hf import SwiftCache

    cache: Any = SwiftCache(loaded.model.config)
    decoder, tokens = loaded.model.get_decoder(), torch.tensor(ids, device=loaded.model.device)
    states = []
    for part in tokens.split(chunk):
        told = decoder(input_ids=part[None], past_key_values=cache, use_cache=True)
        states.append(told.last_hidden_state[0])
        step(len(part))
    return torch.cat(states)


@torch.inference_mode()
def divergence(loaded: Loaded, ids: Sequence[int], full: Tensor, other: Tensor) -> Divergence:
    """Compare two readings of the same text.

    Distributions exist for a few hundred positions at a time: memory O(tokens * width).

    Args:
        loaded: The model.
        ids: Token ids of the text, two at least.
        full: ``last_states`` with full attention.
        other: ``last_states`` with the mechanism.
    """
    model, targets = loaded.model, torch.tensor(ids[1:], device=full.device)
    kl = same = full_nll = other_nll = 0.0
    for start in range(0, len(targets), _ROWS):
        wanted = targets[start : start + _ROWS, None]
        rows = slice(start, start + len(wanted))
        p = reading.next_token_logits(model, full[rows]).log_softmax(-1)
        q = reading.next_token_logits(model, other[rows]).log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        full_nll -= p.gather(1, wanted).sum().item()
        other_nll -= q.gather(1, wanted).sum().item()
    count = len(targets)
    return Divergence(
        # Rounding may leave equal distributions a hair below zero.
        kl=max(0.0, kl / count),
        top1=same / count,
        perplexity=math.exp(other_nll / count),
        perplexity_ratio=math.exp((other_nll - full_nll) / count),
    )
