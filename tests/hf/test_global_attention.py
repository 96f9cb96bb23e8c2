"""Longformer in encoders: separate projections of global tokens, neutral at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from longswift import InputError, UnsupportedError
from longswift.hf import convert, from_pretrained, set_attention
from longswift.mechanisms.longformer import Longformer
from tests.hf.models import batch, build

ENCODERS = ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra"]
SHORT = Longformer(left=3, right=2, global_tokens=2)


def encoder(name: str, **more: Any) -> Any:
    config = getattr(hf, f"{name}Config")(
        vocab_size=97, hidden_size=32, embedding_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
        initializer_range=0.3, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(hf, f"{name}ForMaskedLM")(config).eval()


def disturb(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_global" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_copies_change_nothing(name: str, padding: str) -> None:
    model, inputs = encoder(name), batch(24, padding)
    real = inputs["attention_mask"].bool()
    before = {n: id(m) for n, m in model.named_modules()}
    set_attention(model, SHORT)
    plain = model(**inputs).logits
    with convert(model, SHORT) as handle:
        assert handle.layers == [0, 1]
        torch.testing.assert_close(model(**inputs).logits[real], plain[real])
        disturb(model)
        assert not torch.allclose(model(**inputs).logits[real], plain[real])
    assert torch.equal(model(**inputs).logits, plain)
    assert {n: id(m) for n, m in model.named_modules()} == before


@torch.no_grad()
def test_only_global_rows_use_them() -> None:
    model, inputs = encoder("Bert"), batch(24, "left")
    convert(model, SHORT, layers=[0])
    layer = model.bert.encoder.layer[0].attention.self
    outputs: list[torch.Tensor] = []
    layer.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    model(**inputs)
    disturb(model)
    model(**inputs)
    moved = (outputs[0] - outputs[1]).abs().amax(-1) > 1e-5
    position = inputs["attention_mask"].cumsum(1) - 1
    real = inputs["attention_mask"].bool()
    # The only real token of the last row sees nothing but itself, through another projection.
    assert torch.equal(moved, real & (position < SHORT.global_tokens))


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    model, inputs = encoder("Roberta"), batch(24, "right")
    convert(model, SHORT, layers=[1])
    disturb(model)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, auto_class=hf.AutoModelForMaskedLM).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(InputError, match="query_global"):
        encoder("Roberta").save_pretrained(tmp_path / "other")
        model.config.save_pretrained(tmp_path / "other")
        from_pretrained(tmp_path / "other", auto_class=hf.AutoModelForMaskedLM)


def test_global_projections_are_trained() -> None:
    model, inputs = encoder("Bert").train(), batch(24, "right")
    convert(model, "longformer")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "_global.weight" in n}
    assert len(grads) == 6
    assert all(g is not None and g.any() for g in grads.values())


def test_what_is_no_encoder_is_refused() -> None:
    for model in (build("llama"), build("modernbert")):
        with pytest.raises(UnsupportedError, match="BERT, RoBERTa"):
            convert(model, SHORT)
    with pytest.raises(UnsupportedError, match="decodes"):
        convert(hf.BertLMHeadModel(hf.BertConfig(is_decoder=True, num_hidden_layers=1)), SHORT)
    dropping = encoder("Bert")
    convert(dropping, SHORT)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        dropping(**batch(8), output_attentions=True)
    dropping.train()
    dropping.bert.encoder.layer[0].attention.self.dropout.p = 0.1
    with pytest.raises(UnsupportedError, match="dropout"):
        dropping(**batch(8))
