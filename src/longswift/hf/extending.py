"""``extend``: positions, attention and settings for a longer context, in one reversible call."""

from __future__ import annotations

import copy
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from longswift.core.errors import InputError, UnsupportedError, problem
from longswift.core.mechanism import Mechanism
from longswift.extend.rope import check_kind
from longswift.hf import rotary
from longswift.hf.settings import (
    KEY,
    read_settings,
    set_attention,
    set_profile,
    text_config,
    write_settings,
)
from longswift.mechanisms.profile import Profile

_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "pos_embed")


class Extension:
    """What ``extend`` changed; ``revert()`` (or leaving a ``with`` block) puts everything back.

    Attributes:
        model: The extended model.
        max_length: Positions it now accepts.
        rope: The scaling that was applied, or None where none was needed.
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self.model = model
        self.max_length = max_length
        self.rope: str | None = None
        config = text_config(model)
        self._configs = [(c, _state(c)) for c in _all_configs(model)]
        self._rotary = [
            (module, rotary.snapshot(module)) for module in rotary.rotary_modules(model, config)
        ]
        self._active = True

    def revert(self) -> None:
        """Restore configuration, attention and rotary embeddings. Further calls do nothing."""
        if not self._active:
            return
        self._active = False
        for config, state in self._configs:
            config.__dict__.clear()
            config.__dict__.update(state)
        for module, saved in self._rotary:
            rotary.restore(module, saved)

    def __enter__(self) -> Extension:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.revert()


def extend(
    model: PreTrainedModel,
    max_length: int = 32768,
    rope: str | None = "yarn",
    attention: Mechanism | str | None = "ms_swift",
    profile: Profile | str | Path | None = None,
) -> Extension:
    """Let ``model`` read ``max_length`` tokens.

    The rotary embeddings are scaled only if the model has them, ``max_length`` exceeds the trained
    length and a layer looks further than it was trained to; a model that already has a scaling
    gets a larger factor of the same kind. All settings live in the configuration, so that
    ``save_pretrained`` keeps them.

    Args:
        model: A loaded Transformers model.
        max_length: Positions the model shall accept.
        rope: ``yarn``, ``linear``, ``ntk``, ``dynamic``, ``llama3``, or None to leave the
            frequencies alone (``default`` means the same for a model without scaling).
        attention: A mechanism, a name, or None to leave the attention alone.
        profile: Settings of single heads from ``longswift calibrate``, or its file; replaces
            ``attention``.

    Returns:
        A handle whose ``revert()`` undoes everything; also a context manager.

    Raises:
        UnsupportedError: The positions are a learned table, or the attention cannot be replaced.
        ConfigError: An impossible length or scaling.
        InputError: The profile belongs to another model.
    """
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise InputError(
            problem(
                "max_length",
                expected="a positive number of tokens",
                got=repr(max_length),
                fix="32768 is a good first choice.",
            )
        )
    check_kind(rope)
    handle = Extension(model, max_length)
    try:
        config = text_config(model)
        trained = _limit(config)
        if trained is not None and max_length > trained:
            handle.rope = _extend_positions(model, config, rope, max_length, trained)
        if profile is not None:
            set_profile(model, profile)
        elif attention is not None:
            set_attention(model, attention)
    except BaseException:
        handle.revert()
        raise
    return handle


def limit_of(model: PreTrainedModel) -> int | None:
    """Positions the model accepts, or None when it does not say."""
    return _limit(text_config(model))


def check_length(
    model: PreTrainedModel,
    n_tokens: int,
    fix: str = "Call longswift.hf.extend(model, max_length=...) first, or pass fewer tokens.",
) -> None:
    """Raise ``InputError`` if ``n_tokens`` positions are more than the model can tell apart.

    Args:
        model: Who reads.
        n_tokens: How many.
        fix: What to do about it, where the positions could be extended.
    """
    limit = _limit(text_config(model))
    if limit is None or n_tokens <= limit:
        return
    table = _position_table(model)
    if table is not None:
        fix = "Its positions are a learned table; pass fewer tokens or use a model with RoPE."
    raise InputError(
        problem(
            type(model).__name__,
            expected=f"at most {limit} tokens",
            got=n_tokens,
            fix=fix,
        )
    )


def _extend_positions(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    rope: str | None,
    max_length: int,
    trained: int,
) -> str | None:
    """Scale the angles if need be and raise the length; return the scaling applied."""
    modules = rotary.rotary_modules(model, config)
    table = _position_table(model)
    if table is not None and not modules:
        raise UnsupportedError(
            problem(
                type(model).__name__,
                expected=f"max_length <= {trained}",
                got=max_length,
                fix=f"Its positions are a learned table ({table}) with nothing behind the last "
                "entry; use a model with rotary positions.",
            )
        )
    applied = None
    if rope is not None and modules and not rotary.only_near_layers_rotate(config, trained):
        parameters, scalings = rotary.scaled_parameters(config, modules, rope, max_length, trained)
        if scalings:
            config.rope_parameters = parameters
            # A dynamic scaling measures the text against the trained length.
            if rope != "dynamic":
                config.max_position_embeddings = max_length
            rotary.rebuild(modules, scalings)
            applied = rope
    if rope != "dynamic" or applied is None:
        config.max_position_embeddings = max_length
    write_settings(config, max_length=max_length)
    return applied


def _limit(config: PreTrainedConfig) -> int | None:
    """Positions the model accepts: what ``extend`` stored, else what the configuration says."""
    stored = read_settings(config).get("max_length")
    if stored is not None:
        return int(stored)
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def _position_table(model: PreTrainedModel) -> str | None:
    """Name of the learned table of absolute positions, if the model has one."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in _TABLES and isinstance(module, nn.Embedding):
            return f"{name}, {module.num_embeddings} rows"
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in _TABLES:
            return f"{name}, {parameter.shape[-2]} rows"
    return None


def _all_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found.setdefault(id(config), config)
    return list(found.values())


def _state(config: PreTrainedConfig) -> dict[str, Any]:
    """The attributes of a configuration; what ``extend`` edits is copied, the rest is shared."""
    copied = ("rope_parameters", KEY)
    return {
        name: copy.deepcopy(value) if name in copied else value
        for name, value in vars(config).items()
    }
