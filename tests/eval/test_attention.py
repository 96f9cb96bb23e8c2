"""The attention benchmark: rows, resuming, pictures, comparison."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from longswift.core.errors import ConfigError, InputError
from longswift.eval import attention, attention_table, bench_plots
from longswift.eval.attention import AttentionBench
from longswift.eval.attention_rivals import Rival
from longswift.eval.attention_table import AttentionRow
from longswift.eval.bench_plots import lines, plot_attention
from longswift.eval.compare import compare
from longswift.eval.growth import growth
from longswift.eval.plots import figure
from longswift.eval.results import Result, load

WINDOW = {"name": "sliding_window", "window": 64, "global_tokens": 0}


def bench(**changes: Any) -> AttentionBench:
    options = {
        "lengths": (128, 256),
        "mechanisms": (WINDOW,),
        "dtype": "float32",
        "repeats": 1,
        "memory": False,
    }
    return AttentionBench(**{**options, **changes})


def run(asked: AttentionBench, output: Path | None = None) -> Result:
    return attention.run(asked, output, progress=False)


def test_rows_hold_every_rival_at_every_length(tmp_path: Path) -> None:
    result = run(bench(heads=4, kv_heads=2), tmp_path / "r.json")
    assert load(tmp_path / "r.json", "attention") == result
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    found = attention_table.series(result)
    assert {name: [r.length for r in rows] for name, rows in found.items()} == {
        "sdpa": [128, 256],
        "sliding_window": [128, 256],
    }
    base, window = found["sdpa"][1], found["sliding_window"][1]
    assert base.speedup == 1.0 and base.keys_per_query == 128.5
    assert window.speedup == pytest.approx(base.seconds / window.seconds)
    assert window.keys_per_query < base.keys_per_query
    assert set(result.summary["exponents"]) == {"sdpa", "sliding_window"}
    json.dumps(result.to_dict(), allow_nan=False)


def test_every_direction_has_its_baseline() -> None:
    landmarks = {"name": "nystrom", "landmarks": 8}
    result = run(bench(lengths=(128,), mechanisms=(WINDOW, landmarks)))
    rows = {row.name: row for row in map(lambda r: AttentionRow(**r), result.rows)}
    assert list(rows) == ["sdpa", "sdpa (bidirectional)", "sliding_window", "nystrom"]
    assert [row.causal for row in rows.values()] == [True, False, True, False]
    assert rows["sdpa (bidirectional)"].keys_per_query == 128
    base = rows["sdpa (bidirectional)"].seconds
    assert rows["nystrom"].speedup == pytest.approx(base / rows["nystrom"].seconds)
    assert "nystrom (bidirectional)" in [cells[0] for cells in attention_table.table(result).rows]
    assert len(run(bench(lengths=(128,), mechanisms=(landmarks,), causal=False)).rows) == 2


def test_the_backward_pass_is_also_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very runs whose forward and backward time is the row's, those thrown away left out."""
    clock = iter(range(1000))
    real = attention.caller

    def caller(asked: AttentionBench, rival: Rival, *inputs: Tensor) -> Any:
        run = real(asked, rival, *inputs)
        # Backward passes of 0, 1, 2, ... s, one after the other.
        return lambda: run()._replace(backward_seconds=float(next(clock)))

    with monkeypatch.context() as patch:
        patch.setattr(attention, "caller", caller)
        result = run(bench(lengths=(128,), repeats=2, backward=True))
    base, window = (AttentionRow(**row) for row in result.rows)
    # 0 and 1 warm up; then sdpa, window, window, sdpa.
    assert base.backward_seconds == 3.5 and window.backward_seconds == 3.5
    result = run(bench(lengths=(128,), repeats=2, backward=True))
    base, window = (AttentionRow(**row) for row in result.rows)
    for row in (base, window):
        assert row.backward_seconds and 0 < row.backward_seconds < row.slowest
    assert base.backward_speedup == 1.0
    assert window.backward_speedup == pytest.approx(
        base.backward_seconds / window.backward_seconds  # type: ignore[operator]
    )
    table = attention_table.table(result)
    assert "backward alone" in table.columns and all(
        len(r) == len(table.columns) for r in table.rows
    )
    assert "the backward pass alone" in result.summary["sentences"][0]
    forward = run(bench(lengths=(128,)))
    assert "backward alone" not in attention_table.table(forward).columns
    assert forward.rows[0]["backward_seconds"] is None


