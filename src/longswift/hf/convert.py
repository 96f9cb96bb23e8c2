"""``convert``: memories in the attention layers of a loaded model, in one reversible call."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from longswift.core.errors import ConfigError, InputError, UnsupportedError, problem
from longswift.core.mechanism import Mechanism
from longswift.hf.converted import ConvertedAttention
from longswift.hf.families import Family, attention_layers
from longswift.hf.global_attention import GlobalAttention, encoder_layers
from longswift.hf.position import bias_of
from longswift.hf.settings import (
    GLOBALS,
    KEY,
    MEMORY,
    attention_of,
    read_settings,
    set_attention,
    text_config,
    write_settings,
)
from longswift.mechanisms import from_dict
from longswift.mechanisms.full import Full
from longswift.mechanisms.longformer import Longformer
from longswift.memory import get_memory, memory_from_dict
from longswift.memory.base import MemoryAttention, MemoryConfig

_CONVERTED = (ConvertedAttention, GlobalAttention)


class Conversion:
    """What ``convert`` changed; ``revert()`` (or leaving a ``with`` block) puts everything back.

    Attributes:
        model: The converted model.
        layers: Indices of the converted layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers: list[int] = []
        config = text_config(model)
        self._settings = copy.deepcopy(getattr(config, KEY, None))
        self._implementation = config._attn_implementation
        self._replaced: list[tuple[str, nn.Module]] = []
        self._hooks: list[RemovableHandle] = []
        self._active = True

    def replace(self, name: str, layer: nn.Module, new: nn.Module) -> None:
        """Put ``new`` in the place of an attention layer."""
        self.model.set_submodule(name, new)
        self._replaced.append((name, layer))

    def watch(self, decoder: nn.Module) -> None:
        """Refuse calls of ``decoder`` that would lose a state without a word."""
        self._hooks.append(decoder.register_forward_pre_hook(_keeps_state, with_kwargs=True))

    def revert(self) -> None:
        """Restore the very modules, attention and settings. Further calls do nothing.

        Projections that were replaced meanwhile (by adapters, say) stay replaced. Several
        conversions of a model are reverted in the opposite order.
        """
        if not self._active:
            return
        self._active = False
        for name, layer in self._replaced:
            now = self.model.get_submodule(name)
            for child, _ in list(layer.named_children()):
                layer.set_submodule(child, now.get_submodule(child))
            layer.train(now.training)
            self.model.set_submodule(name, layer)
        for hook in self._hooks:
            hook.remove()
        config = text_config(self.model)
        if self._settings is None:
            config.__dict__.pop(KEY, None)
        else:
            setattr(config, KEY, self._settings)
        self.model.set_attn_implementation(self._implementation)

    def __enter__(self) -> Conversion:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.revert()


def convert(
    model: PreTrainedModel,
    memory: MemoryConfig | Longformer | str,
    layers: Iterable[int] | None = None,
) -> Conversion:
    """Give attention layers of ``model`` what needs parameters, keeping projections and norms.

    A memory goes into a decoder. ``Longformer`` goes into an encoder, whose global tokens then
    have query, key and value projections of their own, copies of the ordinary ones at first.

    The new parameters are fp32 whatever the model's type and start neutral (see the memory's
    page); projections keep their names, so that adapters find them. Layers not converted run exact
    attention, or the mechanism the model was set to. The settings live in the configuration;
    ``longswift.hf.from_pretrained`` loads what ``save_pretrained`` wrote.

    Args:
        model: A loaded decoder of Llama, Mistral, Qwen3, SmolLM3 or GPT-NeoX; for ``Longformer`` an
            encoder of BERT, RoBERTa, XLM-RoBERTa, CamemBERT or ELECTRA.
        memory: A configuration, or a name for its defaults.
        layers: Indices of the layers to convert, all by default. Call again for another memory in
            other layers.

    Returns:
        A handle whose ``revert()`` undoes everything; also a context manager.

    Raises:
        UnsupportedError: Another architecture, or a sliding window narrower than the memory's
            exact part.
        ConfigError: Layers that do not exist, or a mechanism without parameters.
    """
    if memory == Longformer.name:
        memory = Longformer()
    given: Any = get_memory(memory) if isinstance(memory, str) else memory
    if not isinstance(given, MemoryConfig | Longformer):
        kind = "a mechanism" if isinstance(given, Mechanism) else type(given).__name__
        raise ConfigError(
            problem(
                "memory",
                expected="a memory's configuration or name",
                got=kind,
                fix="Mechanisms need no new modules: use longswift.hf.set_attention.",
            )
        )
    if layers is not None and (not isinstance(layers, Iterable) or not (layers := list(layers))):
        raise ConfigError(
            problem(
                "layers",
                expected="indices of one layer or more, such as [0, 2]",
                got=repr(layers),
                fix="Leave it out to convert all layers.",
            )
        )
    wanted = None if layers is None else dict.fromkeys(layers, given)
    return install(model, wanted, given)


