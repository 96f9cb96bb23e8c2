"""Decoding, prefill and training timed: rows, shared data, resuming, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longswift import get_mechanism
from longswift.core.errors import ConfigError
from longswift.eval import phase_table, phase_work, phases
from longswift.eval.bench_plots import plot_phase
from longswift.eval.compare import compare
from longswift.eval.phase_work import Place
from longswift.eval.phases import PhaseBench
from longswift.eval.results import Result, load
from longswift.hf.loading import random_llama

WINDOW = get_mechanism("sliding_window", window=16).to_dict()


def bench(phase: str, **changes: Any) -> PhaseBench:
    options = {
        "model": "random-llama",
        "lengths": (64, 96),
        "mechanisms": (WINDOW,),
        "tokens": 2,
        "repeats": 1,
        "memory": False,
    }
    return PhaseBench(phase=phase, **{**options, **changes})


def run(asked: PhaseBench, output: Path | None = None) -> Result:
    return phases.run(asked, output, progress=False)


@pytest.mark.parametrize(
    ("phase", "batches", "parts"),
    [("decode", (1, 3), 2), ("prefill", (2,), 1), ("train", (1,), 2)],
)
def test_rows_hold_every_rival_in_every_case(
    phase: str, batches: tuple[int, ...], parts: int, tmp_path: Path
) -> None:
    result = run(bench(phase, batches=batches), tmp_path / "r.json")
    assert load(tmp_path / "r.json", phase) == result
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    rows = phase_table.rows(result)
    cases = {(r.part, r.length, r.batch, r.name) for r in rows}
    assert len(cases) == len(rows) == parts * 2 * len(batches) * 2
    for row in rows:
        base = next(
            r
            for r in rows
            if (r.part, r.length, r.batch, r.name) == (row.part, row.length, row.batch, "sdpa")
        )
        assert row.speedup == pytest.approx(base.seconds / row.seconds)
        read = 1 if phase == "decode" else row.length
        assert row.tokens_per_second == pytest.approx(row.batch * read / row.seconds)
        if row.name == "sliding_window":
            assert row.keys_per_query <= 16 < base.keys_per_query
    sentences = result.summary["sentences"]
    assert len(sentences) == parts * len(batches) and "96 tokens" in sentences[0]
    assert len(phase_table.table(result).rows) == len(rows)
    assert plot_phase(result, tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(result.to_dict(), allow_nan=False)
    assert not any(change.worse for change in compare(result, result))
    assert len(compare(result, result)) == len(rows)


def test_dynamic_cache_decodes_the_same_model(tmp_path: Path) -> None:
    result = run(bench("decode", lengths=(64,), dynamic_cache=True))
    names = [(row["part"], row["name"]) for row in result.rows]
    assert [name for part, name in names if part == "attention"] == ["sdpa", "sliding_window"]
    assert [name for part, name in names if part == "model"] == [
        "sdpa",
        "sliding_window",
        "sdpa, DynamicCache",
        "sliding_window, DynamicCache",
    ]


def test_rivals_share_a_cache_that_grows() -> None:
    work = phase_work.Work(bench("decode", lengths=(40,), tokens=3))
    jobs = work.jobs(Place("model", 40, 1))
    lengths: list[int] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["past_key_values"].get_seq_length())

    work.loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    for job in jobs.values():
        job.run()
    assert lengths == [40, 41, 42, 43, 44, 45]


def test_a_training_step_leaves_gradients_of_every_weight() -> None:
    work = phase_work.Work(bench("train", lengths=(48,), checkpointing=True))
    jobs = work.jobs(Place("model", 48, 2))
    found = {}
    for name, job in jobs.items():
        job.run()
        parameters = list(work.loaded.model.named_parameters())
        assert all(p.grad is not None for _, p in parameters)
        found[name] = torch.cat([p.grad.flatten() for _, p in parameters])
    # The window is narrower than the text: the rivals do not compute the same.
    assert not torch.allclose(found["sdpa"], found["sliding_window"], rtol=1e-2)


def test_prefill_reads_the_whole_text_whatever_the_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    work = phase_work.Work(bench("prefill", lengths=(70,), chunk=32))
    monkeypatch.setattr(
        phase_work, "next_token_logits", lambda model, hidden: seen.append(hidden) or hidden
    )
    work.jobs(Place("model", 70, 2))["sdpa"].run()
    ids = work._ids(Place("model", 70, 2))
    with torch.inference_mode():
        once = work.loaded.model.get_decoder()(input_ids=ids).last_hidden_state[:, -1]
    torch.testing.assert_close(seen[0], once, atol=1e-5, rtol=1e-4)


def test_memory_is_measured_in_a_fresh_process() -> None:
    result = run(bench("prefill", lengths=(128,), mechanisms=(), memory=True))
    assert 0 <= result.rows[0]["peak_bytes"] < 2**28


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, measure = tmp_path / "r.json", phases._measure
    done: list[Place] = []

    def interrupt_after(count: int) -> None:
        def step(asked: PhaseBench, work: Any, place: Place, *rest: Any) -> Any:
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(place)
            return measure(asked, work, place, *rest)

        monkeypatch.setattr(phases, "_measure", step)

    interrupt_after(3)
    with pytest.raises(KeyboardInterrupt):
        run(bench("decode"), file)
    assert [p.name for p in tmp_path.iterdir()] == ["r.partial.json"]
    interrupt_after(-1)
    result = run(bench("decode"), file)
    assert done == list(bench("decode").places()) and len(result.rows) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_positions_are_extended_for_a_text_longer_than_trained(model_directory: Path) -> None:
    from longswift.hf.extending import limit_of

    asked = bench("prefill", model=str(model_directory), lengths=(300_000,))
    assert (limit_of(phase_work.Work(asked).loaded.model) or 0) >= 300_000


def test_random_weights_follow_the_seed_and_leave_the_global_state() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (
        random_llama(64, seed).get_input_embeddings().weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_shape_and_a_dtype_can_be_asked_for() -> None:
    model = random_llama(64, heads=4, head_dim=8, layers=1, intermediate=48, dtype=torch.bfloat16)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert weight.shape == (48, 32) and weight.dtype == torch.bfloat16


def test_eight_billion_parameters_are_called_8b_and_refused_where_they_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "random-llama-8b"
    # What Llama 3 8B has.
    assert phase_work._parameters(**phase_work._SHAPES[name]) == 8_030_261_248
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=20 << 30))
    with pytest.raises(ConfigError, match=r"29\.9 GiB of free memory.*20\.0 GiB"):
        phase_work.Work(bench("prefill", model=name))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mechanisms": (get_mechanism("nystrom").to_dict(),)}, "causal form"),
        ({"against": "flashy"}, "sdpa, flex"),
        ({"batches": (0,)}, "batch"),
        ({"tokens": 0}, "tokens"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        bench("decode", **changes)


def test_chunks_that_cut_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="block"):
        bench("prefill", mechanisms=(get_mechanism("ms_swift").to_dict(),), chunk=100)
