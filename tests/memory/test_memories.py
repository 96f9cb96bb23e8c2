"""Properties that every memory has: oracle, gradients, padding, cutting into calls, causality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longswift.core.errors import ConfigError, InputError
from longswift.memory import get_memory, list_memories, memory_from_dict
from longswift.memory.base import LayerShape, MemoryConfig
from longswift.memory.compressive import Infini
from longswift.memory.segment import TransformerXL
from tests.memory.oracles import Layer, oracle

CONFIGS: list[MemoryConfig] = [
    Infini(segment=5),
    Infini(segment=1),
    Infini(segment=4, update="delta_segment"),
    Infini(segment=4, update="delta_token", gate_init=1.0),
    Infini(segment=4, update="delta_unit"),
    Infini(segment=3, detach_every=2),
    Infini(segment=3, update="delta_unit", detach_every=2),
    Infini(segment=3, update="delta_segment", detach_every=1),
    Infini(segment=64),
    TransformerXL(segment=5, memory=7),
    TransformerXL(segment=4, memory=3, clamp=2),
    TransformerXL(segment=5, memory=6, same_length=True),
    TransformerXL(segment=3, memory=2, same_length=True, clamp=1),
    TransformerXL(segment=64, memory=1),
]
of_config = pytest.mark.parametrize("config", CONFIGS, ids=repr)
SHAPES = [LayerShape(12, 4, 2, 6), LayerShape(7, 3, 3, 4), LayerShape(8, 2, 1, 4)]


def data(
    shape: LayerShape, length: int = 17, batch: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, positions and real tokens: none padded, left, right, and in holes."""
    hidden = torch.randn(batch, length, shape.hidden, dtype=dtype)
    real = torch.ones(batch, length, dtype=torch.bool)
    if batch > 1:
        real[1, :4] = False
        real[2, 11:] = False
        real[3, torch.tensor([0, 3, 4, 9, 16])] = False
    positions = (real.cumsum(1) - 1).clamp_min(0)
    return hidden, positions, real


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("turned", [True, False], ids=["rotary", "plain"])
@of_config
def test_oracle_and_every_gradient(config: MemoryConfig, turned: bool, dtype: torch.dtype) -> None:
    shape = SHAPES[CONFIGS.index(config) % len(SHAPES)]
    layer = Layer.make(config, shape, dtype)
    hidden, positions, real = data(shape, dtype=dtype)
    hidden.requires_grad_()
    at = positions if turned else None
    weight = torch.randn(4, shape.heads, 17, shape.head_dim, dtype=dtype)
    fast, _ = layer(hidden, at, key_mask=real, scale=0.4)
    slow = oracle(layer, hidden, at, real, 0.4)
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(fast, slow, **close)
    leaves = [hidden, *layer.parameters()]
    grads = [
        torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)
        for out in (fast, slow)
    ]
    wide = dict(rtol=1e-3, atol=1e-3) if dtype == torch.float32 else dict(rtol=1e-8, atol=1e-9)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **wide)


@of_config
@torch.no_grad()
def test_however_a_text_is_cut(config: MemoryConfig) -> None:
    """Token by token, in odd pieces and at once give the same; the state stays bounded."""
    shape = SHAPES[0]
    layer = Layer.make(config, shape)
    hidden, positions, real = data(shape, length=29)
    whole, last = layer(hidden, positions, key_mask=real)
    for cuts in ([1] * 29, [7, 1, 1, 13, 2, 5], [28, 1]):
        state, parts, start = None, [], 0
        for size in cuts:
            piece = slice(start, start + size)
            out, state = layer(
                hidden[:, piece], positions[:, piece], key_mask=real[:, piece], state=state
            )
            parts.append(out)
            start += size
        torch.testing.assert_close(torch.cat(parts, 2), whole)
        assert state.seen == last.seen == tuple(real.sum(1).tolist())
        for name, x in last.sums.items():
            torch.testing.assert_close(state.sums[name], x)


@pytest.mark.parametrize(
    "config",
    [Infini(segment=8), Infini(segment=8, update="delta_unit"), TransformerXL(segment=8, memory=8)],
    ids=repr,
)
@torch.no_grad()
def test_state_is_bounded(config: MemoryConfig) -> None:
    layer, sizes = Layer.make(config, SHAPES[0]), []
    for length in (16, 64, 256):
        hidden = torch.randn(1, length, 12, dtype=torch.float64)
        _, state = layer(hidden, torch.arange(length)[None])
        tensors = [*state.sums.values(), *state.kept.values()]
        sizes.append(sum(x.untyped_storage().nbytes() for x in tensors))
        assert sizes[-1] == state.nbytes
    assert sizes[0] == sizes[1] == sizes[2]


