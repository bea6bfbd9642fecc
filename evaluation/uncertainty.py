"""How sure a figure is: intervals by resampling, differences of two systems, and how many samples tell them apart.

What is measured is either one value a sample (a picture's PSNR), of which the mean is reported, or a statistic of two
sets (FID). A measure gives a `Figure`, or a sentence that says why there is none; never a bare NaN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap, norm
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 2000
HALVES = 50  # half-samples of a statistic of two sets: its standard error is then known to a tenth of itself
FEWEST = 2  # values that have a spread

Statistic = Callable[[Tensor, Tensor], float]  # of two sets of features (N, ...) and (M, ...)


@dataclass(frozen=True)
class Figure:
    """A value and its 95 % confidence interval.

    count: samples that it was measured on. skipped: samples on which it could not be measured.
    """

    value: float
    low: float
    high: float
    count: int
    skipped: int = 0


def too_few(name: str, count: int, needed: int, what: str = "pictures") -> str:
    """The sentence for a measure that has not enough samples."""
    return f"{name} needs {needed} {what}, has {count}"


def mean_figure(name: str, values: Tensor | str, seed: int = 0) -> Figure | str:
    """The mean of one value a sample, with its bootstrap interval (bias-corrected and accelerated, Efron 1987).

    values: (N,), NaN where a sample could not be measured, or why there are none → a Figure, or the reason.
    """
    if isinstance(values, str):
        return values
    measured = values[~values.isnan()].double()
    skipped = len(values) - len(measured)
    if len(measured) < FEWEST:
        return too_few(name, len(measured), FEWEST, "samples that it can be measured on")
    if not measured.isfinite().all():
        return f"{name} is infinite on {int(measured.isinf().sum())} of {len(values)} samples"
    mean = measured.mean().item()
    if measured.min() == measured.max():  # nothing to resample; the bootstrap would divide by 0
        return Figure(mean, mean, mean, len(measured), skipped)
    interval = bootstrap(
        (measured.numpy(),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // len(measured)),  # bounds the memory, whatever N
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if not (math.isfinite(low) and math.isfinite(high)):  # all but one value the same: no acceleration
        error = measured.std().item() / math.sqrt(len(measured)) * norm.ppf((1 + CONFIDENCE) / 2)
        low, high = mean - error, mean + error
    return Figure(mean, low, high, len(measured), skipped)


def share_figure(name: str, values: Tensor | str, seed: int = 0) -> Figure | str:
    """The mean of hits, 0 or 1 a sample, with Wilson's interval (1927), which has a width even where all are hits.

    values: as of `mean_figure`, which takes those that are not all 0 or 1 (ties of a retrieval).
    """
    if isinstance(values, str):
        return values
    measured = values[~values.isnan()].double()
    if len(measured) < FEWEST or not ((measured == 0) | (measured == 1)).all():
        return mean_figure(name, values, seed)
    interval = binomtest(int(measured.sum()), len(measured)).proportion_ci(CONFIDENCE, method="wilson")
    return Figure(measured.mean().item(), interval.low, interval.high, len(measured), len(values) - len(measured))


def paired_difference(name: str, values: Tensor | str, others: Tensor | str, seed: int = 0) -> Figure | str:
    """The mean of values - others, both (N,) on the same samples, with its bootstrap interval.

    The interval holds 0 where the systems cannot be told apart. Raises ValueError for different lengths.
    """
    for side in (values, others):
        if isinstance(side, str):
            return side
    if len(values) != len(others):
        raise ValueError(f"{name}: {len(values)} and {len(others)} values are not pairs")
    return mean_figure(name, values - others, seed)


def samples_needed(
    name: str, values: Tensor | str, others: Tensor | str, power: float = 0.8, alpha: float = 0.05
) -> int | str:
    """Pairs that a two-sided test of level alpha needs to find the mean difference of values and others (N,).

    n = ((z[1 - alpha / 2] + z[power]) s / d)^2 with the mean d and the standard deviation s of the differences, the
    normal approximation (Chow, Shao and Wang, Sample Size Calculations in Clinical Research, 3.1). At least FEWEST.
    """
    for side in (values, others):
        if isinstance(side, str):
            return side
    differences = (values - others).double()
    differences = differences[differences.isfinite()]
    if len(differences) < FEWEST:
        return too_few(name, len(differences), FEWEST, "pairs that it can be measured on")
    mean, spread = differences.mean().item(), differences.std().item()
    if mean == 0:
        return f"{name}: no difference was measured, so that no number of samples tells the two apart"
    return _enough(spread / abs(mean), power, alpha)


def samples_needed_for_sets(name: str, difference: Figure | str, power: float = 0.8, alpha: float = 0.05) -> int | str:
    """The same for a `set_difference`, whose standard error falls with the square root of its count."""
    if isinstance(difference, str):
        return difference
    if difference.value == 0:
        return f"{name}: no difference was measured, so that no number of samples tells the two apart"
    error = (difference.high - difference.low) / 2 / norm.ppf((1 + CONFIDENCE) / 2)
    return _enough(error * math.sqrt(difference.count) / abs(difference.value), power, alpha)


def _enough(spread: float, power: float, alpha: float) -> int:
    """Samples for a mean difference of 1. spread: the standard deviation of one sample's difference."""
    quantiles = norm.ppf(1 - alpha / 2) + norm.ppf(power)
    return max(FEWEST, math.ceil((quantiles * spread) ** 2))


def halves(count: int, generator: torch.Generator) -> Tensor:
    """A random half of `count` samples → (count // 2,) indices."""
    return torch.randperm(count, generator=generator)[: count // 2]


def set_figure(
    value: float | str, statistic: Statistic, features: Tensor, references: Tensor, seed: int = 0, repeats: int = HALVES
) -> Figure | str:
    """A statistic of two sets with its interval, from random halves of both sets.

    Drawn without replacement, since a statistic that compares pictures with each other (KID, CMMD) takes the doubles
    of a bootstrap for likeness. Halves spread round their own mean as the whole does round the truth (half-samples,
    Efron 1982, chapter 8), which leaves out the bias that some statistics have by the number of samples alone.

    value: of the whole sets, or why there is none. features, references: (N, ...) and (M, ...), a row a texture.
    """
    if isinstance(value, str):
        return value
    if min(len(features), len(references)) < 2 * FEWEST:
        return too_few("its interval", min(len(features), len(references)), 2 * FEWEST, "textures in each set")
    generator = torch.Generator().manual_seed(seed)
    statistics = torch.tensor([
        statistic(features[halves(len(features), generator)], references[halves(len(references), generator)])
        for _ in range(repeats)
    ])  # fmt: skip
    error = statistics.std().item() * norm.ppf((1 + CONFIDENCE) / 2)
    return Figure(float(value), value - error, value + error, len(features))


def set_difference(
    name: str,
    statistic: Statistic,
    features: Tensor,
    others: Tensor,
    references: Tensor,
    seed: int = 0,
    repeats: int = HALVES,
) -> Figure | str:
    """statistic(features, references) - statistic(others, references), with its interval by `set_figure`'s halves.

    The same rows of both systems, (N, ...) each, and of the references are drawn, so that what both share cancels.
    Raises ValueError for different lengths.
    """
    if len(features) != len(others):
        raise ValueError(f"{name}: {len(features)} and {len(others)} textures are not pairs")
    both = torch.stack([features, others], dim=1)

    def difference(pair: Tensor, drawn_references: Tensor) -> float:
        return statistic(pair[:, 0], drawn_references) - statistic(pair[:, 1], drawn_references)

    return set_figure(difference(both, references), difference, both, references, seed, repeats)
