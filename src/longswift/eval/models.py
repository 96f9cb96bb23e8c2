"""The model a command was given: ``tiny``, a directory or a name on the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longswift.core.errors import ConfigError, problem
from longswift.eval import options

TINY = "tiny"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to read.

    Attributes:
        model: A causal language model of Transformers.
        tokenizer: Its tokenizer.
        name: What the user called it; the last part only of a path.
    """

    model: Any
    tokenizer: Any
    name: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def begin(self) -> list[int]:
        """The special tokens this tokenizer puts before a text."""
        both = self.tokenizer("a")["input_ids"]
        plain = self.encode("a")
        return both[: len(both) - len(plain)] if both[-len(plain) :] == plain else []

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def sha256(self) -> str:
        """A fingerprint of the weights, cheap to make: of their names and sums."""
        state = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            state.update(name.encode())
            state.update(tensor.detach().float().sum().cpu().numpy().tobytes())
        return state.hexdigest()

    def stop_tokens(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model by what the user calls it.

    Args:
        name: ``tiny``, a directory, or a name on the hub.
        dtype: Name of a dtype, or ``"auto"`` for that of the checkpoint.
        device: Where to put it.
        trust_remote_code: Allow the model to bring Python code of its own.

    Raises:
        ConfigError: There is no such model, or it does not load.
    """
    if dtype != "auto":
        options.dtype(dtype)
    options.device(device)
    from longswift.hf.loading import load as load_model

    place: str | Path = name
    if name == TINY and not Path(name).is_dir():
        place = tiny_directory()
    model, tokenizer = load_model(
        place, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    return Loaded(model=model, tokenizer=tokenizer, name=Path(name).name)


def tiny_directory() -> Path:
    """Directory of the packaged model.

    Raises:
        ConfigError: This installation does not carry it.
    """
    from longswift import tiny

    try:
        place = tiny.path()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not (place / "config.json").is_file():
        raise ConfigError(
            problem(
                "tiny",
                expected="the packaged model",
                got="an installation without its weights",
                fix="Make it with longswift tiny train, or give another model.",
            )
        )
    return place
