"""Models and tokenizers from a directory or the hub, or a one-line error."""

from __future__ import annotations

import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import logging as hf_logging

from longswift.core.errors import ConfigError, LongSwiftError, problem
from longswift.hf.convert import restore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LONGEST_REASON = 200
_REASONS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model for inference, and its tokenizer.

    Weights come from safetensors only: other formats can run code while they are read.

    Args:
        model: Directory, or name on the hub.
        dtype: Name of a dtype, or ``"auto"`` for that of the checkpoint.
        device: Where to put the model.
        trust_remote_code: Allow the model to bring Python code of its own.

    Raises:
        ConfigError: There is no such model, it cannot be reached, it does not load, or its
            checkpoint lacks weights.
    """
    place = _place(model)
    # Every reason goes into the error; the library's own warnings and bars would drown it.
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
            loaded, told = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                # Both are refused below: Transformers names no tensor, or draws it at random.
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            _check_weights(model, told)
            restore(loaded, place)
        except LongSwiftError:
            raise
        except _REASONS as error:
            raise ConfigError(_refusal(model, error)) from error
    return loaded.to(device).eval(), tokenizer


def random_llama(
    longest: int,
    seed: int = 0,
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    layers: int = 2,
    intermediate: int | None = None,
    vocabulary: int = 256,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> PreTrainedModel:
    """A model of Llama shape with random weights, for work whose time does not depend on them.

    Args:
        longest: Positions it accepts.
        seed: Seed of the weights.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
        layers: Layers.
        intermediate: Width of the MLP; that of all heads when None.
        vocabulary: Tokens it knows.
        dtype: Of the weights.
        device: Where they are drawn.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=heads * head_dim,
        intermediate_size=intermediate or heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=longest,
    )
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def _place(model: str | Path) -> str:
    """The directory or hub name; a path that does not exist is never looked up on the hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                problem(
                    str(model),
                    expected="a model directory with a config.json",
                    got="a directory without one",
                    fix="Name the directory that save_pretrained wrote.",
                )
            )
        return str(path)
    text = str(model)
    looks_like_a_path = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if path.exists() or looks_like_a_path or not text.strip("/ "):
        raise ConfigError(
            problem(
                repr(text),
                expected="a model directory, a name on the hub, or 'tiny'",
                got="a file" if path.is_file() else "no such directory",
                fix="Check the path.",
            )
        )
    if not _reachable(text):
        raise ConfigError(
            problem(
                repr(text),
                expected="a model directory, a name on the hub, or 'tiny'",
                got="no such directory, and the hub cannot be reached",
                fix="Check the name and the connection.",
            )
        )
    return text


def _reachable(name: str) -> bool:
    """Whether a hub name can be looked up; the hub client would retry for most of a minute."""
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:
        return True
    if cached or constants.HF_HUB_OFFLINE:
        return True
    # Through a proxy the hub may be reachable though its host is not.
    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=10).close()
    except OSError:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and warnings of Transformers and the hub client."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        hub.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def _check_weights(model: str | Path, told: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not those of the model its configuration names."""
    lacking = sorted(told["missing_keys"])
    unlike = [
        f"{name} {list(got)} for {list(wanted)}"
        for name, got, wanted in sorted(told["mismatched_keys"])
    ]
    if not lacking and not unlike:
        return
    first, *others = unlike or [f"none called {lacking[0]}", *lacking[1:]]
    raise ConfigError(
        problem(
            repr(str(model)),
            expected="the weights of a whole causal language model",
            got=first + (f", and {len(others)} more" if others else ""),
            fix="Take the whole checkpoint, with its own config.json.",
        )
    )


def _refusal(model: str | Path, error: Exception) -> str:
    reason: Any = " ".join(str(error).split())
    fix = "Check the name and the connection, or give a directory."
    if "trust_remote_code" in reason:
        reason, fix = "one that brings its own code", "If you trust it, add --trust-remote-code."
    elif isinstance(error, FileNotFoundError):
        fix = "The directory is incomplete: fetch that file again."
    elif "safetensors" in reason:
        fix = "Convert its weights to safetensors."
    elif Path(model).expanduser().is_dir():
        fix = "The directory may be incomplete or of another kind of model."
    # The first sentence says what is wrong; the rest is advice that ours replaces.
    reason = re.split(r"(?<=[.!?]) (?=[A-Z])", reason)[0].rstrip(".")[:_LONGEST_REASON]
    return problem(repr(str(model)), expected="a model that loads", got=reason, fix=fix)
