"""The distance to softmax attention, next to its baselines."""

from __future__ import annotations

from pathlib import Path

import torch

from longswift import get_mechanism
from longswift.eval import approximation
from longswift.eval.approximation import Approximation, reassociated
from longswift.eval.results import load

RIVALS = {
    "linear": get_mechanism("linear").to_dict(),
    "all": get_mechanism("sliding_window", window=512).to_dict(),
    "landmarks": get_mechanism("nystrom", landmarks=16).to_dict(),
}


def test_both_orders_of_multiplication_agree_and_softmax_differs() -> None:
    q, k, v = (torch.randn(1, 2, 60, 8, dtype=torch.float64) for _ in range(3))
    for causal in (True, False):
        quadratic, linear = reassociated(q, k, v, causal=causal)
        torch.testing.assert_close(linear, quadratic)
        exact = get_mechanism("full")(q, k, v, causal=causal).out
        assert (linear - exact).norm() > exact.norm()


def test_rivals_stand_next_to_the_mean_of_the_values(tmp_path: Path) -> None:
    asked = Approximation(mechanisms=RIVALS, spreads=(0.01, 4.0), length=128, heads=1, head_dim=16)
    result = approximation.run(asked, tmp_path / "r.json")
    assert load(tmp_path / "r.json", "approximation") == result
    errors = {(r["name"], r["causal"], r["spread"]): r["error"] for r in result.rows}
    # Bidirectional windows of 512 see 128 tokens whole, causal ones too.
    assert errors["all", True, 4.0] < 1e-5 and errors["all", False, 4.0] < 1e-5
    # Flat scores are the mean of the values, peaked ones are not.
    assert errors["uniform", False, 0.01] < 0.05 < 0.5 < errors["uniform", False, 4.0]
    assert ("landmarks", True, 4.0) not in errors and ("landmarks", False, 4.0) in errors
    assert all(row["reassociation"] < 1e-5 for row in result.rows)
    table = approximation.table(result)
    assert table.columns[1:] == ("causal, 0.01", "causal, 4", "both, 0.01", "both, 4")
    assert {row[0]: row[1] for row in table.rows}["landmarks"] == "-"
