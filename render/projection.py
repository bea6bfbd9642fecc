"""Pictures of a body into its texture: which texel shows where in a picture, and in which colour.

A sighting is made from a fit (a posed body, a camera and, where known, the light), or from a map that says of each
pixel where on the resting body it lies. Pixels are in [-1, 1], pictures (3, H, W), textures (3, S, S).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F

from render.bodies import Body, vertex_normals
from render.cameras import Cameras
from render.lights import Lights, polynomial
from render.rasteriser import interpolate, rasterize, rasterize_uv
from render.uv_space import mirrored_texels

STEEPEST = 0.1  # cosine between a texel's normal and the way to the camera, below which it is not read
FINER = 2  # of a pixel's side: what lies in it is told by so many times as many rows and columns
JUMP = 10.0  # pixels' widths on the body between neighbours, from which on one hides what is behind it
EDGE = 0.01  # of a picture's height: so near to an edge of the body texels weigh less
FULL_WEIGHT = 0.02  # from which on a texel keeps the picture's colour altogether
NEIGHBOURS = 4  # pixels whose places on the body tell where a texel lies in the picture
REACH = 3.0  # of the usual way between neighbouring pixels on the body, from a texel to the nearest pixel
DARKEST = 0.05  # light that is divided out, at least
PAIR_STEPS = (3, 8)  # pixels between two places whose colours are compared to tell the light from the cloth
SMOOTH = 0.05  # of log colour: a difference this large between two places is half the cloth's
MIRROR_SHARE = 0.999  # of a weight that a mirrored texel keeps: what is seen itself goes first
CARRIED = 0.04  # metres on the body: so far from what is seen, the rest takes most of its correction
TURN = 0.03  # metres on the body, that a turn of the normal by a radian counts for
CARRIERS = 8  # seen texels that correct an unseen one
OUTLINE_SIDE = 256  # pixels of the picture's longer side, in which an outline is looked for
LEAST_OUTLINE = 60  # pixels of it
LEAST_CHANGE, MOST_CHANGE = 0.15, 1.0  # of a colour in [-1, 1] across an outline: to be one, and that counts
BETTER = 1.1  # times the change across a fit's own outline, for which it is moved
OFF = 0.03  # of a picture's height, by which the outline of a fit may be off
ALIKE = 0.25  # between two colours in [-1, 1]: these may be one surface
CLIPPED = 254 / 255  # colours from here on may have been brighter


@dataclass(frozen=True)
class Fit:
    """How a body stands in a picture. vertices: (V, 3) posed; cameras: one; lights: the picture's, None if unknown."""

    vertices: Tensor
    cameras: Cameras
    lights: Lights | None = None


@dataclass(frozen=True)
class Sighting:
    """Where a picture of height x width shows K texels of a size x size texture.

    texel: (K,) int64 row * size + column. x, y: (K,) pixels, a pixel's centre at 0.5. weight: (K,) in (0, 1], how well
    it is seen. normal: (K, 3) unit. light: (K, 3) that falls there, None if unknown. is_pure: (height, width) bool,
    pixels that show nothing but the body, and no two places of it.
    """

    size: int
    texel: Tensor
    x: Tensor
    y: Tensor
    weight: Tensor
    normal: Tensor
    light: Tensor | None
    is_pure: Tensor

    def take(self, index: Tensor) -> "Sighting":
        """The texels that index (M,) names, or a mask (K,)."""
        chosen = (getattr(self, name)[index] for name in ("texel", "x", "y", "weight", "normal"))
        light = None if self.light is None else self.light[index]
        return Sighting(self.size, *chosen, light, self.is_pure)

    def lit(self, light: Tensor) -> "Sighting":
        """The same in a light (K, 3)."""
        return replace(self, light=light)


