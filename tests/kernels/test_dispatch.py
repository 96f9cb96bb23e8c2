"""Which backend runs: an explicit name never falls back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longswift import ConfigError, Full
from longswift.core.errors import UnsupportedError
from longswift.core.types import Partial
from longswift.kernels import dispatch, reference


def test_unknown_backend() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ConfigError, match="'auto' or one of .*eager"):
        Full()(q, q, q, backend="cuda-magic")


def test_explicit_backend_runs() -> None:
    q, k, v = torch.randn(3, 1, 1, 40, 16)
    usable = [name for name, (runs, _) in dispatch.available("cpu").items() if runs]
    assert {"reference", "eager", "flex"} <= set(usable)
    for name in usable:
        r = Full()(q, k, v, backend=name)
        assert r.stats.backend == name
        torch.testing.assert_close(r.out, Full()(q, k, v).out)


def test_an_unusable_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = dispatch.BACKENDS["eager"]
    monkeypatch.setattr(module, "verify", lambda device: (False, "the device is on strike"))
    with pytest.raises(ConfigError, match="on strike"):
        dispatch.resolve("eager", torch.device("cpu"))


def test_a_backend_without_the_kernel_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="attend_landmarks .*eager"):
        dispatch.resolve("flex", torch.device("cpu"), kernel="attend_landmarks")


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Trust is remembered per process; a test that fakes it leaves none behind."""
    dispatch.trusted.cache_clear()
    yield
    dispatch.trusted.cache_clear()


@pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name != "reference"])
def test_every_backend_passes_its_check(name: str) -> None:
    usable, reason = dispatch.BACKENDS[name].verify(torch.device("cpu"))
    if not usable:
        pytest.skip(reason)
    # Generation asks for the first time where no gradients can be recorded.
    with torch.inference_mode():
        assert dispatch.disagreement(dispatch.BACKENDS[name], torch.device("cpu")) == ""


def test_a_wrong_or_broken_backend_is_found_out() -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Partial:
        part = reference.attend(q, k, v, *rest)
        return Partial(part.out * 1.01, part.lse)

    def broken(*args: Any) -> Partial:
        raise RuntimeError("out of shared memory")

    cpu = torch.device("cpu")
    assert "output differs" in dispatch.disagreement(SimpleNamespace(attend=wrong), cpu)
    assert "out of shared memory" in dispatch.disagreement(SimpleNamespace(attend=broken), cpu)


def test_auto_is_the_fastest_that_can_on_a_cpu() -> None:
    q = torch.randn(1, 1, 4, 16)
    compiled, _ = dispatch.BACKENDS["native"].verify(q.device)
    assert dispatch.resolve("auto", q.device, q, q, q)[0] == ("native" if compiled else "eager")
    wide = q.double()
    assert dispatch.resolve("auto", q.device, wide, wide, wide)[0] == "eager"
    assert dispatch.resolve("auto", torch.device("cuda"))[0] == "eager"


@pytest.mark.usefixtures("forgetful")
def test_auto_on_a_gpu_takes_what_is_right_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "flex"):
        monkeypatch.setattr(dispatch.BACKENDS[name], "verify", lambda device: (True, "here"))
    differences = {"triton": "its output differs", "flex": ""}
    names = {module: name for name, module in dispatch.BACKENDS.items()}
    monkeypatch.setattr(dispatch, "disagreement", lambda module, _: differences[names[module]])
    cuda, q = torch.device("cuda"), torch.zeros(1, 1, 4, 16, device="meta")
    with pytest.warns(UserWarning, match="'triton' is not used on cuda: its output differs"):
        assert dispatch.resolve("auto", cuda, q, q, q)[0] == "flex"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve("auto", cuda, q, q, q)[0] == "flex"
    # What neither computes is no reason to fail.
    wide = q.double()
    assert dispatch.resolve("auto", cuda, wide, wide, wide)[0] == "eager"


def test_every_backend_says_why() -> None:
    for usable, reason in dispatch.available().values():
        assert isinstance(usable, bool)
        assert reason
