"""Whether a texture is one that the body can wear: seams, bleeding, holes, mirrored halves, sharpness, baked light.

No agreed measure of UV consistency exists in the field; these are ours, defined in docs/metrics.md. Each takes a body
and a texture (3, S, S) in [0, 1] as it was written, not filled outside the islands, and gives a number, NaN where it
cannot be measured on that texture. What they need of the body is worked out once.
"""

import functools
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from evaluation.uncertainty import too_few
from render import seams
from render.bodies import Body, vertex_normals
from render.rasteriser import interpolate, rasterize_uv
from render.uv_space import mirrored_texels

LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue (Rec. 709), on the values as they are stored
SMALLEST_STEP = 0.5 / 255  # no 8-bit texture differs by less
DIFFERENT_COLOURS = 0.25  # distance in RGB from which on a foreign colour is told from the island's own
FEWEST_BORDER_TEXELS = 100
SAME_COLOUR = 2.5 / 255
FALSE_ALARMS = 0.05  # share of the references in which a class of defects may be seen

# The four defect classes of textures in 3D-DefectBench (2026), by the measures that see them; a measure counts where
# it is above the references' usual range, or below it.
DEFECTS: dict[str, tuple[tuple[str, str], ...]] = {
    "blurry or noisy": (("sharpness", "below"), ("sharpness", "above"), ("noise", "above")),
    "misplaced or overlapping": (
        ("seam_error", "above"),
        ("bleeding_background", "above"),
        ("bleeding_islands", "above"),
    ),
    "baked-in light": (("baked_light", "above"),),
    "wrong attributes": (),
}


def luminance(texture: Tensor) -> Tensor:
    """(3, ...) → (...)."""
    return torch.einsum("c...,c->...", texture, texture.new_tensor(LUMINANCE))


# Seams.


