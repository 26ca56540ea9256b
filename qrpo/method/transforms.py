"""Transforms f of the quantile reward, each with its exact partition function.

The objective is max E[f(q)] - beta KL(policy || reference). Under the reference q is uniform, so

    Z(beta) = integral_0^1 exp(f(t)/beta) dt                         (QRPO, arXiv 2507.08068)

depends on f and beta only. With u = 1/beta:

| name                 | f(q)           | Z                            | beta | infinite at |
|----------------------|----------------|------------------------------|------|-------------|
| `identity`           | q              | (e^u - 1)/u                  | > 0  |             |
| `log`                | log q          | 1/(1 + u)                    | > 0  | 0           |
| `normal-icdf`        | Phi^-1(q)      | exp(u^2/2)                   | > 0  | 0, 1        |
| `scaled-normal-icdf` | s * Phi^-1(q)  | exp((s u)^2/2), s per prompt | > 0  | 0, 1        |
| `logit`              | log(q/(1 - q)) | pi u / sin(pi u)             | > 1  | 0, 1        |
| `power`              | q^p, p > 0     | 1F1(1/p; 1 + 1/p; u)         | > 0  |             |

Where f is infinite, an estimated quantile of exactly 0 or 1 is clamped by `edge` reference samples,
to [edge/n, 1 - edge/n], at most to 1/2, at the open end only (`edge=1` is what the research code
does). The clamp changes the distribution of f(q), so the `continuous` Z is then no longer exact;
`partition="finite"` includes the clamp.

For another f, wrap a function of NumPy arrays with `from_function`, or subclass `Transform`; a
configuration names either as "path/to/file.py:name". A subclass needs only `__call__`, for NumPy
arrays and torch tensors. By default log Z is found by quadrature, quantiles at 0 and 1 are not
changed, and every beta above 0 is allowed; an attribute or method overrides each. log Z is computed
in float64, by forms that neither overflow nor cancel.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from qrpo.callables import load_callable
from qrpo.errors import ConfigError
from qrpo.method.arrays import Array, Float64, is_torch, on_float64, to_float64
from qrpo.method.quadrature import TiltedNodes, tilted_nodes


@dataclass(frozen=True)
class Transform:
    """A function of the quantile reward and its partition function; a subclass needs `__call__`."""

    edge: float = 1.0
    """By how many reference samples a quantile at an open end is clamped."""
    name: ClassVar[str] = "custom"
    open_ends: ClassVar[tuple[bool, bool]] = (False, False)
    """Whether f is infinite at q = 0, at q = 1."""
    min_beta: ClassVar[float] = 0.0
    """Z is finite for beta above this."""
    needs_scale: ClassVar[bool] = False
    """Whether f is meant to be multiplied by one scale per prompt; log Z is then that at beta /
    scale."""

    def __post_init__(self) -> None:
        if not 0 < self.edge < np.inf:
            raise ConfigError(f"transform {self.name}: edge must be a number above 0, got {self.edge!r}")

    def __call__(self, quantile_reward: Array) -> Array:
        """f(q), elementwise, for NumPy arrays, torch tensors and numbers."""
        raise NotImplementedError

    def at_logit(self, logit: Float64) -> Float64:
        """f at sigmoid(logit). Override it if q = 1 - 1e-17 matters: float64 has no such q."""
        quantile = 1.0 / (1.0 + np.exp(-np.clip(logit, -700.0, 40.0)))
        return to_float64(self(np.minimum(quantile, 1.0 - np.finfo(np.float64).epsneg)))

    def log_z(self, beta: Array) -> Array:
        """log of integral_0^1 exp(f(t)/beta) dt, elementwise; ConfigError outside of its domain."""
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
        """log Z for valid float64 betas; by quadrature unless a subclass has a closed form."""
        distinct, inverse = np.unique(beta, return_inverse=True)
        values = np.array([self.nodes(float(one)).log_z for one in distinct])
        return np.asarray(values[inverse]).reshape(np.shape(beta))

    def nodes(self, beta: float) -> TiltedNodes:
        """A quadrature rule under the optimum's quantile density exp(f(t)/beta)/Z."""
        if type(self).at_logit is not Transform.at_logit:
            return _cached_nodes(self, beta, 1e-14)
        # f is known at float64 quantiles only, and is a staircase near the ends
        rough = _cached_nodes(self, beta, 1e-6)
        unseen = float(rough.weight[(rough.logit > 36.0) | (rough.logit < -700.0)].sum())
        if unseen > 1e-9:
            raise ConfigError(
                f"transform {self.name!r} at beta = {beta:g}: {unseen:.1%} of the optimum lies at quantiles that "
                "float64 cannot distinguish from 0 or 1; use a larger beta, or define the function of the logit (at_logit)"
            )
        return _cached_nodes(self, beta, 1e-12)

    def clamp(self, quantile_reward: Array, num_ref: Array | None) -> Array:
        """Quantiles moved off the ends at which f is infinite; `num_ref` broadcasts."""
        if not any(self.open_ends) or num_ref is None:
            return quantile_reward
        if is_torch(quantile_reward):
            import torch

            q = quantile_reward
            samples = torch.as_tensor(num_ref, dtype=q.dtype, device=q.device)
        else:
            q = np.asarray(quantile_reward)
            q = q if np.issubdtype(q.dtype, np.floating) else q.astype(np.float64)
            samples = np.asarray(num_ref).astype(q.dtype)
        margin = (self.edge / samples).clip(max=0.5)
        return q.clip(margin * self.open_ends[0], 1 - margin * self.open_ends[1])


