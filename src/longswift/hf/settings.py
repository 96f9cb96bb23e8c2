"""Where a model's configuration keeps the mechanism, and how the mechanism is found again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import AttentionInterface, PreTrainedModel

from longswift.core.errors import ConfigError, InputError, UnsupportedError, problem
from longswift.core.mechanism import Mechanism
from longswift.mechanisms import from_dict, get_mechanism, list_mechanisms
from longswift.mechanisms.profile import Architecture, Profile, read_profile

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

KEY = "longswift"
# Where settings name layers that were replaced: by a memory, or for global projections.
CONVERTED = MEMORY, GLOBALS = "memory", "global_projections"
_ALIASES = {"ms_swift": "ms_swift", "ms-swift": "ms_swift"}


def implementation_names() -> dict[str, str]:
    """Every ``attn_implementation`` this library offers, mapped to its mechanism."""
    return {**_ALIASES, **{f"longswift_{name}": name for name in list_mechanisms()}}


def implementation_of(mechanism: Mechanism) -> str:
    """The ``attn_implementation`` that runs ``mechanism``."""
    return mechanism.name if mechanism.name in _ALIASES else f"longswift_{mechanism.name}"


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the model's text decoder (the model's own one for plain models).

    Raises:
        ConfigError: No model of Transformers.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ConfigError(
            problem(
                "model",
                expected="a model of Transformers",
                got=type(model).__name__,
                fix="Pass the model itself, not what wraps it (often .module).",
            )
        )
    return model.config.get_text_config(decoder=True)


def read_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """What this library has stored in a configuration; empty when it has stored nothing."""
    stored = getattr(config, KEY, None)
    if stored is None:
        return {}
    if not isinstance(stored, dict):
        raise ConfigError(
            problem(
                f"config.{KEY}",
                expected="a dictionary such as {'attention': mechanism.to_dict()}",
                got=repr(stored),
                fix="Set it with longswift.hf.set_attention(model, mechanism).",
            )
        )
    return stored


def write_settings(config: PreTrainedConfig, **values: Any) -> None:
    """Merge ``values`` into what is stored, in a new dictionary; empty ones are left out."""
    merged = {**read_settings(config), **values}
    setattr(config, KEY, {name: value for name, value in merged.items() if value != {}})


def mechanism_for(config: PreTrainedConfig, name: str, layer: int | None = None) -> Mechanism:
    """The mechanism ``name`` with the settings stored in ``config``, or with its defaults.

    A layer may have settings of its own; they count only together with the stored mechanism.
    """
    settings = read_settings(config)
    stored = settings.get("attention")
    if not isinstance(stored, dict) or stored.get("name") != name:
        return get_mechanism(name)
    # JSON knows only strings as keys.
    return from_dict(settings.get("layers", {}).get(str(layer), stored))


class _Resolved(NamedTuple):
    name: str
    settings: dict[str, Any]
    mechanism: Mechanism


_RESOLVED: WeakKeyDictionary[nn.Module, _Resolved] = WeakKeyDictionary()
_STAND_IN: ContextVar[Callable[[int | None], Mechanism] | None] = ContextVar(
    "longswift_stand_in", default=None
)


@contextmanager
def stand_in(choose: Callable[[int | None], Mechanism]) -> Iterator[None]:
    """Layers that would run the configured mechanism run ``choose(layer index)`` inside.

    For trying mechanisms without storing them, also ones that have no name. Only for calls of this
    thread; layers whose architecture prescribes a window keep it.
    """
    token = _STAND_IN.set(choose)
    try:
        yield
    finally:
        _STAND_IN.reset(token)


def resolve(module: nn.Module, name: str) -> Mechanism:
    """``mechanism_for`` the module's configuration, built again only when that changed."""
    choose = _STAND_IN.get()
    if choose is not None:
        return choose(getattr(module, "layer_idx", None))
    config: Any = module.config
    settings = read_settings(config)
    known = _RESOLVED.get(module)
    if known is None or known.name != name or known.settings != settings:
        layer = getattr(module, "layer_idx", None)
        if any(str(layer) in settings.get(key, {}) for key in CONVERTED):
            raise UnsupportedError(
                problem(
                    f"layer {layer}",
                    expected="the layer that convert made of it, as its configuration says",
                    got=f"{type(module).__name__}, without the memory it was saved with",
                    fix="Load the model with longswift.hf.from_pretrained (and adapters with "
                    "PeftModel.from_pretrained onto that).",
                )
            )
        mechanism = mechanism_for(config, name, layer)
        known = _Resolved(name, copy.deepcopy(settings), mechanism)
        _RESOLVED[module] = known
    return known.mechanism