@functools.lru_cache(maxsize=2)
def _edge_texels(body: Body, size: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Pairs of points a texel inside either side of the seams, and of the other edges: for each of two sides the four
    texels (N, 4) around a point and their weights (N, 4)."""
    kinds = []
    for sides in seams.edge_pairs(body):
        points = seams.samples(sides, size, 1.0)
        kinds.append([tuple(map(torch.from_numpy, seams.bilinear(points[:, side], size))) for side in range(2)])
    return kinds[0], kinds[1]


def _mean_jump(texture: Tensor, sides: list[tuple[Tensor, Tensor]]) -> float:
    """Mean absolute difference of the colours of the paired points, over RGB."""
    flat = texture.flatten(1).double()
    left, right = ((flat[:, index] * weights).sum(-1) for index, weights in sides)
    return (left - right).abs().mean().item()


def seam_jump(body: Body, texture: Tensor) -> float:
    """Mean colour difference across seams, in [0, 1]; NaN for a body without seams."""
    across_seams, _ = _edge_texels(body, texture.shape[-1])
    return _mean_jump(texture, across_seams) if len(across_seams[0][0]) else math.nan


def seam_error(body: Body, texture: Tensor) -> float:
    """The colour difference across seams over that across all other edges of the mesh: 1 where no seam can be seen.

    The same as `render.seams.seam_error`, but that what lies below is half an 8-bit step at least, so that a texture of
    flat islands has a finite error.
    """
    _, across_others = _edge_texels(body, texture.shape[-1])
    return seam_jump(body, texture) / max(SMALLEST_STEP, _mean_jump(texture, across_others))


# Islands, and what bleeds into them.


@functools.lru_cache(maxsize=4)
def islands(body: Body, size: int) -> Tensor:
    """Which UV island each texel lies on → (size, size) int64, -1 outside.

    Triangles that share a texture coordinate are of one island.
    """
    corners = body.uv_faces.numpy()
    links = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]]])
    graph = coo_matrix((np.ones(len(links)), links.T), shape=(len(body.uvs), len(body.uvs)))
    numbers = connected_components(graph, directed=False)[1]
    fragments = rasterize_uv(body, size)
    return fragments.dense(torch.from_numpy(numbers[corners[:, 0]]).long()[fragments.face], -1)[0]


@functools.lru_cache(maxsize=2)
def _borders(body: Body, size: int) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Border texels, what lies farther in, and what lies beyond.

    → interior: (S, S) bool, texels that are no border; and for "background" and "islands" flat indices (K,) of border
    texels, of their own island's nearest interior texels, and of the nearest texels outside, or of another's interior.
    """
    labels, reach = islands(body, size).numpy(), border_reach(size)
    is_edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        changes = np.diff(labels, axis=axis) != 0
        for before in (0, 1):  # the texels on both sides of a change
            is_edge |= np.pad(changes, [(before, 1 - before) if axis == side else (0, 0) for side in (0, 1)])
    depth = distance_transform_edt(~is_edge)
    interior = (labels >= 0) & (depth >= reach)
    border = np.flatnonzero((labels >= 0) & (depth < reach))
    own, _ = _nearest(interior)
    border = border[labels.flat[own[border]] == labels.flat[border]]  # none on islands that are border all over

    outside, distance = _nearest(labels < 0)
    near_background = border[distance[border] <= 4 * reach]
    near_islands, beyond = [border[:0]], [border[:0]]
    for label in np.unique(labels.flat[border]):
        of_others, distance = _nearest(interior & (labels != label))
        near = border[(labels.flat[border] == label) & (distance[border] <= 8 * reach)]
        near_islands.append(near)
        beyond.append(of_others[near])
    near_islands = np.concatenate(near_islands)
    pairs = {
        "background": (near_background, own[near_background], outside[near_background]),
        "islands": (near_islands, own[near_islands], np.concatenate(beyond)),
    }
    return torch.from_numpy(interior), {name: tuple(map(torch.from_numpy, pair)) for name, pair in pairs.items()}


def border_reach(size: int) -> int:
    """How far from an island's edge its border goes, in texels."""
    return max(2, size // 128)


def _nearest(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every texel the flat index of the nearest one in mask and its distance, (S * S,) each; inf without any."""
    if not mask.any():
        return np.zeros(mask.size, int), np.full(mask.size, np.inf)
    distance, (row, column) = distance_transform_edt(~mask, return_indices=True)
    return (row * mask.shape[1] + column).ravel(), distance.ravel()


def _inner_colours(body: Body, texture: Tensor) -> Tensor:
    """Of each interior texel the mean over the interior texels in a window of `border_reach` to either side, so that
    grain does not count → (3, S * S)."""
    size = texture.shape[-1]
    interior, _ = _borders(body, size)
    reach, weight = border_reach(size), interior.to(texture)[None]
    sums, window = torch.cat([texture * weight, weight]), 2 * border_reach(size) + 1
    for kernel, padding in (((1, window), (0, reach)), ((window, 1), (reach, 0))):  # first along rows, then columns
        sums = F.avg_pool2d(sums, kernel, stride=1, padding=padding)
    return (sums[:-1] / sums[-1:].clamp(min=1e-8)).flatten(1)


def _share_towards(colours: Tensor, own: Tensor, foreign: Tensor) -> float:
    """How far colours have gone from their own to foreign ones, (3, K) each: 0 not, 1 all the way.

    The mean of (c - p).(f - p) / |f - p|^2, within [-1, 1], where f differs from p enough; NaN where next to none does.
    """
    step, way = colours - own, foreign - own
    length = way.square().sum(0)
    differs = length > DIFFERENT_COLOURS**2
    if differs.sum() < FEWEST_BORDER_TEXELS:
        return math.nan
    return ((step * way).sum(0)[differs] / length[differs]).clamp(-1, 1).mean().item()


def _background_colour(texture: Tensor, mask: Tensor) -> Tensor | None:
    """The one colour (3, 1) outside the islands, or None where there are several, as in a filled texture."""
    outside = texture[:, ~mask]
    if not outside.numel():
        return None
    colour = outside.median(1).values[:, None]
    is_it = (outside - colour).abs().amax(0) <= SAME_COLOUR
    return colour if is_it.float().mean() > 0.9 else None


def bleeding_background(body: Body, texture: Tensor) -> float:
    """Of the colour outside the islands into their borders; NaN where there is no one such colour."""
    size = texture.shape[-1]
    colour = _background_colour(texture, islands(body, size) >= 0)
    if colour is None:
        return math.nan
    border, own, _ = _borders(body, size)[1]["background"]
    return _share_towards(texture.flatten(1)[:, border], _inner_colours(body, texture)[:, own], colour)


def bleeding_islands(body: Body, texture: Tensor) -> float:
    """Of the nearest other island's colour into borders; NaN where neighbours are of one colour."""
    border, own, beyond = _borders(body, texture.shape[-1])[1]["islands"]
    inner = _inner_colours(body, texture)
    return _share_towards(texture.flatten(1)[:, border], inner[:, own], inner[:, beyond])


def fill(body: Body, texture: Tensor) -> float:
    """The share of the mask that is not of the background's colour; NaN where there is no one such colour."""
    mask = islands(body, texture.shape[-1]) >= 0
    colour = _background_colour(texture, mask)
    if colour is None:
        return math.nan
    return ((texture[:, mask] - colour).abs().amax(0) > SAME_COLOUR).float().mean().item()


# Halves.


def mirror_difference(body: Body, texture: Tensor) -> float:
    """Mean absolute difference between the body's left and right half, over RGB; NaN for a body without such halves."""
    left, right = mirrored_texels(body, texture.shape[-1])
    if len(left) < 0.5 * len(rasterize_uv(body, texture.shape[-1]).pixel):
        return math.nan
    flat = texture.flatten(1)
    return (flat[:, left] - flat[:, right]).abs().mean().item()


# Sharpness and noise.


def gradient_energy(body: Body, texture: Tensor) -> float:
    """Mean squared difference of luminance between neighbouring texels of one island."""
    bright, labels = luminance(texture), islands(body, texture.shape[-1])
    squares = []
    for axis in (0, 1):
        ahead = labels.narrow(axis, 1, len(labels) - 1)
        same = (ahead == labels.narrow(axis, 0, len(labels) - 1)) & (ahead >= 0)
        squares.append(bright.diff(dim=axis)[same].square())
    values = torch.cat(squares)
    return values.mean().item() if len(values) else math.nan


def noise(body: Body, texture: Tensor) -> float:
    """The standard deviation of white noise in the luminance, from what a second difference both ways leaves (Immerkaer
    1996), in windows that lie on one island."""
    labels = islands(body, texture.shape[-1]).float()[None]
    whole = (F.max_pool2d(labels, 3, stride=1) == -F.max_pool2d(-labels, 3, stride=1)) & (labels[:, 1:-1, 1:-1] >= 0)
    if not whole.any():
        return math.nan
    kernel = texture.new_tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]])
    left = F.conv2d(luminance(texture)[None, None], kernel[None, None])[0]
    return math.sqrt(math.pi / 2) / 6 * left[whole].abs().mean().item()


