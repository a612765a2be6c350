"""How sure a mean is: bootstrap intervals, and paired differences between two models.

NaN stands for "no verdict" everywhere: it is left out, and `n` says how many values were left.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
CHUNK = 1 << 22  # numbers drawn at a time: bounds memory at 32 MiB


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values and its confidence interval; NaN where n is 0."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """Mean of `after - before` over the `n` pairs that both have a value."""

    wins: int
    losses: int
    ties: int
    p_value: float  # two-sided exact sign test, ties left out


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean with its percentile bootstrap interval (95%).

    The interval of values that are all equal has width zero. That says the sample shows no spread,
    not that the mean is certain.
    """
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    n = len(kept)
    if n == 0:
        return Estimate(0, math.nan, math.nan, math.nan)
    distinct, counts = np.unique(kept, return_counts=True)
    draws = resampled_counts(counts, seed=seed, resamples=resamples)
    low, high = percentile_interval(np.concatenate([drawn @ distinct / n for drawn in draws]))
    return Estimate(n, float(kept.mean()), low, high)


def resampled_counts(
    counts: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Iterator[np.ndarray]:
    """How often each of D distinct values occurs in each resample: arrays (rows, D), `resamples` rows in all.

    Resampling n values with replacement is drawing how often each distinct value occurs: one
    multinomial draw per resample. Scores have a handful of distinct values, so 10,000 resamples of
    10,000 scores cost 60,000 numbers, not 100 million.

    Args:
        counts: (D,) how often each value occurs in the sample.
    """
    n = int(counts.sum())
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(counts))
    for start in range(0, resamples, rows):
        yield rng.multinomial(n, counts / n, size=min(rows, resamples - start))


def percentile_interval(estimates: np.ndarray) -> tuple[float, float]:
    """The middle 95% of an estimate's resamples; those in which it is undefined (NaN) are left out."""
    kept = estimates[~np.isnan(estimates)]
    if len(kept) == 0:
        return math.nan, math.nan
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> Difference:
    """How `after` differs from `before` on the same questions, in the same order."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before and {len(after)} after: pairs are needed")
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    change = change[~np.isnan(change)]
    estimate = bootstrap_mean(change.tolist(), seed=seed)
    # Rewards are k/5 in binary floating point: a tie can differ in the last bit.
    wins, losses = int((change > 1e-9).sum()), int((change < -1e-9).sum())
    return Difference(
        estimate.n,
        estimate.mean,
        estimate.low,
        estimate.high,
        wins=wins,
        losses=losses,
        ties=estimate.n - wins - losses,
        p_value=sign_test(wins, losses),
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of `wins` against `losses` if both were equally likely; 1 if there are none."""
    n, fewer = wins + losses, min(wins, losses)
    # Whole numbers throughout: exact for any n, where floats would overflow at n = 1,030.
    term = tail = 1
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)