def test_the_roofline_is_counted_from_what_was_scored() -> None:
    result = run(bench(lengths=(256,)))
    base, window = (AttentionRow(**row) for row in result.rows)
    assert window.flops == pytest.approx(4 * 64 * window.keys_per_query * 256 * 2)
    assert base.flops and window.flops and window.flops < base.flops
    assert window.least_bytes == base.least_bytes == 4 * 256 * 2 * 64 * 4
    for row in (base, window):
        assert row.flops and row.matmul_flops and row.copy_bytes and row.least_bytes
        least = max(row.flops / row.matmul_flops, row.least_bytes / row.copy_bytes)
        assert row.least_seconds == pytest.approx(least)
        assert row.roofline == pytest.approx(least / row.seconds)
    assert "Ceilings of this run" in result.summary["sentences"][-1]


def test_results_from_before_the_roofline_can_be_read() -> None:
    result = run(bench())
    new = (
        "causal",
        "backward_seconds",
        "backward_speedup",
        "state_bytes",
        "flops",
        "least_bytes",
        "matmul_flops",
        "copy_bytes",
        "least_seconds",
    )
    rows = [{k: v for k, v in row.items() if k not in new} for row in result.rows]
    config = {k: v for k, v in result.config.items() if k not in ("against", "left_out")}
    older = Result(kind="attention", config=config, seed=0, rows=rows, summary=result.summary)
    assert attention_table.table(older).rows[0][-1] == "-"
    assert "Ceilings" not in " ".join(attention_table.summarise(older)["sentences"])


def row_of(length: int, seconds: float, density: float = 0.1) -> AttentionRow:
    return AttentionRow(
        name="x",
        length=length,
        seconds=seconds,
        fastest=seconds,
        slowest=seconds,
        samples=1,
        speedup=1.0,
        extra_bytes=None,
        keys_per_query=1.0,
        density=density,
        backend="eager",
    )


def test_times_are_predicted_from_sparse_rows() -> None:
    predicted = attention.predicted_seconds
    assert predicted([], 64) is None and predicted([row_of(32, 1.0, density=1.0)], 64) is None
    assert predicted([row_of(32, 1.0)], 64) == pytest.approx(2.0)
    assert predicted([row_of(16, 1.0), row_of(32, 4.0)], 64) == pytest.approx(16.0)
    # Overhead does not hide growth.
    assert predicted([row_of(16, 1.0), row_of(32, 1.0)], 64) == pytest.approx(2.0)
    assert predicted([row_of(128, 1.0)], 64) is None
    # Noise is no growth beyond that of full attention.
    assert predicted([row_of(16, 1.0), row_of(32, 16.0)], 64) == pytest.approx(64.0)
    slow = replace(row_of(32, 9.0), fastest=2.0)
    assert predicted([row_of(16, 1.0), slow], 64) == pytest.approx(4.0)
    # What is dense at every length is quadratic in the end.
    assert predicted([row_of(32, 1.0, density=1.0)], 64, dense=True) == pytest.approx(4.0)


def test_growth_names_its_range() -> None:
    """Dense rows of a mechanism that is sparse later do not count; the last two are told apart."""
    rows = [row_of(8, 1.0, density=1.0), row_of(16, 1.0), row_of(32, 2.0), row_of(64, 16.0)]
    found = growth({"x": rows, "once": rows[:1]})
    assert set(found) == {"x"}
    one = found["x"]
    assert (one.shortest, one.longest) == (16, 64)
    assert one.time == pytest.approx(2.0) and one.last_time == pytest.approx(3.0)
    assert one.memory is None and one.state is None
    sized = [
        replace(row, least_bytes=100.0 * row.length, extra_bytes=100 * row.length, state_bytes=7)
        for row in rows
    ]
    one = growth({"x": sized})["x"]
    assert one.memory == pytest.approx(1.0) and one.state == pytest.approx(0.0)