# Light.


@functools.lru_cache(maxsize=2)
def _light_basis(body: Body, size: int) -> Tensor:
    """Orthonormal functions (K, up to 9) on the covered texels that span the spherical harmonics up to the second order
    of the surface normal, which hold any distant light on a matt surface to 1 % (Ramamoorthi and Hanrahan 2001)."""
    fragments = rasterize_uv(body, size)
    normals = interpolate(fragments, body.faces, vertex_normals(body.vertices, body.faces))
    x, y, z = F.normalize(normals, dim=-1).double().unbind(-1)
    polynomials = torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, z * x, x * x, y * y], dim=-1)
    basis, scales, _ = torch.linalg.svd(polynomials, full_matrices=False)
    return basis[:, scales > 1e-6 * scales[0]]  # a box has six normals, and fewer functions of them


def baked_light(body: Body, texture: Tensor) -> float:
    """The share of the luminance's variance over the mask that low-order harmonics of the normal explain (R^2 of least
    squares), in [0, 1]; 0 for a flat texture."""
    size = texture.shape[-1]
    bright = luminance(texture).flatten()[rasterize_uv(body, size).pixel].double()
    bright = bright - bright.mean()
    variance = bright.square().sum().item()
    if variance < len(bright) * SMALLEST_STEP**2:
        return 0.0
    return (_light_basis(body, size).T @ bright).square().sum().item() / variance


