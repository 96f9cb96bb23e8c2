"""The fidelity meter against attention weights that Transformers itself computes densely."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longswift import Full, MSSwift, SlidingWindow
from longswift.core.errors import ConfigError, InputError
from longswift.core.observe import Observed, observe
from longswift.eval import fidelity, fidelity_runs
from longswift.eval.fidelity_runs import FidelityRun
from longswift.eval.judging import attend_rows
from longswift.eval.models import Loaded, load
from longswift.eval.reading import hidden_states
from longswift.eval.results import load as load_result
from longswift.eval.rivals import Uniform
from longswift.hf import SwiftCache, set_attention

SMALL = MSSwift(
    windows=(16, 32),
    sinks=4,
    key_tokens=16,
    block=16,
    selector={"name": "bounds", "key_block": 8, "row_group": 4},
    remainder=32,
    dense_below=0,
)
TOKENS = 203


@pytest.fixture(scope="module")
def loaded(model_directory: Path) -> Loaded:
    found = load(str(model_directory))
    # Scores of some spread, so that a choice of keys matters.
    with torch.no_grad():
        for name, weight in found.model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6.0)
    return found


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(3, 500, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def measured(loaded: Loaded, ids: list[int]) -> fidelity.Fidelity:
    return fidelity.measure(loaded.model, ids, SMALL, chunk=64)


def of(rows: list[Any], name: str) -> list[Any]:
    return [row for row in rows if row.name == name]


def test_heads_agree_with_dense_attention_weights(
    loaded: Loaded, ids: list[int], measured: fidelity.Fidelity
) -> None:
    model, calls = loaded.model, []
    tokens = torch.tensor([ids])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=tokens, output_attentions=True).attentions[1][0].double()
    set_attention(model, Full())
    with torch.no_grad(), observe(calls.append):
        model(input_ids=tokens)
    call: Observed = next(c for c in calls if isinstance(c.mechanism, Full))
    assert call.layer == 1
    window = SlidingWindow(window=measured.window)
    truth = weights @ call.v[0].repeat_interleave(2, 0).double()
    for name, mechanism in (("ms_swift", SMALL), ("window", window)):
        mass = (weights * mechanism.visible(call.q, call.k)[0]).sum(-1).numpy()
        out = mechanism.reference(call.q, call.k, call.v).out[0].double()
        error = (out - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
        rows = of(measured.heads, name)
        assert [row.head for row in rows] == [0, 1, 2, 3] and {row.layer for row in rows} == {1}
        for row in rows:
            assert row.captured_mean == pytest.approx(mass[row.head].mean(), abs=1e-4)
            p10 = np.quantile(mass[row.head], 0.1)
            assert row.captured_p10 == pytest.approx(p10, abs=1e-4)
            assert row.captured_min == pytest.approx(mass[row.head].min(), abs=1e-4)
            assert row.error == pytest.approx(float(error[row.head]), abs=1e-4)
            assert row.rows == TOKENS
    even = torch.ones(TOKENS, TOKENS).tril().double()
    even = (even / even.sum(1, keepdim=True)) @ call.v[0].repeat_interleave(2, 0).double()
    error = (even - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    for row in of(measured.heads, "uniform"):
        assert row.error == pytest.approx(float(error[row.head]), abs=1e-4)
        assert row.captured_mean is None


def test_density_is_the_share_of_visible_pairs(
    loaded: Loaded, ids: list[int], measured: fidelity.Fidelity
) -> None:
    calls: list[Observed] = []
    set_attention(loaded.model, Full())
    with torch.no_grad(), observe(calls.append):
        loaded.model(input_ids=torch.tensor([ids]))
    call = next(c for c in calls if isinstance(c.mechanism, Full))
    seen = SlidingWindow(window=measured.window).visible(call.q, call.k)[0].sum((1, 2))
    pairs = TOKENS * (TOKENS + 1) / 2
    for row in of(measured.heads, "window"):
        assert row.density == pytest.approx(float(seen[row.head]) / pairs)
    keys = {row.name: row.keys_per_query for row in measured.ends}
    assert keys["window"] == pytest.approx(keys["ms_swift"], rel=0.02)
    mean = np.mean([row.density for row in of(measured.heads, "ms_swift")])
    assert of(measured.ends, "ms_swift")[0].density == pytest.approx(mean)


def test_the_end_agrees_with_whole_models(
    loaded: Loaded, ids: list[int], measured: fidelity.Fidelity
) -> None:
    model, tokens = loaded.model, torch.tensor([ids])

    def log_probs() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=tokens).logits[0].double().log_softmax(-1)

    model.set_attn_implementation("sdpa")
    dense = log_probs()
    set_attention(model, SMALL)
    sparse = log_probs()
    (row,) = of(measured.ends, "ms_swift")
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    assert row.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert row.kl is not None and row.kl > 1e-5
    assert row.agreement == pytest.approx(
        float((dense.argmax(-1) == sparse.argmax(-1)).double().mean())
    )
    nll = -sparse[:-1].gather(1, tokens[0, 1:, None])
    assert row.nll == pytest.approx(float(nll.mean()), abs=1e-4)
    assert row.kl_by_part is not None
    eighth = torch.arange(TOKENS) * 8 // TOKENS
    assert row.kl_by_part[5] == pytest.approx(float(kl[eighth == 5].mean()), rel=1e-2)
    (full,) = of(measured.ends, "full")
    assert full.kl == 0.0 and full.agreement == 1.0 and full.density == 1.0


def test_the_model_is_left_as_it_was(loaded: Loaded, ids: list[int]) -> None:
    set_attention(loaded.model, SlidingWindow(window=7))
    before = copy.deepcopy(loaded.model.config.to_dict())
    fidelity.measure(loaded.model, ids[:64], SMALL, chunk=32)
    assert loaded.model.config.to_dict() == before
    assert loaded.model.config._attn_implementation == "longswift_sliding_window"


def test_long_documents_are_judged_by_samples(loaded: Loaded, ids: list[int]) -> None:
    found = fidelity.measure(loaded.model, ids, SMALL, chunk=64, exact_below=100)
    assert found.judge == "sampled"
    assert {row.rows for row in found.heads} == {4}
    assert all(row.kl is None and row.nll > 0 for row in found.ends)
    assert {row.name for row in found.ends} == {"ms_swift", "window", "uniform"}


def test_sampled_rows_are_full_attention() -> None:
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((4, 90), (2, 200), (2, 200)))
    result = Full()(q, k, v)
    call = Observed(
        mechanism=Full(),
        q=q,
        k=k,
        v=v,
        causal=True,
        key_mask=None,
        scale=8**-0.5,
        training=False,
        result=result,
        layer=None,
    )
    rows = torch.tensor([0, 3, 50, 89])
    out, lse = attend_rows(call, rows)
    torch.testing.assert_close(out, result.out[:, :, rows])
    torch.testing.assert_close(lse, result.lse[:, :, rows])


@pytest.mark.parametrize("causal", [True, False])
def test_uniform_attention_is_full_attention_without_scores(causal: bool) -> None:
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((4, 30), (2, 50), (2, 50)))
    one, two = (m(q, k, v, causal=causal, scale=0.0) for m in (Uniform(), Full()))
    torch.testing.assert_close(one.out, two.out)
    torch.testing.assert_close(one.lse, two.lse)


def asked(model: Path, **changes: Any) -> FidelityRun:
    options = {
        "mechanism": SMALL.to_dict(),
        "model": str(model),
        "length": 256,
        "documents": 3,
        "chunk": 128,
    }
    return FidelityRun(**{**options, **changes})


def test_an_interrupted_run_gives_the_same_result(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fidelity_runs.run(asked(model_directory), tmp_path / "a.json", progress=False)
    assert load_result(tmp_path / "a.json", "fidelity") == whole
    measure, done = fidelity.measure, []

    def interrupted(*args: Any, **options: Any) -> Any:
        done.append(options["document"])
        if done == [0, 1]:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(fidelity, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fidelity_runs.run(asked(model_directory), tmp_path / "b.json", progress=False)
    resumed = fidelity_runs.run(asked(model_directory), tmp_path / "b.json", progress=False)
    assert done == [0, 1, 1, 2]
    assert resumed.rows == whole.rows and resumed.summary == whole.summary
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert str(model_directory.parent) not in (tmp_path / "a.json").read_text()


def test_verdict_and_tables(model_directory: Path) -> None:
    result = fidelity_runs.run(asked(model_directory, documents=1), progress=False)
    assert result.summary["verdict"].startswith("ms_swift scores")
    assert len(fidelity_runs.end_table(result).rows) == 4
    assert len(fidelity_runs.head_table(result).rows) == 4
    sampled = fidelity_runs.run(asked(model_directory, documents=1, exact_below=1), progress=False)
    assert "sampled rows" in sampled.summary["verdict"]
    assert len(fidelity_runs.end_table(sampled).rows) == 3


def test_a_planted_failure_is_called_a_loss() -> None:
    """The trained model, with hardly any keys: far from full attention, and told so."""
    poor = MSSwift(windows=(16,), sinks=0, key_tokens=0, block=16, remainder=None, dense_below=0)
    run = FidelityRun(mechanism=poor.to_dict(), length=1024, chunk=256)
    verdict = fidelity_runs.run(run, progress=False).summary["verdict"]
    assert "That is a loss" in verdict and "close." not in verdict
    full = FidelityRun(mechanism=Full().to_dict(), length=512, chunk=256)
    assert "That is close." in fidelity_runs.run(full, progress=False).summary["verdict"]


def test_the_guard_is_counted_layer_by_layer(loaded: Loaded, ids: list[int]) -> None:
    """What the rows say is what the calls of the measured mechanism's own reading said."""
    mechanism = replace(SMALL, key_tokens=0, remainder=None, min_coverage=0.4)
    found, told = fidelity.measure(loaded.model, ids, mechanism, chunk=64, document=7), []

    def note(call: Observed) -> None:
        if call.mechanism == mechanism:
            told.append(call.result.stats.extra["guard"])

    set_attention(loaded.model, mechanism)
    cache = SwiftCache(loaded.model.config)
    with observe(note):
        for _ in hidden_states(loaded.model, ids, cache, 64):
            pass
    (row,) = found.guard
    assert (row.document, row.layer, row.min_coverage) == (7, 1, 0.4)
    # 13 blocks of 16 rows, of which the first sees every key anyway, and two KV heads.
    assert row.pairs == sum(each["blocks"] for each in told) == 24
    assert row.dense == sum(each["dense"] for each in told) and 0 < row.dense < row.pairs
    assert row.lowest == min(each["lowest"] for each in told)
    assert row.lowest is not None and row.lowest_after is not None
    assert row.lowest < 0.4 - 1e-5 <= row.lowest_after <= 1
    assert fidelity.measure(loaded.model, ids[:64], SMALL, chunk=64).guard == []


def test_a_guard_that_replaces_most_blocks_saves_nothing() -> None:
    """A budget far too small, and a guard: close to full attention at no saving, and told so."""
    poor = MSSwift(
        windows=(16,),
        sinks=0,
        key_tokens=0,
        block=16,
        remainder=None,
        dense_below=0,
        min_coverage=0.95,
    )
    run = FidelityRun(mechanism=poor.to_dict(), length=1024, documents=2, chunk=256)
    result = fidelity_runs.run(run, progress=False)
    guard, said = result.summary["guard"], result.summary["verdict"]
    rows = [row for row in result.rows if row["part"] == "guard"]
    assert (
        guard["pairs"]
        == sum(row["pairs"] for row in rows)
        == sum(layer["pairs"] for layer in guard["layers"])
    )
    assert guard["dense"] == sum(row["dense"] for row in rows) > 0.5 * guard["pairs"]
    assert len(rows) == 2 * len(guard["layers"]) and guard["lowest"] < 0.5
    assert guard["lowest_after"] >= 0.95 - 1e-5
    counts = f"{guard['dense']:,} of {guard['pairs']:,} pairs of a block and a KV head densely"
    assert counts in said and f"({100 * guard['share']:.1f} %)" in said
    assert "Most blocks were computed densely, so nothing is saved" in said
    assert "Every query saw every key" not in said


def test_a_guard_with_nothing_to_judge_says_so(model_directory: Path) -> None:
    dense = {**SMALL.to_dict(), "dense_below": 1024, "min_coverage": 0.9}
    result = fidelity_runs.run(asked(model_directory, documents=1, mechanism=dense), progress=False)
    assert result.summary["guard"]["pairs"] == 0 and result.summary["guard"]["share"] is None
    said = result.summary["verdict"]
    assert "had nothing to judge" in said and "Every query saw every key" in said
    plain = fidelity_runs.run(asked(model_directory, documents=1), progress=False)
    assert plain.summary["guard"] is None and "guard" not in plain.summary["verdict"]


def test_full_attention_measured_as_a_mechanism_is_itself(loaded: Loaded, ids: list[int]) -> None:
    found = fidelity.measure(loaded.model, ids, Full(), chunk=64)
    (row,) = of(found.ends, "full")
    set_attention(loaded.model, Full())
    with torch.no_grad():
        loss = loaded.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert row.nll == pytest.approx(loss.item(), abs=1e-4)
    assert row.kl == 0.0 and row.agreement == 1.0 and row.density == 1.0


def test_a_text_that_is_read_exactly_proves_nothing(model_directory: Path) -> None:
    dense = {**SMALL.to_dict(), "dense_below": 1024}
    run = asked(model_directory, documents=1, mechanism=dense)
    verdict = fidelity_runs.run(run, progress=False).summary["verdict"]
    assert "Every query saw every key" in verdict and "That is close" not in verdict


def test_what_cannot_be_measured_is_refused(model_directory: Path, ids: list[int]) -> None:
    model = load(str(model_directory)).model
    with pytest.raises(ConfigError, match="multiple of the mechanism's block"):
        fidelity.measure(model, ids, SMALL, chunk=24)
    with pytest.raises(InputError, match="tokens"):
        fidelity_runs.run(asked(model_directory, documents=10**6), progress=False)
    with pytest.raises(InputError, match="at least 2 tokens, got 1"):
        fidelity_runs.run(asked(model_directory, length=1), progress=False)
    with pytest.raises(ConfigError, match="one mechanism"):
        fidelity_runs.rival_of("ms_swift,full", [], None)
    with pytest.raises(InputError, match="profile"):
        fidelity_runs.rival_of("ms_swift", [], "nowhere.json")


def test_ids_may_be_a_tensor(loaded: Loaded, ids: list[int], measured: fidelity.Fidelity) -> None:
    rows = torch.tensor([ids])
    for given in (rows, rows[0], tuple(ids)):
        found = fidelity.measure(loaded.model, given, SMALL, chunk=64)
        assert found.to_rows() == measured.to_rows()


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(2, 8), torch.ones(2, 8, dtype=torch.long), torch.tensor(3), torch.ones(8), ["a"]],
)
def test_other_ids_are_refused(loaded: Loaded, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"tensor \[L\] or \[1, L\]"):
        fidelity.measure(loaded.model, wrong, SMALL, chunk=64)
