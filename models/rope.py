"""Which frequencies a checkpoint rotates its keys with, and how they are stretched."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from nqkv_jax.rotary import Rotary


def setting(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or `default` if it is absent or null."""
    value = config.get(key)
    return default if value is None else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched to longer contexts.

    Attributes:
      theta: base of the frequencies theta^(-2i / head_dim).
      kind: "default", "linear" (all frequencies divided by `factor`), "llama3" (low frequencies
        divided by `factor`, a ramp between), or "yarn" (likewise, the ramp over channels).
      factor: how many times longer the context becomes.
      original_max_positions: the context before stretching (llama3, yarn).
      low_freq_factor, high_freq_factor: llama3's ramp, in rotations over the original context.
      beta_slow, beta_fast: yarn's ramp, likewise.
      attention_factor: multiplies cosine and sine (yarn).
      truncate: yarn's ramp begins and ends at whole channels.

    Source: Su et al. (2021), RoFormer; Chen et al. (2023), Position Interpolation ("linear"); Llama
      team (2024), The Llama 3 Herd of Models, with the reference code's ramp; Peng et al. (2023),
      YaRN, section 3.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float = 1.0
    truncate: bool = True

    KINDS = ("default", "linear", "llama3", "yarn")

    def __post_init__(self):
        if self.kind not in self.KINDS:
            raise NotImplementedError(
                f"RopeConfig: rope type {self.kind!r} is not supported; supported: "
                + ", ".join(self.KINDS)
            )
        if not (self.theta > 0 and self.factor > 0):
            raise ValueError(
                f"RopeConfig: theta and factor must be positive; got {self.theta=}, {self.factor=}"
            )
        if self.kind in ("llama3", "yarn") and not self.original_max_positions:
            raise ValueError(f"RopeConfig: {self.kind} needs original_max_positions; got none")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "RopeConfig: low_freq_factor must be below high_freq_factor; "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, max_positions: int) -> "RopeConfig":
        """Reads `rope_theta` and `rope_scaling`, or `rope_parameters` (transformers 5 and later).

        Raises: NotImplementedError for a scaling we do not have; ValueError for a missing setting.
        """
        rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
        get = functools.partial(setting, rope)
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise NotImplementedError(
                f"rope settings that differ between layers are not supported; got {sorted(rope)}"
            )
        partial = get("partial_rotary_factor", setting(config, "partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise NotImplementedError(f"partial_rotary_factor must be 1; got {partial}")
        kind = get("rope_type", get("type", "default"))
        theta = float(get("rope_theta", setting(config, "rope_theta", 10_000.0)))
        if kind not in cls.KINDS or kind == "default":
            return cls(theta=theta, kind=kind)
        original = setting(
            config, "original_max_position_embeddings",
            get("original_max_position_embeddings", max_positions),
        )  # fmt: skip
        factor = get("factor", None)
        if factor is None and kind == "yarn":
            factor = max_positions / original
        if factor is None:
            raise ValueError(f"rope type {kind!r} needs a `factor`; got {dict(rope)}")
        fields: dict[str, Any] = {}
        if kind == "llama3":
            for name in ("low_freq_factor", "high_freq_factor"):
                if get(name, None) is None:
                    raise ValueError(f"rope type 'llama3' needs `{name}`; got {dict(rope)}")
                fields[name] = float(rope[name])
        if kind == "yarn":
            fields = {
                "beta_slow": float(rope.get("beta_slow") or 1.0),
                "beta_fast": float(rope.get("beta_fast") or 32.0),
                "attention_factor": _yarn_attention_factor(rope, factor),
                "truncate": get("truncate", True),
            }
        return cls(
            theta=theta, kind=kind, factor=float(factor), original_max_positions=original, **fields
        )

    @functools.lru_cache(maxsize=64)  # noqa: B019  (frozen and hashable: nothing is kept alive)
    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """f32[head_dim / 2], radians per token; computed in float64 and rounded once."""
        dim = np.arange(0, head_dim, 2, dtype=np.float64)
        frequencies = self.theta ** (-dim / head_dim)
        # Share of the unstretched frequency that each channel keeps.
        if self.kind == "default":
            keep = 1.0
        elif self.kind == "linear":
            keep = 0.0
        elif self.kind == "llama3":
            rotations = self.original_max_positions * frequencies / (2 * math.pi)
            span = self.high_freq_factor - self.low_freq_factor
            keep = np.clip((rotations - self.low_freq_factor) / span, 0, 1)
        else:
            keep = 1 - self._yarn_ramp(head_dim)
        frequencies = frequencies * (keep + (1 - keep) / self.factor)
        return frequencies.astype(np.float32)

    def _yarn_ramp(self, head_dim: int) -> np.ndarray:
        """[head_dim / 2], from 0 (channels that turn often) to 1 (channels that hardly turn)."""

        def channel(rotations: float) -> float:
            """The channel pair that turns so many times over the original context."""
            period = self.original_max_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(period) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # as the reference does: a step instead of 0 / 0
        return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)

    def rotary(self, head_dim: int) -> Rotary:
        """The rotation; under `jit` its frequencies are constants of the program."""
        return Rotary(
            inverse_frequencies=jnp.asarray(self.inverse_frequencies(head_dim)),
            attention_factor=self.attention_factor,
        )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """The temperature 0.1 ln(factor) + 1 of YaRN, equation 15, unless `rope` overrides it."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)