def attention_of(model: PreTrainedModel) -> Mechanism | None:
    """The mechanism in force in the model's text layers; None when it runs another attention.

    Single layers may run another one, see ``set_attention``.
    """
    config = text_config(model)
    name = implementation_names().get(str(config._attn_implementation))
    return None if name is None else mechanism_for(config, name)


def set_attention(
    model: PreTrainedModel,
    mechanism: Mechanism | str,
    layers: Mapping[int, Mechanism | str] | None = None,
) -> None:
    """Run ``mechanism`` in the text layers of ``model`` and store its settings in the config.

    Args:
        model: Any Transformers model whose layers use the ``AttentionInterface``.
        mechanism: A mechanism, or a name for its defaults.
        layers: Other mechanisms (or other settings) for single layers, by layer index.

    Raises:
        UnsupportedError: The architecture computes attention in code of its own, or has none.
        ConfigError: Something that is no mechanism, or no layer of the model.
    """
    config = text_config(model)
    mechanism = _mechanism(mechanism)
    if layers is not None and not isinstance(layers, Mapping):
        raise ConfigError(
            problem(
                "layers",
                expected="a mechanism for each layer index, such as {0: Full()}",
                got=repr(layers),
                fix="Leave it out to treat all layers alike.",
            )
        )
    others = {layer: _mechanism(other) for layer, other in dict(layers or {}).items()}
    own_code = not model._can_set_attn_implementation()
    if own_code or not _asks_interface(model):
        raise UnsupportedError(
            problem(
                type(model).__name__,
                expected="an architecture that uses Transformers' AttentionInterface",
                got="one with attention code of its own" if own_code else "one without attention",
                fix="Such a model cannot be given another attention; choose another architecture.",
            )
        )
    count = int(config.num_hidden_layers)
    wrong = [i for i in others if i not in range(count)]
    if wrong:
        raise ConfigError(
            problem(
                "layers",
                expected=f"indices from 0 to {count - 1}",
                got=wrong,
                fix="Count the text layers from 0.",
            )
        )
    name = implementation_of(mechanism)
    key = next((k for k in model.config.sub_configs if getattr(model.config, k) is config), None)
    model.set_attn_implementation(name if key is None else {key: name})
    single = {str(layer): other.to_dict() for layer, other in others.items()}
    write_settings(config, attention=mechanism.to_dict(), layers=single)


def _asks_interface(model: nn.Module) -> bool:
    """Whether code of any layer knows the interface; Transformers lets models without attention by.

    Layers that inherit their attention from another architecture know it through that.
    """
    sources = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    # Where the interface itself lives, and every model comes from.
    sources.discard(PreTrainedModel.__module__)
    return any(
        isinstance(value, AttentionInterface)
        for source in sources
        if source in sys.modules
        for value in vars(sys.modules[source]).values()
    )


def _mechanism(given: Mechanism | str) -> Mechanism:
    if isinstance(given, str):
        return get_mechanism(given)
    if not isinstance(given, Mechanism):
        raise ConfigError(
            problem(
                "attention",
                expected="a mechanism such as MSSwift(), or a name",
                got=repr(given),
                fix="Add the parentheses." if isinstance(given, type) else "Pass one of these.",
            )
        )
    return given


def architecture_of(model: PreTrainedModel) -> Architecture:
    """What a profile must match."""
    config: Any = text_config(model)
    heads = int(config.num_attention_heads)
    return Architecture(
        model_type=str(config.model_type),
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def set_profile(model: PreTrainedModel, profile: Profile | str | Path) -> None:
    """Run what ``profile`` prescribes for every head; stored in the config like any settings.

    Raises:
        InputError: No profile, or one of another model.
        UnsupportedError: The architecture computes attention in code of its own.
    """
    profile = read_profile(profile)
    profile.check(architecture_of(model))
    kinds = getattr(text_config(model), "layer_types", None) or ()
    full = {index for index, kind in enumerate(kinds) if kind == "full_attention"}
    if lacking := sorted(full - set(profile.layers)):
        raise InputError(
            problem(
                "profile",
                expected="settings for every layer that sees everything",
                got=f"none for {', '.join(map(str, lacking))}",
                fix="Make it again with longswift calibrate.",
            )
        )
    set_attention(model, profile.attention, profile.mechanisms())
