"""Differences of means with their intervals."""

import collections

import numpy as np
from scipy import stats

Contrast = collections.namedtuple("Contrast", "points low high p")


def contrast(*samples, weights=(1, -1)):
    """Estimate a weighted sum of the means of independent samples, with its 95% interval and p value.

    The degrees of freedom are Welch's and Satterthwaite's. Two samples with weights 1 and -1 are Welch's t test; four
    with 1, -1, -1, 1 compare two differences. Interval and p are nan when a sample has one value or none varies.
    """
    samples = [np.asarray(sample, dtype=float) for sample in samples]
    points = sum(weight * sample.mean() for weight, sample in zip(weights, samples, strict=True))
    if min(map(len, samples)) < 2:
        return Contrast(points, np.nan, np.nan, np.nan)
    parts = [weight**2 * sample.var(ddof=1) / len(sample) for weight, sample in zip(weights, samples, strict=True)]
    error = np.sqrt(sum(parts))
    if error == 0:
        return Contrast(points, np.nan, np.nan, np.nan)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, samples, strict=True))
    reach = stats.t.ppf(0.975, freedom) * error
    return Contrast(points, points - reach, points + reach, 2 * stats.t.sf(abs(points) / error, freedom))
