"""The cache layer of a memory: a state of bounded size instead of keys and values."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from longswift.core.errors import InputError, UnsupportedError, problem
from longswift.memory.state import State

# From the state before, and how many of the call's tokens count, to output and state after.
Run = Callable[[State | None, int], tuple[Tensor, State]]
# Calls that crop can take back: an assistant decodes this many tokens at most in one go.
_RECORDED = 64


class _Call(NamedTuple):
    before: State | None
    run: Run
    new: int


class MemoryLayer(DynamicLayer):
    """One layer's state; ``length`` counts positions, padding included, as masks do.

    What was compressed cannot be taken out again, so ``crop`` repeats the last calls with fewer
    tokens. It can do so only while ``activate_past_recording`` (assisted decoding) keeps them.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.length = 0
        self.record_past = False
        self._before: State | None = None
        self._calls: deque[_Call] = deque(maxlen=_RECORDED)

    def activate_past_recording(self) -> None:
        """From now on ``crop`` can take back what is read."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` can take back what is read from now on."""
        return self.record_past

    def run(self, call: Run, new: int, total: int | None, replays: bool) -> Tensor:
        """Advance the state by a call, or repeat the last call without advancing it again.

        Args:
            call: From the state before to output and state after.
            new: Tokens of the call.
            total: Positions after the call as far as the mask knows, else None.
            replays: The call may be repeated, to recompute activations.

        Raises:
            InputError: The call continues another text than the state.
        """
        if total is not None and total == self.length and self.length:
            if not replays:
                raise self._discontinuity(total - new)
            return call(self._before, new)[0]
        if total is not None and total != self.length + new:
            raise self._discontinuity(total - new)
        before = self.state
        out, self.state = call(before, new)
        self._before = before if replays else None
        if self.record_past:
            self._calls.append(_Call(before, call, new))
        self.length += new
        return out

    def detach(self) -> None:
        """Stop gradients here: the next call does not reach back into this one."""
        self.state = None if self.state is None else self.state.detach()

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 0 if self.state is None else self.state.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """There are no keys and values to return."""
        raise UnsupportedError(
            problem(
                "MemoryLayer",
                expected="a layer that longswift.hf.convert replaced",
                got="another attention layer",
                fix="Use a fresh cache for another model.",
            )
        )

    def get_seq_length(self) -> int:
        """Positions read."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over everything that was read."""
        return self.length + int(query_length), 0

    def reset(self) -> None:
        """Forget everything."""
        self.state = None
        self.length = 0
        self._forget_calls()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length to keep.

        Raises:
            UnsupportedError: They were read before recording, or before the last ``crop``.
        """
        count = int(tokens_to_remove)
        remove = max(0, self.length - count) if count > 0 else -count
        recorded = sum(call.new for call in self._calls)
        if remove > recorded:
            raise UnsupportedError(
                problem(
                    "cache",
                    expected=f"at most the last {recorded} tokens to be taken back",
                    got=f"crop({count}) of a memory",
                    fix="For assisted decoding pass past_key_values=SwiftCache(model.config): it "
                    "records from the start.",
                )
            )
        while remove:
            call = self._calls.pop()
            kept = max(0, call.new - remove)
            self.state = call.before
            if kept:
                with torch.no_grad():
                    self.state = call.run(call.before, kept)[1]
            self.length -= call.new - kept
            remove -= call.new - kept
        self._forget_calls()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` continue row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.state = None if self.state is None else self.state.repeat_interleave(repeats)
        self._forget_calls()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.state = None if self.state is None else self.state.select(torch.as_tensor(indices))
        self._forget_calls()

    def offload(self) -> None:
        """The state is small and stays where it is."""

    def prefetch(self) -> None:
        """The state is where it always was."""

    def _forget_calls(self) -> None:
        self._before = None
        self._calls.clear()

    def _discontinuity(self, start: int) -> InputError:
        return InputError(
            problem(
                "cache",
                expected=f"tokens from position {self.length} on",
                got=f"tokens from position {start} on",
                fix="Pass the cache of this text, and its tokens once and in order.",
            )
        )


def memory_layer(cache: Cache, index: int) -> MemoryLayer:
    """The layer ``index`` of any growing cache, made a memory's on first use.

    Raises:
        UnsupportedError: A cache of fixed length, or one filled by another attention.
    """
    layers = cache.layers
    while len(layers) <= index and cache.layer_class_to_replicate is not None:
        layers.append(cache.layer_class_to_replicate())
    layer = layers[index] if index < len(layers) else None
    if isinstance(layer, MemoryLayer):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.get_seq_length():
        raise UnsupportedError(
            problem(
                "cache",
                expected="an empty DynamicCache or SwiftCache",
                got=f"{type(layer).__name__} in {type(cache).__name__}",
                fix="Pass a new DynamicCache(), or none.",
            )
        )
    layers[index] = new = MemoryLayer()
    return new