def test_what_would_take_too_long_is_left_out_and_said(tmp_path: Path) -> None:
    slow = {"name": "bigbird_tokens", "window": 9}
    asked = (WINDOW, slow, {"name": "full"})
    result = run(bench(lengths=(64, 128), mechanisms=asked, budget_seconds=1e-9))
    assert [(row["name"], row["length"]) for row in result.rows] == [
        ("sdpa", 64),
        ("sliding_window", 64),
        ("bigbird_tokens", 64),
        ("full", 64),
        ("sdpa", 128),
        # The window is as wide as 64 tokens: dense rows predict nothing.
        ("sliding_window", 128),
    ]
    said = attention_table.left_out(result)
    assert [line.partition(" was left out")[0] for line in said] == [
        "bigbird_tokens at 128 tokens",
        "full at 128 tokens",
    ]


def test_many_rivals_are_told_apart(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(14)]
    looks = lines({name: name for name in ["sdpa", "ms_swift", *names]}, ["sdpa"], "ms_swift")
    assert len({(look.colour, look.dashes) for look in looks.values()}) == 16


def test_memory_is_measured_in_a_fresh_process() -> None:
    result = run(bench(lengths=(256,), mechanisms=(), memory=True))
    assert 0 <= result.rows[0]["extra_bytes"] < 2**26


def test_gradients_can_be_timed_too() -> None:
    result = run(bench(lengths=(128,), backward=True))
    assert all(row["seconds"] > 0 for row in result.rows)
    q, _, _ = attention.inputs(bench(backward=True), 8)
    assert q.requires_grad


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, measure = tmp_path / "r.json", attention._measure
    measured = []

    def interrupt_at(length: int | None):
        def step(asked: AttentionBench, n: int, bar: Any, rivals: Any) -> Any:
            if n == length:
                raise KeyboardInterrupt
            measured.append(n)
            return measure(asked, n, bar, rivals)

        return step

    monkeypatch.setattr(attention, "_measure", interrupt_at(256))
    with pytest.raises(KeyboardInterrupt):
        run(bench(), file)
    assert [p.name for p in tmp_path.iterdir()] == ["r.partial.json"]
    monkeypatch.setattr(attention, "_measure", interrupt_at(None))
    result = run(bench(), file)
    assert measured == [128, 256]
    assert [row["length"] for row in result.rows] == [128, 128, 256, 256]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_the_same_seed_gives_the_same_data() -> None:
    first, second = (attention.inputs(bench(seed=5), 32)[0] for _ in range(2))
    assert first.equal(second)
    assert not first.equal(attention.inputs(bench(seed=6), 32)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 3, "kv_heads": 2},
        {"dtype": "int8"},
        {"repeats": 0},
        {"device": "nonsense"},
        {"against": "flash"},
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        bench(**changes)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    file = plot_attention(run(bench()), tmp_path / "p.png")
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000
    one_length = run(bench(lengths=(128,)))
    plot_attention(one_length, tmp_path / "q.png")
    assert attention_table.table(one_length).rows[0][-2] == "-"


def test_comparison_finds_what_got_worse() -> None:
    before = run(bench())
    rows = [dict(row) for row in before.rows]
    rows[0]["seconds"] *= 2
    rows[1]["seconds"] *= 0.5
    after = Result(kind="attention", config=before.config, seed=0, rows=rows)
    changes = {(c.case, c.measure): c for c in compare(before, after)}
    assert changes["sdpa 128", "seconds"].worse
    assert changes["sdpa 128", "seconds"].ratio == pytest.approx(2)
    assert sum(change.worse for change in changes.values()) == 1
    assert not any(change.worse for change in compare(before, after, threshold=1.5))
    with pytest.raises(InputError, match="in common"):
        compare(before, Result(kind="attention", config={}, seed=0, rows=[]))
    with pytest.raises(InputError, match="one kind"):
        compare(before, Result(kind="demo", config={}, seed=0, rows=[]))


def test_numbers_of_rivals_that_tie_do_not_hide_each_other() -> None:
    fig = figure(6, 5)
    axis = fig.subplots()
    rivals = {
        name: [SimpleNamespace(length=n, speedup=x) for n, x in zip((4096, 32768), of, strict=True)]
        for name, of in {"a": (5.1, 4.8), "b": (5.0, 17.0), "c": (4.9, 109.0)}.items()
    }
    for rows in rivals.values():
        axis.plot([row.length for row in rows], [row.speedup for row in rows])
    looks = bench_plots.lines({name: name for name in rivals}, [], "a")
    bench_plots._number_speedups(axis, rivals, looks)  # type: ignore[arg-type]
    bench_plots.ratio_axis(axis, "")
    fig.canvas.draw()
    boxes = [words.get_window_extent() for words in axis.texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
