"""The byte-level tokenizer of the tiny model, trained on the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from longswift.tiny import corpus, tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["END", "END_ID", "PAD", "PAD_ID", "train"]

END, END_ID = "<|endoftext|>", 0
PAD, PAD_ID = "<|pad|>", 1


def _texts(limit: int | None) -> Iterator[str]:
    for name, body in corpus.documents("train"):
        # Prose is a small part of the corpus and would otherwise get few pieces of its own.
        for _ in range(4 if name.startswith("topic:") else 1):
            yield body[:limit]
    yield tasks.statement("word", "0") * 2000


def train(vocab_size: int, *, limit: int | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that splits digits and puts the end token first.

    Args:
        vocab_size: Number of pieces, the two special ones included.
        limit: Characters read of each document; everything by default.

    Raises:
        ValueError: If the vocabulary cannot hold all bytes.
    """
    if vocab_size < 258:
        raise ValueError(f"expected vocab_size >= 258 (all bytes), got {vocab_size}; raise it")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(limit), trainer)
    # A first token of its own gives attention a place to rest when nothing matches.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, END_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )
