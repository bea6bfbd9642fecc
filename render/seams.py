"""UV seams: where they are, how much colours jump across them, and how to bring the two sides together.

A seam is an edge of the mesh whose two triangles have it in different places of the texture.
"""

import functools

import numpy as np
import torch
from scipy import sparse
from scipy.ndimage import distance_transform_edt
from scipy.sparse.linalg import cg
from torch import Tensor

from render.bodies import Body
from render.uv_space import uv_mask

REACH = 8  # texels from a seam that a correction may change
SMOOTHNESS = 0.02  # of the correction, against equal colours at the seam
HOLD = 10.0  # against equal colours, of leaving a texel that is held as it is


@functools.lru_cache(maxsize=4)
def edge_pairs(body: Body) -> tuple[np.ndarray, np.ndarray]:
    """The body's edges as they lie in the texture from the triangle on either side → seams (E, 2, 3, 2) and other
    edges (I, 2, 3, 2): two sides, each with the uv of both ends and of the corner across the edge."""
    faces, uv_faces, uvs = body.faces.numpy(), body.uv_faces.numpy(), body.uvs.numpy().astype(np.float64)
    ends = np.concatenate([faces[:, [a, b]] for a, b in ((0, 1), (1, 2), (2, 0))])
    corners = np.concatenate([uv_faces[:, [a, b, c]] for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1))])
    flipped = ends[:, 0] > ends[:, 1]
    ends[flipped] = ends[flipped, ::-1]
    corners[flipped] = corners[flipped][:, [1, 0, 2]]
    order = np.lexsort((ends[:, 1], ends[:, 0]))
    ends, corners = ends[order], corners[order]
    same = (ends[1:] == ends[:-1]).all(1)
    first = np.flatnonzero(same & ~np.r_[False, same[:-1]])  # an edge of three triangles is taken once
    sides = np.stack([uvs[corners[first]], uvs[corners[first + 1]]], axis=1)
    is_seam = np.abs(sides[:, 0, :2] - sides[:, 1, :2]).max((1, 2)) > 1e-6
    return sides[is_seam], sides[~is_seam]


def samples(sides: np.ndarray, size: int, inset: float) -> np.ndarray:
    """Points along each edge, about a texel apart, `inset` texels inside the triangle of each side.

    sides: (E, 2, 3, 2) → (N, 2, 2): texel coordinates x, y of both sides, of a size x size texture.
    """
    start, end, across = (sides[:, :, index] for index in range(3))
    length = np.linalg.norm(end - start, axis=-1).max(1) * size
    count = np.maximum(1, np.ceil(length)).astype(int)
    edge = np.repeat(np.arange(len(sides)), count)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    share = ((step + 0.5) / count[edge])[:, None, None]
    points = start[edge] * (1 - share) + end[edge] * share
    along = end[edge] - start[edge]
    inward = across[edge] - start[edge]
    along /= np.linalg.norm(along, axis=-1, keepdims=True) + 1e-12
    inward -= (inward * along).sum(-1, keepdims=True) * along
    height = np.linalg.norm(inward, axis=-1, keepdims=True)
    inward /= height + 1e-12
    points = points + inward * np.minimum(inset / size, height / 2)
    return np.stack([points[..., 0] * size - 0.5, (1 - points[..., 1]) * size - 0.5], axis=-1)


