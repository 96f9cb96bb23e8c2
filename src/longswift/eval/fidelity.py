"""What sparse attention costs in quality, on a model and a text of the user's own.

Two questions, kept apart:

* **single layers**: each full-attention layer's queries, keys and values *of the dense model* go to
  every rival, whose output and captured attention mass are compared with full attention's. Errors
  of earlier layers play no part.
* **the whole model**: every rival reads the document in the model, its own errors carried from
  layer to layer, and its next-token distributions are compared with the dense model's.

The dense model reads in blocks: time O(n^2), memory O(n). Documents longer than ``exact_below`` are
judged by sampled query rows, computed exactly, on the layers' inputs in the *sparse* model; the
dense model does not run, and there are no divergences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor

from longswift.core.errors import InputError, problem
from longswift.core.mechanism import Mechanism
from longswift.eval.cost import equal_cost_window
from longswift.eval.guarded import Guarded, GuardRow
from longswift.eval.judging import EndJudge, EndRow, HeadRow, LayerJudge
from longswift.eval.progress import Bar, silent
from longswift.eval.reading import check_chunk
from longswift.eval.rivals import FULL, UNIFORM, WINDOW, Rival, Uniform
from longswift.eval.rows import Records
from longswift.eval.walk import Walk, on_trial
from longswift.mechanisms.full import Full
from longswift.mechanisms.profile import Profile
from longswift.mechanisms.sliding_window import SlidingWindow

EXACT_BELOW = 32768
# Rows of a chunk judged where the dense model does not run: 1/64 of dense attention's work.
_SAMPLED_SHARE = 64


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What one document told.

    Attributes:
        judge: ``"exact"``: every row against the dense model. ``"sampled"``: some rows of the
            sparse model's layers against full attention.
        heads: By rival, layer and head.
        ends: By rival.
        window: The window of equal cost.
        guard: By layer, what the coverage guard did; empty for a mechanism without one.
    """

    judge: str
    heads: list[HeadRow]
    ends: list[EndRow]
    window: int
    guard: list[GuardRow]

    def to_rows(self) -> list[dict[str, Any]]:
        """Flat records."""
        heads = [{"part": "head", "judge": self.judge, **asdict(row)} for row in self.heads]
        ends = [{"part": "end", "judge": self.judge, **asdict(row)} for row in self.ends]
        guard = [{"part": "guard", "judge": self.judge, **asdict(row)} for row in self.guard]
        return [*heads, *ends, *guard]


@dataclass(frozen=True, kw_only=True)
class _Kept:
    part: str
    judge: str


@dataclass(frozen=True, kw_only=True)
class _Head(_Kept, HeadRow): ...


@dataclass(frozen=True, kw_only=True)
class _End(_Kept, EndRow): ...


@dataclass(frozen=True, kw_only=True)
class _Guard(_Kept, GuardRow): ...


# What ``Fidelity.to_rows`` gives, by its part.
RECORDS: Records = ("part", {"head": _Head, "end": _End, "guard": _Guard})


def measure(
    model: Any,
    ids: Sequence[int] | Tensor,
    mechanism: Mechanism | Profile,
    *,
    chunk: int = 1024,
    exact_below: int = EXACT_BELOW,
    document: int = 0,
    step: Bar = silent,
) -> Fidelity:
    """Measure a mechanism in the full-attention layers of a model, and two baselines beside it.

    The baselines are a sliding window that scores as many keys, and uniform attention. Nothing is
    changed in the model.

    Args:
        model: A causal language model of Transformers.
        ids: Token ids of the document: numbers, or a tensor ``[L]`` or ``[1, L]``.
        mechanism: What to measure.
        chunk: Tokens per forward pass; a multiple of the mechanism's block.
        exact_below: Longest document the dense model reads.
        document: Goes into the rows.
        step: Progress, in tokens; four readings.

    Raises:
        ConfigError: The chunk is no multiple of the mechanism's block.
        InputError: The ids are no whole numbers of one document.
        UnsupportedError: The architecture computes attention in code of its own.
    """
    own = Rival(name_of(mechanism), mechanism)
    check_chunk("chunk", chunk, own.choose(None))
    ids = _numbers(ids)
    exact = len(ids) <= exact_below
    with on_trial(model), torch.inference_mode():
        walk = Walk(model, ids, chunk, step)
        states, keys = {}, {}
        guarded = Guarded(document)
        states[own.name], keys[own.name] = walk.keep(own, guarded.see)
        window = equal_cost_window(keys[own.name], len(ids))
        baselines = [Rival(WINDOW, SlidingWindow(window=window)), Rival(UNIFORM, Uniform())]
        for rival in baselines:
            states[rival.name], keys[rival.name] = walk.keep(rival)
        ends = EndJudge(model, ids)

        def compare(start: int, dense: Tensor | None) -> None:
            ends.add(start, dense, {name: kept[start // chunk] for name, kept in states.items()})

        if exact:
            layers = LayerJudge([own, *baselines])
            walk.read(Rival(FULL, Full()), layers, compare)
            keys[FULL] = (len(ids) + 1) / 2
        else:
            layers = LayerJudge([own, *baselines], own, max(1, chunk // _SAMPLED_SHARE))
            walk.read(own, layers, lambda start, _: compare(start, None))
    return Fidelity(
        judge="exact" if exact else "sampled",
        heads=layers.rows(document),
        ends=ends.rows(document, keys),
        window=window,
        guard=guarded.rows(),
    )


def _numbers(ids: Sequence[int] | Tensor) -> list[int]:
    """The ids of one document, whatever holds them."""
    if not isinstance(ids, Tensor):
        try:
            return [index(one) for one in ids]
        except TypeError:
            got = "something else"
    else:
        one = ids.squeeze(0) if ids.dim() == 2 and ids.shape[0] == 1 else ids
        whole = not one.is_floating_point() and not one.is_complex() and one.dtype != torch.bool
        if one.dim() == 1 and whole:
            found: list[int] = one.tolist()
            return found
        got = f"{str(ids.dtype).removeprefix('torch.')} of shape {list(ids.shape)}"
    raise InputError(
        problem(
            "ids",
            expected="whole numbers, as a list or a tensor [L] or [1, L]",
            got=got,
            fix="Give one document at a time, for example input_ids[0].",
        )
    )


def name_of(mechanism: Mechanism | Profile) -> str:
    """How rows call what is measured."""
    return "profile" if isinstance(mechanism, Profile) else mechanism.name
