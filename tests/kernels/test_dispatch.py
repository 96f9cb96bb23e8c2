"""Which backend runs: an explicit name never falls back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from longswift import ConfigError, Full, MSSwift, SlidingWindow
from longswift.core.bias import ScoreBias
from longswift.core.errors import UnsupportedError
from longswift.core.pattern import BlockPattern
from longswift.core.states import LinearResult, LinearState
from longswift.core.types import Partial
from longswift.extend.bias import ALiBi
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


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_tangents_are_refused_and_not_lost(backend: str) -> None:
    q, k, v, t = torch.randn(4, 1, 2, 64, 16)
    for mechanism in (MSSwift(), Full()):
        with pytest.raises(UnsupportedError, match="tangents"):
            torch.func.jvp(lambda x, m=mechanism: m(x, k, v, backend=backend).out, (q,), (t,))
    window = SlidingWindow(window=8)
    with pytest.raises(UnsupportedError, match="tangents"):
        torch.func.jvp(lambda x: window(x, k, v, backend=backend).out, (q,), (t,))
    right = torch.func.jvp(lambda x: window(x, k, v, backend="reference").out, (q,), (t,))[1]
    with forward_ad.dual_level():
        moved = window(forward_ad.make_dual(q, t), k, v, backend="reference").out
        torch.testing.assert_close(forward_ad.unpack_dual(moved).tangent, right)
    step = 1e-3 * t
    slope = (window(q + step, k, v).out - window(q - step, k, v).out) / 2e-3
    torch.testing.assert_close(right, slope, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_transforms_are_refused_and_spoil_no_verdict(backend: str, forgetful: None) -> None:
    q, k, v = torch.randn(3, 2, 1, 2, 64, 16)
    with pytest.raises(UnsupportedError, match=r"torch\.func\.vmap"):
        torch.func.vmap(lambda q, k, v: Full()(q, k, v, backend=backend).out)(q, k, v)
    with pytest.raises(UnsupportedError, match=r"torch\.func\.grad"):
        torch.func.grad(lambda q: MSSwift()(q, k[0], v[0], backend=backend).out.sum())(q[0])
    slope = torch.func.grad(lambda q: Full()(q, k[0], v[0], backend="reference").out.sum())(q[0])
    given = q[0].clone().requires_grad_()
    Full()(given, k[0], v[0], backend=backend).out.sum().backward()
    torch.testing.assert_close(slope, given.grad)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Trust is remembered per process; a test that fakes it leaves none behind."""
    dispatch.trusted.cache_clear()
    yield
    dispatch.trusted.cache_clear()


@pytest.mark.parametrize("asked", dispatch.CHECKS)
@pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name != "reference"])
def test_every_backend_passes_its_check(name: str, asked: str) -> None:
    module, cpu = dispatch.BACKENDS[name], torch.device("cpu")
    usable, reason = module.verify(cpu)
    if not usable:
        pytest.skip(reason)
    if name == "flex" and asked != "attend":
        pytest.skip("FlexAttention computes patterns without a bias")
    if asked == "choose_by_bounds" and not hasattr(module, asked):
        pytest.skip("chosen by torch")
    if name == "native" and asked == "attend_linear":
        pytest.skip("the compiled kernels are those of softmax attention")
    # Generation asks for the first time where no gradients can be recorded.
    with torch.inference_mode():
        assert dispatch.disagreement(module, cpu, asked) == ""


def test_a_wrong_or_broken_backend_is_found_out() -> None:
    def wrong_state(*args: Any, **options: Any) -> LinearResult:
        found = reference.attend_linear(*args, **options)
        return found._replace(state=LinearState(found.state.s, found.state.z * 1.01))

    def wrong(*args: Any, **options: Any) -> Partial:
        part = reference.attend(*args, **options)
        return Partial(part.out * 1.01, part.lse)

    def deaf(*args: Any, bias: ScoreBias) -> Partial:
        part = reference.attend(*args, bias=replace(bias, values=bias.values.detach()))
        return Partial(part.out + 0 * bias.values.sum(), part.lse)

    def broken(*args: Any, **options: Any) -> Partial:
        raise RuntimeError("out of shared memory")

    cpu = torch.device("cpu")
    assert "output differs" in dispatch.disagreement(SimpleNamespace(attend=wrong), cpu)
    assert "out of shared memory" in dispatch.disagreement(SimpleNamespace(attend=broken), cpu)
    assert "bias" in dispatch.disagreement(SimpleNamespace(attend=deaf), cpu, "attend with a bias")
    linear = SimpleNamespace(attend_linear=wrong_state)
    assert "its z differs" in dispatch.disagreement(linear, cpu, "attend_linear")


