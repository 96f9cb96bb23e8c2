"""What the figures of a report say in words."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest

from longswift.eval import guarded, report_page
from longswift.eval.report_sections import FIDELITY, FULL, READING, RETRIEVAL, ReadingRow
from longswift.eval.report_verdict import BAD, GOOD, NOTE, Verdict, verdict
from longswift.eval.results import Result
from longswift.mechanisms import MECHANISMS


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
                "tasks": [{"name": n} for n in dict.fromkeys(r["task"] for r in rows)],
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


def test_predicting_is_not_retrieving() -> None:
    rows = [scored(name, 2.0, task="perplexity", metric="nll") for name in ("model", "ms_swift")]
    said = say(row(FULL), FAST, retrieval(*rows))
    assert not any("Retrieval" in f.text for f in said.findings)
    refused = [scored(name, None, count=0.0) for name in ("model", "ms_swift")]
    said = say(row(FULL), FAST, retrieval(*refused))
    assert any("no document fits" in f.text for f in said.findings)


def test_advice_is_about_options_the_mechanism_has() -> None:
    for name in [n for n in MECHANISMS.names() if n != "full"]:
        result = made(row(FULL), row(name, density=0.2, nll=2.3))
        result.summary["subject"] = name
        said = verdict(result)
        assert said.level == BAD
        assert ("key_tokens" in said.headline) == (name == "ms_swift")
        known = {f.name for f in fields(MECHANISMS.get(name))}
        advice = said.headline.partition("raise ")[2].partition(",")[0]
        assert name == "ms_swift" or set(advice.split(" or ")) - {""} <= known


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
