"""What only Transformer-XL promises: memories without history, stacked layers, neutral start."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.memory.base import LayerShape
from longswift.memory.segment import TransformerXL
from tests.memory.oracles import Layer

SHAPE = LayerShape(8, 2, 2, 4)
N = 6


def stack() -> list[Layer]:
    """Two layers, heads concatenated being as wide as the hidden states."""
    return [Layer.make(TransformerXL(segment=N, memory=2 * N), SHAPE) for _ in range(2)]


def run(layers: list[Layer], hidden: Tensor, positions: Tensor, states: list) -> tuple:
    after = []
    for layer, state in zip(layers, states, strict=True):
        out, state = layer(hidden, positions, state=state)
        hidden = hidden + out.transpose(1, 2).flatten(2)
        after.append(state)
    return hidden, after


def test_two_segments_are_one_pass_with_the_first_detached() -> None:
    layers = stack()
    first, second = torch.randn(2, 1, N, 8, dtype=torch.float64)
    positions = torch.arange(2 * N)[None]
    _, states = run(layers, first, positions[:, :N], [None, None])
    second = second.requires_grad_()
    apart, _ = run(layers, second, positions[:, N:], states)
    whole, _ = run(layers, torch.cat([first, second], 1), positions, [None, None])
    torch.testing.assert_close(apart, whole[:, N:])
    leaves = [second, *layers[0].parameters(), *layers[1].parameters()]
    weight = torch.randn_like(apart)
    one = torch.autograd.grad((apart * weight).sum(), leaves)
    other = torch.autograd.grad((whole[:, N:] * weight).sum(), leaves)
    torch.testing.assert_close(one, other)


def test_no_gradient_enters_an_earlier_segment() -> None:
    layers = stack()
    hidden = torch.randn(1, 3 * N, 8, dtype=torch.float64, requires_grad=True)
    out, _ = run(layers, hidden, torch.arange(3 * N)[None], [None, None])
    (grad,) = torch.autograd.grad(out[:, 2 * N :].sum(), hidden)
    assert not grad[:, : 2 * N].any()
    assert grad[:, 2 * N :].abs().sum() > 0


@torch.no_grad()
def test_depth_multiplies_the_reach() -> None:
    layers = [Layer.make(TransformerXL(segment=N, memory=N), SHAPE) for _ in range(2)]
    hidden, at = torch.randn(1, 4 * N, 8, dtype=torch.float64), torch.arange(4 * N)[None]
    other = hidden.clone()
    other[:, N] += 1
    before, after = (run(layers, x, at, [None, None])[0] for x in (hidden, other))
    moved = (before - after).abs().sum(-1)[0] > 1e-12
    assert moved[3 * N :].all()
    one, two = (run(layers[:1], x, at, [None])[0] for x in (hidden, other))
    assert not ((one - two).abs().sum(-1)[0] > 1e-12)[3 * N :].any()


@torch.no_grad()
def test_new_parameters_change_nothing_at_first() -> None:
    """A layer that rotates starts as softmax attention over memory and segment."""
    layer = Layer.make(TransformerXL(segment=4, memory=64), SHAPE)
    layer.memory.reset_parameters()
    hidden, positions = torch.randn(1, 13, 8, dtype=torch.float64), torch.arange(13)[None]
    out, _ = layer(hidden, positions)
    layer.memory.config = TransformerXL(segment=64, memory=1)
    plain, _ = layer(hidden, positions)
    torch.testing.assert_close(out, plain)


def test_states_serve_with_and_without_gradients() -> None:
    """A state made without gradients holds projections, which training does not reuse."""
    layer = Layer.make(TransformerXL(segment=4, memory=4), SHAPE)
    hidden, positions = torch.randn(1, 12, 8, dtype=torch.float64), torch.arange(12)[None]
    with torch.no_grad():
        _, quiet = layer(hidden[:, :8], positions[:, :8])
    _, loud = layer(hidden[:, :8], positions[:, :8])
    assert "k" in quiet.kept and "k" not in loud.kept
    with torch.no_grad():
        layer.projections["k"].weight.mul_(2)
    expected, _ = layer(hidden[:, 8:], positions[:, 8:], state=loud)
    got, _ = layer(hidden[:, 8:], positions[:, 8:], state=quiet)
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        again, _ = layer(hidden[:, 8:], positions[:, 8:], state=loud)
    torch.testing.assert_close(again, expected)
