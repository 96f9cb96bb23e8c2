"""A small model with random weights, saved as a directory, for everything that reads."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the tiny model's kind: two layers, one sliding, one full."""
    from longswift.tiny import network, tokenizer

    place = tmp_path_factory.mktemp("model")
    network.build(
        vocab_size=512,
        layers=2,
        hidden=32,
        heads=4,
        kv_heads=2,
        feed_forward=64,
        window=32,
        seed=0,
    ).save_pretrained(place)
    tokenizer.train(512, limit=300).save_pretrained(place)
    return place
