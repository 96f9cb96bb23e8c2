"""The suite: one reading for all questions, fair windows, refusals, and resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import longswift
from longswift.core.errors import ConfigError, InputError, UnsupportedError
from longswift.eval import runner, standings, suite, tasks
from longswift.eval.heatmaps import plot_depths
from longswift.eval.models import load
from longswift.eval.results import Result
from longswift.eval.results import load as load_result
from longswift.mechanisms import MECHANISMS
from longswift.mechanisms.full import Full

SWIFT = ["windows=[64,128]", "key_tokens=32", "sinks=4", "remainder=64", "dense_below=0"]
SETTINGS = [f"ms_swift.{option}" for option in SWIFT]


class EncoderOnly(Full):
    """Exact attention that has no causal form."""

    name = "encoder_only"
    supports_causal = False


@pytest.fixture
def encoder_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mechanism without a causal form in the table."""
    monkeypatch.setitem(MECHANISMS._table, "encoder_only", f"{__name__}:EncoderOnly")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def asked(model: Path | str, **changes: Any) -> suite.Suite:
    options: dict[str, Any] = {
        "model": str(model),
        "tasks": "needle,needle_multiquery,perplexity",
        "attention": "full,sliding_window,ms_swift",
        "settings": SETTINGS,
        "lengths": (300, 420),
        "samples": 2,
        "chunk": 128,
    }
    return suite.asked(**{**options, **changes})


