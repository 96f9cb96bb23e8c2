"""Small ``LongSwiftLM`` models, and what is done with each of them: generating, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from longswift import SlidingWindow
from longswift.hf import LongSwiftConfig, LongSwiftLM, memory_parameters
from longswift.memory.compressive import Infini
from longswift.memory.segment import TransformerXL
from tests.hf.models import VOCAB

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    initializer_range=0.2,
)
MIXED = [SlidingWindow(window=6), Infini(segment=5), TransformerXL(segment=4, memory=4), "full"]


def build(attention: Any = MIXED, **more: Any) -> LongSwiftLM:
    torch.manual_seed(0)
    model = LongSwiftLM(LongSwiftConfig(attention=attention, **{**SIZES, **more})).eval()
    with torch.no_grad():
        for parameter in memory_parameters(model):
            parameter.normal_(std=0.3)
    return model


def check_teacher_forcing(
    model: LongSwiftLM, inputs: dict[str, Tensor], *, with_positions: bool
) -> None:
    """The logits of nine generated tokens are those of reading the whole at once."""
    grown = model.generate(
        **inputs,
        max_new_tokens=9,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    rows, length = inputs["input_ids"].shape
    mask = torch.cat([inputs["attention_mask"], torch.ones(rows, 9, dtype=torch.long)], 1)
    told = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if with_positions else {}
    whole = model(grown.sequences, attention_mask=mask, **told).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(grown.logits, 1), whole, rtol=1e-3, atol=1e-3)


def train(model: LongSwiftLM, folder: Path) -> float:
    """Three steps with recomputed activations: every parameter moves, biases without decay.

    Returns:
        The loss.
    """
    rows = torch.randint(3, VOCAB, (4, 18))
    before = {n: p.clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_checkpointing=True, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in rows])
    assert not any("bias" in name for name in trainer.get_decay_parameter_names(model))
    loss = trainer.train().training_loss
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    return loss
