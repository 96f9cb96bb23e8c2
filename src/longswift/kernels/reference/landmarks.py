"""The dense oracle of landmark attention: three explicit softmax matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from longswift.core.softmax import accumulator_dtype


def attend_landmarks(
    q: Tensor, k: Tensor, v: Tensor, *, landmarks: int, scale: float, iterations: int | None
) -> Tensor:
    """``softmax(Q K~^T) Z softmax(Q~ K^T) V``; see the eager kernel for the arguments."""
    groups, length = q.shape[1] // k.shape[1], k.shape[2]
    qd, kd, vd = (x.double() for x in (q, k, v))
    kd, vd = kd.repeat_interleave(groups, 1), vd.repeat_interleave(groups, 1)
    count = min(landmarks, length)
    starts = [-(-length * i // count) for i in range(count + 1)]
    q_mean, k_mean = (
        torch.stack([x[:, :, a:b].mean(2) for a, b in zip(starts, starts[1:], strict=False)], 2)
        for x in (qd, kd)
    )
    left = (qd @ k_mean.transpose(2, 3) * scale).softmax(3)
    middle = (q_mean @ k_mean.transpose(2, 3) * scale).softmax(3)
    right = (q_mean @ kd.transpose(2, 3) * scale).softmax(3)
    if iterations is None:
        z = torch.linalg.pinv(middle)
    else:
        eye = torch.eye(count, dtype=torch.float64, device=q.device)
        z = torch.stack([m.T / (m.sum(0).max() * m.sum(1).max()) for m in middle.flatten(0, 1)])
        z = z.view_as(middle)
        for _ in range(iterations):
            y = middle @ z
            z = z @ (13 * eye - y @ (15 * eye - y @ (7 * eye - y))) / 4
    return (left @ z @ (right @ vd)).to(accumulator_dtype(q.dtype))