@pytest.fixture(scope="module")
def finished(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run."""
    place = tmp_path_factory.mktemp("run")
    suite.run(asked(model_directory), place / "out.json", progress=False)
    return place


def test_every_task_length_and_mechanism_has_its_rows(finished: Path) -> None:
    result = load_result(finished / "out.json", "eval")
    whole = [row for row in standings.rows(result) if row.at is None]
    assert len(whole) == 3 * 3 * 2
    for row in whole:
        assert row.samples == 2 and row.refused == 0
        assert row.count == {"needle": 2, "needle_multiquery": 8}.get(row.task, 2 * row.length - 2)
        if row.metric == "nll":
            assert row.score is not None and row.score > 1 and row.low is None
        else:
            assert row.low is not None and row.low <= (row.score or 0) <= (row.high or 0)
    depths = {row.at for row in standings.rows(result) if row.task == "needle"}
    assert depths == {None, 0.0, 7 / 9}
    positions = [r.at for r in standings.rows(result) if r.task == "perplexity" and r.length == 300]
    assert len([at for at in positions if at is not None]) == 3 * 8
    table = standings.table(result)
    assert table.columns == ("task", "tokens", "n", "full", "sliding_window", "ms_swift")
    assert [row[0] for row in table.rows][:2] == ["needle", "needle"] and len(table.rows) == 6
    assert "ppl" in table.rows[-1][3] and "x)" in table.rows[-1][4]
    assert (finished / "out.samples.jsonl").read_text().count("\n") == 1 + 3 * 3 * 2 * 2
    assert str(finished.parent) not in json.dumps(result.to_dict())
    assert plot_depths(result, finished / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_window_costs_what_ms_swift_costs(finished: Path) -> None:
    result = load_result(finished / "out.json")
    lines = (finished / "out.samples.jsonl").read_text().splitlines()[1:]
    entries = [json.loads(line) for line in lines]
    for length in (300, 420):
        cost = {}
        for name in ("ms_swift", "sliding_window", "full"):
            some = [e for e in entries if e["mechanism"] == name and e["length"] == length]
            cost[name] = sum(e["keys"] for e in some) / sum(e["queries"] for e in some)
        assert cost["sliding_window"] == pytest.approx(cost["ms_swift"], rel=0.02)
        assert cost["ms_swift"] < 0.9 * cost["full"]
    costs = {(c["mechanism"], c["length"]): c for c in result.summary["cost"]}
    assert costs["full", 300]["density"] == 1 and costs["full", 300]["samples"] == 6
    assert costs["ms_swift", 420]["density"] < 0.9
    windows = result.summary["windows"]
    assert list(windows) == ["300", "420"]
    fixed = asked("tiny", settings=[*SETTINGS, "sliding_window.window=99"])
    assert not fixed.equal_cost and {"window": 99}.items() <= fixed.mechanisms[1].items()


def test_a_finished_run_is_not_measured_again(
    finished: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_result(finished / "out.json")
    monkeypatch.setattr(runner, "answer", None)
    again = suite.run(asked(model_directory), finished / "out.json", progress=False)
    assert again.rows == before.rows and again.summary["reused"] == 36
    assert again.summary["windows"] == before.summary["windows"]
    with pytest.raises(InputError, match=r"config\.samples"):
        suite.run(asked(model_directory, samples=3), finished / "out.json", progress=False)


_KILLED = """
import sys, time
from tests.eval.test_suite import asked
from longswift.eval import suite
from longswift.eval.journal import Journal
add = Journal.add
def slowly(self, entry):
    # Leaves the watcher time to kill it in the middle, however busy the machine.
    add(self, entry)
    time.sleep(0.3)
Journal.add = slowly
suite.run(asked(sys.argv[1]), sys.argv[2], progress=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="processes are killed differently there")
def test_a_killed_run_goes_on_and_gives_the_same_result(
    finished: Path, model_directory: Path, tmp_path: Path
) -> None:
    samples = tmp_path / "out.samples.jsonl"
    command = [sys.executable, "-c", _KILLED, str(model_directory), str(tmp_path / "out.json")]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(longswift.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=root, env=environment) as process:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if samples.is_file() and samples.read_bytes().count(b"\n") > 6:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was to be killed before it ended"
    assert not (tmp_path / "out.json").exists()
    # As if the kill had come in the middle of a write.
    samples.write_bytes(samples.read_bytes() + b'{"mechanism": "fu')
    result = suite.run(asked(model_directory), tmp_path / "out.json", progress=False)
    assert 5 <= result.summary["reused"] < 36
    before = load_result(finished / "out.json")
    assert result.rows == before.rows and result.config == before.config
    assert result.summary["windows"] == before.summary["windows"]


def test_answers_behind_one_reading_are_those_of_whole_prompts(model_directory: Path) -> None:
    loaded = load(str(model_directory))
    loaded.use(None)
    sample = tasks.get_task("needle_multiquery", digits=8).generate(loaded, 400, 0)
    _, output = runner.answer(loaded, sample, chunk=64)
    for i, question in enumerate(sample.questions):
        prompt = torch.tensor([sample.prompt(i)])
        made = loaded.model.generate(prompt, max_new_tokens=question.limit, do_sample=False)
        assert output.texts[i] == loaded.decode(made[0, prompt.shape[1] :].tolist())


def test_losses_are_those_of_one_forward(model_directory: Path) -> None:
    loaded = load(str(model_directory))
    loaded.use(None)
    task = tasks.get_task("perplexity")
    sample = task.generate(loaded, 200, 1)
    _, output = runner.answer(loaded, sample, chunk=64, likelihood=True)
    ids = torch.tensor([sample.document])
    with torch.inference_mode():
        loss = loaded.model(ids, labels=ids).loss.item()
    scores = task.score(sample, output)
    assert sum(s.weight for s in scores) == 199
    assert sum(s.value * s.weight for s in scores) / 199 == pytest.approx(loss, rel=1e-4)


def test_questions_that_do_not_fit_are_counted(model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    lines = [
        {"document": "word " * size, "question": "Which word?", "answer": "word"}
        for size in (10, 400, 20)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    chosen = asked(model_directory, tasks="qa", questions=file, attention="full", settings=())
    result = suite.run(chosen, progress=False)
    f1 = [r for r in standings.rows(result) if r.at is None and r.metric == "f1"]
    assert [(r.length, r.samples, r.refused) for r in f1] == [(300, 1, 1), (420, 1, 1)]
    assert str(tmp_path) not in json.dumps(result.to_dict())


def test_a_length_for_which_a_task_is_too_long_is_no_score(model_directory: Path) -> None:
    chosen = asked(
        model_directory, tasks="needle,common_words", attention="full", settings=(), samples=1
    )
    result = suite.run(chosen, progress=False)
    cells = {row[:2]: row[3] for row in standings.table(result).rows}
    said = [sentence for sentence in standings.sentences(result) if "refused" in sentence]
    assert any(s.startswith("common_words at 300 tokens: ") and "do not fit" in s for s in said)
    assert cells["common_words", "300"] == "refused" and cells["needle", "300"] != "refused"


def test_a_length_beyond_the_models_window_is_refused(
    tmp_path: Path, model_directory: Path
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_directory).save_pretrained(tmp_path)
    short = {"attention": "model", "settings": (), "tasks": "passkey", "samples": 1}
    with pytest.raises(InputError, match="at most 256"):
        suite.run(asked(tmp_path, lengths=(200, 300), **short), progress=False)
    longer = suite.run(asked(tmp_path, lengths=(200, 300), max_length=512, **short), progress=False)
    assert {row.length for row in standings.rows(longer)} == {200, 300}


@pytest.mark.usefixtures("encoder_only")
def test_a_mechanism_without_a_causal_form_is_reported(model_directory: Path) -> None:
    short = {"tasks": "passkey", "lengths": (200,), "samples": 1, "settings": ()}
    result = suite.run(
        asked(model_directory, attention="full,encoder_only", **short), progress=False
    )
    assert "causal" in result.summary["refused"]["encoder_only"]
    assert standings.table(result).columns == ("task", "tokens", "n", "full")
    assert any("encoder_only did not run" in line for line in standings.sentences(result))
    with pytest.raises(UnsupportedError):
        suite.run(asked(model_directory, attention="encoder_only", **short), progress=False)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tasks": "nedle"}, "Did you mean"),
        ({"tasks": ""}, "at least one"),
        ({"attention": "windw", "settings": ()}, "windw"),
        ({"settings": ["kv.questions=2"]}, "--set"),
        ({"settings": ["needle.depth=2"]}, "depth"),
        ({"form": "key_value", "tasks": "copy"}, "copy.form"),
        ({"samples": 0}, "samples"),
        ({"chunk": 100}, "block"),
    ],
)
def test_impossible_suites_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        asked("tiny", **changes)


def test_what_a_guard_did_is_told_for_each_length(model_directory: Path, tmp_path: Path) -> None:
    strict = [*SETTINGS, "ms_swift.min_coverage=0.999", "ms_swift.key_tokens=1"]
    options = {"settings": strict, "tasks": "needle"}
    found = suite.run(asked(model_directory, **options), tmp_path / "out.json", progress=False)
    costs = {(cost["mechanism"], cost["length"]): cost["guard"] for cost in found.summary["cost"]}
    assert costs["full", 300] is None and costs["sliding_window", 420] is None
    for length in (300, 420):
        guard = costs["ms_swift", length]
        assert 0 < guard["dense"] <= guard["pairs"] and guard["min_coverage"] == 0.999
        # Two documents, read whole: what is counted is the sum of what lies beside the result.
        lines = (tmp_path / "out.samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines if '"guard": [{' in line]
        own = [row for s in samples if s["length"] == length for row in s["guard"]]
        assert {row["document"] for row in own} == {0, 1}
        assert sum(row["pairs"] for row in own) == guard["pairs"]
        said = [line for line in standings.sentences(found) if f"ms_swift at {length} " in line]
        assert len(said) == 1 and f"computed {guard['dense']:,} of {guard['pairs']:,}" in said[0]
    assert not any(
        "guard" in line
        for line in standings.sentences(
            suite.run(asked(model_directory, tasks="needle"), progress=False)
        )
    )


def test_sentences_name_the_worst_task() -> None:
    def row(mechanism: str, task: str, value: float) -> dict[str, Any]:
        case = {"task": task, "length": 8, "mechanism": mechanism, "metric": "score", "at": None}
        counts = {"low": 0.0, "high": 1.0, "count": 4.0, "samples": 4, "refused": 0}
        return {**case, **counts, "score": value}

    rows = [row("full", "needle", 1.0), row("ms_swift", "needle", 1.0)]
    rows += [row("full", "kv", 0.8), row("ms_swift", "kv", 0.6)]
    # Full attention cannot do this one, so nothing can be kept of it.
    rows += [row("full", "copy", 0.1), row("ms_swift", "copy", 0.0)]
    config = {
        "model": "m",
        "tasks": [{"name": name} for name in ("needle", "kv", "copy")],
        "mechanisms": [{"name": "full"}, {"name": "ms_swift"}],
    }
    cost = [
        {"mechanism": "full", "length": 8, "density": 1.0},
        {"mechanism": "ms_swift", "length": 8, "density": 1.0},
        {"mechanism": "model", "length": 8, "density": None},
    ]
    summary = {"windows": {}, "refused": {}, "cost": cost}
    result = Result(kind="eval", config=config, seed=0, rows=rows, summary=summary)
    said, dense = standings.sentences(result)
    assert dense.startswith("ms_swift is dense at 8 tokens")
    assert "at least 75 %" in said and "kv score at 8 tokens, 0.60 against 0.80" in said
    with pytest.raises(InputError, match="depths"):
        plot_depths(result, "nowhere.png")


def test_the_packaged_model_finds_single_needles_as_before() -> None:
    from longswift import tiny

    if not (tiny.path() / "model.safetensors").is_file():
        pytest.skip("the packaged model's weights are not in this checkout")
    chosen = asked(
        "tiny",
        tasks="needle",
        settings=[*SETTINGS, "ms_swift.key_tokens=64"],
        lengths=(1024,),
        samples=4,
        chunk=1024,
    )
    result = suite.run(chosen, progress=False)
    found = {row.mechanism: row.score for row in standings.rows(result) if row.at is None}
    assert found["full"] >= 0.75 and found["ms_swift"] >= found["full"] - 0.25
    assert found["sliding_window"] <= 0.5
