"""A Transformers cache that grows in place and keeps page summaries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from longswift.core.errors import UnsupportedError, problem
from longswift.hf.memory_cache import MemoryLayer
from longswift.hf.settings import read_settings
from longswift.memory.paged_kv import PagedKV

_MARK = "_longswift_pages"


def pages_of(key: Tensor) -> PagedKV | None:
    """The pages behind the keys a ``SwiftLayer`` returned; None for any other tensor.

    Any operation on the keys in between makes a new tensor without the mark, so that summaries
    can never describe other keys than these.
    """
    pages = getattr(key, _MARK, None)
    if not isinstance(pages, PagedKV) or pages.keys is None:
        return None
    same = key.shape == pages.keys.shape and key.data_ptr() == pages.keys.data_ptr()
    return pages if same else None


class SwiftLayer(DynamicLayer):
    """One full-attention layer's cache; the work is done by ``PagedKV``."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        self.pages = PagedKV()
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """``[B, Hkv, length, D]``, a view into the buffer."""
        return self.pages.keys

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._only_none(value)

    @property
    def values(self) -> Tensor | None:
        """``[B, Hkv, length, Dv]``, a view into the buffer."""
        return self.pages.values

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._only_none(value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; buffers are made by the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; the keys returned lead the attention function to their summaries."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.pages.append(key_states, value_states)
        setattr(keys, _MARK, self.pages)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.pages.length

    def reset(self) -> None:
        """Forget everything."""
        self.pages.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length to keep."""
        count = int(tokens_to_remove)
        if count:
            self.pages.crop(count if count > 0 else self.pages.length + count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` continue row ``beam_idx[i]``."""
        self.pages.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.pages.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.pages.select(torch.as_tensor(indices))

    def _only_none(self, value: Tensor | None) -> None:
        if value is not None:
            raise UnsupportedError(
                problem(
                    "SwiftCache",
                    expected="keys and values through update()",
                    got="an assignment of tensors to a layer",
                    fix="Use DynamicCache where tensors are moved or replaced from outside.",
                )
            )


class SwiftCache(Cache):
    """A drop-in for ``DynamicCache`` whose full-attention layers grow in place.

    Layers converted to a memory keep its state; sliding and recurrent layers are Transformers' own,
    with their bounded memory. Pass one to
    ``model(..., past_key_values=cache)`` or ``model.generate(..., past_key_values=cache)``.

    Args:
        config: The model's configuration, from which the kind of each layer is read. Without it
            every layer is a full one.
    """

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        if config is None:
            super().__init__(layer_class_to_replicate=SwiftLayer)
            return
        layers = [
            SwiftLayer() if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=config).layers
        ]
        for index in read_settings(config.get_text_config(decoder=True)).get("memory", {}):
            layers[int(index)] = MemoryLayer()
        super().__init__(layers=layers)


def dynamic_cache(config: PreTrainedConfig) -> Cache:
    """Transformers' own cache, which copies all keys for every new token: what to compare with."""
    return DynamicCache(config=config)
