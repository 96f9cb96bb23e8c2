"""Calibration: what candidates keep, which one is chosen, and whether it holds on unseen text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from longswift import ConfigError, Full, InputError, MSSwift
from longswift.core.observe import Observed
from longswift.eval import calibration_runs, fidelity
from longswift.eval.calibration import (
    CAPTURED,
    OUTPUT,
    Candidate,
    Tried,
    Tryout,
    candidates,
    cheapest,
    variant,
    with_choice,
)
from longswift.eval.calibration_runs import Calibration
from longswift.eval.calibration_summary import table
from longswift.eval.models import load
from longswift.mechanisms.profile import read_profile

BASE = MSSwift(
    windows=(16, 64),
    sinks=4,
    key_tokens=16,
    block=16,
    selector={"name": "bounds", "key_block": 8, "row_group": 4, "proposals": 4},
    remainder=32,
    dense_below=0,
)


def call_of(n: int, offset: int = 0) -> Observed:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 8, generator=generator) for h in (4, 2, 2))
    q = 2 * q[:, :, offset:]
    return Observed(
        mechanism=Full(),
        q=q,
        k=k,
        v=v,
        causal=True,
        key_mask=None,
        scale=8**-0.5,
        training=False,
        result=Full()(q, k, v),
        layer=1,
    )


@pytest.mark.parametrize("criterion", [CAPTURED, OUTPUT])
@pytest.mark.parametrize("offset", [0, 80])
def test_tryouts_measure_what_the_mechanism_does(criterion: str, offset: int) -> None:
    call = call_of(200, offset)
    mechanism = variant(BASE, Candidate(scale=1, key_tokens=8), 2)
    tryout = Tryout(
        lambda layer, kv_heads: {"one": mechanism},
        block=16,
        sample=lambda layer: range(13),
        criterion=criterion,
    )
    tryout(call)
    kept = tryout.kept[1]["one"]
    whole = mechanism(call.q, call.k, call.v)
    if criterion == CAPTURED:
        exact = mechanism.exact_part()
        assert exact is not None
        lse = exact(call.q, call.k, call.v).lse
        expected = (lse - call.result.lse).exp().mean((0, 2))
    else:
        wrong = (whole.out - call.result.out).transpose(0, 1).flatten(1).norm(dim=1)
        expected = 1 - wrong / call.result.out.transpose(0, 1).flatten(1).norm(dim=1)
    assert kept.share(criterion) == pytest.approx(expected.tolist(), abs=1e-5)
    assert kept.queries == 200 - offset
    # Attended keys as the statistics count them, and the choosing on top.
    attended = whole.stats.keys_per_query
    assert attended < sum(kept.cost()) / 2 < attended + 0.5 * (4 * 8 + 3 * 200 / 32) + 200 / 32


def test_only_asked_blocks_are_tried_and_chunks_do_not_matter() -> None:
    asked_for = [7, 8, 12, 19, 20]
    whole, cut = (
        Tryout(
            lambda layer, kv_heads: {"one": BASE},
            block=16,
            sample=lambda layer: asked_for,
            criterion=CAPTURED,
        )
        for _ in range(2)
    )
    call = call_of(320)
    whole(call)
    for start in range(0, 320, 64):
        q, k, v = call.q[:, :, start : start + 64], call.k[:, :, : start + 64], call.v
        v = v[:, :, : start + 64]
        cut(
            Observed(
                **{**vars(call), "q": q, "k": k, "v": v, "result": Full()(q, k, v)},
            )
        )
    one, two = whole.kept[1]["one"], cut.kept[1]["one"]
    # The document has no block 20.
    assert one.queries == two.queries == 4 * 16
    assert one.share(CAPTURED) == pytest.approx(two.share(CAPTURED), abs=1e-5)
    assert one.cost() == pytest.approx(two.cost(), rel=1e-6)


def test_the_cheapest_that_serves_every_head_of_the_group() -> None:
    found = candidates(BASE, (0, 8))
    assert found == [
        Candidate(scale=0, key_tokens=0),
        Candidate(scale=0, key_tokens=8),
        Candidate(scale=1, key_tokens=0),
        Candidate(scale=1, key_tokens=8),
    ]
    tried = Tried(
        shares=[
            [0.99, 0.80, 0.95, 0.91, 0.1, 0.2],
            [0.99, 0.92, 0.99, 0.99, 0.2, 0.3],
            [0.99, 0.91, 0.99, 0.99, 0.3, 0.3],
            [0.99, 0.99, 0.99, 0.99, 0.5, 0.95],
        ],
        costs=[[10, 10, 10], [30, 30, 30], [20, 20, 20], [40, 40, 40]],
        dense=100.0,
    )
    layer = cheapest(tried, found, 3, 0.9)
    shares, costs = with_choice(tried, layer, found)
    assert layer.scale == (1, 0, 0) and layer.key_tokens == (0, 0, 0)
    assert layer.dense == (False, False, True)
    assert shares == [0.99, 0.91, 0.95, 0.91, 1.0, 1.0] and costs == [20, 10, 100]
    # A candidate dearer than full attention serves nobody.
    less = Tried(**{**vars(tried), "dense": 15.0})
    layer = cheapest(less, found, 3, 0.9)
    assert layer.dense == (True, False, True)
    assert with_choice(less, layer, found)[1] == [15, 10, 15]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same few words in random order: every piece is like any other."""
    rng = random.Random(0)
    words = ("alpha", "beta", "gamma", "delta", "the", "of", "and", "list", "value", "name")
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(rng.choice(words) for _ in range(3000)))
    return file