@of_config
@torch.no_grad()
def test_nothing_before_a_changed_token_moves(config: MemoryConfig) -> None:
    layer = Layer.make(config, SHAPES[0])
    hidden, positions, _ = data(SHAPES[0], batch=1)
    before, _ = layer(hidden, positions)
    for at in (0, 6, 16):
        other = hidden.clone()
        other[:, at] += 1
        after, _ = layer(other, positions)
        torch.testing.assert_close(after[:, :, :at], before[:, :, :at], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, :, at], before[:, :, at])


@of_config
@torch.no_grad()
def test_rows_are_independent(config: MemoryConfig) -> None:
    """Beams: reordered, repeated and reset rows continue as if they had always been alone."""
    layer = Layer.make(config, SHAPES[0])
    hidden, positions, real = data(SHAPES[0])
    _, state = layer(hidden, positions, key_mask=real)
    more = torch.randn(4, 3, 12, dtype=torch.float64)
    at = positions[:, -1:] + torch.arange(1, 4)
    straight, _ = layer(more, at, state=state)
    order = torch.tensor([2, 0, 2, 1])
    shuffled, _ = layer(more[order], at[order], state=state.select(order))
    torch.testing.assert_close(shuffled, straight[order])
    twice, _ = layer(
        more.repeat_interleave(2, 0), at.repeat_interleave(2, 0), state=state.repeat_interleave(2)
    )
    torch.testing.assert_close(twice, straight.repeat_interleave(2, 0))
    some, _ = layer(more, at, state=state.reset([1, 3]))
    fresh, _ = layer(more, at)
    torch.testing.assert_close(some[[0, 2]], straight[[0, 2]])
    torch.testing.assert_close(some[[1, 3]], fresh[[1, 3]])


@of_config
def test_only_what_is_asked_carries_gradients(config: MemoryConfig) -> None:
    layer = Layer.make(config, SHAPES[0])
    hidden, positions, _ = data(SHAPES[0], batch=1)
    with torch.no_grad():
        quiet, _ = layer(hidden, positions)
    hidden.requires_grad_()
    out, state = layer(hidden, positions)
    torch.testing.assert_close(out, quiet)
    tensors = [*state.detach().sums.values(), *state.detach().kept.values()]
    assert not any(x.requires_grad for x in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        Infini(segment=16),
        Infini(segment=16, update="delta_unit"),
        TransformerXL(segment=16, memory=16),
    ],
    ids=repr,
)
@torch.no_grad()
def test_half_precision(config: MemoryConfig, dtype: torch.dtype) -> None:
    layer = Layer.make(config, SHAPES[0], dtype)
    hidden, positions, real = data(SHAPES[0], length=70, dtype=dtype)
    half, state = layer(hidden, positions, key_mask=real)
    assert half.dtype == dtype
    assert all(x.dtype == torch.float32 for x in state.sums.values())
    for module in (layer.memory, layer.projections):
        module.double()
    exact, _ = layer(hidden.double(), positions, key_mask=real)
    assert (half - exact).norm() < 0.02 * exact.norm()


def test_table() -> None:
    assert list_memories()[:2] == ["infini", "transformer_xl"]
    for config in CONFIGS:
        assert memory_from_dict(config.to_dict()) == config
        assert get_memory(config.name) == type(config)()
        assert config.reach >= 1
    with pytest.raises(ConfigError, match="Did you mean 'infini'"):
        get_memory("infinity")
    with pytest.raises(ConfigError, match="options among .*got 'segments'. Did you mean 'segment'"):
        get_memory("infini", segments=4)
    with pytest.raises(ConfigError, match="with a 'name'"):
        memory_from_dict({"segment": 4})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("infini", {"segment": 0}),
        ("infini", {"update": "delta"}),
        ("infini", {"gate_init": -100.0}),
        ("infini", {"gate_init": float("nan")}),
        ("infini", {"detach_every": 0}),
        ("transformer_xl", {"memory": 0}),
        ("transformer_xl", {"segment": True}),
        ("transformer_xl", {"same_length": 1}),
        ("transformer_xl", {"clamp": -1}),
    ],
)
def test_impossible_values(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        get_memory(name, **options)


def test_wrong_inputs() -> None:
    layer = Layer.make(Infini(segment=4), SHAPES[0])
    hidden, positions, _ = data(SHAPES[0])
    _, state = layer(hidden, positions)
    with pytest.raises(InputError, match="4 rows|2 rows"):
        layer(hidden[:2], positions[:2], state=state)
    tokens = layer.tokens(hidden, positions)
    with pytest.raises(InputError, match="as many queries as keys"):
        layer.memory(tokens._replace(q=tokens.q[:, :, :3]), project=layer.project)
    with pytest.raises(InputError, match="NaN"):
        layer(hidden * float("nan"), positions)
