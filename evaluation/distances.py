"""Distances between two sets of pictures, from the features of one extractor.

features: (N, V, D), V views of N textures; references: (M, V, D). torch-fidelity, which has them all, does not start
without torchvision; these are its formulas, and the kernel is torchmetrics'.
"""

import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_kernel

from evaluation.extractors import unit
from evaluation.uncertainty import HALVES, Figure, Statistic, set_figure, too_few

CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024
MIND_PROJECTIONS, MIND_SEED = 1000, 2020  # Berthet et al. 2026; torch-fidelity's
FEWEST_FOR_MIND = 1000  # pictures from which on it says something, by its authors
ROWS = 1024  # of a matrix of kernels at once
WIDE = 1024  # features whose covariance takes seconds


def pooled(features: Tensor) -> Tensor:
    """All views as pictures of their own, (N * V, D), in the precision that distances need."""
    return features.flatten(0, -2).double()


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """FID (Heusel et al. 2017): |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of Gaussians with the sets' means and
    covariances. Needs more pictures than features, or the covariances have no full rank."""
    ours, theirs = pooled(features), pooled(references)
    covariance, reference_covariance = ours.T.cov(), theirs.T.cov()
    # tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ reference_covariance @ root).clamp(min=0).sqrt().sum()
    gap = (ours.mean(0) - theirs.mean(0)).square().sum()
    return (gap + covariance.trace() + reference_covariance.trace() - 2 * cross).item()


def unbiased_mmd(kernel: Callable[[Tensor, Tensor], Tensor], features: Tensor, references: Tensor) -> float:
    """The squared maximum mean discrepancy (Gretton et al. 2012, lemma 6), unbiased: the mean of the kernel over pairs
    within either set, less twice that over pairs across.

    It is the mean over all subsets of any size, so that no subset size is to be chosen. A pair within a set is of two
    textures: views of one texture are no independent pictures, and would be taken for likeness.
    """
    within = sum(_mean_over_pairs(kernel, side, side, same_set=True) for side in (features, references))
    return within - 2 * _mean_over_pairs(kernel, features, references, same_set=False)


def _mean_over_pairs(kernel, features: Tensor, others: Tensor, same_set: bool) -> float:
    (textures, views), (other_textures, other_views) = features.shape[:2], others.shape[:2]
    ours, theirs = pooled(features), pooled(others)
    total = sum(kernel(rows, theirs).sum().item() for rows in ours.split(ROWS))
    if not same_set:
        return total / (textures * views * other_textures * other_views)
    own = sum(kernel(texture, texture).sum().item() for texture in features.double())
    return (total - own) / (textures * (textures - 1) * views**2)


def kernel_distance(features: Tensor, references: Tensor) -> float:
    """KID (Binkowski et al. 2018): the discrepancy under (x.y / D + 1)^3."""
    return unbiased_mmd(poly_kernel, features, references)


def gaussian_kernel(left: Tensor, right: Tensor, bandwidth: float) -> Tensor:
    """exp(-|x - y|^2 / (2 bandwidth^2)) for (N, D) and (M, D) → (N, M)."""
    return (torch.cdist(left, right).square() / (-2 * bandwidth**2)).exp()


def clip_discrepancy(features: Tensor, references: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024): 1000 times the discrepancy of unit features under a Gaussian of bandwidth 10."""
    kernel = functools.partial(gaussian_kernel, bandwidth=CMMD_BANDWIDTH)
    return CMMD_SCALE * unbiased_mmd(kernel, unit(features), unit(references))


def monge_distance(features: Tensor, references: Tensor) -> float:
    """MIND (Berthet et al. 2026): 3 D times the squared sliced 2-Wasserstein distance, over 1000 random directions.

    Of the larger set as many pictures are drawn as the smaller has. As torch-fidelity computes it.
    """
    ours, theirs = pooled(features).float(), pooled(references).float()
    count, width = min(len(ours), len(theirs)), ours.shape[1]
    generator = torch.Generator().manual_seed(MIND_SEED)
    ours, theirs = (
        side if len(side) == count else side[torch.randperm(len(side), generator=generator)[:count]]
        for side in (ours, theirs)
    )
    directions = unit(torch.randn(MIND_PROJECTIONS, width, generator=generator))
    ours, theirs = ((side @ directions.T).sort(dim=0).values for side in (ours, theirs))
    return 3 * width * (ours - theirs).square().mean().item()


DISTANCES: dict[str, Statistic] = {
    "fid": frechet_distance,
    "kid": kernel_distance,
    "cmmd": clip_discrepancy,
    "mind": monge_distance,
}


BIASED = ("fid", "mind")  # by the number of pictures, and by another amount for each system (Chong and Forsyth 2020)


def cannot_be_had(name: str, features: Tensor, references: Tensor) -> str | None:
    """Why a distance of DISTANCES says nothing of these sets, (N, V, D) and (M, V, D): a number would say more about
    their count than about the pictures. None where it can be had."""
    pictures = min(math.prod(side.shape[:2]) for side in (features, references))
    fewest = {"fid": features.shape[-1] + 1, "mind": FEWEST_FOR_MIND}.get(name, 2)
    if pictures < fewest:
        return too_few(name, pictures, fewest)
    textures = min(len(features), len(references))
    return too_few(name, textures, 2, "textures") if textures < 2 else None


def half_samples(features: Tensor) -> int:
    """How many are drawn for an interval: fewer of wide features, whose distances take seconds."""
    return HALVES if features.shape[-1] <= WIDE else HALVES // 5


def set_distances(
    features: Tensor, references: Tensor, names: Iterable[str] = DISTANCES, seed: int = 0, repeats: int | None = None
) -> dict[str, Figure | str]:
    """Distances of DISTANCES between the renders of two sets, with intervals over textures: a name → a Figure, or how
    many pictures it needs. features, references: (N, V, D) and (M, V, D) of one extractor."""
    figures: dict[str, Figure | str] = {}
    for name in names:
        distance, reason = DISTANCES[name], cannot_be_had(name, features, references)
        if reason is None:
            value = distance(features, references)
            drawn = repeats or half_samples(features)
            figures[name] = set_figure(value, distance, features, references, seed, drawn)
        else:
            figures[name] = reason
    return figures
