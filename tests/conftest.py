"""Fixtures of every test: one thread, fixed seeds, exact ranks, memory never zero by luck."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

from longswift.core.blocks import Workspace
from longswift.kernels.native import choosing, rounding
from longswift.kernels.native.factors import factors_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports triton: its kernels run on a GPU or in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
torch.set_num_threads(1)


class TorchRandom:
    """PyTorch's global random state, so that Hypothesis can replay an example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.random.get_rng_state)
    setstate = staticmethod(torch.random.set_rng_state)


TORCH_RANDOM = TorchRandom()
register_random(TORCH_RANDOM)

settings.register_profile(
    "dev", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = make(*args, **kwargs)
        if x.is_meta or x.dtype == torch.bool:
            return x
        with torch.no_grad():
            huge = float("nan") if x.is_floating_point() or x.is_complex() else 1 << 6
            return x.fill_(huge)

    return poison


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from ``torch.empty`` and its kin holds NaN, so that reading it first fails a test."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    # A reused buffer is as unreliable as a new one.
    monkeypatch.setattr(Workspace, "get", _poisoned(Workspace.get))


@pytest.fixture(scope="session", autouse=True)
def exact_ranks() -> Iterator[None]:
    """Inputs are ranked as they are everywhere, so that backends choose the same keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "ranking_dtype", factors_of)
        patch.setattr(rounding, "ranks_in_bytes", lambda: False)
        yield


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the tiny model's kind: two layers, one sliding, one full."""
    from longswift.tiny import network, tokenizer

    place = tmp_path_factory.mktemp("model")
    network.build(
        vocab_size=512,
        layers=2,
        hidden=32,
        heads=4,
        kv_heads=2,
        feed_forward=64,
        window=32,
        seed=0,
    ).save_pretrained(place)
    tokenizer.train(512, limit=300).save_pretrained(place)
    return place