def aligned(body: Body, fit: Fit, picture: Tensor) -> Fit:
    """The fit, moved and zoomed across the picture (3, H, W) so that its outline lies where colours change.

    A fit that lies there already, or finds no clearly better place nearby, stays as it is: to the bit.
    """
    height, width = (round(side * OUTLINE_SIDE / max(picture.shape[1:])) for side in picture.shape[1:])
    small = F.interpolate(picture[None], size=(height, width), mode="bilinear", antialias=True)
    mask = rasterize(fit.vertices, body.faces, fit.cameras, height, width).mask.float()[None]
    down, across = torch.gradient(F.avg_pool2d(mask, 5, 1, 2)[0, 0])
    inner = (mask[0, 0] > 0) & (F.max_pool2d(1 - mask, 3, 1, 1)[0, 0] > 0)
    row, column = inner.nonzero(as_tuple=True)
    if len(row) < LEAST_OUTLINE:
        return fit
    outward = -F.normalize(torch.stack([across[row, column], down[row, column]], dim=1), dim=1) * 2  # pixels
    middle, size = torch.tensor([width / 2, height / 2]), torch.tensor([width, height])
    outline = torch.stack([column, row], dim=1) + 0.5 - middle

    def contrast(moves: Tensor) -> Tensor:
        """moves: (M, 3) of zoom - 1 and pixels right and down → how much colours change across the outline, (M,)."""
        places = outline * (1 + moves[:, None, :1]) + moves[:, None, 1:] + middle
        sides = [
            F.grid_sample(small, ((places + offset) * 2 / size - 1)[None], padding_mode="border", align_corners=False)
            for offset in (outward, -outward)
        ]
        change = (sides[0] - sides[1])[0].norm(dim=0).clamp(max=MOST_CHANGE)  # (M, outline)
        is_inside = ((places > 2) & (places < size - 2)).all(-1)
        return (change * is_inside).sum(1) / is_inside.sum(1).clamp(min=LEAST_OUTLINE)

    best = torch.zeros(1, 3)
    as_told = contrast(best)[0]
    for reach, zoom, steps in ((0.06 * height, 0.06, 13), (0.01 * height, 0.01, 7), (0.003 * height, 0.004, 5)):
        shifts, zooms = torch.linspace(-reach, reach, steps), torch.linspace(-zoom, zoom, min(steps, 7))
        moves = best + torch.cartesian_prod(zooms, shifts, shifts)
        best = moves[contrast(moves).argmax()][None]
    if contrast(best)[0] < max(BETTER * as_told, LEAST_CHANGE):
        return fit
    zoom, *shift = best[0].tolist()
    focal = fit.cameras.focal * (1 + zoom)
    depth = (fit.vertices @ fit.cameras.rotation[0].T + fit.cameras.translation[0])[:, 2].mean()
    metres = torch.tensor([*shift, 0.0]) * depth / (focal * height)
    return replace(fit, cameras=Cameras(fit.cameras.rotation, fit.cameras.translation + metres, focal))


def sight_fit(body: Body, fit: Fit, height: int, width: int, size: int) -> Sighting:
    """The texels that the fitted camera sees: in the picture, turned towards it, nothing before them."""
    fragments = rasterize_uv(body, size)
    normals = vertex_normals(fit.vertices, body.faces)
    position = interpolate(fragments, body.faces, fit.vertices)
    normal = F.normalize(interpolate(fragments, body.faces, normals), dim=-1)
    light = None if fit.lights is None else interpolate(fragments, body.faces, fit.lights.at(normals)[0])
    eye = -(fit.cameras.rotation[0].T @ fit.cameras.translation[0])
    cosine = (normal * F.normalize(eye - position, dim=-1)).sum(-1)
    x, y, depth = fit.cameras.project(position, height, width)[0].unbind(-1)
    is_near = (cosine > STEEPEST) & (depth > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)

    shown = rasterize(fit.vertices, body.faces, fit.cameras, height * FINER, width * FINER)
    # Where a place is in the picture and on the resting body: a hand before the trunk is far from it in one of the two.
    places = torch.cat([fit.vertices, body.vertices], dim=1) / 2**0.5
    surface = shown.dense(interpolate(shown, body.faces, places), torch.inf)[0]  # (2H, 2W, 6)
    footprint = shown.dense(shown.depth, torch.inf)[0] / (fit.cameras.focal[0] * height * FINER)  # metres
    edges = _edges(surface, footprint).unflatten(1, (width, FINER)).unflatten(0, (height, FINER))
    is_edge = edges.any(3).any(1)

    kept = is_near.nonzero()[:, 0]
    finer = (y[kept] * FINER).long(), (x[kept] * FINER).long()
    own = interpolate(fragments, body.faces, places)[kept]
    gap = (surface[finer] - own).norm(dim=-1)
    is_shown = gap < 1.5 * footprint[finer] / cosine[kept]
    weight = cosine[kept] ** 2 * _away_from_edges(is_edge, x[kept], y[kept])
    sighting = Sighting(
        size, fragments.pixel[kept], x[kept], y[kept], weight, normal[kept], None if light is None else light[kept],
        ~is_edge & surface[::FINER, ::FINER].isfinite().all(-1),
    )  # fmt: skip
    return sighting.take(is_shown & (weight > 0))


