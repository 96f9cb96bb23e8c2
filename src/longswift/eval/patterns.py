"""Who sees whom, and why: what a picture of a mechanism shows, found by asking the mechanism.

Nothing is assumed about a mechanism. ``visible()`` names the keys it sees; its weights (its output
for the identity matrix as values) tell whether that is all: a key with a weight that is not
visible is reached through a summary, and weights that are no softmax of the scores come through a
state. Random queries and keys with a fixed seed stand for a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Mechanism
from longswift.core.pattern import BlockPattern
from longswift.mechanisms.ms_swift import MSSwift
from longswift.mechanisms.patterned import Patterned

HEADS, HEAD_DIM = 3, 16
SHORTEST, LONGEST = 16, 512
# Weights below this are rounding; a softmax over 512 keys of moderate scores stays far above it.
_NO_WEIGHT = 1e-9
_SAME = 1e-6


class Why(IntEnum):
    """Why a query sees a key; larger ones win where several apply."""

    NOTHING = 0
    SUMMARY = 1
    STATE = 2
    FULL_ROW = 3
    CHOSEN = 4
    WINDOW = 5
    GLOBAL = 6


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads that see the same.

    Attributes:
        label: Which heads these are.
        why: uint8 ``[Lq, Lk]`` on the CPU, a ``Why`` for each pair.
    """

    label: str
    why: Tensor


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One mechanism at one length.

    Attributes:
        mechanism: What is shown.
        causal: Which of its forms.
        heads: One entry for each different view.
        subset: The output is a softmax over ``visible()`` and nothing else.
        density: Pairs seen exactly as a share of those that full attention scores; mean over heads.
    """

    mechanism: Mechanism
    causal: bool
    heads: tuple[Heads, ...]
    subset: bool
    density: float

    @property
    def length(self) -> int:
        """Tokens."""
        return self.heads[0].why.shape[0]

    @property
    def reasons(self) -> list[Why]:
        """Every reason that occurs, the strongest first."""
        found = {int(w) for heads in self.heads for w in heads.why.unique()}
        return [Why(w) for w in sorted(found, reverse=True) if w]


def picture(mechanism: Mechanism, length: int = 64, *, causal: bool = True) -> Picture:
    """Ask a mechanism whom each token sees. O(length^2) time and memory.

    Args:
        mechanism: Any mechanism, configured for a text this short.
        length: Tokens.
        causal: The causal or the bidirectional form.

    Raises:
        UnsupportedError: It has no such form.
        ConfigError: A length that no picture can show.
    """
    check_length(length)
    scales = getattr(mechanism, "scale_of_head", None)
    heads = HEADS if scales is None else len(scales)
    q, k = _content(heads, length, seed=0)
    seen = mechanism.visible(q, k, causal=causal)[0]
    allowed = torch.ones(length, length, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    weights = _weights(mechanism, q, k, causal)
    reached = weights.abs() > _NO_WEIGHT
    why = reasons(mechanism, seen, causal=causal)
    exact = _follows_scores(mechanism, q, k, seen, weights, causal)
    if exact:
        why = torch.where(reached & ~seen, int(Why.SUMMARY), why)
    else:
        why = torch.where(reached, int(Why.STATE), int(Why.NOTHING))
    pairs = seen & allowed
    return Picture(
        mechanism=mechanism,
        causal=causal,
        heads=_distinct(mechanism, why.to(torch.uint8)),
        subset=exact and not bool((reached & ~seen).any()),
        density=float(pairs.sum()) / (heads * int(allowed.sum())) if exact else 1.0,
    )


def check_length(length: int) -> None:
    """Raise ``ConfigError`` for a length that no picture can show."""
    if not SHORTEST <= length <= LONGEST:
        raise ConfigError(
            problem(
                "length",
                expected=f"{SHORTEST} to {LONGEST} tokens",
                got=length,
                fix="A picture of more would show dots smaller than a pixel.",
            )
        )


def reasons(mechanism: Mechanism, seen: Tensor, *, causal: bool) -> Tensor:
    """Why each visible key is seen, uint8 like ``seen``.

    Args:
        mechanism: Whose ``visible()`` it is.
        seen: bool ``[Hq, Lq, Lk]``; with fewer queries than keys they are the last ones.
        causal: Causal attention.
    """
    heads, q_len, k_len = seen.shape
    allowed = torch.ones(q_len, k_len, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(k_len - q_len)
    full = (seen | ~allowed).all(2, keepdim=True)
    band = _band(mechanism, seen, full, causal)
    why = torch.where(seen, int(Why.CHOSEN), int(Why.NOTHING))
    why = torch.where(full & seen, int(Why.FULL_ROW), why)
    why = torch.where(band & seen, int(Why.WINDOW), why)
    if isinstance(mechanism, MSSwift):
        everywhere = (torch.arange(k_len) < mechanism.sinks)[None, None]
    else:
        beyond = (allowed & ~band).sum(1, keepdim=True)
        everywhere = (seen | ~allowed).all(1, keepdim=True) & (beyond >= max(2, q_len // 4))
        # Where every query sees every key no token is more global than another.
        everywhere = everywhere & ~full.all(1, keepdim=True)
    return torch.where(everywhere & seen, int(Why.GLOBAL), why).to(torch.uint8)


def _content(heads: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys whose attention has peaks, ``[1, heads, length, HEAD_DIM]`` each."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        1.5 * torch.randn(1, heads, length, HEAD_DIM, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return q, k


@torch.no_grad()
def _weights(mechanism: Mechanism, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Weight of every value in every output, ``[H, L, L]``: outputs are linear in the values."""
    heads, length = q.shape[1:3]
    values = torch.eye(length, dtype=q.dtype).expand(1, heads, -1, -1)
    return mechanism(q, k, values, causal=causal).out[0]


