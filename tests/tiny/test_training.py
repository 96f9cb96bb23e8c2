"""The recipe: batches are a function of the step, and an interrupted run goes on unchanged."""

from __future__ import annotations

import dataclasses
import os
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from longswift.tiny import network, train  # noqa: E402
from longswift.tiny.config import Config, Stage  # noqa: E402

SMALL = Config(
    stages=(
        Stage(length=48, tokens=4 * 96, batch=96),
        Stage(length=160, tokens=4 * 160, batch=160),
    ),
    vocab_size=300,
    layers=2,
    hidden=32,
    heads=2,
    kv_heads=1,
    feed_forward=48,
    window=16,
    warmup=2,
    corpus_limit=200,
    words=200,
)


def build(config, family="smollm3"):
    return network.build(
        family=family,
        vocab_size=config.vocab_size,
        layers=4,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        feed_forward=config.feed_forward,
        window=config.window,
        seed=0,
    )


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    train.train(tmp_path / "whole", config=SMALL)
    for end in (3, 6, None):
        train.train(tmp_path / "parts", config=dataclasses.replace(SMALL, max_steps=end))
    whole, parts = (train.load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == SMALL.total_steps == 8
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    assert not list(tmp_path.rglob("*.tmp"))


def test_sigterm_leaves_a_checkpoint(tmp_path, monkeypatch):
    make = train.data.make_batch

    def interrupt(pool, rows, length, seed, step, *, kind):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(pool, rows, length, seed, step, kind=kind)

    monkeypatch.setattr(train.data, "make_batch", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    train.train(tmp_path, config=SMALL)
    assert train.load_checkpoint(tmp_path)["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_settings_are_refused(tmp_path):
    train.train(tmp_path, config=dataclasses.replace(SMALL, max_steps=1))
    with pytest.raises(ValueError, match="another seed; use a new out_dir"):
        train.train(tmp_path, config=dataclasses.replace(SMALL, seed=9))


@pytest.mark.parametrize("family", network.FAMILIES)
@pytest.mark.parametrize("length", [20, 33, 96, 101])
def test_training_forward_equals_the_models_own(length, family):
    model = build(SMALL, family).eval()
    ids = torch.randint(2, 300, (1, length), generator=torch.Generator().manual_seed(length))
    kept = torch.tensor([0, 7, length - 1])
    with torch.inference_mode():
        own = model.model(ids).last_hidden_state
        mine = network.hidden_states(model, ids)
        some = network.hidden_states(model, ids, kept)
    torch.testing.assert_close(mine, own, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(some, own[:, kept], atol=2e-5, rtol=1e-4)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="expected a family"):
        build(SMALL, "bert")


def test_the_rate_follows_the_stages():
    config = Config()
    total = config.total_steps
    assert config.rate(0) < config.rate(config.warmup) == 1.0
    assert config.rate(total - 1) < 0.1
    assert config.locate(0) == (config.stages[0], 0)
    assert config.locate(total - 1) == (config.stages[-1], config.stages[-1].steps - 1)
    with pytest.raises(ValueError, match="train no further"):
        config.locate(total)


@pytest.mark.parametrize(
    "kind", ["mixed", "sentences", "streams", "bare", "copies", "dense", "texts", "packed"]
)
def test_batches_depend_on_the_step_alone(tmp_path, kind):
    _, pool = train._prepare(tmp_path, SMALL)
    first, second, other = (
        train.data.make_batch(pool, 6, 384, 1, step, kind=kind) for step in (5, 5, 6)
    )
    assert (first.ids == second.ids).all() and (first.weights == second.weights).all()
    assert not (first.ids == other.ids).all()
    assert first.ids.max() < 300 and first.weights.min() == 0
    with pytest.raises(ValueError, match="expected a kind"):
        train.data.make_batch(pool, 1, 48, 1, 0, kind="other")


def test_bare_statements_repeat_and_leave_out_words(tmp_path):
    _, pool = train._prepare(tmp_path, SMALL)
    stop, between = (
        pool.parts["stop"].tolist(),
        [pool.parts[name].tolist() for name in ("is", "space")],
    )
    forms, scored = set(), 0
    for seed in range(40):
        row = train.data._stream_row(pool, 97, np.random.default_rng(seed), bare=True)
        ids, weights = (part.tolist() for part in row)
        told, start = set(), int(ids[0] == train.data.END_ID)
        for place, (token, weight) in enumerate(zip(ids, weights, strict=True)):
            if token in pool.digits and weight == train.data.ANSWER_WEIGHT:
                # What is asked for was stated before, in the same words.
                assert tuple(ids[start : place + 1]) in told
                forms.add(
                    sum(ids[place - 1 - i] == part for i, (part,) in enumerate(between[::-1]))
                )
                scored += 1
            if [token] == stop:
                start = place + 1
            told.add(tuple(ids[start : place + 1]))
    assert forms == {0, 1, 2} and scored > 100
