"""Frequencies of rotary embeddings stretched beyond the trained length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from longswift.core.errors import ConfigError, problem

Kind = Literal["default", "linear", "ntk", "dynamic", "yarn", "llama3"]
KINDS: tuple[str, ...] = get_args(Kind)


def check_kind(rope: str | None) -> None:
    """Raise ``ConfigError`` unless ``rope`` is None or one of ``KINDS``."""
    if rope is not None and rope not in KINDS:
        raise ConfigError(
            problem(
                "rope",
                expected=f"None or one of {', '.join(KINDS)}",
                got=repr(rope),
                fix="'yarn' is a good first choice.",
            )
        )


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a model trained on ``original_length`` positions reads ``factor`` times as many.

    With base ``b``, rotary dimension ``d`` and ``f_i = b ** (-2i / d)``:

    * ``linear``: ``f_i / s``; every distance shrinks.
    * ``ntk``: base ``b * s ** (d / (d - 2))``; the slowest channel is stretched ``s`` times, the
      fastest stays.
    * ``dynamic``: the same with a stretch that follows the current length ``L``:
      ``s * L / L0 - (s - 1)``. Keys cached before the text grew keep their old angles.
    * ``yarn``: channels that turn more than ``beta_fast`` times within ``L0`` stay, those that turn
      less than ``beta_slow`` times are interpolated, a ramp between; queries and keys are scaled
      by ``0.1 ln s + 1``.
    * ``llama3``: the same idea with a ramp over wavelengths and without the scaling.

    Attributes:
        kind: One of the above, or ``default`` (no change).
        factor: ``s``, at least 1.
        original_length: ``L0``, the trained length.
        beta_fast: ``yarn``: turns above which a channel stays.
        beta_slow: ``yarn``: turns below which a channel is interpolated.
        low_freq_factor: ``llama3``: wavelengths above ``L0`` over this are interpolated.
        high_freq_factor: ``llama3``: wavelengths below ``L0`` over this stay.
    """

    kind: Kind
    factor: float = 1.0
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                problem(
                    "rope",
                    expected=f"one of {', '.join(KINDS)}",
                    got=repr(self.kind),
                    fix="'yarn' is a good first choice.",
                )
            )
        if not 1.0 <= self.factor < math.inf or self.original_length < 1:
            raise ConfigError(
                problem(
                    "rope scaling",
                    expected="a factor of at least 1 and a positive original length",
                    got=f"factor={self.factor}, original_length={self.original_length}",
                    fix="The factor is the wanted length over the trained one.",
                )
            )
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if not 0.0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise ConfigError(
                    problem(
                        "rope scaling",
                        expected=f"0 < {low} < {high}",
                        got=f"{getattr(self, low)} and {getattr(self, high)}",
                        fix="Leave both at what the model was published with.",
                    )
                )

    def frequencies(self, dim: int, base: float, length: int | None = None) -> tuple[Tensor, float]:
        """Angles per position, fp32 ``[dim / 2]``, and the factor on cosines and sines.

        Args:
            dim: Channels that are rotated (even).
            base: The trained ``rope_theta``.
            length: Current length; only ``dynamic`` depends on it.
        """
        if self.kind == "ntk":
            base = self.ntk_base(dim, base)
        elif self.kind == "dynamic":
            ratio = max(length or 0, self.original_length) / self.original_length
            base = _stretched(base, self.factor * ratio - (self.factor - 1), dim)
        inv_freq = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if self.kind == "linear":
            return inv_freq / self.factor, 1.0
        if self.kind == "yarn":
            keep = 1.0 - self._yarn_ramp(dim, base)
            stretched = inv_freq / self.factor * (1.0 - keep) + inv_freq * keep
            return stretched, 1.0 if self.factor == 1.0 else 0.1 * math.log(self.factor) + 1.0
        if self.kind == "llama3":
            turns = self.original_length * inv_freq / (2 * math.pi)
            span = self.high_freq_factor - self.low_freq_factor
            keep = ((turns - self.low_freq_factor) / span).clamp(0.0, 1.0)
            return inv_freq / self.factor * (1.0 - keep) + inv_freq * keep, 1.0
        return inv_freq, 1.0

    def ntk_base(self, dim: int, base: float) -> float:
        """The base that stretches the slowest channel ``factor`` times."""
        return _stretched(base, self.factor, dim)

    def parameters(self, dim: int, base: float) -> dict[str, Any]:
        """The ``rope_parameters`` entries that make Transformers compute these frequencies."""
        if self.kind in ("default", "ntk"):
            theta = self.ntk_base(dim, base) if self.kind == "ntk" else base
            return {"rope_type": "default", "rope_theta": theta}
        found: dict[str, Any] = {"rope_type": self.kind, "rope_theta": base, "factor": self.factor}
        if self.kind in ("yarn", "llama3"):
            found["original_max_position_embeddings"] = self.original_length
        if self.kind == "yarn":
            found |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        if self.kind == "llama3":
            found["low_freq_factor"] = self.low_freq_factor
            found["high_freq_factor"] = self.high_freq_factor
        return found

    def _yarn_ramp(self, dim: int, base: float) -> Tensor:
        """0 for channels that stay, 1 for those that are interpolated, ``[dim / 2]``."""

        def channel(turns: float) -> float:
            wavelength = self.original_length / (turns * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(base))

        low = max(math.floor(channel(self.beta_fast)), 0)
        high = min(math.ceil(channel(self.beta_slow)), dim - 1)
        width = high - low if high != low else 0.001
        return ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)


def _stretched(base: float, factor: float, dim: int) -> float:
    """The base that stretches the slowest of ``dim / 2`` channels ``factor`` times."""
    if dim <= 2:
        raise ConfigError(
            problem(
                "rope",
                expected="at least 4 rotated channels for 'ntk' and 'dynamic'",
                got=dim,
                fix="Use 'linear' or 'yarn' for this model.",
            )
        )
    return base * math.pow(factor, dim / (dim - 2))
