"""Longformer in an encoder: global tokens with query, key and value projections of their own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from longswift.core.errors import UnsupportedError, problem
from longswift.hf.attention import refuse_unsupported
from longswift.hf.masks import KeyMask
from longswift.mechanisms.longformer import Longformer, attend_with_global_projections

ENCODERS = {
    "BertSelfAttention": "BERT",
    "RobertaSelfAttention": "RoBERTa",
    "XLMRobertaSelfAttention": "XLM-RoBERTa",
    "CamembertSelfAttention": "CamemBERT",
    "ElectraSelfAttention": "ELECTRA",
}
_NAMES = ("query", "key", "value")


class GlobalAttention(nn.Module):
    """Takes the place of an encoder's self-attention; its projections keep their names.

    Attributes:
        query_global: Projection of the queries of global tokens; a copy of ``query`` at first, as
            in the published conversions. ``key_global`` and ``value_global`` likewise.
        layer_idx: Index of the layer.
    """

    new_parameters = tuple(f"{name}_global" for name in _NAMES)

    def __init__(self, layer: nn.Module, mechanism: Longformer, index: int) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        for name, new in zip(_NAMES, self.new_parameters, strict=True):
            self.add_module(new, copy.deepcopy(layer.get_submodule(name)))
        self.config, self.mechanism = layer.config, mechanism
        self.layer_idx, self.is_causal = index, False
        source: Any = layer
        self.width, self.scaling = int(source.attention_head_size), float(source.scaling)
        self.train(layer.training)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Returns the output and no attention weights."""
        dropout: Any = self.dropout
        refuse_unsupported(self, dropout.p if self.training else 0.0, kwargs)
        mask = attention_mask
        if (
            not isinstance(mask, KeyMask)
            or not hasattr(mask, "rule")
            or mask.rule.causal
            or mask.rule.sequences is not None
            or mask.shape[3] != hidden_states.shape[1]
        ):
            raise UnsupportedError(
                problem(
                    type(self).__name__,
                    expected="the bidirectional mask of an encoder, made by this library",
                    got=type(mask).__name__ if not isinstance(mask, KeyMask) else "another one",
                    fix="Pass a two-dimensional attention_mask, no cache, and keep the model's "
                    "attention implementation one of longswift_<name>.",
                )
            )
        real = mask.key_mask()
        result = attend_with_global_projections(
            self.mechanism,
            self._project(_NAMES, hidden_states),
            self._project(self.new_parameters, hidden_states),
            key_mask=None if real is None else real.expand(hidden_states.shape[0], -1),
            scale=self.scaling,
        )
        return result.out.transpose(1, 2).flatten(2), None

    def _project(self, names: tuple[str, ...], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            self.get_submodule(name)(hidden).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for name in names
        )
        return q, k, v


def encoder_layers(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Name and module of every self-attention of a known encoder, by layer.

    Raises:
        UnsupportedError: There is none, or it decodes.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("transformers.models.") and kind.__name__ in ENCODERS:
            layer: Any = module
            found[len(found) if layer.layer_idx is None else int(layer.layer_idx)] = name, module
            if layer.is_decoder or layer.is_causal:
                found = {}
                break
    if not found:
        raise UnsupportedError(
            problem(
                type(model).__name__,
                expected=f"an encoder of {', '.join(ENCODERS.values())}",
                got="none, or one that decodes",
                fix="Elsewhere use longswift.hf.set_attention(model, Longformer(...)).",
            )
        )
    return found