def _edges(surface: Tensor, footprint: Tensor) -> Tensor:
    """Pixels (H, W) on either side of the body's outline, or of a limb before the rest of it; those at the picture's
    edge are none. surface: (H, W, C) metres, inf beside the body; footprint: (H, W) metres."""
    is_body = surface.isfinite().all(-1)
    is_edge = torch.zeros_like(is_body)
    for axis in (0, 1):
        length = surface.shape[axis] - 1
        here, there = (surface.narrow(axis, start, length) for start in (0, 1))
        reach = JUMP * torch.maximum(*(footprint.narrow(axis, start, length) for start in (0, 1)))
        whole = is_body.narrow(axis, 0, length) & is_body.narrow(axis, 1, length)
        either = is_body.narrow(axis, 0, length) | is_body.narrow(axis, 1, length)
        jumps = either & ~(whole & ((here - there).norm(dim=-1) < reach))
        for start in (0, 1):
            is_edge.narrow(axis, start, length).logical_or_(jumps)
    return is_edge


def _away_from_edges(is_edge: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How far pixels x, y (K,) are from an edge of is_edge (H, W), in [0, 1]: 1 from EDGE of the height on."""
    ways = torch.from_numpy(distance_transform_edt(~is_edge.numpy())).float()
    return (ways[y.long(), x.long()] / (EDGE * len(is_edge))).clamp(max=1)


def sight_map(body: Body, positions: Tensor, is_body: Tensor, size: int) -> Sighting:
    """The texels that a map of a picture shows. positions: (H, W, 3) metres on the resting body; is_body: (H, W) bool.

    A texel lies between the pixels whose places on the body are nearest to its own, as far as they are near at all.
    Normals are those of the resting body.
    """
    fragments = rasterize_uv(body, size)
    rest = interpolate(fragments, body.faces, body.vertices)
    normal = F.normalize(interpolate(fragments, body.faces, vertex_normals(body.vertices, body.faces)), dim=-1)
    surface = torch.where(is_body[..., None], positions, torch.inf)
    row, column = is_body.nonzero(as_tuple=True)
    steps = [(surface[:, 1:] - surface[:, :-1]).norm(dim=-1), (surface[1:] - surface[:-1]).norm(dim=-1)]
    steps = torch.cat([step[step.isfinite()] for step in steps])
    usual = steps.median().item() if len(steps) else 0.0
    is_edge = _edges(surface, torch.full(is_body.shape, usual))
    pure = (~is_edge)[row, column].nonzero()[:, 0]
    row, column = row[pure], column[pure]
    count = min(NEIGHBOURS, len(pure))
    if not count:
        none = torch.empty(0)
        return Sighting(size, none.long(), none, none, none, none.view(0, 3), None, ~is_edge & is_body)
    distance, nearest = cKDTree(surface[row, column].numpy()).query(rest.numpy(), k=count, workers=1)
    distance = torch.from_numpy(distance).float().view(-1, count)
    nearest = torch.from_numpy(nearest).view(-1, count)
    shares = 1 / (distance + 0.05 * usual + 1e-9)
    shares = shares / shares.sum(1, keepdim=True)
    # Of the nearest ones, those beside the very nearest in the picture too: the others are of another limb.
    rows, columns = row[nearest].float(), column[nearest].float()
    is_beside = ((rows - rows[:, :1]).abs() <= 3) & ((columns - columns[:, :1]).abs() <= 3)
    shares = shares * is_beside / (shares * is_beside).sum(1, keepdim=True)
    x, y = ((shares * pixel).sum(1) + 0.5 for pixel in (columns, rows))
    weight = _away_from_edges(is_edge, x, y) * (1 - distance[:, 0] / (REACH * usual + 1e-9)).clamp(min=0)
    sighting = Sighting(size, fragments.pixel, x, y, weight, normal, None, ~is_edge & is_body)
    return sighting.take(weight > 0)


def looks_like_background(picture: Tensor, is_body: Tensor) -> Tensor:
    """Pixels (H, W) near the body's outline that are of the colour beside it and not of the colour within, as where a
    fit stands a little off. picture: (3, H, W) in [-1, 1]; is_body: (H, W) bool, by the fit."""
    band = max(2.0, OFF * len(is_body))
    depth = distance_transform_edt(np.pad(is_body.numpy(), 1, mode="edge"))[1:-1, 1:-1]
    within, beside = depth > band, distance_transform_edt(~is_body.numpy()) > band
    if not within.any() or not beside.any():
        return torch.zeros_like(is_body)

    def unlike(places: np.ndarray) -> Tensor:
        """How far each pixel's colour is from that of the nearest of these places."""
        row, column = distance_transform_edt(~places, return_distances=False, return_indices=True)
        return (picture - smooth[:, torch.from_numpy(row).long(), torch.from_numpy(column).long()]).norm(dim=0)

    smooth = F.avg_pool2d(picture, 5, stride=1, padding=2, count_include_pad=False)
    near = is_body & torch.from_numpy(depth <= band)
    as_beside, as_within = unlike(beside), unlike(within)
    return near & (as_beside < ALIKE) & (as_beside < 0.5 * as_within)


def read_colours(picture: Tensor, sighting: Sighting) -> Tensor:
    """picture: (3, H, W) → the texels' colours (K, 3): bilinear, from pure pixels alone, and where pixels are finer
    than texels from the mean of those that a texel covers; NaN where no pixel is pure."""
    x, y = sighting.x, sighting.y
    is_pure = (sighting.is_pure & ~looks_like_background(picture, sighting.is_pure))[None].float()
    beside = (sighting.texel.diff() == 1).nonzero()[:, 0]
    step = torch.hypot(x.diff()[beside], y.diff()[beside])
    coarser = max(1, int(step.median())) if len(step) else 1
    carried = torch.cat([picture * is_pure, is_pure])[None]
    if coarser > 1:
        carried = F.avg_pool2d(carried, coarser, ceil_mode=True, count_include_pad=False)
        x, y = x / coarser, y / coarser
    height, width = carried.shape[-2:]
    grid = torch.stack([x * 2 / width - 1, y * 2 / height - 1], dim=-1)
    sampled = F.grid_sample(carried, grid[None, None], padding_mode="border", align_corners=False)[0, :, 0]
    return torch.where(sampled[3] > 0.1, sampled[:3] / sampled[3], torch.nan).T


def estimate_light(colours: Tensor, sighting: Sighting) -> Tensor:
    """The light (K, 3) on what a picture shows, from its colours (K, 3) in [0, 1] alone, its geometric mean 1.

    Its logarithm is a polynomial of the normal up to the second order (as `Lights`): of places a few pixels apart, the
    cloth is mostly one, and what their colours differ by follows their normals. Least squares, reweighted so that
    edges of the cloth count little (Geman and McClure 1985).
    """
    basis, logs = polynomial(sighting.normal)[:, 1:], (colours + 0.02).log()
    height, width = sighting.is_pure.shape
    at = torch.full((height, width), -1)
    at[sighting.y.long().clamp(0, height - 1), sighting.x.long().clamp(0, width - 1)] = torch.arange(len(logs))
    pairs = []
    for step in PAIR_STEPS:
        for first, second in ((at[:, :-step], at[:, step:]), (at[:-step], at[step:])):
            both = (first >= 0) & (second >= 0)
            pairs.append(torch.stack([first[both], second[both]]))
    first, second = torch.cat(pairs, dim=1)
    if len(first) < 100:
        return torch.ones_like(colours)
    slopes, jumps = (basis[first] - basis[second]).double(), (logs[first] - logs[second]).double()
    ridge = 1e-3 * len(first) * slopes.square().mean() * torch.eye(slopes.shape[1], dtype=torch.float64)
    shares, light = torch.ones(len(jumps), dtype=torch.float64), None
    for _ in range(10):
        weighted = slopes * shares[:, None]
        light = torch.linalg.solve(weighted.T @ slopes + ridge, weighted.T @ jumps)
        misfit = (jumps - slopes @ light).norm(dim=1)
        shares = 1 / (1 + (misfit / SMOOTH) ** 2) ** 2
    logs = basis.double() @ light
    return (logs - logs.mean(0)).exp().float()


def sureness(weight: Tensor) -> Tensor:
    """How far texels seen with these weights keep the picture's colour, in [0, 1]."""
    return (weight / FULL_WEIGHT).clamp(max=1)


def merge(
    body: Body, pictures: Sequence[Tensor], sightings: Sequence[Sighting], relight: bool = True, mirror: bool = False
) -> tuple[Tensor, Tensor]:
    """What pictures (3, H, W) in [-1, 1] of one person show of the texture → colours (3, S, S) in [-1, 1], 0 where
    nothing is seen, and how sure they are, (S, S) in [0, 1].

    A texel takes the mean of the pictures' colours by their weights. relight: the light is divided out, estimated where
    a fit does not say it. mirror: a texel that no picture shows takes the colour of its mirror image.
    """
    size = sightings[0].size
    total, weights = torch.zeros(size * size, 3), torch.zeros(size * size)
    for picture, sighting in zip(pictures, sightings):
        colours = (read_colours(picture, sighting) + 1) / 2
        kept = colours.isfinite().all(1)
        colours, sighting = colours[kept], sighting.take(kept)
        weight = sighting.weight
        if relight and len(colours):
            light = estimate_light(colours, sighting) if sighting.light is None else sighting.light
            weight = weight * torch.where((colours > CLIPPED).any(1) & (light > 1).any(1), 0.1, 1.0)
            colours = (colours / light.clamp(min=DARKEST)).clamp(0, 1)
        total[sighting.texel] += colours * weight[:, None]
        weights[sighting.texel] += weight
    if mirror:
        texel, mirrored = mirrored_texels(body, size)
        hidden = (weights[texel] < FULL_WEIGHT) & (weights[mirrored] > weights[texel])
        texel, mirrored = texel[hidden], mirrored[hidden]
        total[texel], weights[texel] = total[mirrored] * MIRROR_SHARE, weights[mirrored] * MIRROR_SHARE
    colours = (total / weights.clamp(min=1e-9)[:, None]).T.view(3, size, size)
    sure = sureness(weights).view(size, size)
    return torch.where(sure > 0, colours * 2 - 1, 0), sure


def blend_in(body: Body, texture: Tensor, colours: Tensor, sure: Tensor) -> Tensor:
    """A generated texture (3, S, S) whose unseen texels are corrected as their nearest seen ones on the body would be,
    less and less with the distance, so that no outline of what was seen shows. colours, sure: of `merge`, at S."""
    fragments = rasterize_uv(body, texture.shape[-1])
    seen = (sure.flatten()[fragments.pixel] > 0.5).nonzero()[:, 0]
    if len(seen) < CARRIERS:
        return texture
    position = interpolate(fragments, body.faces, body.vertices)
    normal = interpolate(fragments, body.faces, vertex_normals(body.vertices, body.faces))
    places = torch.cat([position, TURN * normal], dim=1).numpy()
    distance, nearest = cKDTree(places[seen.numpy()]).query(places, k=CARRIERS)
    distance, nearest = torch.from_numpy(distance).float(), torch.from_numpy(nearest)
    flat = texture.flatten(1).clone()
    missing = (colours.flatten(1) - flat)[:, fragments.pixel[seen]]  # (3, seen)
    shares = 1 / (distance + 0.005)
    carried = (missing[:, nearest] * shares).sum(-1) / shares.sum(-1)
    flat[:, fragments.pixel] += carried * (-distance[:, 0] / CARRIED).exp()
    return flat.view_as(texture)