@lru_cache(maxsize=256)
def _cached_nodes(transform: Transform, beta: float, tolerance: float) -> TiltedNodes:
    return tilted_nodes(transform.at_logit, 1.0 / beta, tolerance)


@dataclass(frozen=True)
class Identity(Transform):
    """f(q) = q: the quantile reward; its expectation is the win rate against the reference."""

    name: ClassVar[str] = "identity"

    def __call__(self, quantile_reward: Array) -> Array:
        """q."""
        return quantile_reward

    def at_logit(self, logit: Float64) -> Float64:
        """sigmoid(x)."""
        return _special().expit(logit)  # type: ignore[no-any-return]

    def _log_z(self, beta: Float64) -> Float64:
        # log((e^u - 1)/u) = u/2 + log(sinh(h)/h) with h = u/2; for small u
        # sinh(h)/h - 1 = h^2/6 (1 + h^2/20 (1 + h^2/42 (...)))
        u = 1.0 / beta
        h = np.minimum(u, 2.0) / 2.0
        square = h * h
        series = np.ones_like(h)
        for k in range(10, 0, -1):
            series = 1.0 + square / ((2 * k + 2) * (2 * k + 3)) * series
        small = h + np.log1p(square / 6.0 * series)
        # for large u: u - log u + log(1 - e^-u); the research code drops the last term
        u = np.maximum(u, 2.0)
        return np.where(h < 1.0, small, u + np.log(-np.expm1(-u) / u))


@dataclass(frozen=True)
class Log(Transform):
    """f(q) = log q: penalises the worst completions; the optimum's density is (1 + u) q^u."""

    name: ClassVar[str] = "log"
    open_ends: ClassVar[tuple[bool, bool]] = (True, False)

    def __call__(self, quantile_reward: Array) -> Array:
        """log q."""
        if is_torch(quantile_reward):
            return quantile_reward.log()
        with np.errstate(divide="ignore"):
            return np.log(quantile_reward)

    def at_logit(self, logit: Float64) -> Float64:
        """log sigmoid(x)."""
        return _special().log_expit(logit)  # type: ignore[no-any-return]

    def _log_z(self, beta: Float64) -> Float64:
        return -np.log1p(1.0 / beta)


@dataclass(frozen=True)
class NormalIcdf(Transform):
    """f(q) = Phi^-1(q), the inverse normal distribution function; N(1/beta, 1) under the
    optimum."""

    name: ClassVar[str] = "normal-icdf"
    open_ends: ClassVar[tuple[bool, bool]] = (True, True)

    def __call__(self, quantile_reward: Array) -> Array:
        """Phi^-1(q)."""
        return _special(quantile_reward).ndtri(quantile_reward)

    def at_logit(self, logit: Float64) -> Float64:
        """Phi^-1(sigmoid(x)), from the logarithm of the smaller tail."""
        special = _special()
        return np.asarray(-np.sign(logit) * special.ndtri_exp(special.log_expit(-np.abs(logit))))

    def _log_z(self, beta: Float64) -> Float64:
        return 0.5 / beta / beta


@dataclass(frozen=True)
class ScaledNormalIcdf(NormalIcdf):
    """`normal-icdf` times one scale per prompt: prompts with a larger spread of rewards weigh more
    (`reference_scale`)."""

    name: ClassVar[str] = "scaled-normal-icdf"
    needs_scale: ClassVar[bool] = True


@dataclass(frozen=True)
class Logit(Transform):
    """f(q) = log(q/(1 - q)): heavier tails than `normal-icdf`; Z = B(1 + u, 1 - u) is finite for
    beta > 1 only."""

    name: ClassVar[str] = "logit"
    open_ends: ClassVar[tuple[bool, bool]] = (True, True)
    min_beta: ClassVar[float] = 1.0

    def __call__(self, quantile_reward: Array) -> Array:
        """log(q/(1 - q))."""
        return _special(quantile_reward).logit(quantile_reward)

    def at_logit(self, logit: Float64) -> Float64:
        """x."""
        return logit

    def _log_z(self, beta: Float64) -> Float64:
        # log B(1 + u, 1 - u) = log(pi u/sin(pi u)); for u <= 1/2: sum over k of zeta(2k) u^2k / k
        square = np.minimum(1.0 / beta, 0.5) ** 2
        k = np.arange(1, 31)
        small = np.zeros_like(square)
        for coefficient in (_special().zeta(2.0 * k) / k)[::-1]:
            small = square * (coefficient + small)
        # for larger u: sin(pi u) = sin(pi (beta - 1)/beta), exact near u = 1, where Z diverges
        near = np.where(beta < 2.0, beta, 1.5)
        large = -np.log(np.sin(np.pi * ((near - 1.0) / near)) * near / np.pi)
        return np.where(beta < 2.0, large, small)


