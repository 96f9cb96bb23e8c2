"""The second recipe: positions that leap, and a rotary model that is trained with them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from longswift.core.errors import ConfigError  # noqa: E402
from longswift.tiny import network, positions, settings, train  # noqa: E402
from longswift.tiny.config import RECIPES, Config, Stage, recipe  # noqa: E402

SMALL = Config(
    stages=(
        Stage(length=48, tokens=2 * 192, batch=192, leaps=0.5),
        Stage(length=160, tokens=2 * 160, batch=160, leaps=1.0),
    ),
    family="llama",
    vocab_size=300,
    layers=2,
    hidden=32,
    heads=2,
    kv_heads=1,
    feed_forward=48,
    rope_theta=500.0,
    reach=1000,
    warmup=2,
    corpus_limit=200,
    words=200,
)


def build(**other):
    model = train._model(dataclasses.replace(SMALL, **other)).eval()
    with torch.no_grad():
        for p in model.parameters():
            # The weights of an untrained model hardly look at positions.
            p.mul_(3.0)
    return model


def leaping(rows, length, seed=0):
    drawn = positions.draw(rows, length, reach=1000, leaps=1.0, seed=seed, step=0)
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("length", [1, 7, 50, 998, 999])
def test_leaping_positions_increase_and_stay_within_reach(length):
    drawn = positions.draw(500, length, reach=1000, leaps=1.0, seed=3, step=5)
    assert drawn.shape == (500, length) and drawn.dtype == np.int64
    assert (np.diff(drawn) >= 1).all()
    assert drawn.min() >= 0 and drawn.max() < 1000
    # Skips share a total, so no row has more of them than cuts.
    assert (np.diff(drawn) > 1).sum(1).max(initial=0) <= 8


def test_targets_are_log_uniform():
    drawn = positions.draw(4000, 50, reach=5000, leaps=1.0, seed=0, step=0)
    share = np.log((drawn[:, -1] + 1) / 50) / np.log(100)
    # A share of the room is lost to rounding down, up to one position a cut.
    assert abs(share.mean() - 0.5) < 0.03 and share.max() > 0.99
    assert abs((share < 0.25).mean() - 0.25) < 0.04


def test_cuts_fall_everywhere_and_are_one_to_eight():
    drawn = positions.draw(4000, 40, reach=100_000, leaps=1.0, seed=0, step=0)
    wide = drawn[:, -1] > 50_000
    leaps = np.diff(drawn[wide], prepend=-1) > 1
    assert set(leaps.sum(1)) == set(range(1, 9))
    assert leaps.any(0).all()


@pytest.mark.parametrize("leaps", [0.1, 0.5, 0.9])
def test_the_share_of_leaping_rows(leaps):
    drawn = positions.draw(4000, 20, reach=100_000, leaps=leaps, seed=1, step=1)
    moved = (drawn != np.arange(20)).any(1).mean()
    assert abs(moved - leaps) < 0.03


def test_positions_depend_on_seed_and_step_alone():
    first, again, other, later = (
        positions.draw(40, 30, reach=900, leaps=0.5, seed=seed, step=step)
        for seed, step in ((1, 4), (1, 4), (2, 4), (1, 5))
    )
    assert (first == again).all()
    assert (first != other).any() and (first != later).any()


def test_rows_as_long_as_the_reach_do_not_leap():
    assert positions.draw(4, 1000, reach=1000, leaps=1.0, seed=0, step=0) is None
    assert positions.draw(4, 1001, reach=1000, leaps=1.0, seed=0, step=0) is None
    assert positions.draw(4, 100, reach=1000, leaps=0.0, seed=0, step=0) is None


def test_training_forward_at_leaping_positions_equals_the_models_own():
    model = build()
    ids = torch.randint(2, 300, (3, 60), generator=torch.Generator().manual_seed(0))
    places = leaping(3, 60)
    kept = torch.tensor([0, 7, 30, 59])
    with torch.inference_mode():
        # Without a mask Transformers takes a leap for the start of another text.
        own = model.model(
            ids, position_ids=places, attention_mask=torch.ones_like(ids)
        ).last_hidden_state
        plain = model.model(ids).last_hidden_state
        mine = network.hidden_states(model, ids, positions=places)
        some = network.hidden_states(model, ids, kept, positions=places)
    torch.testing.assert_close(mine, own, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(some, own[:, kept], atol=2e-5, rtol=1e-4)
    assert (plain - own).abs().max() > 1e-2


@pytest.mark.parametrize("family", network.FAMILIES)
@pytest.mark.parametrize("count", [1, 20, 21, 40])
def test_many_kept_need_no_mask(family, count, monkeypatch):
    model = build(family=family, reach=None, stages=SMALL.stages[:0], window=8)
    ids = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    kept = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:count].sort().values
    attend, masks = network.F.scaled_dot_product_attention, []

    def watched(q, k, v, *, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask, **options)

    every = network.hidden_states(model, ids)[:, kept]
    monkeypatch.setattr(network.F, "scaled_dot_product_attention", watched)
    some = network.hidden_states(model, ids, kept)
    torch.testing.assert_close(some, every, atol=2e-5, rtol=1e-4)
    assert (masks[-1] is None) == (count > 20)
    weights = torch.randn(some.shape, generator=torch.Generator().manual_seed(3))
    parameters = [p for p in model.model.parameters()]
    for a, b in zip(
        torch.autograd.grad((some * weights).sum(), parameters),
        torch.autograd.grad((every * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_few_kept_of_a_last_layer_that_slides():
    model = build(family="smollm3", reach=None, stages=SMALL.stages[:0], window=8, layers=3)
    ids = torch.randint(2, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([3, 17, 39])
    some = network.hidden_states(model, ids, kept)
    torch.testing.assert_close(some, network.hidden_states(model, ids)[:, kept])


def test_rows_of_which_nothing_is_scored_add_nothing(monkeypatch):
    monkeypatch.setattr(train, "_CACHED_TOKENS", 40)
    ids = np.random.default_rng(1).integers(2, 300, (3, 41))
    weights = np.zeros((3, 41), dtype=np.float32)
    weights[1, 5:] = 1.0
    models = build(), build()
    told = train._gradients(models[0], train.data.Batch(ids, weights))
    alone = train._gradients(models[1], train.data.Batch(ids[1:2], weights[1:2]))
    assert told == alone
    for some, one in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(some.grad, one.grad)


def test_gradients_of_few_rows_at_a_time_are_those_of_all(tmp_path, monkeypatch):
    _, pool = train._prepare(tmp_path, SMALL)
    batch = train.data.make_batch(pool, 5, 100, 1, 0)
    places = leaping(5, 100).numpy()
    model = build()
    parameters = dict(model.named_parameters())

    def gradients(cached, places):
        monkeypatch.setattr(train, "_CACHED_TOKENS", cached)
        model.zero_grad()
        train._gradients(model, batch, places)
        return {name: p.grad.clone() for name, p in parameters.items()}

    whole, single, pairs = (gradients(cached, places) for cached in (1000, 1, 200))
    for name, wanted in whole.items():
        torch.testing.assert_close(single[name], wanted, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(pairs[name], wanted, atol=1e-4, rtol=1e-3)
    plain = gradients(1000, None)
    assert any((plain[name] - wanted).abs().max() > 1e-3 for name, wanted in whole.items())


def weights_of(folder):
    return train.load_checkpoint(folder)["model"]


def test_an_interrupted_run_with_leaps_ends_with_the_same_weights(tmp_path):
    train.train(tmp_path / "whole", config=SMALL)
    for end in (1, 3, None):
        train.train(tmp_path / "parts", config=dataclasses.replace(SMALL, max_steps=end))
    still = tuple(dataclasses.replace(stage, leaps=0.0) for stage in SMALL.stages)
    train.train(tmp_path / "still", config=dataclasses.replace(SMALL, stages=still))
    whole, parts, still = (weights_of(tmp_path / name) for name in ("whole", "parts", "still"))
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name
    assert not all(torch.equal(weight, still[name]) for name, weight in whole.items())


def test_the_rotary_recipe_trains_and_states_what_it_reaches(tmp_path):
    config = recipe("rotary")
    assert (config.family, config.layers, config.hidden, config.heads) == ("llama", 4, 256, 4)
    assert max(stage.length for stage in config.stages) <= config.reach == 33_000
    assert {stage.leaps for stage in config.stages} == {0.0, 0.5}
    small = dataclasses.replace(
        config,
        stages=tuple(
            dataclasses.replace(stage, length=stage.length // 16, tokens=1, batch=1)
            for stage in config.stages[5:7]
        ),
        vocab_size=300,
        corpus_limit=200,
        words=200,
    )
    assert small.total_steps == 2
    folder = train.train(tmp_path, config=small)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written["max_position_embeddings"] == 33_000
    assert written["rope_parameters"]["rope_theta"] == 500_000
    assert written["hidden_size"] == 256 and written["num_key_value_heads"] == 2


def test_the_longest_stage_counts_where_it_exceeds_the_reach():
    model = train._model(dataclasses.replace(SMALL, reach=100))
    assert model.config.max_position_embeddings == 160


def test_names_of_recipes():
    assert recipe("packaged") == Config()
    with pytest.raises(ConfigError, match="expected one of packaged, rotary, got 'rotery'"):
        recipe("rotery")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_rates_of_a_recipe_stay_within_the_peak(name):
    config = recipe(name)
    rates = [config.rate(step) for step in range(config.total_steps)]
    assert max(rates) == 1.0 and min(rates) > 0 and rates[-1] < 0.05


def test_impossible_leaps_are_refused():
    with pytest.raises(ValueError, match="expected leaps from 0 to 1, got 2"):
        Stage(length=8, tokens=8, batch=8, leaps=2)
    with pytest.raises(ValueError, match="expected a reach for stages that leap"):
        dataclasses.replace(SMALL, reach=None)
    with pytest.raises(ValueError, match="expected family 'llama' with a reach"):
        dataclasses.replace(SMALL, family="smollm3")


def test_a_run_older_than_a_setting_goes_on(tmp_path):
    still = tuple(dataclasses.replace(stage, leaps=0.0) for stage in SMALL.stages)
    config = dataclasses.replace(SMALL, stages=still, reach=None, rope_theta=10_000.0)
    train.train(tmp_path, config=dataclasses.replace(config, max_steps=1))
    file = tmp_path / "settings.json"
    old = json.loads(file.read_text(encoding="utf-8"))
    assert settings.noted(file) == old == settings.kept(config)
    for name in ("rope_theta", "reach"):
        del old[name]
    for stage in old["stages"]:
        del stage["leaps"]
    file.write_text(json.dumps(old), encoding="utf-8")
    train.train(tmp_path, config=dataclasses.replace(config, max_steps=2))
    assert train.load_checkpoint(tmp_path)["step"] == 2
    for other in ({"rope_theta": 500.0}, {"reach": 1000}, {"reach": 1000, "stages": SMALL.stages}):
        with pytest.raises(ValueError, match=f"another {', '.join(sorted(other))}; use a new"):
            train.train(tmp_path, config=dataclasses.replace(config, **other))
    file.write_text(json.dumps(old | {"later": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="another later; use a new"):
        train.train(tmp_path, config=config)
