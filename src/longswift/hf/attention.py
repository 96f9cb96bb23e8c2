"""The attention function: from a Transformers layer to a mechanism and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longswift.core.errors import UnsupportedError, problem
from longswift.core.mechanism import Mechanism
from longswift.core.observe import layer_scope
from longswift.core.summary import KeySummary
from longswift.hf.cache import pages_of
from longswift.hf.masks import KeyMask, Rule
from longswift.hf.position import bias_of
from longswift.hf.settings import resolve
from longswift.mechanisms.full import Full
from longswift.mechanisms.sliding_window import SlidingWindow

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    # Not public; without it only layers that are told about it refuse attention weights.
    _active_collector = None

AttentionFunction = Callable[..., tuple[Tensor, None]]

# More queries than this compute their own summaries faster than a cache could keep them.
_DECODE_QUERIES = 64

_PACKED = "packed sequences"
# Where a tensor of bounds keeps its numbers.
_READ = "_longswift_numbers"
_REFUSED = {
    "attention_bias": "a bias on the scores",
    "block_indices": "a selection of blocks made by the model",
    "block_table": "continuous batching",
    "cache": "continuous batching",
    "cu_seq_lens_k": _PACKED,
    "cu_seq_lens_q": _PACKED,
    "head_mask": "a mask of heads",
    "indices": "a selection of keys made by the model",
    "position_bias": "a position bias on the scores",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "softcap": "soft-capped scores",
}


class _Seen(NamedTuple):
    """Which keys a layer may see at all, before a mechanism chooses among them."""

    rule: Rule
    real: Tensor | None
    length: int
    starts: tuple[int, ...] | None


def make_attention(name: str) -> AttentionFunction:
    """The function registered with ``AttentionInterface`` for mechanism ``name``."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        bounds = [kwargs.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
        refuse_unsupported(module, dropout, kwargs)
        seen = _what_is_seen(module, query, key, attention_mask, kwargs)
        sequences = _sequences(module, query, key, seen, *bounds)
        mechanism = _mechanism(module, name, seen, query.shape[2])
        summary = None
        if sequences is None:
            summary = _summary(mechanism, key, query.shape[2], seen)
        real = seen.real
        if seen.length < key.shape[2]:
            key, value = key[:, :, : seen.length], value[:, :, : seen.length]
        if real is not None and _is_cross_attention(module, seen.rule):
            # One hidden key more: equal lengths would mean that queries are padded like keys.
            key, value = pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1))
            real = pad(real, (0, 1))

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return mechanism(
                query,
                key,
                value,
                causal=seen.rule.causal,
                key_mask=real,
                scale=scaling,
                # A recomputed layer must make the choice it made before, gradients on or off.
                training=True if module.training else None,
                summary=summary,
                bias=bias_of(module),
            ).out

        with layer_scope(getattr(module, "layer_idx", None)):
            if sequences is None:
                out = attend(query, key, value)
            else:
                out = _each(attend, query, key, value, sequences)
        return out.transpose(1, 2).contiguous(), None

    attention.__name__ = f"longswift_{name}"
    return attention


def _mechanism(module: nn.Module, name: str, seen: _Seen, queries: int) -> Mechanism:
    """The configured mechanism, except where the model's own architecture decides."""
    rule = seen.rule
    if rule.window is not None:
        return SlidingWindow(window=rule.window + 1 if rule.causal else max(1, 2 * rule.window))
    if _is_cross_attention(module, rule) or not rule.causal and queries != seen.length:
        return Full()
    return resolve(module, name)


def _is_cross_attention(module: nn.Module, rule: Rule) -> bool:
    """Whether queries and keys belong to different sequences, as far as a module tells."""
    if rule.causal:
        return False
    if "cross" in type(module).__name__.lower() or getattr(module, "is_cross_attention", False):
        return True
    return bool(getattr(module, "is_decoder", False)) and not getattr(module, "is_causal", True)


def _what_is_seen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> _Seen:
    length = key.shape[2]
    if isinstance(mask, KeyMask) and hasattr(mask, "rule"):
        if mask.shape[3] != length or mask.shape[0] not in (1, query.shape[0]):
            raise UnsupportedError(
                problem(
                    type(module).__name__,
                    expected=f"a mask of {query.shape[0]} rows and {length} keys",
                    got=f"one made for {mask.shape[0]} rows and {mask.shape[3]} keys",
                    fix="This model shares masks between unlike layers; use 'sdpa'.",
                )
            )
        real, rule = mask.key_mask(), _with_window(module, mask.rule, kwargs)
        if rule.window is not None and mask.holed():
            raise UnsupportedError(
                problem(
                    "attention_mask",
                    expected="padding before or after a row's tokens where layers have a window",
                    got="padding between them, which the model's own window counts",
                    fix="Pad on the left, or use attn_implementation='sdpa'.",
                )
            )
        if real is not None:
            real = real.expand(query.shape[0], -1)
        starts = mask.starts() if query.shape[2] <= _DECODE_QUERIES else None
        if starts is not None and len(starts) != query.shape[0]:
            starts = starts * query.shape[0]
        return _Seen(rule, real, mask.length, starts)
    asked = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if asked is None else asked)
    real = None if mask is None else _plain_mask(module, query, key, mask, causal)
    rule = _with_window(module, Rule(causal=causal), kwargs)
    starts = (0,) * query.shape[0] if real is None else None
    return _Seen(rule, real, length, starts)