@dataclass(frozen=True)
class Power(Transform):
    """f(q) = q^exponent: above 1 it separates good completions; below 1, bad ones."""

    exponent: float = 2.0
    name: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.exponent < np.inf:
            raise ConfigError(f"transform power: exponent must be a number above 0, got {self.exponent!r}")

    def __call__(self, quantile_reward: Array) -> Array:
        """q^exponent."""
        return quantile_reward**self.exponent

    def at_logit(self, logit: Float64) -> Float64:
        """sigmoid(x)^exponent."""
        return np.asarray(np.exp(self.exponent * _special().log_expit(logit)))

    def _log_z(self, beta: Float64) -> Float64:
        # log 1F1(a; a + 1; u) with a = 1/exponent
        # for u <= 1: Z - 1 = sum over k of a/(a + k) u^k/k!
        a, u = 1.0 / self.exponent, 1.0 / beta
        small = np.minimum(u, 1.0)
        excess, term = np.zeros_like(small), np.ones_like(small)
        for k in range(1, 22):
            term = term * small / k
            excess = excess + a / (a + k) * term
        # for larger u Kummer's transformation, e^u 1F1(1; a + 1; -u)
        large = np.maximum(u, 1.0)
        return np.where(u <= 1.0, np.log1p(excess), large + np.log(_special().hyp1f1(1.0, a + 1.0, -large)))


@dataclass(frozen=True)
class _Function(Transform):
    """A user's function; see `from_function`."""

    function: Callable[[Float64], Any] = np.asarray
    label: str = "custom"
    ends: tuple[bool, bool] = (False, False)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label

    @property
    def open_ends(self) -> tuple[bool, bool]:  # type: ignore[override]
        return self.ends

    def __call__(self, quantile_reward: Array) -> Array:
        return on_float64(
            lambda quantile: np.asarray(self.function(quantile), dtype=np.float64), quantile_reward
        )


_REGISTRY: dict[str, type[Transform]] = {
    kind.name: kind for kind in (Identity, Log, NormalIcdf, ScaledNormalIcdf, Logit, Power)
}


def transform_names() -> tuple[str, ...]:
    """The names that `get_transform` accepts."""
    return tuple(_REGISTRY)


@lru_cache(maxsize=16)
def get_transform(transform: str | Transform) -> Transform:
    """A transform by name, or itself. A name may have parameters: `power(exponent=0.5)`,
    `normal-icdf(edge=2)`.

    A name with a colon, "path/to/file.py:name" or "package.module:name", is a user's: a function on
    (0, 1), finite there and at both ends, the result of `from_function`, or a subclass of
    Transform.
    """
    if isinstance(transform, Transform):
        return transform
    called = re.fullmatch(r"([\w-]+)(?:\(([\w.+=, -]*)\))?", transform)
    if called and called[1] in _REGISTRY:
        try:
            given = [item.split("=") for item in (called[2] or "").replace(" ", "").split(",") if item]
            if len(numbers := {name: float(value) for name, value in given}) < len(given):
                raise ValueError("a name is given twice")
            return _REGISTRY[called[1]](**numbers)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"transform: got {transform!r}, expected numbers by name, such as power(exponent=0.5) or "
                f"normal-icdf(edge=2) ({error})"
            ) from None
    if ":" not in transform:
        raise ConfigError(
            f"transform: got {transform!r}, expected one of {', '.join(_REGISTRY)}, or a function as "
            "'path/to/file.py:function'"
        )
    found = load_callable(transform)
    if isinstance(found, Transform):
        return found
    if isinstance(found, type) and issubclass(found, Transform):
        return found()
    return from_function(found, name=transform)


def from_function(
    function: Callable[[Float64], Any],
    *,
    name: str = "custom",
    open_ends: tuple[bool, bool] = (False, False),
) -> Transform:
    """A transform from any function on (0, 1), over float64 NumPy arrays; log Z by quadrature.

    `open_ends`: whether the function is infinite at 0, at 1.
    """
    return _Function(function=function, label=name, ends=open_ends)


def reference_scale(ref_std: Array, mean_ref_std: float) -> Array:
    """Each prompt's standard deviation (n - 1) of reference rewards over the mean of all
    prompts."""
    if not mean_ref_std > 0:
        raise ConfigError(
            f"scaled-normal-icdf: the mean standard deviation of reference rewards must be above 0, got {mean_ref_std!r}; "
            "every prompt's reference rewards are equal: use another transform or reward"
        )
    return ref_std / mean_ref_std


def _special(value: object = None) -> Any:
    """torch.special for a tensor, else scipy.special, which is slow to import."""
    if is_torch(value):
        import torch

        return torch.special
    import scipy.special

    return scipy.special
