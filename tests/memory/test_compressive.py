"""What only Infini-attention promises: its formulas, its precision, and a gate that can learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longswift.core.states import LinearState
from longswift.mechanisms.linear import elu1
from longswift.memory.base import LayerShape
from longswift.memory.compressive import Infini, InfiniAttention
from longswift.memory.rules import RULES, add_delta_segment, add_linear
from tests.memory.oracles import Layer

SHAPE = LayerShape(12, 4, 2, 6)


def layer_with_gate(config: Infini, gate: float) -> Layer:
    layer = Layer.make(config, SHAPE)
    with torch.no_grad():
        layer.memory.gate_bias.fill_(gate)
    return layer


@torch.no_grad()
def test_the_memory_is_linear_attention_over_all_earlier_segments() -> None:
    layer = layer_with_gate(Infini(segment=5), 1e9)
    hidden, positions = torch.randn(2, 23, 12, dtype=torch.float64), torch.arange(23).expand(2, -1)
    tokens = layer.tokens(hidden, positions)
    out, state = layer(hidden, positions)
    f_q = elu1(tokens.q)
    f_k, v = (x.repeat_interleave(2, 1) for x in (elu1(tokens.k), tokens.v))
    segment = torch.arange(23) // 5
    weights = (f_q @ f_k.mT) * (segment[:, None] > segment)
    expected = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out[:, :, 5:], expected[:, :, 5:])
    # The state is the plain sum over the complete segments.
    done = slice(0, 20)
    stored = elu1(tokens.k[:, :, done])
    torch.testing.assert_close(state.sums["matrix"], stored.mT @ tokens.v[:, :, done])
    torch.testing.assert_close(state.sums["norm"], stored.sum(2))
    assert state.kept["k"].shape[2] == 3


@pytest.mark.parametrize("gate", [-8.0, 0.0, 8.0, 1e9])
@torch.no_grad()
def test_an_empty_memory_is_not_mixed_in(gate: float) -> None:
    hidden, positions = torch.randn(1, 5, 12, dtype=torch.float64), torch.arange(5)[None]
    layer = layer_with_gate(Infini(segment=5), gate)
    out, _ = layer(hidden, positions)
    tokens = layer.tokens(hidden, None)
    layer.memory.config = Infini(segment=512)
    longer, _ = layer(hidden, positions)
    torch.testing.assert_close(out, longer)
    assert out.abs().sum() > 0
    torch.testing.assert_close(out[:, :, 0], tokens.v[:, :, 0].repeat_interleave(2, 1))


def test_the_gate_learns_from_where_it_starts() -> None:
    """A gate at -100 or 10 is saturated; ours has a gradient of the size of the others."""
    layer = layer_with_gate(Infini(segment=4), Infini().gate_init)
    hidden = torch.randn(2, 16, 12, dtype=torch.float64)
    out, _ = layer(hidden, torch.arange(16).expand(2, -1))
    target = torch.randn_like(out)
    (grad,) = torch.autograd.grad(((out - target) ** 2).mean(), layer.memory.parameters())
    assert bool((grad.abs() > 1e-4).all())
    assert Infini().gate_init == 0.0


def _random(length: int, width: int = 6) -> tuple[Tensor, Tensor, LinearState]:
    k, v = torch.randn(2, 1, 2, length, width, dtype=torch.float64)
    zeros = torch.zeros(1, 2, width, width, dtype=torch.float64)
    return elu1(k), v, LinearState(zeros, zeros[..., 0])


def test_the_two_delta_rules_differ_and_agree_on_single_tokens() -> None:
    f, v, empty = _random(24)
    token = RULES["delta_token"].update
    by_segment = add_delta_segment(f[:, :, 12:], v[:, :, 12:], add_linear(f, v, empty))
    by_token = token(f[:, :, 12:], v[:, :, 12:], add_linear(f, v, empty))
    assert not torch.allclose(by_segment.s, by_token.s, rtol=0.05)
    sums = empty
    for t in range(24):
        sums = add_delta_segment(f[:, :, t : t + 1], v[:, :, t : t + 1], sums)
    torch.testing.assert_close(sums, token(f, v, empty))


@pytest.mark.parametrize("name", ["delta_segment", "delta_token", "delta_unit"])
def test_delta_rules_do_not_store_twice_what_is_known(name: str) -> None:
    f, v, empty = _random(1)
    update, read_as, divides = RULES[name]
    once = update(f, v, empty)
    again = update(f, v, once)
    torch.testing.assert_close(again.s, once.s)
    linear = add_linear(f, v, empty)
    assert not torch.allclose(add_linear(f, v, linear).s, linear.s)
    torch.testing.assert_close(read_as(f, once), v)
    # The normaliser counts it a second time all the same.
    torch.testing.assert_close(read_as(f, again), v / 2 if divides else v)


def test_the_unit_rule_replaces_what_a_key_says_and_nothing_else() -> None:
    width, rule = 4, RULES["delta_unit"]
    f = torch.eye(width, dtype=torch.float64).view(1, 1, width, width)
    old, new = torch.randn(2, 1, 1, width, 3, dtype=torch.float64)
    zeros = torch.zeros(1, 1, width, 3, dtype=torch.float64)
    sums = rule.update(5 * f, old, LinearState(zeros, zeros[..., :0, 0]))
    sums = rule.update(0.1 * f[:, :, 1:2], new[:, :, 1:2], sums)
    torch.testing.assert_close(rule.read(f, sums)[:, :, 1], new[:, :, 1])
    torch.testing.assert_close(rule.read(f, sums)[:, :, [0, 2, 3]], old[:, :, [0, 2, 3]])


def _weights_of_segments(name: str, k: Tensor, q: Tensor, segments: int) -> Tensor:
    """Mean weight of each segment's values in reads behind all of them: reads are linear in v."""
    update, read_as, divides = RULES[name]
    length, width = k.shape[2:]
    v = torch.eye(length, dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    zeros = k.new_zeros(*k.shape[:2], width, length)
    sums = LinearState(zeros, zeros[..., 0] if divides else zeros[..., :0, 0])
    for keys, values in zip(k.chunk(segments, 2), v.chunk(segments, 2), strict=True):
        sums = update(elu1(keys), values, sums)
    return read_as(elu1(q), sums).unflatten(-1, (segments, -1)).sum(-1).mean((0, 1, 2))


def test_with_the_normaliser_the_delta_rule_forgets_where_a_text_began() -> None:
    """Elu features are positive and alike: segment s of S keeps (s - 1) / (S - 1) of its weight.

    Documented in docs/mechanisms/infini.md; a rule that stops to behave so must be described anew.
    """
    torch.manual_seed(0)
    k, q = torch.randn(2, 16, 4, 80, 16, dtype=torch.float64) * 0.8
    near = {"rtol": 0, "atol": 0.012}
    expected = torch.arange(5, dtype=torch.float64) / 4 / 5
    linear = _weights_of_segments("linear", k, q, 5)
    torch.testing.assert_close(linear, torch.full_like(linear, 1 / 5), **near)
    segment = _weights_of_segments("delta_segment", k, q, 5)
    torch.testing.assert_close(segment, expected, **near)
    # Token by token the same holds of tokens, so that a little of the first segment is left.
    token = _weights_of_segments("delta_token", k, q, 5)
    torch.testing.assert_close(token, (torch.arange(5, dtype=k.dtype) + 0.5) / 25, **near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_sums_over_65536_tokens_neither_stall_nor_overflow(dtype: torch.dtype) -> None:
    """In bf16 the normaliser stalls at 32,768 and in fp16 it is infinite: state is fp32."""
    shape = LayerShape(4, 1, 1, 4)
    memory = InfiniAttention(Infini(segment=4096), shape).to(dtype)
    hidden = torch.randn(1, 65_536, 4).to(dtype)
    layer = Layer(memory, Layer.make(Infini(), shape, dtype).projections, shape)
    tokens = layer.tokens(hidden, None)
    out, state = memory(tokens, project=layer.project)
    exact = elu1(tokens.k.double()).sum(2)
    assert float(exact.max()) > 40_000
    assert out.isfinite().all()
    torch.testing.assert_close(state.sums["norm"].double(), exact, rtol=1e-3, atol=0)


def test_gradients_through_the_memory_stop_where_asked() -> None:
    hidden, positions = torch.randn(1, 12, 12, dtype=torch.float64), torch.arange(12)[None]
    reached = {}
    for every in (None, 1, 2):
        torch.manual_seed(0)
        layer = layer_with_gate(Infini(segment=4, detach_every=every), 2.0)
        x = hidden.clone().requires_grad_()
        out, _ = layer(x, positions)
        (grad,) = torch.autograd.grad(out[:, :, 8:].sum(), x)
        reached[every] = [bool(grad[0, s : s + 4].abs().sum() > 0) for s in (0, 4, 8)]
    assert reached == {
        None: [True, True, True],
        1: [False, False, True],
        2: [False, False, True],
    }
    layer = layer_with_gate(Infini(segment=4, detach_every=2), 2.0)
    x = hidden.clone().requires_grad_()
    out, _ = layer(x, positions)
    (grad,) = torch.autograd.grad(out[:, :, 4:8].sum(), x)
    assert bool(grad[0, :4].abs().sum() > 0)


@pytest.mark.parametrize("update", RULES)
def test_extreme_keys_stay_finite(update: str) -> None:
    """Features of -2000 underflow; nothing is divided by zero, forward or backward."""
    layer = layer_with_gate(Infini(segment=2, update=update), 1.0)
    hidden = torch.randn(1, 8, 12, dtype=torch.float64, requires_grad=True)
    tokens = layer.tokens(hidden, None)
    tokens = tokens._replace(q=tokens.q - 2000, k=tokens.k - 2000)
    out, _ = layer.memory(tokens, project=layer.project)
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out.sum(), hidden)
    assert grad.isfinite().all()