def install(
    model: PreTrainedModel,
    by_layer: Mapping[int, Any] | None,
    every: MemoryConfig | Longformer | None = None,
) -> Conversion:
    """Convert the layers named, or all of them with ``every``, and note it in the configuration."""
    first = every if by_layer is None else next(iter(by_layer.values()), None)
    found: dict[int, tuple[str, nn.Module, Any]]
    if isinstance(first, Longformer):
        key, found = GLOBALS, {i: (*layer, None) for i, layer in encoder_layers(model).items()}
    else:
        key = MEMORY
        found = {int(x.layer_idx): (n, x, f) for n, x, f in attention_layers(model)}  # type: ignore[arg-type]
    chosen: Mapping[int, Any] = dict.fromkeys(found, every) if by_layer is None else by_layer
    wrong = [index for index in chosen if index not in found]
    if wrong:
        raise ConfigError(
            problem(
                "layers",
                expected=f"indices among {sorted(found)}",
                got=wrong,
                fix="Count from 0; a layer that was converted already must be reverted first.",
            )
        )
    if key == MEMORY:
        for index, memory in chosen.items():
            _check_layer(*found[index][1:], memory)
    handle = Conversion(model)
    try:
        if attention_of(model) is None:
            set_attention(model, Full())
        for index, given in chosen.items():
            name, layer, family = found[index]
            if family is None:
                handle.replace(name, layer, GlobalAttention(layer, given, index))
            else:
                handle.replace(name, layer, ConvertedAttention(layer, family, given))
            handle.layers.append(index)
        if key == MEMORY:
            for owner in {".".join(found[index][0].split(".")[:-3]) for index in chosen}:
                handle.watch(model.get_submodule(owner))
        config = text_config(model)
        stored = dict(read_settings(config).get(key, {}))
        # JSON knows only strings as keys.
        stored |= {str(index): given.to_dict() for index, given in chosen.items()}
        write_settings(config, **{key: stored})
    except BaseException:
        handle.revert()
        raise
    return handle


def _keeps_state(decoder: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """Before a forward: Transformers' checkpointing takes the cache away, and with it the state."""
    cached = given.get("past_key_values", given.get("cache")) is not None
    if cached and decoder.training:
        layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        if any(layer.gradient_checkpointing for layer in layers):
            raise UnsupportedError(
                problem(
                    type(decoder).__name__,
                    expected="no cache in training with gradient checkpointing, which drops it "
                    "and the memory with it",
                    got="past_key_values",
                    fix="Call gradient_checkpointing_disable(), or wrap single layers with "
                    "torch's apply_activation_checkpointing.",
                )
            )


def from_pretrained(
    path: str | Path, *args: Any, auto_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> PreTrainedModel:
    """Load a model together with the memories it was saved with; others load as always.

    Args:
        path: Directory, or name on the hub; weights in safetensors.
        *args: For ``auto_class.from_pretrained``.
        auto_class: Which head to load.
        **kwargs: For ``auto_class.from_pretrained``.

    Raises:
        InputError: The checkpoint lacks parameters of a memory its configuration names.
    """
    model = auto_class.from_pretrained(path, *args, use_safetensors=True, **kwargs)
    restore(model, path)
    return model


def restore(model: PreTrainedModel, path: str | Path) -> None:
    """Convert a loaded model as its configuration says, and load the parameters that brings."""
    settings = read_settings(text_config(model))
    present = {m.layer_idx for m in model.modules() if isinstance(m, _CONVERTED)}
    missing = [
        {int(i): build(c) for i, c in settings.get(key, {}).items() if int(i) not in present}
        for key, build in ((MEMORY, memory_from_dict), (GLOBALS, from_dict))
    ]
    if not any(missing):
        return
    if isinstance(settings.get("attention"), dict):
        others = {int(i): from_dict(c) for i, c in settings.get("layers", {}).items()}
        set_attention(model, from_dict(settings["attention"]), others)
    for by_layer in missing:
        if by_layer:
            install(model, by_layer)
    wanted = {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if isinstance(module, _CONVERTED)
        for leaf, parameter in module.named_parameters()
        if leaf.split(".")[0] in module.new_parameters
    }
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), allow_patterns=["*.safetensors"]))
    # A head more or less: one of the two carries the prefix, as for Transformers' own weights.
    prefix = f"{model.base_model_prefix}."
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - not a dictionary
                for name in (stored, prefix + stored, stored.removeprefix(prefix)):
                    if name in wanted:
                        wanted.pop(name).data.copy_(tensors.get_tensor(stored))
    if wanted:
        raise InputError(
            problem(
                str(path),
                expected="the parameters of every converted layer in its configuration",
                got=f"a checkpoint without {', '.join(sorted(wanted))}",
                fix="Save the converted model again with save_pretrained.",
            )
        )


def memory_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that memories brought, for an optimiser group of their own.

    Gates learn too slowly at the rate of the other weights, and decay pulls them to an even mix.
    """
    return [
        parameter
        for module in model.modules()
        if isinstance(module, MemoryAttention)
        for parameter in module.parameters()
    ]


def _check_layer(layer: nn.Module, family: Family, memory: MemoryConfig) -> None:
    bias = bias_of(layer)
    if bias is not None:
        raise UnsupportedError(
            problem(
                f"layer {layer.layer_idx}",
                expected="no position bias (a memory adds none to its scores)",
                got=f"bias {bias.name!r}",
                fix="Convert models with rotary positions, or without any.",
            )
        )
    window = family.window(layer)
    if window is not None and memory.reach > window:
        raise UnsupportedError(
            problem(
                f"layer {layer.layer_idx}",
                expected=f"at most the {window} keys of the layer's sliding window",
                got=f"{memory.reach} keys that {memory.name} shows",
                fix="Shorten the segment (and memory), or convert other layers only.",
            )
        )
