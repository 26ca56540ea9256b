"""The protocol of a transform f: the function itself, its partition function, its domain of beta, its ends.

A subclass needs `__call__` only, for NumPy arrays and torch tensors. The partition function is then found by quadrature,
quantiles at 0 and 1 are taken as they are, and every beta above 0 is allowed; each of these has one attribute or method to
say otherwise. `qrpo.transforms` has the transforms that have names.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np

from qrpo.arrays import Array, Float64, is_torch, on_float64, to_float64
from qrpo.errors import ConfigError
from qrpo.quadrature import TiltedNodes, tilted_nodes

__all__ = ["Scaled", "Transform"]


@dataclass(frozen=True)
class Transform:
    """A function of the quantile reward and its partition function. Subclasses give at least `__call__`.

    `edge`: how many reference samples inwards a quantile at an open end is moved (see `qrpo.transforms`).
    """

    edge: float = 1.0
    name: ClassVar[str] = "custom"
    open_ends: ClassVar[tuple[bool, bool]] = (False, False)
    """Whether f is infinite at q = 0, at q = 1."""
    min_beta: ClassVar[float] = 0.0
    """Z is finite for beta above this."""
    needs_scale: ClassVar[bool] = False
    """Whether `scaled` must be called with one scale per prompt before use."""

    def __call__(self, quantile_reward: Array) -> Array:
        """f(q), elementwise, for NumPy arrays, torch tensors and numbers."""
        raise NotImplementedError

    def at_logit(self, logit: Float64) -> Float64:
        """f at the quantile sigmoid(logit). Override it where q = 1 - 1e-17 matters: float64 has no such q."""
        quantile = 1.0 / (1.0 + np.exp(-np.clip(logit, -700.0, 40.0)))
        return to_float64(self(np.minimum(quantile, 1.0 - np.finfo(np.float64).epsneg)))

    def log_z(self, beta: Array) -> Array:
        """log of integral_0^1 exp(f(t)/beta) dt, elementwise on beta; ConfigError where beta is out of the domain."""
        return on_float64(self._checked_log_z, beta)

    def _checked_log_z(self, beta: Float64) -> Float64:
        if not np.all(beta > self.min_beta):
            bad = float(beta[~(beta > self.min_beta)].ravel()[0]) if np.ndim(beta) else float(beta)
            raise ConfigError(
                f"beta: got {bad:g} for the transform {self.name!r}, whose partition function is finite for "
                f"beta > {self.min_beta:g} only (per sample: beta / scale, beta / length); use a larger beta"
            )
        return self._log_z(beta)

    def _log_z(self, beta: Float64) -> Float64:
        """log Z for valid float64 betas; by quadrature unless a subclass knows better."""
        distinct, inverse = np.unique(beta, return_inverse=True)
        values = np.array([self.nodes(float(one)).log_z for one in distinct])
        return np.asarray(values[inverse]).reshape(np.shape(beta))

    def nodes(self, beta: float) -> TiltedNodes:
        """A quadrature rule under the optimum's quantile density exp(f(t)/beta)/Z."""
        if type(self).at_logit is not Transform.at_logit:
            return _cached_nodes(self, beta, 1e-14)
        # f is only asked at float64 quantiles: it says nothing beyond them, and is a staircase close to them
        rough = _cached_nodes(self, beta, 1e-6)
        unseen = float(rough.weight[(rough.logit > 36.0) | (rough.logit < -700.0)].sum())
        if unseen > 1e-9:
            raise ConfigError(
                f"transform {self.name!r} at beta = {beta:g}: {unseen:.1%} of the optimum lies at quantiles that "
                "float64 cannot tell from 0 or 1; use a larger beta, or give the function of the logit (at_logit)"
            )
        return _cached_nodes(self, beta, 1e-12)

    def clamp(self, quantile_reward: Array, num_ref: Array | None) -> Array:
        """Quantiles moved off the ends at which f is infinite; `num_ref` broadcasts against them."""
        if not any(self.open_ends) or num_ref is None:
            return quantile_reward
        if is_torch(quantile_reward):
            import torch

            samples = torch.as_tensor(num_ref, dtype=quantile_reward.dtype, device=quantile_reward.device)
            margin = (self.edge / samples).clamp(max=0.5)
            low = margin if self.open_ends[0] else torch.zeros_like(margin)
            high = 1.0 - margin if self.open_ends[1] else torch.ones_like(margin)
            return torch.minimum(torch.maximum(quantile_reward, low), high)
        quantile = np.asarray(quantile_reward)
        dtype = quantile.dtype if np.issubdtype(quantile.dtype, np.floating) else np.dtype(np.float64)
        margin = np.minimum(self.edge / np.asarray(num_ref), 0.5).astype(dtype)
        low = margin if self.open_ends[0] else np.zeros_like(margin)
        high = 1 - margin if self.open_ends[1] else np.ones_like(margin)
        return np.clip(quantile, low, high)

    def scaled(self, scale: Array) -> "Transform":
        """The transform scale * f, with one scale per prompt that broadcasts against quantiles and betas."""
        return Scaled(edge=self.edge, base=self, scale=scale)

    def unscaled(self, beta: Array) -> tuple["Transform", Array]:
        """(f, beta') with f free of scales and exp(self/beta) = exp(f/beta')."""
        return self, beta


@lru_cache(maxsize=256)
def _cached_nodes(transform: Transform, beta: float, tolerance: float) -> TiltedNodes:
    return tilted_nodes(transform.at_logit, 1.0 / beta, tolerance)


@dataclass(frozen=True)
class Scaled(Transform):
    """scale * base; see `Transform.scaled`."""

    base: Transform = field(default_factory=Transform)
    scale: Array = 1.0

    @property
    def name(self) -> str:  # type: ignore[override]
        """The base transform's, marked as scaled."""
        return f"scaled {self.base.name}"

    @property
    def open_ends(self) -> tuple[bool, bool]:  # type: ignore[override]
        """The base transform's."""
        return self.base.open_ends

    def __call__(self, quantile_reward: Array) -> Array:
        """scale * f(q)."""
        return self.scale * self.base(quantile_reward)

    def at_logit(self, logit: Float64) -> Float64:
        """scale * f(sigmoid(logit)), for one scale."""
        return np.asarray(self.scale * self.base.at_logit(logit))

    def log_z(self, beta: Array) -> Array:
        """log Z of the base transform at beta / scale; 0 where the scale is 0."""
        base, unscaled_beta = self.unscaled(beta)
        return base.log_z(unscaled_beta)

    def nodes(self, beta: float) -> TiltedNodes:
        """The base transform's at beta / scale, for one scale."""
        base, unscaled_beta = self.unscaled(beta)
        return base.nodes(float(unscaled_beta))

    def unscaled(self, beta: Array) -> tuple[Transform, Array]:
        """The base transform, and beta / scale."""
        if is_torch(self.scale) or is_torch(beta):
            return self.base.unscaled(beta / self.scale)
        with np.errstate(divide="ignore"):  # scale 0 (all reference rewards equal): beta' = inf, Z = 1
            return self.base.unscaled(np.divide(beta, self.scale))
