"""``LongSwiftLM``: a small decoder to train from scratch, any attention in any layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Mechanism
from longswift.hf.convert import install
from longswift.hf.position import PLACE, LayerBias, layer_bias, read_position
from longswift.hf.settings import KEY, read_settings, set_attention
from longswift.mechanisms import from_dict, list_mechanisms
from longswift.mechanisms.full import Full
from longswift.memory import list_memories, memory_from_dict
from longswift.memory.base import MemoryAttention, MemoryConfig

Attention = Mechanism | MemoryConfig | str | dict[str, Any]

_SMALL = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1 << 20,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class LongSwiftConfig(SmolLM3Config):
    """Configuration of ``LongSwiftLM``: SmolLM3's, and which attention each layer runs.

    Args:
        attention: A mechanism or memory for all layers, or a sequence with one per layer: the
            object, its name, or its dictionary. Full attention by default.
        position: Where positions come from. ``"rope"`` (default): rotation; ``rope_parameters`` say
            how, ``no_rope_layers`` (1 marks a rotated layer) in which layers.
            ``"none"``: causality alone. ``"alibi"``: linear biases with the published slopes.
            ``"t5"``: learned biases by bucket, a table per layer of
            ``relative_attention_num_buckets`` (32) rows up to ``relative_attention_max_distance``
            (128). Biases need mechanisms of the softmax family in every layer.
        rope: ``True`` and ``False`` say ``position="rope"`` and ``"none"``.
        **kwargs: Everything else SmolLM3 knows, with the sizes of a small model as defaults:
            ``hidden_size``, ``num_hidden_layers``, ``num_key_value_heads``,
            ``tie_word_embeddings``...

    Raises:
        ConfigError: As many attentions as layers were expected, one is unknown or has no scores to
            add a bias to, or the positions contradict one another.
    """

    model_type = "longswift"

    def __init__(
        self,
        *,
        attention: Attention | Sequence[Attention] | None = None,
        position: str | None = None,
        rope: bool | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = {**_SMALL, **kwargs}
        layers = int(sizes["num_hidden_layers"])
        position, sizes["no_rope_layers"] = read_position(
            position, rope, sizes.get("no_rope_layers"), layers
        )
        super().__init__(**sizes)
        self.position = position
        if attention is not None or getattr(self, KEY, None) is None:
            setattr(self, KEY, _settings(attention, layers))
        if position in ("alibi", "t5"):
            _check_biased(getattr(self, KEY), position)


class LongSwiftLM(SmolLM3ForCausalLM):
    """A causal language model whose layers attend as ``LongSwiftConfig`` says.

    Embedding, norms, projections and feed-forward layers are SmolLM3's (Llama's, with grouped heads
    and optional rotation), so that ``generate``, ``Trainer``, PEFT, activation checkpointing and
    ``save_pretrained`` work as for any model. Attention comes from the configuration alone; an
    ``attn_implementation`` given while loading does not change it.
    """

    config: LongSwiftConfig
    config_class = LongSwiftConfig

    def __init__(self, config: LongSwiftConfig) -> None:
        super().__init__(config)
        settings = read_settings(config)
        layers = {int(i): from_dict(c) for i, c in settings.get("layers", {}).items()}
        memories = {int(i): memory_from_dict(c) for i, c in settings.get("memory", {}).items()}
        set_attention(self, from_dict(settings["attention"]), layers)
        for layer in self.model.layers:
            bias = layer_bias(config)
            if bias is not None:
                layer.self_attn.add_module(PLACE, bias)
        if memories:
            install(self, memories)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Transformers looks for its interface in the text of this file.
        return True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemoryAttention | LayerBias):
            module.reset_parameters()


def _settings(
    attention: Attention | Sequence[Attention] | None, layers: int
) -> dict[str, dict[str, Any]]:
    """The stored form: a mechanism for most layers, others by layer, memories by layer."""
    if isinstance(attention, Sequence) and not isinstance(attention, str):
        chosen = [_resolved(each) for each in attention]
    else:
        chosen = [Full() if attention is None else _resolved(attention)] * layers
    if len(chosen) != layers:
        raise ConfigError(
            problem(
                "attention",
                expected=f"one for all layers, or {layers} of them",
                got=len(chosen),
                fix="Give num_hidden_layers as many entries.",
            )
        )
    mechanisms = {i: x for i, x in enumerate(chosen) if isinstance(x, Mechanism)}
    most: Mechanism = max(mechanisms.values(), key=list(mechanisms.values()).count, default=Full())
    return {
        "attention": most.to_dict(),
        "layers": {str(i): x.to_dict() for i, x in mechanisms.items() if x != most},
        "memory": {
            str(i): x.to_dict() for i, x in enumerate(chosen) if isinstance(x, MemoryConfig)
        },
    }


def _check_biased(settings: dict[str, Any], position: str) -> None:
    """Raise ``ConfigError`` if a layer has no scores to add a bias to."""
    mechanisms = [settings["attention"], *settings.get("layers", {}).values()]
    deaf = {m["name"] for m in mechanisms if not from_dict(m).supports_bias}
    deaf |= {m["name"] for m in settings.get("memory", {}).values()}
    if deaf:
        raise ConfigError(
            problem(
                "position",
                expected=f"mechanisms of the softmax family with {position!r}",
                got=", ".join(sorted(deaf)),
                fix="Use position='rope' or 'none' with these.",
            )
        )


def _resolved(attention: Attention) -> Mechanism | MemoryConfig:
    if isinstance(attention, Mechanism | MemoryConfig):
        return attention
    config = attention if isinstance(attention, dict) else {"name": attention}
    name = str(config.get("name")).replace("-", "_")
    if name in list_memories():
        return memory_from_dict(config)
    if name in list_mechanisms():
        return from_dict(config)
    raise ConfigError(
        problem(
            "attention",
            expected=f"one of {', '.join([*list_mechanisms(), *list_memories()])}",
            got=repr(attention),
            fix="Give a name, a dictionary with a 'name', or the object.",
        )
    )
