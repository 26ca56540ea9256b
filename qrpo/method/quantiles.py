"""Quantile rewards: the rank of a completion's reward among the rewards of the reference policy's
completions.

    q(y) = P(s <= r(y)),  s ~ rewards of the reference, estimated from n of them        (QRPO, arXiv
                          2507.08068)

References are ragged: one flat array and offsets, as Arrow stores a list column, so a Parquet
column is used without a copy. The work is one pass of comparisons in cache-sized blocks, N*K per
prompt; that is faster than sorting for the few completions K that a prompt trains on
(`benchmarks/quantiles.py`). It needs no torch, and SciPy only for bounds.

Ties. With `weak`, the paper's rule, q = #{s <= r}/n; `strict` is #{s < r}/n; `mid` the mean of
both. `randomized` breaks ties by a seeded uniform draw: q = (#{s < r} + U (1 + #{s = r}))/(n + 1)
is exactly uniform on (0, 1) under the reference, for any reward distribution and any n, so the
continuous partition function is exact for it.

Self-exclusion. A training completion that is one of the reference samples (the off-policy regime)
would count itself in #{s <= r}, and its quantile could never be below 1/n. It is excluded, which
leaves n - 1 references, unless `self_exclusion=False` selects the research code's inclusive count.
"""

import numbers
from decimal import Decimal
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo.errors import ConfigError, DataError

Ties = Literal["weak", "strict", "mid", "randomized"]
Floats = NDArray[np.floating]
Integers = NDArray[np.int64]

_BLOCK = 1 << 17  # comparisons at a time: the block's float32 and its mask stay in the second-level cache


def quantile_rewards(
    rewards: ArrayLike,
    ref_rewards: ArrayLike,
    *,
    offsets: ArrayLike | None = None,
    ref_offsets: ArrayLike | None = None,
    ties: Ties = "weak",
    in_reference: ArrayLike | None = None,
    self_exclusion: bool = True,
    seed: int = 0,
) -> Floats:
    """Quantile rewards in [0, 1], (P, K) or flat as `rewards`; float32 where either input is, else
    float64.

    `rewards`: (P, K), or flat with `offsets` (P + 1): prompt p's are rewards[offsets[p]:offsets[p +
    1]]. The result is then flat, from the first offset to the last (an Arrow slice's offsets need
    not start at 0).
    `ref_rewards`: (P, N), or flat with `ref_offsets` (P + 1).
    `in_reference`: a mask in the shape of `rewards`: which completions are reference samples.
    `seed`: for `ties="randomized"`.

    Raises DataError for NaN rewards, shapes that do not fit, a prompt without references, or a
    completion marked as a reference sample whose reward is not among them.
    """
    if ties not in ("weak", "strict", "mid", "randomized"):
        raise ConfigError(f"ties: got {ties!r}, expected weak, strict, mid or randomized")
    queries, query_offsets = _flat("rewards", rewards, offsets)
    references, reference_offsets = _flat("ref_rewards", ref_rewards, ref_offsets)
    if len(query_offsets) != len(reference_offsets):
        raise DataError(
            f"rewards are of {len(query_offsets) - 1} prompts, ref_rewards of {len(reference_offsets) - 1}; "
            "each prompt needs one row in both"
        )
    if queries.dtype != references.dtype:  # 0.1 as float32 must tie with 0.1 as float64
        queries, references = queries.astype(np.float32), references.astype(np.float32)
    widths = np.diff(query_offsets)
    mine = np.zeros(len(queries), bool) if in_reference is None else np.asarray(in_reference).reshape(-1)
    if mine.size != queries.size or mine.dtype != np.bool_:
        raise DataError(
            f"in_reference: got {mine.size} values of {mine.dtype}, expected a mask of the {queries.size} rewards"
        )
    excluded = mine if self_exclusion else np.zeros_like(mine)
    num_ref = np.repeat(np.diff(reference_offsets), widths) - excluded
    if num_ref.size and num_ref.min() < 1:
        at = int(np.argmin(num_ref))
        prompt = _prompt_of(at, query_offsets)
        raise DataError(
            f"prompt {prompt} has {int(np.diff(reference_offsets)[prompt])} reference rewards: too few for the quantile "
            f"of its completion {at - int(query_offsets[prompt])}"
            + (", itself one of them" if mine[at] else "")
            + "; sample more references"
        )
    at_most = _counts(np.less_equal, queries, query_offsets, references, reference_offsets)
    if ties == "weak" and not mine.any():
        quantiles = at_most / num_ref
    else:
        below = _counts(np.less, queries, query_offsets, references, reference_offsets)
        if np.any(mine & (at_most == below)):
            at = int(np.argmax(mine & (at_most == below)))
            raise DataError(
                f"completion {at} (reward {queries[at]!r}) is marked as a reference sample, but no reference reward of "
                "its prompt equals it; in_reference does not match the rewards"
            )
        equal = at_most - below - excluded
        if ties == "randomized":
            uniform = np.random.default_rng(seed).random(len(queries))
            # its own rank is one of the tied ones, unless it already counts among its references
            own = ~mine | excluded
            quantiles = (below + uniform * (equal + own)) / (num_ref + own)
        else:
            quantiles = (below + {"weak": 1.0, "strict": 0.0, "mid": 0.5}[ties] * equal) / num_ref
    result: Floats = quantiles.astype(queries.dtype)
    return result if offsets is not None else result.reshape(np.shape(rewards))


def standard_error(quantile_reward: ArrayLike, num_ref: ArrayLike) -> Floats:
    """The standard error sqrt(q (1 - q)/n) of quantiles estimated from `num_ref` references (one
    per prompt, or of the same shape)."""
    q, n = _aligned(quantile_reward, num_ref)
    return np.sqrt(q * (1.0 - q) / n)


