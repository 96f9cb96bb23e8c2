"""The report: honest in words, complete in JSON, readable on a page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from longswift.core.errors import ConfigError, InputError, UnsupportedError
from longswift.eval import demo, guarded, report, report_page, report_sections
from longswift.eval.report import Report
from longswift.eval.report_sections import FIDELITY, FULL, READING, RETRIEVAL, ReadingRow
from longswift.eval.report_verdict import BAD, GOOD, NOTE, Verdict, verdict
from longswift.eval.results import Result, load

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


def row(name: str, **changes: Any) -> dict[str, Any]:
    made = ReadingRow(
        name=name,
        label=name,
        tokens=1000,
        seconds=2.0,
        tokens_per_second=10.0,
        peak_bytes=2**20,
        keys_per_query=500.0,
        density=1.0 if name == FULL else 0.2,
        nll=2.0,
        nll_by_part=[2.0, 2.0],
        windows=[],
    )
    return {"section": READING, **asdict(made), **changes}


def scored(name: str, score: float | None, **changes: Any) -> dict[str, Any]:
    found = {
        "task": "needle",
        "length": 1000,
        "mechanism": name,
        "metric": "score",
        "at": None,
        "score": score,
        "low": score,
        "high": score,
        "count": 20.0,
        "samples": 20,
        "refused": 0,
    }
    return {**found, **changes}


def retrieval(*rows: dict[str, Any], **summary: Any) -> dict[str, Any]:
    names = list(dict.fromkeys(r["mechanism"] for r in rows))
    return {
        "section": RETRIEVAL,
        "content": {
            "kind": "eval",
            "config": {
                "model": "m",
                "tasks": [{"name": "needle"}],
                "mechanisms": [{"name": n} for n in names],
            },
            "seed": 0,
            "rows": list(rows),
            "summary": {"windows": {}, "refused": {}, "cost": [], **summary},
        },
    }


def fidelity(kl: float | None, agreement: float | None, captured: float = 0.95) -> dict[str, Any]:
    ends = {"density": 0.2, "kl": kl, "agreement": agreement, "perplexity_ratio": 1.0}
    head = {
        "name": "ms_swift",
        "layer": 1,
        "head": 0,
        "density": 0.2,
        "error": 0.1,
        "captured_mean": captured,
        "captured_p10": captured,
        "captured_min": captured,
    }
    content = {"measured": "ms_swift", "judge": "exact", "heads": [head], "ends": {}}
    content["ends"] = {"ms_swift": ends, "window": {**ends, "kl": None if kl is None else 0.3}}
    return {"section": FIDELITY, "content": content}


def say(*rows: dict[str, Any]) -> Verdict:
    return verdict(made(*rows))


def made(*rows: dict[str, Any]) -> Result:
    return Result(
        kind="report",
        config={
            "model": "m",
            "file": "<b>f</b>",
            "mechanisms": [{"name": "ms_swift", "sinks": 4}],
            "length": 1000,
            "chunk": 256,
            "dtype": "auto",
            "text_sha256": "0" * 64,
            "model_sha256": "1" * 64,
        },
        seed=0,
        rows=list(rows),
        summary={"subject": "ms_swift"},
    )


FAST = row("ms_swift", seconds=1.0)


def test_good_news() -> None:
    said = say(
        row(FULL),
        FAST,
        retrieval(scored("model", 1.0), scored("ms_swift", 1.0)),
        fidelity(0.01, 0.99),
    )
    assert said.level == GOOD
    assert said.headline == (
        "ms_swift reads these 1,000 tokens 2.0x faster than full attention and keeps what full "
        "attention finds."
    )
    assert [f.level for f in said.findings].count(BAD) == 0


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([retrieval(scored("model", 1.0), scored("ms_swift", 0.5))], "50 % of full attention's"),
        ([fidelity(0.2, 0.99)], "0.2000 nats"),
        ([fidelity(0.001, 0.8)], "80.0 %"),
        ([fidelity(None, None, captured=0.4)], "40 %"),
        ([retrieval(scored("model", 1.0), refused={"ms_swift": "no form"})], "no form"),
        # A good mean does not make up for one bad task.
        (
            [
                fidelity(0.001, 0.999),
                retrieval(scored("model", 0.9), scored("ms_swift", 0.6)),
            ],
            "67 % of full attention's",
        ),
    ],
)
def test_losses_are_said(rows: list[dict[str, Any]], why: str) -> None:
    said = say(row(FULL), FAST, *rows)
    assert said.level == BAD and "loses what full attention keeps" in said.headline
    assert said.findings[0].level == BAD
    assert any(why in finding.text for finding in said.findings if finding.level == BAD)


def test_perplexity_alone_can_condemn_but_not_acquit() -> None:
    assert say(row(FULL), {**FAST, "nll": 2.2}).level == BAD
    said = say(row(FULL), FAST)
    assert said.level == NOTE and "is open" in said.headline


def test_what_was_not_learned_is_said() -> None:
    dense = say(row(FULL), {**FAST, "density": 1.0}, fidelity(0.0, 1.0))
    assert dense.level == NOTE and "it is full attention" in dense.headline
    failing = say(row(FULL), FAST, retrieval(scored("model", 0.1), scored("ms_swift", 0.1)))
    assert failing.level == NOTE
    assert any("Retrieval tells nothing" in f.text for f in failing.findings)
    cost = [{"mechanism": "ms_swift", "length": 1000, "density": 1.0}]
    everything = retrieval(scored("model", 1.0), scored("ms_swift", 1.0), cost=cost)
    said = say(row(FULL), FAST, everything)
    assert said.level == NOTE and any("every key was scored" in f.text for f in said.findings)
    few = retrieval(scored("model", 1.0, count=3.0), scored("ms_swift", 1.0, count=3.0, low=0.44))
    assert any("44 %" in f.text for f in say(row(FULL), FAST, few).findings)


def test_arithmetic_is_not_taken_for_keys() -> None:
    """The density of a mechanism without scores may pass 1 though it is no full attention."""
    result = made(row(FULL), row("performer", density=4.7), fidelity(1.8, 0.01))
    result.summary["subject"] = "performer"
    result.rows[-1]["content"]["measured"] = "performer"
    result.rows[-1]["content"]["ends"]["performer"] = result.rows[-1]["content"]["ends"]["ms_swift"]
    said = verdict(result)
    assert said.level == BAD and "it is full attention" not in said.headline


def guard(dense: int, pairs: int = 100) -> dict[str, Any]:
    row = {"document": 0, "layer": 1, "min_coverage": 0.9, "pairs": pairs, "dense": dense}
    found = guarded.summarise([{**row, "lowest": 0.125, "lowest_after": 0.95}])
    assert found is not None
    return found


def test_a_guard_that_fires_now_and_then_is_a_note() -> None:
    said = say(row(FULL), {**FAST, "guard": guard(7)}, fidelity(0.001, 0.999))
    assert said.level == GOOD and "keeps what full attention finds" in said.headline
    (told,) = [f for f in said.findings if f.text.startswith("Guard")]
    assert told.level == NOTE and "12.5 % before and 95.0 % after" in told.text
    assert "7 of 100 pairs of a block and a KV head densely (7.0 %)" in told.text
    assert "saved" not in told.text
    (most,) = [
        f
        for f in say(row(FULL), {**FAST, "guard": guard(7), "density": 0.97}).findings
        if f.text.startswith("Guard")
    ]
    assert "97 % of full attention's keys are scored, so nothing is saved" in most.text


def test_a_guard_that_does_the_work_is_said() -> None:
    result = made(row(FULL), {**FAST, "guard": guard(80), "density": 1.3}, fidelity(0.001, 0.999))
    said = verdict(result)
    assert said.level == BAD and "its guard computed most blocks densely" in said.headline
    assert any("so nothing is saved" in f.text for f in said.findings if f.level == BAD)
    assert "it is full attention" not in said.headline
    result.summary["verdict"] = said.to_dict()
    page = report_page.html(result)
    assert "The coverage guard" in page and "<td>80 of 100</td><td>80.0 %</td>" in page
    lost = say(row(FULL), {**FAST, "guard": guard(80)}, fidelity(0.3, 0.9))
    assert "loses what full attention keeps" in lost.headline
    assert any("so little is saved" in f.text for f in lost.findings)


def test_slower_is_said() -> None:
    said = say(row(FULL), {**FAST, "seconds": 4.0}, fidelity(0.001, 0.999))
    assert "2.0x slower" in said.headline and "no reason" in said.headline
    assert any(f.level == BAD and f.text.startswith("Speed") for f in said.findings)


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
