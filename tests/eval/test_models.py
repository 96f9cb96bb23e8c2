"""The model a command was given, and what tells it from another."""

from __future__ import annotations

import torch

from longswift.eval.models import load


def test_a_fingerprint_tells_weights_apart_whatever_the_threads() -> None:
    loaded = load("tiny")
    found = {loaded.fingerprint()}
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            found.add(loaded.fingerprint())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    weight = next(iter(loaded.model.parameters()))
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(2.0))
    assert loaded.fingerprint() not in found
    assert load("tiny", dtype="bfloat16").fingerprint() not in found
