"""Which backend runs: an explicit name never falls back."""

from __future__ import annotations

import pytest
import torch

from longswift import ConfigError, Full
from longswift.kernels import dispatch


def test_unknown_backend() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ConfigError, match="'auto' or one of .*eager"):
        Full()(q, q, q, backend="cuda-magic")


def test_explicit_backend_runs() -> None:
    q, k, v = torch.randn(3, 1, 1, 40, 8)
    for name in dispatch.available("cpu"):
        r = Full()(q, k, v, backend=name)
        assert r.stats.backend == name
        torch.testing.assert_close(r.out, Full()(q, k, v).out)


def test_an_unusable_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = dispatch.BACKENDS["eager"]
    monkeypatch.setattr(module, "verify", lambda device: (False, "the device is on strike"))
    with pytest.raises(ConfigError, match="on strike"):
        dispatch.resolve("eager", torch.device("cpu"))


def test_every_backend_says_why() -> None:
    for usable, reason in dispatch.available().values():
        assert isinstance(usable, bool)
        assert reason