def _sequences(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    seen: _Seen,
    q_bounds: Tensor | None,
    k_bounds: Tensor | None,
) -> tuple[tuple[int, ...], ...] | None:
    """Lengths of the sequences packed into each row, from the mask or from FlashAttention's bounds.

    Args:
        module: The layer.
        query: ``[B, H, n, D]``.
        key: ``[B, Hkv, n, D]``.
        seen: What the mask says.
        q_bounds: Where each sequence starts and the last one ends, ``[count + 1]``, or None.
        k_bounds: The same for keys.
    """
    if q_bounds is None and k_bounds is None:
        return seen.rule.sequences
    if q_bounds is not None and k_bounds is not None and _numbers(q_bounds) == _numbers(k_bounds):
        bounds = _numbers(q_bounds)
        lengths = tuple(b - a for a, b in pairwise(bounds) if b != a)
        whole = bounds[:1] == (0,) and bounds[-1] == query.shape[2] == key.shape[2]
        if (
            whole
            and min(lengths) > 0
            and query.shape[0] == 1
            and seen.real is None
            and seen.rule.sequences in (None, (lengths,))
        ):
            return (lengths,)
    raise UnsupportedError(
        problem(
            type(module).__name__,
            expected="cu_seq_lens_q and cu_seq_lens_k that say the same, over all of one row, as "
            "position_ids do",
            got="others, padding, several rows or keys in a cache",
            fix="Pass one row without padding and cache, as DataCollatorWithFlattening makes it.",
        )
    )


def _numbers(bounds: Tensor) -> tuple[int, ...]:
    """What a tensor holds; read once for all layers, as a GPU is waited for."""
    if bounds.is_inference():
        # Nobody counts what is written to it.
        return tuple(bounds.tolist())
    version, kept = getattr(bounds, _READ, (None, ()))
    if version != bounds._version:
        kept = tuple(bounds.tolist())
        setattr(bounds, _READ, (bounds._version, kept))
    return kept


def _each(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: tuple[tuple[int, ...], ...],
) -> Tensor:
    """The output of packed rows, ``[B, H, n, Dv]``: each sequence attends as if it were alone."""
    if len(set(sequences)) == 1:
        # Rows that are packed alike go together.
        sequences = sequences[:1]
    done = []
    by_row = (x.chunk(len(sequences)) for x in (query, key, value))
    for lengths, *tensors in zip(sequences, *by_row, strict=True):
        parts = zip(*(x.split(lengths, dim=2) for x in tensors), strict=True)
        done.append(torch.cat([attend(*part) for part in parts], dim=2))
    return torch.cat(done)


def _with_window(module: nn.Module, rule: Rule, kwargs: dict[str, Any]) -> Rule:
    """The rule narrowed by the window the layer itself states."""
    window = kwargs.get("sliding_window")
    if window is None:
        return rule
    # Both kinds of layer state their reach plus one: the query's own position counts.
    stated = int(window) - 1
    if rule.window is None:
        return replace(rule, window=stated)
    if rule.window != stated:
        raise UnsupportedError(
            problem(
                type(module).__name__,
                expected="one sliding window per layer",
                got=f"{stated + 1} from the layer and {rule.window + 1} from the mask",
                fix="Use attn_implementation='sdpa' for this model.",
            )
        )
    return rule


def _plain_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor, causal: bool
) -> Tensor:
    """Real keys from a mask that this library did not make, if it says nothing else."""
    batch, length = query.shape[0], key.shape[2]
    if mask.dim() == 2 and tuple(mask.shape) == (batch, length) and not mask.is_floating_point():
        return mask.bool()
    one_row = mask.dim() == 4 and mask.shape[1:3] == (1, 1) and mask.shape[3] == length
    if one_row and mask.shape[0] in (1, batch) and (not causal or query.shape[2] == 1):
        row = mask[:, 0, 0, :].expand(batch, -1)
        if row.dtype == torch.bool:
            return row
        hidden = row <= torch.finfo(row.dtype).min / 2
        if row.is_floating_point() and bool(((row == 0) | hidden).all()):
            return ~hidden
    raise UnsupportedError(
        problem(
            type(module).__name__,
            expected="an attention_mask [batch, length] of real tokens",
            got=f"a mask of shape {tuple(mask.shape)} and type {mask.dtype}",
            fix="Pass the two-dimensional mask to the model, or use attn_implementation='sdpa'.",
        )
    )


def _summary(mechanism: Mechanism, key: Tensor, queries: int, seen: _Seen) -> KeySummary | None:
    """Page summaries from the cache that made ``key``; None where they would not be used."""
    if queries > _DECODE_QUERIES or seen.starts is None or not seen.rule.causal:
        return None
    if seen.length != key.shape[2] or not mechanism.reads_summary(queries, key):
        return None
    pages = pages_of(key)
    return None if pages is None else pages.summary(seen.starts)


def _weights_are_collected() -> bool:
    """Whether the model was asked for attention weights; many layers are not told."""
    collected = None if _active_collector is None else _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def refuse_unsupported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise for anything that changes the result and that no mechanism computes."""
    got = next((what for k, what in _REFUSED.items() if kwargs.get(k) is not None), None)
    fix = "Use attn_implementation='eager' (or 'sdpa', if the model allows it)."
    if dropout:
        got = f"dropout {dropout}"
        fix = (
            "Load the model with from_pretrained(..., attention_dropout=0.0) (attn_pdrop, "
            "attention_probs_dropout_prob); layers keep the number they were built with."
        )
    elif kwargs.get("output_attentions") or _weights_are_collected():
        got = "output_attentions=True"
        fix = "There are no attention weights to return; use attn_implementation='eager'."
    if got is not None:
        raise UnsupportedError(
            problem(type(module).__name__, expected="plain scaled attention", got=got, fix=fix)
        )
