"""The packaged model: Transformers loads it as it is, and it looks secrets up."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from longswift import tiny
from longswift.tiny import card, corpus, tasks

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.path()).eval()
    return model, AutoTokenizer.from_pretrained(tiny.path())


def test_importing_loads_no_framework():
    code = (
        "import sys, longswift.tiny, longswift.tiny.corpus, longswift.tiny.tasks;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_are_complete_and_small(loaded):
    files = {f.name: f.stat().st_size for f in tiny.path().iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "MODEL_CARD.md",
        "card.json",
    } <= files.keys()
    assert sum(files.values()) < 16e6
    model, _ = loaded
    assert sum(p.numel() for p in model.parameters()) <= 8e6
    assert model.config.max_position_embeddings >= 1 << 20


def test_digits_are_single_tokens(loaded):
    _, tokenizer = loaded
    ids = tokenizer(" is 48213.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids)[-6:] == [*"48213", "."]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " is 48213."


def test_generate_finds_a_secret_at_1k_tokens(loaded):
    model, tokenizer = loaded
    hidden = tasks.hide_secrets(corpus.text("heldout")[:3000], 1, seed=5, depths=(0.4,))
    prompt = tokenizer(hidden.document + hidden.questions[0], return_tensors="pt")
    size = prompt["input_ids"].shape[1]
    assert size > 800
    output = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(output[0, size:]).strip() == hidden.answers[0]


def test_evaluate_and_card(tmp_path, loaded):
    text = corpus.text("heldout")[:40_000]
    result = card.evaluate(
        tiny.path(), (1024,), trials=8, keys=(2,), multi_lengths=(2048,), multi_trials=4, text=text
    )
    assert result["single"]["1024"] >= 0.75
    assert result["multi"]["2048"]["2"] >= 0.25
    with pytest.raises(ValueError, match="evaluate without text="):
        card.write(tmp_path, result, command="")
    published = json.loads((tiny.path() / "card.json").read_text(encoding="utf-8"))
    assert published["single"]["32768"] >= 0.9
    with pytest.raises(ValueError, match="raise it"):
        card.recall(*loaded, [5, 6, 7], 64, keys=2)
