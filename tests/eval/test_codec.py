"""Documents and questions as token ids, for tokenizers of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longswift.core.errors import ConfigError
from longswift.eval import tasks
from longswift.eval.models import Codec

TEXT = ["The secret number of word is 48213. The pass key is 1234. " * 3, "0123456789 48 213 821"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def spaces_with_words() -> PreTrainedTokenizerFast:
    """Byte-level, as GPT-2's: a space belongs to what follows, numbers included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece's: a mark for the space, and one before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = [chr(c) for c in range(33, 127)] + ["\u2581", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "<unk>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [spaces_with_words, metaspace])
def test_a_question_ends_where_the_tokens_of_its_answer_begin(
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    codec = Codec(tokenizer=make())
    before = " The secret number of word is "
    ids, count = codec.split(before, "48213")
    whole = codec.encode(f"{before}48213")
    assert whole[: len(ids)] == ids and len(whole) == len(ids) + count
    assert codec.decode(whole[len(ids) :]).strip() == "48213"
    for name in ("needle", "kv", "passkey", "copy", "variable_tracking"):
        task = tasks.get_task(name)
        sample = task.generate(codec, 1500, 1)
        assert sample.tokens <= 1500
        assert "48213" not in codec.decode(sample.document)


def test_a_chat_template_is_filled_once(model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    plain = Codec(tokenizer=tokenizer, chat=False)
    assert plain.frame("Before.", " After.", " So")[0][0] == plain.begin()[0]
    tokenizer.chat_template = TEMPLATE
    tokenizer.bos_token = tokenizer.eos_token
    codec = Codec(tokenizer=tokenizer)
    head, tail = codec.frame("Before.", " After.", " The answer is")
    shown = tokenizer.decode([*head, *tail])
    assert shown == f"{tokenizer.bos_token}<|user|>Before. After.<|end|><|assistant|>The answer is"
    assert head.count(plain.begin()[0]) == 1
    assert plain.frame("B", "A") == ([*plain.begin(), *codec.encode("B")], codec.encode("A"))
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ConfigError, match="--no-chat"):
        codec.frame("Before.", "After.")
    tokenizer.chat_template = TEMPLATE
    task = tasks.get_task("needle")
    assert task.form_for(codec) == "instruct"
    assert task.form_for(plain) == "continuation"
    sample = task.generate(codec, 1000, 0)
    whole = tokenizer.decode(sample.prompt())
    assert whole.count("<|user|>") == 1 and whole.count(tokenizer.bos_token) == 1
    assert sample.tokens == 1000 and len(sample.prompt()) + 128 == 1000
