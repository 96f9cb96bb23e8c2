"""Changing the rotary embeddings of a loaded model, and putting them back."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longswift.core.errors import ConfigError, UnsupportedError, problem
from longswift.extend.rope import RopeScaling

_FLAT = ""
# Their code, not their configuration, leaves the full layers without positions.
_PLAIN_FULL_LAYERS = (
    "afmoe",
    "cohere2",
    "exaone4",
    "exaone4_5_text",
    "exaone_moe",
    "flint",
    "kolibri1",
)


def rotary_modules(model: PreTrainedModel, config: PreTrainedConfig) -> list[nn.Module]:
    """The modules that turn positions of ``config``'s layers into angles."""
    return [
        module
        for module in model.modules()
        if getattr(module, "config", None) is config
        and hasattr(module, "rope_type")
        and any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


def parameter_sets(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The config's rope parameters by layer type; under ``""`` where all layers share them."""
    stored = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in stored:
        return {_FLAT: stored}
    return {name: value for name, value in stored.items() if isinstance(value, dict)}


def only_near_layers_rotate(config: PreTrainedConfig, trained: int) -> bool:
    """Whether no rotated layer ever relates tokens further apart than it was trained for.

    True of models whose layers all slide, and of those whose full layers know no positions.
    """
    window = getattr(config, "sliding_window", None)
    if window is None or window > trained:
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds is None or config.model_type in _PLAIN_FULL_LAYERS:
        return True
    # 1 marks a rotated layer, whatever the name suggests.
    rotated = getattr(config, "no_rope_layers", None) or [1] * len(kinds)
    if config.model_type == "cohere2_moe":
        # A full layer of it rotates only in the dense prefix, and there at one setting only.
        prefix = config.prefix_dense_sliding_window_pattern == 1
        rotated = [
            kind == "sliding_attention" or prefix and mlp == "dense"
            for kind, mlp in zip(kinds, config.mlp_layer_types, strict=True)
        ]
    return all(
        kind == "sliding_attention" for kind, turns in zip(kinds, rotated, strict=True) if turns
    )


def scaled_parameters(
    config: PreTrainedConfig, modules: list[nn.Module], kind: str, max_length: int, trained: int
) -> tuple[dict[str, Any], dict[str, RopeScaling]]:
    """New ``rope_parameters`` for ``max_length`` positions, and what was applied to which layers.

    Layers with a sliding window inside the trained length are left as they are: they only see
    distances they were trained on.

    Raises:
        ConfigError: The model is already scaled in another way.
    """
    sets = parameter_sets(config)
    new: dict[str, Any] = copy.deepcopy(getattr(config, "rope_parameters", None) or {})
    applied: dict[str, RopeScaling] = {}
    window = getattr(config, "sliding_window", None)
    for layer_type, old in sets.items():
        if layer_type == "sliding_attention" and window is not None and window <= trained:
            continue
        factor, original = max_length / trained, trained
        present = old.get("rope_type", "default")
        if present != "default":
            if present != kind or kind == "dynamic":
                raise ConfigError(
                    problem(
                        "rope",
                        expected=f"the scaling the model was trained with ({present!r}) or None",
                        got=repr(kind),
                        fix=f"Pass rope={present!r} to raise its factor."
                        if present in ("linear", "yarn", "llama3")
                        else "Pass rope=None and a max_length the model knows.",
                    )
                )
            factor *= old.get("factor") or 1.0
            original = old.get("original_max_position_embeddings") or math.ceil(max_length / factor)
        known = ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
        extra = {name: float(old[name]) for name in known if old.get(name) is not None}
        scaling = RopeScaling(kind=kind, factor=factor, original_length=original, **extra)  # type: ignore[arg-type]
        entries = scaling.parameters(_rotary_dim(modules, layer_type), old["rope_theta"])
        target = new if layer_type == _FLAT else new[layer_type]
        target.update(entries)
        applied[layer_type] = scaling
    return new, applied


def rebuild(modules: list[nn.Module], applied: dict[str, RopeScaling]) -> None:
    """Recompute the angles of loaded modules from their (changed) configuration.

    Raises:
        UnsupportedError: The architecture did not follow the configuration.
    """
    for module in modules:
        config: Any = module.config
        try:
            fresh = type(module)(config)
        except TypeError as error:
            raise UnsupportedError(
                problem(
                    type(module).__name__,
                    expected="rotary embeddings made from the configuration alone",
                    got=str(error),
                    fix="Pass rope=None, or choose another architecture.",
                )
            ) from None
        for layer_type, scaling in applied.items():
            _check_followed(module, fresh, layer_type, scaling)
        device = next(b.device for _, b in module.named_buffers(recurse=False))
        fresh.to(device)
        kept = {k: module.__dict__[k] for k in module.__dict__ if "hook" in k}
        module.__dict__.update({**fresh.__dict__, **kept, "training": module.training})


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything needed to put a rotary module back, its buffers copied."""
    state = dict(module.__dict__)
    state["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    return state


def restore(module: nn.Module, state: dict[str, Any]) -> None:
    """Undo every change since ``snapshot``; the module keeps the device it is on now."""
    device = next(b.device for _, b in module.named_buffers(recurse=False))
    module.__dict__.clear()
    module.__dict__.update(state)
    module._buffers = {
        name: None if buffer is None else buffer.to(device)
        for name, buffer in module._buffers.items()
    }


def _rotary_dim(modules: list[nn.Module], layer_type: str) -> int:
    return 2 * _buffer(modules[0], layer_type).numel()


def _buffer(module: nn.Module, layer_type: str) -> Tensor:
    return module.get_buffer(f"{layer_type}_inv_freq" if layer_type else "inv_freq")


def _check_followed(
    old: nn.Module, fresh: nn.Module, layer_type: str, scaling: RopeScaling
) -> None:
    config: Any = fresh.config
    stored = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    got = _buffer(fresh, layer_type).float().cpu()
    base = stored["rope_theta"]
    plain = RopeScaling(kind="default", original_length=scaling.original_length)
    rule = plain if scaling.kind == "ntk" else scaling
    expected, _ = rule.frequencies(2 * got.numel(), base)
    if not torch.allclose(got, expected, rtol=1e-4, atol=0.0):
        raise UnsupportedError(
            problem(
                type(old).__name__,
                expected=f"rotary embeddings that follow rope_type={scaling.kind!r}",
                got="other frequencies",
                fix="Pass rope=None, or choose another scaling for this architecture.",
            )
        )
