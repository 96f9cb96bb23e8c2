"""Linear, Efficient and Performer attention beyond the table: steps, states, options, defects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longswift import ConfigError, InputError, get_mechanism
from longswift.core.states import LinearState
from longswift.mechanisms.recurrent import Recurrent, State
from tests.mechanisms.drawing import tolerance
from tests.mechanisms.table import CASES, Case

STATEFUL = [c for c in CASES if isinstance(c.build(), Recurrent)]
stateful_of = pytest.mark.parametrize("case", STATEFUL, ids=lambda case: case.label)


def recurrent(name: str, **config: Any) -> Recurrent:
    mechanism = get_mechanism(name, **config)
    assert isinstance(mechanism, Recurrent)
    return mechanism


def draw(n: int, *, heads: int = 4, kv_heads: int = 2, **options: Any) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, h, n, 8, **options) for h in (heads, kv_heads, kv_heads))


@stateful_of
@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 90), (0, 40, 41, 90), (0, 90)], ids=str)
def test_steps_are_the_text(case: Case, cuts: tuple[int, ...]) -> None:
    q, k, v = draw(90, dtype=torch.float64)
    mechanism = recurrent(case.name, **case.config)
    whole = mechanism(q, k, v)
    state, outs, lses = None, [], []
    for a, b in zip(cuts, cuts[1:], strict=False):
        out, lse, state = mechanism.step(*(x[:, :, a:b] for x in (q, k, v)), state)
        outs.append(out)
        lses.append(lse)
    torch.testing.assert_close(torch.cat(outs, 2), whole.out)
    torch.testing.assert_close(torch.cat(lses, 2), whole.lse)


@stateful_of
def test_steps_forget_padding(case: Case) -> None:
    """Rows padded left, right and in between, cut where one row has only padding so far."""
    q, k, v = draw(40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :13] = mask[1, 9:20] = mask[1, 35:] = False
    mechanism = recurrent(case.name, **case.config)
    whole = mechanism(q, k, v, key_mask=mask)
    state, outs = None, []
    for part in torch.arange(40).split([5, 6, 1, 10, 18]):
        out, _, state = mechanism.step(
            q[:, :, part], k[:, :, part], v[:, :, part], state, key_mask=mask[:, part]
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole.out, **tolerance(torch.float32))
    assert state is not None and all(x.isfinite().all() for x in state)


@stateful_of
def test_gradients_flow_through_the_state(case: Case) -> None:
    tensors = [x.requires_grad_() for x in draw(30, dtype=torch.float64)]
    mechanism = recurrent(case.name, **case.config)
    whole = torch.autograd.grad(mechanism(*tensors).out.square().sum(), tensors)
    state: State | None = None
    loss = torch.zeros((), dtype=torch.float64)
    for part in torch.arange(30).split([11, 1, 18]):
        out, _, state = mechanism.step(*(x[:, :, part] for x in tensors), state)
        loss = loss + out.square().sum()
    for a, b in zip(torch.autograd.grad(loss, tensors), whole, strict=True):
        torch.testing.assert_close(a, b)


@stateful_of
def test_the_state_has_the_size_reported_however_long_the_text(case: Case) -> None:
    mechanism = recurrent(case.name, **case.config)
    sizes = set()
    for n in (3, 300):
        q, k, v = draw(n, dtype=torch.bfloat16)
        state = mechanism.step(q, k, v).state
        held = sum(x.untyped_storage().nbytes() for x in state)
        assert held == q.shape[0] * mechanism(q, k, v).stats.extra["state_bytes_per_sequence"]
        sizes.add(held)
    assert len(sizes) == 1


def test_steps_refuse_what_they_cannot_continue() -> None:
    q, k, v = draw(6)
    mechanism = recurrent("linear")
    state = mechanism.step(q, k, v).state
    with pytest.raises(InputError, match="state"):
        mechanism.step(q[:1], k[:1], v[:1], state)
    with pytest.raises(InputError, match="same new tokens"):
        mechanism.step(q[:, :, :1], k, v)
    with pytest.raises(InputError, match="finite"):
        mechanism.step(q, k, v * float("nan"))


@pytest.mark.parametrize(
    "mechanism",
    [recurrent("linear"), recurrent("efficient"), recurrent("performer", features=16)],
    ids=lambda mechanism: mechanism.name,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_long_text_neither_stalls_nor_overflows(mechanism: Recurrent, dtype: torch.dtype) -> None:
    """64k tokens, the last ones unlike the rest: a 16-bit sum would stall or be infinite."""
    q, k, v = (torch.randn(1, 1, n, 8).to(dtype) for n in (1, 65_536, 65_536))
    v[:, :, 60_000:] += 3.0
    exact = mechanism.reference(q.double(), k.double(), v.double()).out
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mechanism(q, k, v).out.double(), exact, rtol=eps, atol=eps)


@pytest.mark.parametrize("name", ["linear", "efficient", "performer"])
def test_terms_inside_a_chunk_are_not_dropped(name: str) -> None:
    q, k, v = draw(128)
    whole, single = (recurrent(name, chunk=c)(q, k, v).out for c in (128, 1))
    torch.testing.assert_close(whole, single, **tolerance(torch.float32))


@pytest.mark.parametrize("causal", [True, False])
def test_reassociation_is_exact_without_softmax(causal: bool) -> None:
    """``(Q K^T) V == Q (K^T V)``: the same numbers, one of them in linear time."""
    q, k, v = (torch.randn(1, 1, 70, 8, dtype=torch.float64) for _ in range(3))
    weights = q @ k.transpose(2, 3)
    expected = (weights.tril() if causal else weights) @ v
    plain = recurrent("linear", feature_map="identity", normalise=False)
    torch.testing.assert_close(plain(q, k, v, causal=causal, scale=1.0).out, expected)


def test_scale_multiplies_weights_that_are_not_normalised() -> None:
    q, k, v = draw(20)
    sums, means = recurrent("linear", normalise=False), recurrent("linear")
    torch.testing.assert_close(sums(q, k, v, scale=2.0).out, 2 * sums(q, k, v, scale=1.0).out)
    assert torch.equal(means(q, k, v, scale=2.0).out, means(q, k, v, scale=1.0).out)
    weights = means.reference(q, k, v).lse.exp().unsqueeze(3)
    torch.testing.assert_close(sums(q, k, v, scale=1.0).out, means(q, k, v).out * weights)


def test_a_query_without_weight_is_zero() -> None:
    q, k, v = draw(10)
    out, lse, _ = recurrent("linear", feature_map="relu")(-q.abs(), k, v)
    assert not out.any() and (lse == float("-inf")).all()


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_efficient_attention_add_up_to_one(causal: bool) -> None:
    q, k, _ = (3 * x for x in draw(300))
    v = torch.ones(2, 2, 300, 1)
    out, lse, _ = recurrent("efficient")(q, k, v, causal=causal)
    torch.testing.assert_close(out, torch.ones_like(out))
    assert not lse.any()


def test_causal_efficient_attention_ends_as_the_bidirectional_one() -> None:
    """The same normalisers, one per feature: the last row has seen every key."""
    q, k, v = draw(100)
    causal, both = (recurrent("efficient")(q, k, v, causal=c).out[:, :, -1] for c in (True, False))
    torch.testing.assert_close(causal, both)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("linear", {"feature_map": "exp"}),
        ("linear", {"feature_map": "identity"}),
        ("linear", {"chunk": 0}),
        ("performer", {"features": 0}),
        ("performer", {"features": 5, "hyperbolic": True}),
        ("performer", {"seed": -1}),
        ("performer", {"seed": 1.5}),
    ],
)
def test_impossible_options_are_refused(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        get_mechanism(name, **config)


def test_states_can_be_reordered_for_beams() -> None:
    q, k, v = draw(12)
    mechanism = recurrent("linear")
    state = mechanism.step(q[:, :, :11], k[:, :, :11], v[:, :, :11]).state
    swapped = LinearState(*(x.flip(0) for x in state))
    last = [x[:, :, 11:].flip(0) for x in (q, k, v)]
    out = mechanism.step(*last, swapped).out.flip(0)
    torch.testing.assert_close(out, mechanism(q, k, v).out[:, :, 11:])