def quantile_bounds(
    quantile_reward: ArrayLike, num_ref: ArrayLike, *, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """(low, high): the Clopper-Pearson interval of the true quantile P(s <= r), given k = nq of n
    references at or below r.

    k is binomial(n, P(s <= r)); the interval covers at least `confidence` for every true quantile.
    Shapes as in `standard_error`; float64 out. Half counts, from ties="mid", are allowed.
    """
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence: must be between 0 and 1, got {confidence!r}")
    from scipy.special import betaincinv

    q, n = _aligned(quantile_reward, num_ref)
    k = np.round(q * n, 3)  # a float32 quantile times n is almost a whole or half count
    pairs, inverse = np.unique(k + 1j * n, return_inverse=True)  # few distinct (k, n) among many completions
    ks, ns = pairs.real, pairs.imag
    tail = (1.0 - confidence) / 2.0
    low = np.where(ks <= 0.0, 0.0, betaincinv(np.maximum(ks, 0.5), ns - ks + 1.0, tail))
    high = np.where(ks >= ns, 1.0, betaincinv(ks + 1.0, np.maximum(ns - ks, 0.5), 1.0 - tail))
    return low[inverse].reshape(q.shape), high[inverse].reshape(q.shape)


def _flat(what: str, values: ArrayLike, offsets: ArrayLike | None) -> tuple[Floats, Integers]:
    """Values as a flat float32 or float64 array, and P + 1 offsets into it."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        array = np.asarray([_number(what, number, item) for number, item in enumerate(array.flat)]).reshape(
            array.shape
        )
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if offsets is None:
        if array.ndim != 2:
            raise DataError(
                f"{what}: got shape {array.shape}, expected (prompts, completions), or flat with offsets"
            )
        bounds = np.arange(array.shape[0] + 1, dtype=np.int64) * array.shape[1]
        array = array.reshape(-1)
    else:
        bounds = np.asarray(offsets).astype(np.int64)
        if array.ndim != 1 or bounds.ndim != 1 or not bounds.size:
            raise DataError(
                f"{what}: with offsets, got shapes {array.shape} and {bounds.shape}; both must be flat"
            )
        if bounds[0] < 0 or bounds[-1] > array.size or np.any(np.diff(bounds) < 0):
            raise DataError(
                f"{what}: offsets must ascend within 0..{array.size}, got {bounds[0]}..{bounds[-1]}"
            )
        array, bounds = array[bounds[0] : bounds[-1]], bounds - bounds[0]
    if array.size and np.isnan(array.min()):  # the minimum of anything with a NaN is NaN
        at = int(np.argmax(np.isnan(array)))
        prompt = int(np.searchsorted(bounds, at, side="right")) - 1
        raise DataError(
            f"{what}: prompt {prompt} has a NaN; reject unscored completions before taking quantiles"
        )
    return array, bounds


def _number(what: str, place: int, value: object) -> float:
    if isinstance(value, (numbers.Real, Decimal)):
        return float(value)
    raise DataError(f"{what}: item {place} is {value!r:.40}, expected a number; reject unscored completions")


def _prompt_of(position: int, offsets: Integers) -> int:
    return int(np.searchsorted(offsets, position, side="right")) - 1


def _counts(
    compare: np.ufunc,
    queries: Floats,
    query_offsets: Integers,
    references: Floats,
    reference_offsets: Integers,
) -> Integers:
    """For every completion, how many references s of its prompt satisfy compare(s, reward)."""
    counts = np.zeros(len(queries), dtype=np.int64)
    widths = np.diff(query_offsets)
    prompts = len(widths)
    start = 0
    while start < prompts:
        limit = reference_offsets[start] + _BLOCK
        end = max(start + 1, int(np.searchsorted(reference_offsets, limit, side="right")) - 1)
        bounds = reference_offsets[start : end + 1]
        block = references[bounds[0] : bounds[-1]]
        lengths = np.diff(bounds)
        width = widths[start:end]
        for k in range(int(width.max(initial=0))):  # the k-th completion of each prompt that has one, at once
            if width.min() > k:
                rows = query_offsets[start:end] + k
                counts[rows] = _segment_counts(
                    compare, block, bounds[:-1] - bounds[0], lengths, queries[rows]
                )
                continue
            active = np.flatnonzero(width > k)
            rows = query_offsets[start:end][active] + k
            some = lengths[active]
            begins = np.cumsum(some) - some
            gathered = block[np.arange(some.sum()) + np.repeat(bounds[active] - bounds[0] - begins, some)]
            counts[rows] = _segment_counts(compare, gathered, begins, some, queries[rows])
        start = end
    return counts


def _segment_counts(
    compare: np.ufunc, block: Floats, begins: Integers, lengths: Integers, values: Floats
) -> NDArray[np.int32]:
    """How many of each segment's references satisfy compare(s, value), one value per segment."""
    if not block.size:
        return np.zeros(len(values), dtype=np.int32)
    mask = compare(block, np.repeat(values, lengths))
    # reduceat gives an empty segment its first neighbour, and refuses one at the very end
    counts = np.add.reduceat(mask.view(np.int8), np.minimum(begins, block.size - 1), dtype=np.int32)
    counts[lengths == 0] = 0
    return counts


def _aligned(
    quantile_reward: ArrayLike, num_ref: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Quantiles and numbers of references broadcast to one shape: (P,) with (P, K) is one number
    per prompt."""
    q = np.asarray(quantile_reward, dtype=np.float64)
    n = np.asarray(num_ref, dtype=np.float64)
    if n.ndim == 1 and q.ndim == 2:
        n = n[:, None]
    if n.size and not n.min() >= 1:
        raise DataError(f"num_ref: must be at least 1, got {n.min():g}")
    return q, np.broadcast_to(n, q.shape)
