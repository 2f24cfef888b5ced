"""What is computed from the rewards of completions: pass@k, and means with their intervals."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

_Z_95 = 1.96  # half a 95 % interval of a normal distribution, in standard deviations


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean. `half_width` is half its 95 % interval; None where there is one value, or all are alike: then the values
    say nothing of their spread."""

    mean: float
    half_width: float | None


def estimate(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean with its 95 % interval by the normal approximation: 1.96 standard errors.

    Values are independent, or else those of one cluster are not: the spread is then that of whole clusters
    (cluster-robust variance, Liang and Zeger 1986).
    """
    mean, num_values = statistics.fmean(values), len(values)
    if clusters is None:
        spread, divisor = statistics.stdev(values) if num_values > 1 else 0.0, math.sqrt(num_values)
    else:
        residuals: defaultdict[Hashable, float] = defaultdict(float)
        for cluster, value in zip(clusters, values, strict=True):
            residuals[cluster] += value - mean
        spread, divisor = math.sqrt(sum(residual**2 for residual in residuals.values())), num_values
    return Estimate(mean=mean, half_width=_Z_95 * spread / divisor if spread else None)


def pass_at_k(rewards: Sequence[float], k: int) -> float:
    """The unbiased estimate, from the completions of one prompt, of the best reward among k of them.

    It is the mean over the sets of k completions. With rewards of 0 and 1 it is pass@k: the share of the sets with a
    solved one (Chen et al. 2021, arXiv 2107.03374, eq. 1). With k = len(rewards) it is their maximum.
    """
    ordered = sorted(rewards)
    num_sets = math.comb(len(ordered), k)
    # A set has its best among the lowest i completions in comb(i, k) of the cases, and then misses the gap above them.
    missed = sum((ordered[i] - ordered[i - 1]) * (math.comb(i, k) / num_sets) for i in range(1, len(ordered)))
    return ordered[-1] - missed
