"""The model a command was given: ``tiny``, a directory or a name on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longswift.core.errors import ConfigError, problem
from longswift.core.mechanism import Mechanism
from longswift.eval import options

if TYPE_CHECKING:
    from torch import Tensor

TINY = "tiny"


# What a model is tried with, and how many tokens of it.
_SENTENCE = (
    "Any text will do, as long as it has a few dozen tokens: one, two, three, four, five. " * 2
)
_PROBE = 32
# Stands for the document while a chat template is filled in; no tokenizer ever sees it.
_DOCUMENT = "<<longswift:document>>"


# For commands with this option; those without say what they have.
EXTEND = "Extend its positions with --max-length, or read fewer tokens."


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A tokenizer, and how a document and a question about it are put together.

    Attributes:
        tokenizer: A tokenizer of Transformers.
        chat: Use its chat template, if it has one, where instructions are given.
        vocabulary: Tokens the model has vectors for; None where none will read them.
    """

    tokenizer: Any
    chat: bool = True
    vocabulary: int | None = None

    @property
    def has_chat(self) -> bool:
        """Whether instructions go through a chat template."""
        return self.chat and bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.known(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def begin(self) -> list[int]:
        """The special tokens this tokenizer puts before a text."""
        both = self.tokenizer("a")["input_ids"]
        plain = self.encode("a")
        first = both[: len(both) - len(plain)] if both[-len(plain) :] == plain else []
        return self.known(first)

    def known(self, ids: list[int]) -> list[int]:
        """The ids, if the model has a vector for each of them.

        Raises:
            ConfigError: It has not.
        """
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            raise ConfigError(
                problem(
                    "tokenizer",
                    expected=f"token ids below {self.vocabulary:,}, the model's vocabulary",
                    got=max(ids),
                    fix="Take the tokenizer the model was trained with.",
                )
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def split(self, text: str, answer: str) -> tuple[list[int], int]:
        """Token ids of ``text`` as they are when ``answer`` follows, and the answer's tokens.

        Whether a space belongs to the word after it or stands alone is up to the tokenizer, and a
        model can only continue what ends where its tokens end.
        """
        ids = self.encode(text + answer)
        for k in range(len(ids) - 1, 0, -1):
            if self.decode(ids[:k]).strip() == text.strip():
                return ids[:k], len(ids) - k
        return self.encode(text), len(self.encode(answer))

    def frame(self, before: str, after: str, begun: str = "") -> tuple[list[int], list[int]]:
        """Token ids that go before a document, and those that follow it.

        Args:
            before: Text before the document.
            after: Text after it.
            begun: How the answer begins.

        Raises:
            ConfigError: The chat template does not show the message as it is.
        """
        if not self.has_chat:
            return [*self.begin(), *self.encode(before)], self.encode(after + begun)
        message = {"role": "user", "content": before + _DOCUMENT + after}
        text: str = self.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        # The template writes the special tokens itself; a second one before it changes scores.
        head, found, tail = text.partition(_DOCUMENT)
        if not found:
            raise ConfigError(
                problem(
                    "chat template",
                    expected="one that repeats the message it is given",
                    got="one that changes or drops it",
                    fix="Use --no-chat.",
                )
            )
        return self.encode(head), self.encode(tail + begun.lstrip())


@dataclass(frozen=True, kw_only=True)
class Loaded(Codec):
    """A model ready to read.

    Attributes:
        model: A causal language model of Transformers.
        name: What the user called it; the last part only of a path.
    """

    model: Any
    name: str

    def use(self, mechanism: Mechanism | None) -> None:
        """Attend with ``mechanism``, or as Transformers does if it is None.

        Transformers' way is ``sdpa``, or ``eager`` where the model has more than that computes.
        """
        from longswift.hf import set_attention

        if mechanism is not None:
            set_attention(self.model, mechanism)
            return
        try:
            self.model.set_attn_implementation("sdpa")
        except ValueError:
            self.model.set_attn_implementation("eager")

    def extend(self, max_length: int | None, rope: str | None) -> None:
        """Extend the model's positions; nothing is done for no ``max_length``."""
        from longswift.hf import extend

        if max_length is not None:
            extend(self.model, max_length, rope, None)

    def check_length(self, tokens: int) -> None:
        """Raise ``InputError`` if the model cannot tell so many positions apart."""
        from longswift.hf import check_length

        check_length(self.model, tokens, EXTEND)

    def probe(self) -> list[int]:
        """A few dozen tokens of text, to see what the model can do."""
        return [*self.begin(), *self.encode(_SENTENCE)][:_PROBE]

    def check_runs(self, mechanism: Mechanism) -> None:
        """Attend with ``mechanism``, and see before any long work that the model can.

        Raises:
            UnsupportedError: The model has scores or masks that mechanisms do not compute, or the
                mechanism no causal form.
        """
        from longswift.eval.reading import read
        from longswift.hf import SwiftCache

        self.use(mechanism)
        ids = self.probe()
        read(self.model, ids, SwiftCache(self.model.config), chunk=len(ids))

    def fingerprint(self) -> str:
        """A hash of names, shapes and sums of the weights; sums of floats depend on threads."""
        state = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            state.update(str(_sum_of_bits(tensor)).encode())
        return state.hexdigest()

    def stop_tokens(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())


def _sum_of_bits(tensor: Tensor) -> int:
    import torch

    flat = tensor.detach().flatten().contiguous()
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(flat.view(words.get(flat.element_size(), torch.uint8)).sum(dtype=torch.int64))


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
        ConfigError: There is no such model, it does not load, or its tokenizer is of another.
        UnsupportedError: It cannot be read in chunks, or scored here.
        InputError: Its logits are not finite.
    """
    if dtype != "auto":
        options.dtype(dtype, "auto")
    options.device(device)
    from longswift.eval.reading import check_readable
    from longswift.hf.loading import load as load_model

    place: str | Path = name
    if name == TINY and not Path(name).is_dir():
        place = tiny_directory()
    model, tokenizer = load_model(
        place, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    loaded = Loaded(
        model=model,
        tokenizer=tokenizer,
        name=Path(name).name,
        vocabulary=model.get_input_embeddings().weight.shape[0],
    )
    check_readable(model, loaded.probe())
    return loaded


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
