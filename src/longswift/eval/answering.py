"""One question about one long file: read it in chunks, stream the answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.mechanism import Mechanism
from longswift.eval import options, reading
from longswift.eval.documents import read_text
from longswift.eval.models import Loaded, load
from longswift.eval.progress import bar
from longswift.extend.rope import check_kind
from longswift.mechanisms.profile import Profile

# What a decoder shows for bytes that are not yet a whole character.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to read and to ask.

    Attributes:
        model: ``tiny``, a directory or a name on the hub.
        file: UTF-8 text.
        prompt: Follows the text; may be empty. Without a chat template it continues the text, after
            a space unless it begins with one.
        mechanism: Attention of the model's full layers, or None for the model's own.
        profile: Settings of single heads; replaces ``mechanism``.
        max_new_tokens: Longest answer.
        max_length: Extend the model's positions to this many tokens.
        rope: Scaling of rotary positions used for that.
        chat: Use the tokenizer's chat template if it has one.
        chunk: Tokens per forward pass while reading; a multiple of the mechanism's block.
        dtype: Name of a dtype, or ``"auto"``.
        device: Where to run.
        trust_remote_code: Allow the model to bring Python code of its own.
    """

    model: str
    file: str
    prompt: str = ""
    mechanism: Mechanism | None = None
    profile: Profile | None = None
    max_new_tokens: int = 256
    max_length: int | None = None
    rope: str | None = "yarn"
    chat: bool = True
    chunk: int = 1024
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_positive("generate", max_new_tokens=self.max_new_tokens, chunk=self.chunk)
        check_kind(self.rope)
        reading.check_chunk("chunk", self.chunk, self.attention)

    @property
    def attention(self) -> Mechanism | None:
        """What most layers run."""
        return self.mechanism if self.profile is None else self.profile.attention


def mechanism(name: str, settings: Sequence[str] = (), *, own: bool = True) -> Mechanism | None:
    """The mechanism called ``name``; None for ``"model"``, the model's own attention.

    Args:
        name: One mechanism.
        settings: ``NAME.OPTION=VALUE``.
        own: False where a profile runs instead, which has settings of its own.

    Raises:
        ConfigError: There is no such mechanism, or settings for none.
    """
    if not own:
        options.check_unused("--profile", {"--set": tuple(settings)}, fix=options.CALIBRATE)
        return None
    if name == "model":
        options.check_unused(
            "--attention model", {"--set": tuple(settings)}, fix="Name the mechanism to set."
        )
        return None
    found = options.mechanisms(name, settings)
    if len(found) > 1:
        raise ConfigError(
            problem("attention", expected="one mechanism", got=repr(name), fix="Pick one of them.")
        )
    return next(iter(found.values()))


class Answer:
    """The answer to a question, made while it is streamed.

    Args:
        question: What to read and to ask.

    Raises:
        InputError: The file is no text, or longer than the model can position.
        ConfigError: The model does not load.
    """

    def __init__(self, question: Question) -> None:
        from longswift.hf import SwiftCache, extend, set_attention, set_profile

        text = read_text(question.file)
        self.question = question
        self.loaded = load(
            question.model,
            dtype=question.dtype,
            device=question.device,
            trust_remote_code=question.trust_remote_code,
        )
        model = self.loaded.model
        if question.max_length is not None:
            extend(model, question.max_length, question.rope, question.mechanism, question.profile)
        elif question.profile is not None:
            set_profile(model, question.profile)
        elif question.mechanism is not None:
            set_attention(model, question.mechanism)
        self.ids = _encode(self.loaded, text, question)
        self.loaded.check_length(len(self.ids) + question.max_new_tokens)
        self._cache = SwiftCache(model.config)
        self._read_seconds = self._made_seconds = 0.0
        self._made: list[int] = []

    def describe(self) -> str:
        """What is about to happen."""
        attention = self.question.attention
        how = "its own attention" if attention is None else attention.name
        return f"{self.loaded.name} reads {len(self.ids):,} tokens with {how}"

    def stream(self) -> Iterator[str]:
        """Pieces of the answer as they are made."""
        model, question = self.loaded.model, self.question
        with bar(len(self.ids), "reading") as step:
            told = reading.read(model, self.ids[:-1], self._cache, chunk=question.chunk, step=step)
        self._read_seconds = told.seconds
        begin, shown = time.perf_counter(), ""
        stop = self.loaded.stop_tokens()
        tokens = reading.decode(model, self.ids[-1:], self._cache, question.max_new_tokens, stop)
        for token in tokens:
            self._made.append(token)
            text = self.loaded.decode(self._made)
            if text.startswith(shown) and not text.endswith(_INCOMPLETE):
                yield text[len(shown) :]
                shown = text
        self._made_seconds = time.perf_counter() - begin
        yield self.loaded.decode(self._made)[len(shown) :]

    def account(self) -> str:
        """What it took."""
        speed = len(self._made) / max(self._made_seconds, 1e-9)
        return (
            f"read {len(self.ids):,} tokens in {self._read_seconds:.1f} s; "
            f"wrote {len(self._made)} at {speed:.1f} tokens/s"
        )


def _encode(loaded: Loaded, text: str, question: Question) -> list[int]:
    """Token ids of the text and the prompt, in the chat template if there is one."""
    # A terminal without UTF-8 hands bytes on as they are.
    prompt = question.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if question.chat and getattr(loaded.tokenizer, "chat_template", None):
        content = f"{text.rstrip()}\n\n{prompt}" if prompt else text
        return loaded.encode(
            loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        )
    if prompt:
        # The prompt goes on from the text; words after a space are other tokens than bare ones.
        text = text.rstrip() + ("" if prompt[0].isspace() else " ") + prompt
    return [*loaded.begin(), *loaded.encode(text)]
