"""The mask function: which keys are real and what shape the mask has, never ``n x n``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dis import get_instructions
from itertools import pairwise
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as hf

from longswift.core.errors import InputError, UnsupportedError, problem


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The shape of a mask, padding aside.

    Attributes:
        causal: Nothing after the query is visible.
        window: Keys at most this far away are visible, the query's own distance being 0:
            ``p - j <= window`` if causal, ``|p - j| <= window`` if not. None: every key.
        sequences: For each row of the batch the lengths of the sequences packed into it, which see
            only themselves. None: a row is one sequence.
    """

    causal: bool
    window: int | None = None
    sequences: tuple[tuple[int, ...], ...] | None = None


class KeyMask(Tensor):
    """A bool ``[B, 1, 1, Lk]`` tensor, True for real tokens, that knows its ``Rule``.

    Four dimensions because Transformers hands prepared 4-D masks through untouched; one row
    because the rest of the mask is a rule. Operations that keep the content keep the rule, any
    other returns a plain tensor, which the attention function refuses, but for those of attention
    code that has never heard of rules: it would add the mask to scores, which is refused here.

    Attributes:
        rule: Shape of the mask.
        length: Keys in use; a static cache holds empty ones behind them.
        padded: Whether any key in use is padding.
    """

    rule: Rule
    length: int
    padded: bool
    _starts: tuple[int, ...] | None = None
    _holed: bool | None = None

    @classmethod
    def make(cls, data: Tensor, rule: Rule, length: int, padded: bool) -> KeyMask:
        """Attach a rule to ``data``, bool ``[B, 1, 1, Lk]``."""
        mask = data.as_subclass(cls)
        mask.rule, mask.length, mask.padded = rule, length, padded
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _TAKES_NUMBERS:
            raise UnsupportedError(
                problem(
                    "attention mask",
                    expected="layers that hand it to Transformers' AttentionInterface as it is",
                    got=f"attention code of the model's own ({func.__name__} of the mask)",
                    fix="Use attn_implementation='sdpa' for this model.",
                )
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func in _KEEPS_CONTENT and isinstance(source, KeyMask) and hasattr(source, "rule"):
            keeps = isinstance(result, Tensor) and result.dtype == torch.bool
            if keeps and result is not source:
                return cls.make(result, source.rule, source.length, source.padded)
        return result

    def key_mask(self) -> Tensor | None:
        """Real keys among those in use, bool ``[B, length]``; None when all are."""
        return self.as_subclass(Tensor)[:, 0, 0, : self.length] if self.padded else None

    def holed(self) -> bool:
        """Whether a row has padding between its real keys."""
        if self._holed is None:
            real = self.key_mask()
            # Real keys without holes begin once.
            self._holed = real is not None and bool(
                ((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0].int() > 1).any()
            )
        return self._holed

    def starts(self) -> tuple[int, ...]:
        """First real position of each row; ``length`` for a row of padding only."""
        if self._starts is None:
            real = self.key_mask()
            if real is None:
                self._starts = (0,) * self.shape[0]
            else:
                first = torch.where(real.any(1), real.int().argmax(1), self.length)
                self._starts = tuple(first.tolist())
        return self._starts


_KEEPS_CONTENT = (
    Tensor.to,
    Tensor.cpu,
    Tensor.cuda,
    Tensor.clone,
    Tensor.detach,
    Tensor.contiguous,
)
_TAKES_NUMBERS = {
    *(getattr(Tensor, name) for name in ("add", "add_", "sub", "mul", "masked_fill", "where")),
    *(getattr(Tensor, f"__{name}__") for name in ("add", "radd", "iadd", "sub", "rsub", "mul")),
    *(getattr(torch, name) for name in ("add", "sub", "mul", "cat", "concat", "where")),
    torch.masked_fill,
    torch.nn.functional.scaled_dot_product_attention,
}


def swift_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = hf.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> KeyMask:
    """Describe a mask for the attention function; registered with ``AttentionMaskInterface``.

    Args:
        batch_size: Rows of the batch.
        q_length: Queries of this call.
        kv_length: Keys the layer will present, empty slots of a static cache included.
        q_offset: Position of the first query.
        kv_offset: Position of the first key (a sliding cache has dropped those before).
        mask_function: Transformers' description of the mask.
        attention_mask: ``[B, positions]``, nonzero for real tokens.
        device: Where the mask is wanted.

    Raises:
        UnsupportedError: A mask that is neither causal, sliding nor bidirectional.
    """
    rule = read_rule(mask_function, int(kv_offset) + kv_length)
    length = kv_length
    if rule.causal:
        length = int(q_offset) + q_length - int(kv_offset)
        if not q_length <= length <= kv_length:
            raise UnsupportedError(
                problem(
                    "cache",
                    expected="keys that end with the last query",
                    got=f"{q_length} queries from position {int(q_offset)}, {kv_length} keys "
                    f"from position {kv_offset}",
                    fix="Use DynamicCache, StaticCache or longswift.hf.SwiftCache.",
                )
            )
    if attention_mask is None:
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return KeyMask.make(everything.expand(batch_size, 1, 1, kv_length), rule, length, False)
    if attention_mask.dim() != 2:
        raise InputError(
            problem(
                "attention_mask",
                expected="[batch, length]",
                got=tuple(attention_mask.shape),
                fix="Pass the two-dimensional mask of real tokens.",
            )
        )
    real = attention_mask.to(device=device, dtype=torch.bool)
    missing = kv_offset + kv_length - real.shape[1]
    if missing > 0:
        real = torch.nn.functional.pad(real, (0, missing))
    real = real[:, kv_offset : kv_offset + kv_length].expand(batch_size, -1)
    padded = not bool(real[:, :length].all())
    return KeyMask.make(real[:, None, None, :], rule, length, padded)


def read_rule(mask_function: Callable[..., Any], end: int) -> Rule:
    """Recognise one of Transformers' own mask functions by its code.

    Args:
        mask_function: What ``create_*_mask`` composed.
        end: One past the last key position.

    Raises:
        UnsupportedError: Anything but a causal, sliding or bidirectional mask of whole rows or of
            sequences packed into them.
    """
    causal = False
    past: list[int] = []
    both: list[int] = []
    sequences = None
    for part in _conjuncts(mask_function):
        code = getattr(part, "__code__", None)
        if code is _CAUSAL:
            causal = True
        elif code is _SLIDING:
            past.append(_cell(part, "sliding_window") - 1)
        elif code is _SLIDING_BOTH:
            both.append(_cell(part, "sliding_window"))
        elif code is _PACKED and sequences is None:
            sequences = _sequences(_cell(part, "packed_sequence_mask"))
        elif code is not None and code is _REMAPPED:
            # Positions count from each sequence's first token, which changes no distance.
            positions = _cell(part, "position_ids")
            inner = read_rule(_cell(part, "mask_function"), int(positions.max()) + 1)
            causal = causal or inner.causal
            if inner.window is not None:
                (past if inner.causal else both).append(inner.window)
        elif code is _OR and (widened := _widened(part, end)) is not None:
            if widened.window is not None:
                both.append(widened.window)
        elif code is _CHUNKED and end <= _cell(part, "chunk_size"):
            continue
        elif code is not _BIDIRECTIONAL:
            raise UnsupportedError(_refusal(part, code))
    if past and not causal:
        raise UnsupportedError(_refusal(mask_function, _SLIDING))
    reach = min(past + both) if past or both else None
    return Rule(causal=causal, window=reach, sequences=sequences)


def _sequences(numbers: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """Lengths of packed sequences from their number at each position, ``[B, n]``."""
    begins = torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    # While a model is traced, Transformers cannot look whether anything is packed.
    if int(begins.sum()) == numbers.shape[0]:
        return None
    found = []
    for row in begins:
        starts = [*row.nonzero().squeeze(1).tolist(), numbers.shape[1]]
        found.append(tuple(end - start for start, end in pairwise(starts)))
    return tuple(found)


def _conjuncts(mask_function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The mask functions whose intersection this is; unions with nothing are dropped."""
    code = getattr(mask_function, "__code__", None)
    if code is _AND:
        return [p for part in _cell(mask_function, "mask_functions") for p in _conjuncts(part)]
    if code is _OR:
        parts = _cell(mask_function, "mask_functions")
        kept = [part for part in parts if not _is_empty(part)]
        if len(kept) == 1:
            return _conjuncts(kept[0])
    return [mask_function]


def _widened(union: Callable[..., Any], end: int) -> Rule | None:
    """The bidirectional rule into which some models widen a causal one (Gemma 3's encoders).

    None for any other union.
    """
    parts = _cell(union, "mask_functions")
    if len(parts) != 2:
        return None
    narrow, wide = read_rule(parts[0], end), parts[1]
    code = getattr(wide, "__code__", None)
    if not narrow.causal or code is None:
        return None
    takes = any(step.opname.startswith("LOAD_FAST") for step in get_instructions(code))
    if not takes and not code.co_freevars:
        # It looks at nothing, so that one call tells all.
        return Rule(causal=False) if bool(wide(0, 0, 0, 0)) else None
    reach = narrow.window
    named = getattr(wide, "__qualname__", "").startswith("_bidirectional_window_overlay.")
    if named and code.co_freevars == ("sliding_window",) and reach is not None:
        places = ((0, reach), (reach, 0), (0, reach + 1), (reach + 1, 0))
        if [bool(wide(0, 0, q, k)) for q, k in places] == [True, True, False, False]:
            return Rule(causal=False, window=reach)
    return None


def _is_empty(mask_function: Callable[..., Any]) -> bool:
    """A block overlay without a block (a multimodal model reading text) shows nothing."""
    code = getattr(mask_function, "__code__", None)
    if code is None or code is not _BLOCKWISE:
        return False
    return not bool((_cell(mask_function, "block_sequence_ids") >= 0).any())


def _cell(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _refusal(function: Callable[..., Any], code: CodeType | None) -> str:
    got = getattr(function, "__qualname__", repr(function)).removesuffix(".<locals>.inner_mask")
    fix = "Use attn_implementation='sdpa' for this input."
    if code is _CHUNKED:
        got = f"chunked attention over more than one chunk of {_cell(function, 'chunk_size')}"
        fix = "Stay within one chunk or use attn_implementation='sdpa'."
    elif code is _BLOCKWISE or code is _OR:
        got = "a mask that also shows blocks of later tokens (images, a prefix)"
    return problem("mask", expected="causal, sliding or bidirectional", got=got, fix=fix)


_NOTHING = torch.zeros(0, dtype=torch.long)
_CAUSAL = hf.causal_mask_function.__code__
_BIDIRECTIONAL = hf.bidirectional_mask_function.__code__
_AND = hf.and_masks(hf.causal_mask_function).__code__
_OR = hf.or_masks(hf.causal_mask_function).__code__
_SLIDING = hf.sliding_window_overlay(1).__code__
_SLIDING_BOTH = hf.sliding_window_bidirectional_overlay(1).__code__
_CHUNKED = hf.chunked_overlay(1, _NOTHING).__code__
_PACKED = hf.packed_sequence_mask_function(_NOTHING).__code__
# Older versions have neither.
_REMAPPED = (
    hf.remap_positions_for_packed_sequence(hf.causal_mask_function, _NOTHING).__code__
    if hasattr(hf, "remap_positions_for_packed_sequence")
    else None
)
_BLOCKWISE = hf.blockwise_overlay(_NOTHING).__code__ if hasattr(hf, "blockwise_overlay") else None
