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


def _weights(name: str, k: Tensor, q: Tensor) -> Tensor:
    """Weights ``[B, H, Lq, L]`` of reads behind 5 segments on all values: reads are linear in v."""
    rule, (length, width) = RULES[name], k.shape[2:]
    v = torch.eye(length, dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    zeros = k.new_zeros(*k.shape[:2], width, length)
    sums = LinearState(zeros, zeros[..., : width if rule.divides else 0, 0])
    for keys, values in zip(k.chunk(5, 2), v.chunk(5, 2), strict=True):
        sums = rule.update(elu1(keys), values, sums)
    return rule.read(elu1(q), sums)


def test_what_the_rules_keep_of_each_segment() -> None:
    """The figures of docs/mechanisms/infini.md: a rule that changes must be described anew."""
    torch.manual_seed(0)
    k, q = torch.randn(2, 16, 4, 80, 16, dtype=torch.float64) * 0.8
    expected = {
        "linear": [0.2, 0.2, 0.2, 0.2, 0.2],
        "delta_unit": [0.0, 0.0, 0.0, 0.0, 1.0],
        # Features are positive and alike, so that segment s of S keeps (s - 1) / (S - 1) ...
        "delta_segment": [0.0, 0.05, 0.1, 0.15, 0.2],
        # ... and token t of L keeps (t - 1) / (L - 1).
        "delta_token": [0.02, 0.06, 0.1, 0.14, 0.18],
    }
    specific = {}
    for name, shares in expected.items():
        found = _weights(name, k, q).unflatten(-1, (5, 16)).sum(-1).mean((0, 1, 2))
        torch.testing.assert_close(found, found.new_tensor(shares), rtol=0, atol=0.015)
        # Asked with a key of the first segment: its own value against the others of the segment.
        first = _weights(name, k, k)[:, :, :16, :16]
        own = first.diagonal(dim1=-2, dim2=-1)
        specific[name] = float((own - (first.sum(-1) - own) / 15).mean())
    for name in ("linear", "delta_segment", "delta_token"):
        assert specific[name] == pytest.approx(0.004, abs=3e-4)
    assert specific["delta_unit"] == pytest.approx(0.08, abs=0.003)


def test_corrections_overshoot_only_without_normaliser_and_all_at_once() -> None:
    """A correction whose largest eigenvalue exceeds 2 makes errors grow."""
    torch.manual_seed(0)
    f = elu1(torch.randn(16, 4, 32, 16, dtype=torch.float64) * 0.8)
    first, second = f.chunk(2, 2)
    step = 1 / (second @ first.sum(2).unsqueeze(-1))
    paper = torch.linalg.eigvals(second.mT @ (step * second)).abs().amax(-1)
    assert float(paper.mean()) == pytest.approx(1.02, abs=0.03) and float(paper.max()) < 1.3
    units = second / second.norm(dim=-1, keepdim=True)
    at_once = torch.linalg.eigvalsh(units @ units.mT)[..., -1]
    assert float(at_once.mean()) == pytest.approx(12.4, abs=0.3)


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