def test_a_choice_of_keys_that_are_not_there_is_found_out() -> None:
    """As a GPU's compiler once made of the kernels: candidates beyond the band."""

    def ahead(
        q: Tensor, k: Tensor, lse: Tensor, pattern: BlockPattern, tokens: Tensor, **_: Any
    ) -> bool:
        tokens.copy_(torch.arange(tokens.shape[3]) + k.shape[2] - tokens.shape[3])
        return True

    def first(
        q: Tensor, k: Tensor, lse: Tensor, pattern: BlockPattern, tokens: Tensor, **_: Any
    ) -> bool:
        tokens.copy_(torch.arange(tokens.shape[3]) + 5)
        return True

    for wrong in (ahead, first):
        module = SimpleNamespace(choose_by_bounds=wrong)
        why = dispatch.disagreement(module, torch.device("cpu"), "choose_by_bounds")
        assert "its choice in float32 differs" in why


@pytest.mark.usefixtures("forgetful")
def test_a_gpu_chooses_only_by_a_kernel_that_is_right_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, cuda = dispatch.BACKENDS["triton"], torch.device("cuda")
    monkeypatch.setattr(backend, "verify", lambda device: (True, "here"))
    assert dispatch.chooser(dispatch.BACKENDS["eager"], cuda) is None
    with pytest.warns(UserWarning, match="'triton' is not used on cuda for choose_by_bounds"):
        assert dispatch.chooser(backend, cuda) is None
    dispatch.trusted.cache_clear()
    monkeypatch.setattr(dispatch, "disagreement", lambda module, device, asked: "")
    assert dispatch.chooser(backend, cuda) is backend.choose_by_bounds
    assert dispatch.chooser(backend, torch.device("cpu")) is backend.choose_by_bounds


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
    monkeypatch.setattr(dispatch, "disagreement", lambda module, *_: differences[names[module]])
    cuda, q = torch.device("cuda"), torch.zeros(1, 1, 4, 16, device="meta")
    with pytest.warns(UserWarning, match="'triton' is not used on cuda for attend: its output"):
        assert dispatch.resolve("auto", cuda, q, q, q)[0] == "flex"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve("auto", cuda, q, q, q)[0] == "flex"
    # What neither computes is no reason to fail.
    wide = q.double()
    assert dispatch.resolve("auto", cuda, wide, wide, wide)[0] == "eager"


@pytest.mark.usefixtures("forgetful")
def test_auto_on_a_gpu_asks_for_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is wrong in one of its functions may be right in another."""
    for name in ("triton", "flex"):
        monkeypatch.setattr(dispatch.BACKENDS[name], "verify", lambda device: (True, "here"))
    wrong = {"attend": "its output differs", "attend_linear": "", "attend with a bias": ""}
    monkeypatch.setattr(dispatch, "disagreement", lambda module, device, asked: wrong[asked])
    cuda, q = torch.device("cuda"), torch.zeros(1, 1, 4, 16, device="meta")
    assert dispatch.resolve("auto", cuda, q, q, q, kernel="attend_linear")[0] == "triton"
    bias = ALiBi().scores(q.new_zeros(q.shape, device="cpu"), q)
    assert dispatch.resolve("auto", cuda, q, q, q, bias=bias)[0] == "triton"
    with pytest.warns(UserWarning, match="for attend: its output differs"):
        assert dispatch.resolve("auto", cuda, q, q, q)[0] == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kernel in ("attend_exponential", "attend_landmarks"):
            assert dispatch.resolve("auto", cuda, q, q, q, kernel=kernel)[0] == "eager"


def test_every_backend_says_why() -> None:
    for usable, reason in dispatch.available().values():
        assert isinstance(usable, bool)
        assert reason