MEASURES: dict[str, Callable[[Body, Tensor], float]] = {
    "seam_error": seam_error,
    "seam_jump": seam_jump,
    "bleeding_background": bleeding_background,
    "bleeding_islands": bleeding_islands,
    "fill": fill,
    "mirror_difference": mirror_difference,
    "gradient_energy": gradient_energy,
    "noise": noise,
    "baked_light": baked_light,
}


_ONE_BACKGROUND = "needs textures with one colour outside the islands; these are filled, or have several there"
# Of each measure that may be NaN: what not one of the textures had.
NEEDED = {
    "seam_error": "needs a body with seams",
    "seam_jump": "needs a body with seams",
    "bleeding_background": f"{_ONE_BACKGROUND}, or are of that colour",
    "bleeding_islands": f"needs {FEWEST_BORDER_TEXELS} texels on borders whose nearest island has another colour",
    "fill": _ONE_BACKGROUND,
    "mirror_difference": "needs a body whose left half mirrors its right",
    "gradient_energy": "needs islands of two texels and more",
    "noise": "needs islands of three by three texels and more",
    "baked_light": "needs a body that covers texels",
}


def consistency(body: Body, textures: Iterable[Tensor]) -> dict[str, Tensor]:
    """Every measure of MEASURES: its name → a value a texture, (N,), NaN where it cannot be measured on that one.

    textures: (3, S, S) in [0, 1] each, as written; one at a time, so that memory stays the same for any N.
    """
    rows = [[measure(body, texture) for measure in MEASURES.values()] for texture in textures]
    columns = torch.tensor(rows, dtype=torch.float64).view(-1, len(MEASURES)).unbind(1)
    return dict(zip(MEASURES, columns))


def sharpness(energies: Tensor, reference_energies: Tensor | None) -> Tensor | str:
    """`gradient_energy` of N textures over the references' mean: 1 is as sharp, less blurred, more noisy or finer."""
    if reference_energies is None or not (mean := reference_energies.nanmean().item()) > 0:
        return "sharpness needs reference textures that are not flat"
    return energies / mean


def defects(measures: dict[str, Tensor], references: dict[str, Tensor] | None) -> dict[str, Tensor | str]:
    """Which textures have a defect of each class of DEFECTS → a class → (N,) of 0 and 1, or why it cannot be told.

    measures, references: of `consistency`, of N textures and of M true ones. A texture has a defect where one of the
    class's measures lies outside the references' usual range, which FALSE_ALARMS of the references at most leave; a
    measure that cannot be taken on it does not count.
    """
    if references is None:
        return dict.fromkeys(DEFECTS, "defects need reference textures")
    ours, theirs = dict(measures), dict(references)
    ours["sharpness"], theirs["sharpness"] = measures["gradient_energy"], references["gradient_energy"]
    classes: dict[str, Tensor | str] = {}
    for name, signs in DEFECTS.items():
        if not signs:
            classes[name] = f"{name} needs the prompt: see the measures of what a texture was asked to show"
            continue
        fewest = math.ceil(len(signs) / FALSE_ALARMS)  # or no reference lies outside
        count = len(theirs[signs[0][0]])
        if count < fewest:
            classes[name] = too_few(name, count, fewest, "reference textures")
            continue
        outside = torch.zeros(len(ours[signs[0][0]]), dtype=torch.bool)
        for measure, side in signs:
            sign = 1 if side == "above" else -1
            usual = (sign * theirs[measure]).nanquantile(1 - FALSE_ALARMS / len(signs))
            outside |= sign * ours[measure] > usual  # never where either is NaN
        classes[name] = outside.double()
    return classes
