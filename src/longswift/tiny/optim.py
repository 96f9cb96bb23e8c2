"""Muon for the hidden matrices: momentum whose update has all singular values near one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from longswift.core.hardware import cpu_multiplies_fast

__all__ = ["Muon"]

_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def _orthogonal(update: torch.Tensor) -> torch.Tensor:
    """Push the singular values of ``update`` [count, rows, columns] towards one."""
    a, b, c = _QUINTIC
    wide = update.shape[-2] <= update.shape[-1]
    x = update if wide else update.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if cpu_multiplies_fast(torch.bfloat16):
        x = x.bfloat16()
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(update.dtype)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with matrices of one shape updated together.

    PyTorch's own version always iterates in bfloat16, which many CPUs only emulate; this one does
    so where it is fast.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one update to every matrix."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                looks = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    grad = p.grad if p.grad is not None else torch.zeros_like(p)
                    state["momentum"].lerp_(grad, 1 - group["momentum"])
                    looks.append(grad.lerp(state["momentum"], group["momentum"]))
                turned = _orthogonal(torch.stack(looks))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for p, update in zip(params, turned, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-scale)
