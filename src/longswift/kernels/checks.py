"""Small problems that a backend must solve as the reference does before it is used unasked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.pattern import Band, BlockPattern
from longswift.core.states import LinearState
from longswift.kernels.choice_check import agreement

Results = dict[str, Tensor]


def _attend(module: ModuleType, device: torch.device, biased: bool = False) -> Results:
    """Bands, gathered tokens row by row, the remainder, grouped heads and every gradient.

    And once without gradients for whole blocks, and for full attention: a backend may have other
    kernels for them.
    """
    shapes = (1, 4, 70, 32), (1, 2, 90, 32), (1, 2, 90, 32), (4, 159)
    *leaves, values = _leaves(device, *shapes)
    tokens = torch.tensor([[-1, -1, -1], [1, 6, -1], [2, 30, 8]], dtype=torch.int32, device=device)
    since = torch.tensor([[0, 0, 0], [40, 0, 0], [64, 70, 89]], dtype=torch.int32, device=device)
    pattern = BlockPattern(
        causal=True,
        bands=(Band(tile=32, left=0), Band(tile=32, left=16)),
        block=32,
        tokens=tokens.expand(1, 2, -1, -1),
        visible_from=since.expand(1, 2, -1, -1),
        pool=32,
        pool_grain=16,
    )
    bias = ScoreBias(values=values, zero=89) if biased else None
    out, lse = module.attend(*leaves, pattern, 0.2, bias=bias)
    if biased:
        leaves.append(values)
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    shared = replace(pattern, visible_from=None)
    full = BlockPattern(causal=True, bands=(Band(tile=90, left=0),) * 2)
    with torch.no_grad():
        found = (
            *module.attend(*leaves[:3], shared, 0.2, bias=bias),
            *module.attend(*leaves[:3], full, 0.2, bias=bias),
        )
    names = "output, log-sum-exp, shared output, shared log-sum-exp, full output, full log-sum-exp"
    names += ", dq, dk, dv" + ", gradient of the bias" * biased
    return _named(names, out, lse, *found, *grads)


def _attend_linear(module: ModuleType, device: torch.device) -> Results:
    """A carried state, masked keys, grouped heads, uneven chunks and every gradient."""
    shapes = (1, 4, 70, 40), (1, 2, 90, 40), (1, 2, 90, 24), (1, 2, 40, 24), (1, 2, 40)
    leaves = _leaves(device, *shapes)
    q, k, v, s, z = leaves
    out, normaliser, state = module.attend_linear(
        q,
        k,
        v,
        causal=True,
        chunk=32,
        q_map=torch.sigmoid,
        k_map=torch.sigmoid,
        state=LinearState(s, z.abs()),
        key_mask=(torch.arange(90, device=device) % 7 > 0).unsqueeze(0),
    )
    # The sums are some hundreds: as means they count as much as the output.
    sums = torch.cat([x.flatten() for x in state]).square().mean() + normaliser.log().sum()
    grads = torch.autograd.grad(out.square().sum() + sums, leaves)
    found = out, normaliser.log(), state.s, state.z, *grads
    return _named("output, log of the normaliser, S, z, dq, dk, dv, dS, dz", *found)


def _leaves(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    made = (
        torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        for shape in shapes
    )
    return [x.to(device).requires_grad_() for x in made]


def _named(names: str, *tensors: Tensor) -> Results:
    return {name: x.detach() for name, x in zip(names.split(", "), tensors, strict=True)}


# By what is asked of a backend.
CHECKS: dict[str, Callable[[ModuleType, torch.device], Results]] = {
    "attend": _attend,
    "attend with a bias": functools.partial(_attend, biased=True),
    "attend_linear": _attend_linear,
    "choose_by_bounds": agreement,
}