def asked(model: Path, text: Path, **changes: Any) -> Calibration:
    options = {
        "mechanism": BASE.to_dict(),
        "target": 0.45,
        "budgets": (0, 32, 128),
        "model": str(model),
        "file": str(text),
        "length": 384,
        "documents": 2,
        "blocks": 16,
        "chunk": 128,
    }
    return Calibration(**{**options, **changes})


def test_prediction_holds_on_unseen_text(model_directory: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    profile, result = calibration_runs.run(asked(model_directory, text), out, progress=False)
    assert read_profile(out) == profile
    summary = result.summary
    assert summary["off"] <= 0.01 and "prediction holds" in summary["verdict"]
    assert summary["predicted"] >= 0.45 and summary["cost"] < 0.9
    assert summary["worst_head_off"] >= summary["off"]
    assert summary["another"]["low"] < summary["checked"] < summary["another"]["high"]
    assert profile.calibration["target"] == 0.45 and profile.calibration["file"] == "words.txt"
    assert len(table(profile, result).rows) == 2
    assert str(tmp_path) not in out.read_text()
    # The meter, on a document of its own accord, finds what the profile promises.
    loaded = load(str(model_directory))
    ids = loaded.encode(text.read_text())[-384:]
    found = fidelity.measure(loaded.model, ids, profile, chunk=128)
    captured = [row.captured_mean for row in found.heads if row.name == "profile"]
    assert len(captured) == 4
    for got, promised in zip(captured, summary["layers"][0]["predicted"], strict=True):
        assert got == pytest.approx(promised, abs=0.03)


def test_an_interrupted_calibration_gives_the_same_profile(
    model_directory: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = asked(model_directory, text, budgets=(0, 64))
    whole, _ = calibration_runs.run(run, tmp_path / "a.json", progress=False)
    tryout, done = calibration_runs._Calibrator.tryout, []

    def interrupted(self: Any, part: int, number: int, mechanisms: Any) -> Any:
        done.append((part, number))
        if len(done) in (2, 4):
            raise KeyboardInterrupt
        return tryout(self, part, number, mechanisms)

    monkeypatch.setattr(calibration_runs._Calibrator, "tryout", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            calibration_runs.run(run, tmp_path / "b.json", progress=False)
        assert not (tmp_path / "b.json").exists()
    resumed, _ = calibration_runs.run(run, tmp_path / "b.json", progress=False)
    assert done == [(0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1)]
    both = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    for one in both:
        del one["calibration"]["date"]
    assert both[0] == both[1] and resumed.layers == whole.layers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_an_unreachable_target_is_met_densely(
    model_directory: Path, text: Path, tmp_path: Path
) -> None:
    run = asked(model_directory, text, target=0.999999, budgets=(0,), documents=1)
    profile, result = calibration_runs.run(run, tmp_path / "p.json", progress=False)
    assert profile.mechanism(1) == Full()
    assert result.summary["cost"] == pytest.approx(1.0)
    assert result.summary["checked"] == pytest.approx(1.0, abs=1e-5)
    (most,), said = (
        (one["most_kept"] for one in result.summary["layers"]),
        result.summary["verdict"],
    )
    assert said.startswith("The profile SAVES NOTHING at this target: all 2 KV heads are dense")
    assert "no window and budget tried keeps 99.9999 % of the attention mass" in said
    assert f"keeps {100 * max(most):.1f} % (layer 1, KV head {most.index(max(most))}" in said
    # What it says helps.
    lower = asked(model_directory, text, target=0.99 * max(most), budgets=(0,), documents=1)
    helped, result = calibration_runs.run(lower, tmp_path / "q.json", progress=False)
    assert not all(helped.layers[1].dense)
    # One document says nothing about others.
    assert result.summary["another"] is None and "UNKNOWN" in result.summary["verdict"]


def test_budgets_that_cost_more_than_all_keys_are_told(
    model_directory: Path, text: Path, tmp_path: Path
) -> None:
    run = asked(model_directory, text, budgets=(5000,), documents=1)
    profile, result = calibration_runs.run(run, tmp_path / "p.json", progress=False)
    said = result.summary["verdict"]
    assert all(profile.layers[1].dense) and "SAVES NOTHING" in said
    assert "costs at least as much as full attention on 384 tokens" in said
    assert "smaller --budgets" in said


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"target": 1.5}, ConfigError, "--target"),
        ({"criterion": "speed"}, ConfigError, "--criterion"),
        ({"budgets": ()}, ConfigError, "--budgets"),
        ({"mechanism": {"name": "full"}}, ConfigError, "ms_swift"),
        ({"chunk": 24}, ConfigError, "multiple"),
        ({"length": 64}, InputError, "at least 128 tokens, got 64"),
    ],
)
def test_impossible_calibrations_are_refused(
    change: dict[str, Any],
    error: type[Exception],
    said: str,
    model_directory: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=said):
        calibration_runs.run(asked(model_directory, text, **change), tmp_path / "p", progress=False)
