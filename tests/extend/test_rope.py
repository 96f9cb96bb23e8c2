"""Scaled rotary frequencies against Transformers' own and against formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longswift.core.errors import ConfigError
from longswift.extend.rope import RopeScaling


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["linear", "dynamic", "yarn", "llama3"]),
    dim=st.sampled_from([16, 32, 64, 128]),
    base=st.sampled_from([10_000.0, 500_000.0, 5_000_000.0]),
    factor=st.floats(1.0, 64.0),
    original=st.sampled_from([512, 2048, 8192]),
    length=st.integers(1, 100_000),
)
def test_equal_to_transformers(
    kind: str, dim: int, base: float, factor: float, original: int, length: int
) -> None:
    scaling = RopeScaling(kind=kind, factor=factor, original_length=original)  # type: ignore[arg-type]
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        max_position_embeddings=original,
        rope_parameters=scaling.parameters(dim, base),
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    got, got_factor = scaling.frequencies(dim, base, length)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0.0)
    assert got_factor == pytest.approx(expected_factor)


def test_ntk_stretches_the_slowest_channel_by_the_factor() -> None:
    scaling = RopeScaling(kind="ntk", factor=8.0, original_length=2048)
    plain = RopeScaling(kind="default", original_length=2048)
    got, factor = scaling.frequencies(64, 10_000.0)
    before, _ = plain.frequencies(64, 10_000.0)
    assert factor == 1.0
    assert got[0] == before[0]
    assert (before[-1] / got[-1]).item() == pytest.approx(8.0, rel=1e-4)
    assert scaling.ntk_base(64, 10_000.0) == pytest.approx(10_000 * 8 ** (64 / 62))
    assert scaling.parameters(64, 10_000.0)["rope_type"] == "default"


@pytest.mark.parametrize("kind", ["default", "linear", "ntk", "dynamic", "yarn", "llama3"])
def test_a_factor_of_one_changes_nothing(kind: str) -> None:
    scaling = RopeScaling(kind=kind, factor=1.0, original_length=2048)  # type: ignore[arg-type]
    got, factor = scaling.frequencies(64, 10_000.0)
    expected = 1.0 / 10_000.0 ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(got, expected)
    assert factor == 1.0


def test_yarn_keeps_fast_and_interpolates_slow_channels() -> None:
    got, factor = RopeScaling(kind="yarn", factor=4.0, original_length=4096).frequencies(128, 1e4)
    plain, _ = RopeScaling(kind="default", original_length=4096).frequencies(128, 1e4)
    assert torch.equal(got[:10], plain[:10])
    torch.testing.assert_close(got[-10:], plain[-10:] / 4)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "magic"},
        {"kind": "yarn", "factor": 0.5},
        {"kind": "yarn", "factor": math.nan},
        {"kind": "linear", "factor": math.inf},
        {"kind": "yarn", "beta_fast": 1.0, "beta_slow": 32.0},
        {"kind": "llama3", "low_freq_factor": 4.0},
    ],
)
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RopeScaling(**{"original_length": 128, **options})  # type: ignore[arg-type]