def _band(mechanism: Mechanism, seen: Tensor, full: Tensor, causal: bool) -> Tensor:
    """The contiguous keys around each query, bool like ``seen``; ``full`` marks complete rows."""
    heads, q_len, k_len = seen.shape
    pattern = None
    if isinstance(mechanism, MSSwift):
        bands = mechanism.bands(q_len, heads, causal)
        pattern = BlockPattern(causal=causal, bands=bands)
    elif isinstance(mechanism, Patterned):
        pattern = mechanism.pattern(q_len, k_len, heads, causal)
    if pattern is not None:
        return pattern.band_mask(q_len, k_len, seen.device)[0]
    # Nothing is known: whatever is seen without a gap from the query's own position on.
    position = torch.arange(k_len - q_len, k_len)[:, None]
    gaps = (~seen).cumsum(2)
    run = seen & (gaps == gaps.gather(2, position.expand(heads, -1, 1)))
    # A row that sees everything has no gap; its window is no wider than those of other rows.
    distance = (position - torch.arange(k_len)).expand_as(run)
    rest = run & ~full
    if not bool(rest.any()):
        return run
    behind, ahead = distance[rest].max(), distance[rest].min()
    return run & (distance <= behind) & (distance >= ahead)


def _follows_scores(
    mechanism: Mechanism, q: Tensor, k: Tensor, seen: Tensor, weights: Tensor, causal: bool
) -> bool:
    """Whether the weights of visible keys are a softmax of their scores, up to a fixed bias.

    ``log weight - score`` is then the same, up to a number per query, for any content.
    """

    def excess(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2))[0] * q.shape[-1] ** -0.5
        return weights.clamp(min=0).log() - scores

    other_q, other_k = _content(q.shape[1], q.shape[2], seed=1)
    other_seen = mechanism.visible(other_q, other_k, causal=causal)[0]
    other = excess(other_q, other_k, _weights(mechanism, other_q, other_k, causal))
    gap = excess(q, k, weights) - other
    both = seen & other_seen
    if not bool(torch.isfinite(gap[both]).all()):
        return False
    count = both.sum(2, keepdim=True).clamp(min=1)
    gap = torch.where(both, gap, 0.0)
    centred = torch.where(both, gap - gap.sum(2, keepdim=True) / count, 0.0)
    return bool(centred.abs().max() < _SAME)


def _distinct(mechanism: Mechanism, why: Tensor) -> tuple[Heads, ...]:
    """Heads that see the same, together; random content differs between heads by itself."""
    groups: list[tuple[list[int], str]] = []
    for head in range(len(why)):
        label = ""
        if isinstance(mechanism, MSSwift):
            label = f"window {mechanism.window_of_head(len(why))[head]}"
        for members, other in groups:
            if label == other and (label or bool((why[members[0]] == why[head]).all())):
                members.append(head)
                break
        else:
            groups.append(([head], label))
    found = []
    for members, label in groups:
        numbers = ", ".join(map(str, members))
        name = f"head{'s' if len(members) > 1 else ''} {numbers}"
        if len(groups) == 1 and len(members) == len(why):
            name = "every head"
        found.append(Heads(label=f"{name}: {label}" if label else name, why=why[members[0]]))
    return tuple(found)


def options_in_words(mechanism: Mechanism) -> str:
    """The configuration of a mechanism, in a line."""
    config = {
        key: value
        for key, value in mechanism.to_dict().items()
        # An empty list says nothing in a title.
        if key != "name" and value not in ((), [], "")
    }
    words = ", ".join(f"{key}={_plain(value)}" for key, value in config.items())
    return words or "no options"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("name", value))
    if isinstance(value, list | tuple):
        return "/".join(map(str, value))
    return str(value)