def bilinear(points: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Texels around points (N, 2) and their weights: (N, 4) flat indices, (N, 4)."""
    points = points.clip(0, size - 1)
    low = np.floor(points).astype(int).clip(0, size - 2)
    x, y = (points - low).T
    index = low[:, 1] * size + low[:, 0]
    weights = np.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y], axis=1)
    return np.stack([index, index + 1, index + size, index + size + 1], axis=1), weights


def differences(texture: np.ndarray, sides: np.ndarray, inset: float) -> np.ndarray:
    """Mean colour difference of each pair of samples. texture: (S, S, 3) → (N,)."""
    flat, size = texture.reshape(-1, texture.shape[-1]), len(texture)
    points = samples(sides, size, inset)
    left, right = (_blend(flat, *bilinear(points[:, side], size)) for side in range(2))
    return np.abs(left - right).mean(-1)


def _blend(flat: np.ndarray, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """flat: (S * S, C); index, weights: (N, 4), of `bilinear` → (N, C)."""
    return (flat[index] * weights[..., None]).sum(1)


def seam_error(body: Body, texture: Tensor) -> float:
    """How much more colours differ across seams than across other edges, a texel inside either side; 1 is no seam to
    be seen. texture: (3, S, S). nan for a body without seams."""
    pixels = texture.permute(1, 2, 0).numpy()
    seams, others = edge_pairs(body)
    if not len(seams):
        return float("nan")
    across_seams, across_others = (differences(pixels, sides, 1.0).mean() for sides in (seams, others))
    return float(across_seams / max(1e-9, across_others))


def seam_points(body: Body, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Points on both sides of the seams (N, 2, 2), as of `samples`, and the texels (S, S) that they are made of."""
    seams, _ = edge_pairs(body)
    points = np.concatenate([samples(seams, size, inset) for inset in (0.5, 1.0)])
    touched = np.zeros(size * size, bool)
    for side in range(2):
        touched[bilinear(points[:, side], size)[0]] = True
    return points, touched.reshape(size, size)


def field_gradient(number: np.ndarray, covered: np.ndarray, size: int) -> sparse.csr_matrix:
    """Differences between neighbours of a field on some texels of a size x size texture, and at its outer edge, where
    it is 0. number: (S * S,) the field's place of each texel, -1 outside; covered: (S * S,) bool, the islands."""
    inside, blocks = np.flatnonzero(number >= 0), []
    for offset in (1, size):
        here = inside[inside % size < size - 1] if offset == 1 else inside[inside < size * (size - 1)]
        here = here[covered[here + offset]]
        there = number[here + offset]
        is_on_field, row = there >= 0, np.arange(len(here))
        values = np.concatenate([np.ones(len(here)), -np.ones(is_on_field.sum())])
        rows = np.concatenate([row, row[is_on_field]])
        columns = np.concatenate([number[here], there[is_on_field]])
        blocks.append(sparse.csr_matrix((values, (rows, columns)), shape=(len(here), len(inside))))
        # The outer edge at the lower end of the difference.
        back = inside[inside - offset >= 0]
        back = number[back[covered[back - offset] & (number[back - offset] < 0)]]
        entries = (np.ones(len(back)), (np.arange(len(back)), back))
        blocks.append(sparse.csr_matrix(entries, shape=(len(back), len(inside))))
    return sparse.vstack(blocks)


def fix_seams(body: Body, texture: Tensor, held: Tensor | None = None) -> Tensor:
    """Brings the two sides of every seam to one colour; texels farther than REACH from a seam stay as they are.

    Adds to the texture the smooth field that minimises the squared differences between paired points on the two sides
    of the seams and SMOOTHNESS times its own squared gradient, and is 0 from REACH texels on (sparse least squares by
    conjugate gradients). Detail is moved up or down as a whole, never blurred. texture: (3, S, S) in [0, 1]. held:
    (S, S) in [0, 1], 1 where a texel is to stay, so that the other side comes to it.
    """
    seams, _ = edge_pairs(body)
    if not len(seams):
        return texture
    size = texture.shape[-1]
    points, touched = seam_points(body, size)
    (left, left_weights), (right, right_weights) = (bilinear(points[:, side], size) for side in range(2))
    covered = uv_mask(body, size).numpy() | touched
    band = (distance_transform_edt(~touched) < REACH - 1) & covered
    number = np.full(size * size, -1)
    number[band.ravel()] = np.arange(band.sum())
    rows = np.repeat(np.arange(len(points)), 8)
    columns = number[np.concatenate([left, right], axis=1)].ravel()
    values = np.concatenate([left_weights, -right_weights], axis=1).ravel()
    equal = sparse.csr_matrix((values, (rows, columns)), shape=(len(points), band.sum()))
    gradient = field_gradient(number, covered.ravel(), size)
    inside = np.flatnonzero(number >= 0)
    stays = np.full(len(inside), 1e-6)
    if held is not None:
        stays += HOLD * held.numpy().ravel()[inside]
    system = equal.T @ equal + SMOOTHNESS * gradient.T @ gradient + sparse.diags(stays)
    scale = sparse.diags(1 / system.diagonal())
    flat = texture.permute(1, 2, 0).double().numpy().reshape(-1, 3)
    jump = _blend(flat, right, right_weights) - _blend(flat, left, left_weights)
    fixed = flat.copy()
    for channel in range(3):
        field, _ = cg(system, equal.T @ jump[:, channel], rtol=1e-4, maxiter=400, M=scale)
        fixed[inside, channel] += field
    return torch.from_numpy(fixed.clip(0, 1).reshape(size, size, 3)).permute(2, 0, 1).to(texture.dtype)
