"""The report: honest in words, complete in JSON, readable on a page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longswift.core.errors import ConfigError, InputError, UnsupportedError
from longswift.eval import demo, guarded, report, report_page, report_sections
from longswift.eval.report import Report
from longswift.eval.report_sections import FULL
from longswift.eval.report_verdict import BAD, verdict
from longswift.eval.results import load
from tests.eval.test_report_verdict import FAST, fidelity, made, retrieval, row, scored

SMALL = (
    "ms_swift.dense_below=0",
    "ms_swift.windows=[64]",
    "ms_swift.block=64",
    "ms_swift.key_tokens=16",
    "ms_swift.remainder=64",
)


STARVED = (
    "ms_swift.dense_below=0",
    "ms_swift.windows=[16]",
    "ms_swift.key_tokens=1",
    "ms_swift.sinks=0",
    "ms_swift.block=16",
    "ms_swift.remainder=null",
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from longswift.tiny import corpus

    file = tmp_path_factory.mktemp("text") / "<my> text.txt"
    file.write_text(corpus.text("heldout")[:20_000], encoding="utf-8")
    return file


def asked(model: Path | str, document: Path, *settings: str, **changes: Any) -> Report:
    options = {"tasks": "none", "fidelity": False, "length": 512, "chunk": 256}
    return report.asked(
        attention="ms_swift,sliding_window",
        model=str(model),
        file=str(document),
        settings=settings or SMALL,
        **{**options, **changes},
    )


def test_tasks_take_settings_and_questions(document: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    made = asked(
        *("tiny", document, "needle.keys=3", "sliding_window.window=32"),
        **{"tasks": "needle,kv,qa", "questions": questions, "samples": 4, "seed": 5},
    )
    needle, kv, qa = made.tasks
    assert needle["keys"] == 3 and needle["file"] == str(document) and qa["file"] == str(questions)
    assert [task["depths"] for task in (needle, kv, qa)] == [4, 4, 4]
    assert {task["seed"] for task in (needle, kv, qa)} == {5} and not made.equal_cost
    with pytest.raises(ConfigError, match="the task qa, which asks them"):
        asked("tiny", document, tasks="needle", questions=questions)
    with pytest.raises(ConfigError, match="got 'kv'"):
        asked("tiny", document, "kv.questions=2")


def test_a_malformed_file_of_questions_is_seen_before_anything_is_read(
    model_directory: Path, document: Path, tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text("{}\n")
    wanted = asked(model_directory, document, tasks="qa", questions=tmp_path / "q.jsonl")
    with pytest.raises(InputError, match="line 1"):
        report.run(wanted, tmp_path / "r.html", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["q.jsonl"]


def test_a_page_without_sections_says_what_measures_them() -> None:
    result = made(row(FULL), FAST)
    result.summary["verdict"] = verdict(result).to_dict()
    html = report_page.html(result)
    assert html.count("Not measured") == 2
    assert "longswift fidelity m --file &lt;b&gt;f&lt;/b&gt; --length 1000" in html
    assert "<b>f</b>" not in html and "longswift eval" in html
    assert not re.search(r"https?://|<link|<script|@import", html)
    assert set(re.findall(r'src="([^:]*:[^;]*)', html)) == {"data:image/svg+xml", "data:image/png"}


def test_measuring_is_kept_and_resumed(
    model_directory: Path, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, done = report._Work._read, []

    def interrupt(self: Any, name: str, *rest: Any) -> Any:
        done.append(name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return original(self, name, *rest)

    monkeypatch.setattr(report._Work, "_read", interrupt)
    page = tmp_path / "report.html"
    with pytest.raises(KeyboardInterrupt):
        report.run(asked(model_directory, document), page, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["report.partial.json"]
    result = report.run(asked(model_directory, document), page, progress=False)
    assert done == ["full", "ms_swift", "ms_swift", "sliding_window"]
    assert load(tmp_path / "report.json", "report") == result
    full, swift, window = report_sections.readings(result)
    assert full.density == 1.0 and swift.density < 0.9
    assert window.keys_per_query == pytest.approx(swift.keys_per_query, rel=0.02)
    assert {layer for layer, _, _ in swift.windows} == {1} and len(swift.windows) == 2
    # Parts of the text weigh as many tokens: together they are the whole.
    assert sum(swift.nll_by_part) / len(swift.nll_by_part) == pytest.approx(swift.nll, rel=0.01)
    report_page.write(result, page)
    text = page.read_text(encoding="utf-8")
    assert "&lt;my&gt; text.txt" in text and str(tmp_path) not in text
    assert str(document.parent) not in json.dumps(result.to_dict())


def test_a_planted_failure_is_said_in_words(document: Path, tmp_path: Path) -> None:
    """A budget far too small: the packaged model finds nothing, and the report says so."""
    from longswift import tiny

    if not (tiny.path() / "model.safetensors").is_file():
        pytest.skip("the packaged model's weights are not in this checkout")
    wanted = asked(
        "tiny", document, *STARVED, tasks="needle", samples=2, fidelity=True, length=1024
    )
    result = report.run(wanted, tmp_path / "report.html", progress=False)
    said = result.summary["verdict"]
    assert said["level"] == BAD
    assert "loses what full attention keeps. Do not use this configuration" in said["headline"]
    bad = [f["text"] for f in said["findings"] if f["level"] == BAD]
    assert any(text.startswith("Retrieval") for text in bad), said
    assert any(text.startswith("Next token") for text in bad), said
    html = report_page.html(result)
    assert "Not measured" not in html and 'class="verdict bad"' in html
    assert html.count('class="maps"') == 1


def test_a_guard_over_a_planted_failure_is_said_in_words(document: Path, tmp_path: Path) -> None:
    from longswift import tiny

    if not (tiny.path() / "model.safetensors").is_file():
        pytest.skip("the packaged model's weights are not in this checkout")
    wanted = asked("tiny", document, *STARVED, "ms_swift.min_coverage=0.95", length=1024)
    result = report.run(wanted, tmp_path / "report.html", progress=False)
    told = load(tmp_path / "report.json").summary["guard"]
    assert list(told) == ["ms_swift"] and told["ms_swift"]["share"] > 0.5
    assert told["ms_swift"]["lowest"] < 0.5 < 0.94 < told["ms_swift"]["lowest_after"]
    assert len(told["ms_swift"]["layers"]) > 1
    said = result.summary["verdict"]
    assert said["level"] == BAD and "its guard computed most blocks densely" in said["headline"]
    assert any("so nothing is saved" in f["text"] for f in said["findings"])
    html = report_page.html(result)
    assert all(f"<td>{row[1]}</td>" in html for row in guarded.table(told["ms_swift"]))


def test_impossible_requests_are_refused(
    model_directory: Path, document: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="beside full"):
        report.asked(attention="full", model="tiny", file="x")
    with pytest.raises(ConfigError, match="multiple"):
        asked(model_directory, document, chunk=100)
    with pytest.raises(ConfigError, match="none_such"):
        asked(model_directory, document, tasks="none_such")
    with pytest.raises(InputError, match="tokens"):
        wanted = asked(model_directory, document, length=10_000_000)
        report.run(wanted, tmp_path / "report.html", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_cannot_run_is_refused_before_it_reads(
    model_directory: Path, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    capped = tmp_path / "capped"
    Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
        )
    ).save_pretrained(capped)
    AutoTokenizer.from_pretrained(model_directory).save_pretrained(capped)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the text was read")

    monkeypatch.setattr(report._Work, "_read", never)
    monkeypatch.setattr(demo, "_read", never)
    page = tmp_path / "report.html"
    with pytest.raises(UnsupportedError, match="soft-capped scores"):
        report.run(asked(capped, document), page, progress=False)
    with pytest.raises(UnsupportedError, match="causal"):
        wanted = report.asked(attention="nystrom", model=str(model_directory), file=str(document))
        report.run(replace(wanted, length=512), page, progress=False)
    story = demo.Demo(mechanism={"name": "ms_swift"}, model=str(capped), length=512, documents=1)
    with pytest.raises(UnsupportedError, match="soft-capped scores"):
        demo.run(story, tmp_path / "demo", progress=False)
    assert not page.with_suffix(".json").exists()


def browser() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.mark.skipif(browser() is None, reason="no chromium on the PATH to look at the page with")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_the_page(tmp_path: Path, width: int) -> None:
    """The page has content at the width of a phone and of a desk, and nothing sticks out."""
    result = made(
        row(FULL),
        {**FAST, "windows": [[1, head, 64 << head] for head in range(2)]},
        retrieval(
            *(scored(n, 1.0, at=at) for n in ("model", "ms_swift") for at in (None, 0.0, 1.0))
        ),
        fidelity(0.01, 0.99),
    )
    result.summary["verdict"] = verdict(result).to_dict()
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    page = tmp_path / "report.html"
    page.write_text(report_page.html(result).replace("</body>", probe), encoding="utf-8")
    picture = tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1600",
    ]
    command = [str(browser()), *options]
    for last in (f"--screenshot={picture}", "--dump-dom"):
        done = subprocess.run(
            [*command, last, page.as_uri()], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr[-500:]
    title = re.search(r"<title>(\d+)</title>", done.stdout)
    assert title is not None and int(title.group(1)) <= width
    # A blank page of this size is a few kilobytes.
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 40_000
