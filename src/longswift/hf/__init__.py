"""LongSwift inside Transformers: importing this registers the mechanisms and changes nothing else.

``AutoModelForCausalLM.from_pretrained(path, attn_implementation="ms_swift")`` then works, as does
``longswift_<name>`` for every mechanism of the table.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from longswift.core.errors import ConfigError, problem
from longswift.hf.attention import make_attention
from longswift.hf.cache import SwiftCache
from longswift.hf.convert import Conversion, convert, from_pretrained, memory_parameters
from longswift.hf.extending import Extension, check_length, extend
from longswift.hf.heads import group_heads
from longswift.hf.masks import swift_mask
from longswift.hf.model import LongSwiftConfig, LongSwiftLM
from longswift.hf.settings import attention_of, implementation_names, set_attention, set_profile

__all__ = [
    "Conversion",
    "Extension",
    "LongSwiftConfig",
    "LongSwiftLM",
    "SwiftCache",
    "attention_of",
    "check_length",
    "convert",
    "extend",
    "from_pretrained",
    "group_heads",
    "implementation_names",
    "memory_parameters",
    "set_attention",
    "set_profile",
]

# Transformers looks for these inside names and takes the implementation for another one.
_RESERVED = ("flash", "sdpa", "flex_attention", "/", "|", ":")


def _register() -> None:
    for name, mechanism in implementation_names().items():
        if any(word in name for word in _RESERVED):
            raise ConfigError(
                problem(
                    "mechanism name",
                    expected=f"none of {', '.join(_RESERVED)} in it",
                    got=repr(name),
                    fix="Rename the plug-in's entry point.",
                )
            )
        # What chooses by content cannot be traced; a compiled model calls it between its graphs.
        AttentionInterface.register(name, torch.compiler.disable(make_attention(mechanism)))
        AttentionMaskInterface.register(name, torch.compiler.disable(swift_mask))
    AutoConfig.register("longswift", LongSwiftConfig)
    AutoModelForCausalLM.register(LongSwiftConfig, LongSwiftLM)


_register()
